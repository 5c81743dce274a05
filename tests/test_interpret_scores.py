"""Scores of every edge against plain computations on small models in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import kanformer
from interpret_cases import contributions, mean_loss, texts, tiny, watch
from kanformer.errors import ConfigError, DataError, NoFeedForwardError
from kanformer.interpret.scoring.edges import SCORES
from kanformer.layers import KANFeedForward

CASES = [("gpt2", "full"), ("gpt2", "shared"), ("llama", "full"), ("llama", "shared")]


def blocks_of(model) -> dict[str, KANFeedForward]:
    return {path: module for path, module in model.named_modules() if isinstance(module, KANFeedForward)}


def maps_of(block) -> list[str]:
    names = ["kan_up", "kan_gate", "kan_down"] if block.edges == "full" else ["kan_down"]
    return [name for name in names if getattr(block, name) is not None]


def plain(model, path, batches, name):
    """(contributions (tokens, out, in), outputs, gradients of the mean loss) of a map, padding left out."""
    block = model.get_submodule(path)
    inputs, outputs, handles = watch(block, [name])
    mean_loss(model, batches).backward()
    for handle in handles:
        handle.remove()
    keep = [batch["attention_mask"] != 0 for batch in batches]
    x, y, g = (
        torch.cat([value[mask] for value, mask in zip(values, keep, strict=True)])
        for values in (inputs[name], [o.detach() for o in outputs[name]], [o.grad for o in outputs[name]])
    )
    return contributions(block, name, x).detach(), y, g


@pytest.mark.parametrize(("kind", "edges"), CASES)
def test_scores_are_what_they_are_called(kind, edges):
    model, batches = tiny(kind, edges=edges, grid_size=3), texts()
    stats = kanformer.collect(model, batches, scores="all")
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert stats.data.tokens == tokens and stats.data.loss == pytest.approx(float(mean_loss(model, batches).detach()), abs=1e-9)
    for path, block in blocks_of(model).items():
        for name in maps_of(block):
            phi, y, g = plain(copy.deepcopy(model), path, batches, name)
            found, output = stats[path].scores[name].values, stats[path].outputs[name]
            assert list(found) == list(SCORES) and all(value.dtype == torch.float64 for value in found.values())
            centred = phi - phi.mean(0)
            std = centred.square().mean(0).sqrt()
            torch.testing.assert_close(output.mean, y.mean(0))
            torch.testing.assert_close(output.variance, y.var(0, correction=0))
            rms = (g * stats.data.scored).square().mean(0).sqrt()
            torch.testing.assert_close(output.gradient_rms, rms)
            torch.testing.assert_close(found["std"], std, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(found["sens"], std * rms.unsqueeze(1), rtol=1e-6, atol=1e-9)
            share = (centred * (y - y.mean(0)).unsqueeze(2)).mean(0) / y.var(0, correction=0).unsqueeze(1)
            torch.testing.assert_close(found["share"], share, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found["share"].sum(1), torch.ones(len(share), dtype=torch.float64), rtol=0, atol=1e-6)
            torch.testing.assert_close(found["effect1"], -(centred * g.unsqueeze(2)).sum(0), rtol=1e-6, atol=1e-9)
            exact = {"rtol": 1e-6, "atol": 1e-9} if edges == "shared" else {"rtol": 0.1, "atol": 0.02 * float(std.mean())}  # full: on histogram nodes
            torch.testing.assert_close(found["l1"], phi.abs().mean(0), **exact)
            torch.testing.assert_close(found["range"], phi.amax(0) - phi.amin(0), **exact)


@pytest.mark.parametrize(("kind", "edges"), CASES)
def test_straightness_and_distance_from_the_start(kind, edges):
    model, batches = tiny(kind, edges=edges, grid_size=3), texts()
    stats = kanformer.collect(model, batches, scores=("nonlinearity", "nonbase", "delta"))
    path, block = next(iter(blocks_of(model).items()))
    reader = "kan_functions" if edges == "shared" else "kan_down"
    inputs, outputs, handles = watch(block, list(dict.fromkeys([reader, "kan_down"])))
    mean_loss(model, batches)
    for handle in handles:
        handle.remove()
    keep = [batch["attention_mask"] != 0 for batch in batches]
    x, y = (torch.cat([v[mask] for v, mask in zip(values, keep, strict=True)]).detach() for values in (inputs[reader], outputs["kan_down"]))
    found = stats[path].scores["kan_down"].values
    functions = block.kan_functions if edges == "shared" else block.kan_down
    for o, i in ((0, 0), (3, 5), (7, 11)):
        base = functions.base(x)[:, i]
        if edges == "shared":
            curve, weight = functions(x)[:, i].detach(), float(block.kan_down.weight[o, i].detach().abs())
            learned = (functions(x) - functions.base(x))[:, i].detach() * weight
        else:
            curve = contributions(block, "kan_down", x)[:, o, i].detach()
            learned = curve - (block.kan_down.kan_base_weight[o, i] * base).detach()
        for score, regressors in (("nonlinearity", [x[:, i]]), ("nonbase", [x[:, i], base])):
            design = torch.stack([torch.ones_like(base), *regressors], 1).detach()
            residual = curve - design @ torch.linalg.lstsq(design, curve.unsqueeze(1)).solution.squeeze(1)
            expected = float(residual.var(correction=0) / curve.var(correction=0))
            assert float(found[score][o, i]) == pytest.approx(expected, abs=1e-6)
        assert float(found["delta"][o, i]) == pytest.approx(float((learned.square().mean().sqrt() / y[:, o].std(correction=0)).detach()), rel=1e-6)


@pytest.mark.parametrize(("kind", "edges"), [("gpt2", "full"), ("gpt2", "shared"), ("llama", "shared"), ("bert", "full")])
def test_the_curvature_is_the_gauss_newton_one(kind, edges):
    """The mean over many sequences of one draw each, against directional differences of the outputs."""
    model = tiny(kind, edges=edges, grid_size=2)
    batch = texts(count=1, sequences=2400, length=3, padded=False)[0]
    path, block = list(blocks_of(model).items())[-1]
    found = kanformer.collect(model, batch, scores=("effect", "effect1"))[path].scores["kan_down"].values
    predicted = (found["effect"] - found["effect1"])[::2, ::3]
    exact = _gauss_newton(model, block, batch, kind)
    assert 0.85 < float(predicted.sum() / exact.sum()) < 1.15
    assert np.corrcoef(predicted.flatten().numpy(), exact.flatten().numpy())[0, 1] > 0.95


@pytest.mark.parametrize(("kind", "groups"), [("gpt2", 4), ("bert", None)])
def test_more_draws_come_nearer(kind, groups):
    model, batch = tiny(kind, edges="shared", groups=groups, grid_size=2), texts(count=1, sequences=8, length=6)[0]
    path = list(blocks_of(model))[-1]

    def curvature(probes):
        layer = kanformer.collect(model, batch, scores=("effect", "effect1"), probes=probes)[path]
        parts = (layer.scores["kan_down"].values, layer.functions["kan_functions"].values)
        return [part["effect"] - part["effect1"] for part in parts]

    limit, one, many = curvature(600), curvature(1), curvature(60)
    for exact, rough, fine in zip(limit, one, many, strict=True):
        assert float((fine - exact).norm()) < 0.5 * float((rough - exact).norm())
        assert float((fine.sum() / exact.sum()).log().abs()) < 0.3


@torch.no_grad()
def _gauss_newton(model, block, batch, kind):
    """1/2 d^T J^T H J d per predicted token, d = phi - E phi, of some edges of the down map."""
    read = []
    handle = block.kan_down.register_forward_hook(lambda module, args, output: read.append(args[0]))
    before = model(**batch)
    handle.remove()
    phi = contributions(block, "kan_down", read[0].flatten(0, 1))
    centred = (phi - phi.mean(0))[:, ::2, ::3].view(*read[0].shape[:2], 4, 4)
    out = torch.zeros(4, 4, dtype=torch.float64)
    for row in range(4):
        for column in range(4):
            step = torch.zeros(*read[0].shape[:2], 8, dtype=torch.float64)
            step[..., 2 * row] = 1e-5 * centred[..., row, column]
            handle = block.kan_down.register_forward_hook(lambda module, args, output, step=step: output - step)
            after = model(**batch)
            handle.remove()
            if kind == "bert":
                h0 = before.last_hidden_state
                moved = (after.last_hidden_state - h0) / 1e-5
                out[row, column] = (moved.square().sum(-1) / h0.square().sum(-1)).mean()
            else:
                moved, p = (after.logits - before.logits)[:, :-1] / 1e-5, before.logits[:, :-1].softmax(-1)
                out[row, column] = 0.5 * ((p * moved.square()).sum(-1) - (p * moved).sum(-1).square()).mean()
    return out


@pytest.mark.parametrize("edges", ["full", "shared"])
def test_swapping_hidden_units_only_permutes_the_scores(edges):
    model, batches = tiny("gpt2", edges=edges, grid_size=3), texts()
    swapped, order = copy.deepcopy(model), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for block in blocks_of(swapped).values():
            if edges == "full":
                for parameter in block.kan_up.parameters():
                    parameter.copy_(parameter[order])
                for parameter in (block.kan_down.kan_base_weight, block.kan_down.kan_coef):
                    parameter.copy_(parameter[..., order])
                block.kan_down.kan_grid.copy_(block.kan_down.kan_grid[order])
            else:
                for parameter in (*block.kan_up.parameters(), block.kan_functions.kan_coef, block.kan_functions.kan_grid):
                    parameter.copy_(parameter[order])
                block.kan_down.weight.copy_(block.kan_down.weight[:, order])
    one, two = (kanformer.collect(each, batches, scores="all") for each in (model, swapped))
    for path in one:
        for score in SCORES:
            loose = {"rtol": 1e-6, "atol": 1e-9}
            torch.testing.assert_close(two[path].scores["kan_down"].values[score], one[path].scores["kan_down"].values[score][:, order], **loose)
            if edges == "full":
                torch.testing.assert_close(two[path].scores["kan_up"].values[score], one[path].scores["kan_up"].values[score][order], **loose)
            else:
                torch.testing.assert_close(
                    two[path].functions["kan_functions"].values[score], one[path].functions["kan_functions"].values[score][order], **loose
                )


@pytest.mark.parametrize("groups", [None, 3])
def test_functions_add_up_their_edges(groups):
    model, batches = tiny("gpt2", edges="shared", groups=groups, grid_size=3), texts()
    for layer in kanformer.collect(model, batches, scores="all").values():
        edges, functions = layer.scores["kan_down"].values, layer.functions["kan_functions"].values
        count = 12 if groups is None else groups
        by_group = edges["effect1"].sum(0).view(count, -1).sum(1)
        torch.testing.assert_close(functions["effect1"], by_group)
        assert float(functions["share"].sum()) == pytest.approx(1, abs=1e-9)
        assert (functions["effect"] >= functions["effect1"]).all() and functions["sens"].shape == (count,)


def test_batches_and_padding_do_not_matter():
    model, batches = tiny("gpt2", edges="full", grid_size=3), texts()
    single = [{key: value[row : row + 1] for key, value in batch.items()} for batch in batches for row in range(4)]
    cut = [{key: value[:, : int(batch["attention_mask"].sum())] for key, value in batch.items()} for batch in single]
    one, two = (kanformer.collect(model, each, scores=[s for s in SCORES if s not in ("l1", "range")]) for each in (batches, cut))
    for path in one:
        for name, scores in one[path].scores.items():
            for score, value in scores.values.items():
                torch.testing.assert_close(two[path].scores[name].values[score], value, rtol=1e-6, atol=1e-8)


def test_the_model_is_as_it_was():
    model, batches = tiny("gpt2", edges="full", grid_size=3), texts()
    model.train()
    model.transformer.h[0].mlp.kan_up.kan_coef.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: (value.requires_grad, value.grad) for key, value in model.named_parameters()}
    hooks = {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}
    torch.manual_seed(7)
    random = torch.get_rng_state()
    kanformer.collect(model, batches, scores="all", contexts=2, logits=3)
    assert torch.equal(torch.get_rng_state(), random) and all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for key, value in model.named_parameters():
        assert value.requires_grad == flags[key][0] and value.grad is flags[key][1] and bool((value.grad == 0.5).all())
    assert hooks == {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}


def test_first_tokens_are_left_out_where_asked():
    model, batches = tiny("gpt2", edges="shared", grid_size=3), texts()
    stats = kanformer.collect(model, batches, scores=("std",), skip_first_token=True)
    assert stats.data.tokens == sum(int(batch["attention_mask"].sum()) - 4 for batch in batches) and stats.data.skip_first_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype):
    exact, batches = kanformer.collect(tiny("gpt2", edges="full", grid_size=3), texts(), scores="all"), texts()
    rough = kanformer.collect(tiny("gpt2", dtype, edges="full", grid_size=3), batches, scores="all")
    for path in exact:
        for name in exact[path].scores:
            for score in ("std", "share", "sens"):
                a, b = exact[path].scores[name].values[score].flatten(), rough[path].scores[name].values[score].double().flatten()
                assert b.isfinite().all() and torch.corrcoef(torch.stack([a, b]))[0, 1] > (0.99999 if dtype == torch.float32 else 0.97)


def test_experts():
    model, batches = tiny("mixtral", edges="full", grid_size=2), texts()
    stats = kanformer.collect(model, batches, scores="all", contexts=2)
    assert len(stats) == 6 and sum(layer.outputs["kan_down"].count for layer in list(stats.values())[:3]) == 2 * stats_tokens(batches)
    path = max(stats, key=lambda p: stats[p].tokens)
    block, layer = model.get_submodule(path), stats[path]
    gradient = torch.autograd.grad(mean_loss(model, batches), block.kan_down.kan_coef)[0]
    mean = torch.stack([layer.moments["kan_down"][:, 0, 3 + c] for c in range(block.kan_down.basis.n_basis)], 0)
    base = torch.autograd.grad(mean_loss(model, batches), block.kan_down.kan_base_weight)[0]
    bias = torch.autograd.grad(mean_loss(model, batches), block.kan_down.kan_bias)[0] if block.kan_down.kan_bias is not None else None
    zero = -(block.kan_down.kan_coef * gradient).sum(1) - block.kan_down.kan_base_weight * base
    if bias is None:  # the slope of the node: one more constant output
        handle_bias = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        handle = block.kan_down.register_forward_hook(lambda m, a, y: y + handle_bias)
        bias = torch.autograd.grad(mean_loss(model, batches), handle_bias)[0]
        handle.remove()
    phi = torch.einsum("oci,ci->oi", block.kan_down.kan_coef, mean) + block.kan_down.kan_base_weight * layer.moments["kan_down"][:, 0, 2]
    expected = zero + phi * bias.unsqueeze(1)  # the identity of the coefficients
    # padded tokens reach experts too, but no loss depends on them
    torch.testing.assert_close(layer.scores["kan_down"].values["effect1"], expected.detach(), rtol=1e-5, atol=1e-8)
    assert layer.contexts["kan_down"].tokens.max() >= 0


def stats_tokens(batches) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


@pytest.mark.parametrize(("kind", "labels"), [("bert-mlm", True), ("bert-mlm", False), ("gpt2", True)])
def test_losses_are_the_models_own(kind, labels):
    model, batches = tiny(kind, edges="shared", grid_size=3), texts(padded=False)
    if labels:
        for number, batch in enumerate(batches):
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, number + 1 :: 2] = -100
    stats = kanformer.collect(model, batches, scores=("effect",))
    with torch.no_grad():
        losses, counts = [], []
        for batch in batches:
            given = batch["labels"] if labels else batch["input_ids"]
            losses.append(float(model(**{**batch, "labels": given}).loss))
            counts.append(int(((given[:, 1:] if kind == "gpt2" else given) != -100).sum()))
    assert stats.data.loss == pytest.approx(np.average(losses, weights=counts), rel=1e-6)  # transformers' is in float32


def test_a_users_loss():
    model, batches = tiny("bert", edges="shared", grid_size=3), texts()

    def size(outputs, batch):
        return outputs.last_hidden_state[batch["attention_mask"] != 0][:, 0].mean()

    stats = kanformer.collect(model, batches, scores=("effect", "effect1", "sens"), loss=size)
    assert stats.data.loss_name == "size"
    with pytest.raises(DataError, match="scalar"):
        kanformer.collect(model, batches, scores=("sens",), loss=lambda outputs, batch: outputs.last_hidden_state)
    assert all(bool((layer.scores["kan_down"].values["effect1"] != 0).any()) for layer in stats.values())


def test_bad_input():
    import transformers as tf

    model, batches = tiny("gpt2", edges="full", grid_size=2), texts(1)
    with pytest.raises(NoFeedForwardError, match="patch_model"):
        kanformer.collect(tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2)), batches)
    with pytest.raises(DataError, match="no tokens"):
        kanformer.collect(model, [], scores="all")
    with pytest.raises(DataError, match="nothing to predict"):
        kanformer.collect(model, {"input_ids": torch.ones(1, 1, dtype=torch.long)}, scores=("effect",))
    with pytest.raises(ConfigError, match="'sens'"):
        kanformer.collect(model, batches, scores=("senses",))
    with pytest.raises(ConfigError, match="loss"):
        kanformer.collect(model, batches, scores=("sens",), loss="cross-entropy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layer"):
        kanformer.collect(model, batches, layers=[5])
    with pytest.raises(ConfigError, match="contexts"):
        kanformer.collect(model, batches, contexts=-1)
    with pytest.raises(ConfigError, match=r"GiB.*top=.*layers"):
        kanformer.collect(model, batches, scores="all", max_memory=10_000)
    with torch.no_grad():
        model.transformer.h[1].mlp.kan_up.kan_base_weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"transformer.h.1.mlp, .*NaN in batch 2"):
        kanformer.collect(model, _second_is_bad(model, batches), scores=("effect",))


def _second_is_bad(model, batches):
    weight = model.transformer.h[1].mlp.kan_up.kan_base_weight
    with torch.no_grad():
        weight[0, 0] = 1.0
        yield batches[0]
        weight[0, 0] = torch.nan
    yield batches[0]


def test_constant_inputs_and_one_token_score_nothing():
    model = tiny("gpt2", edges="full", grid_size=2)
    batch = {"input_ids": torch.full((2, 1), 5)}
    stats = kanformer.collect(model, batch, scores=("std", "share", "nonlinearity", "nonbase", "delta", "range", "l1"))
    for layer in stats.values():
        for scores in layer.scores.values():
            for score in ("std", "share", "nonlinearity", "nonbase"):
                assert bool((scores.values[score] == 0).all()), score
            assert all(bool(value.isfinite().all()) for score, value in scores.values.items() if score != "delta")
