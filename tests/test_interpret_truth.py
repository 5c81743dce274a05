"""Measured mean ablation, the check of a ranking, and the numbers of the header."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr

import kanformer
from interpret_cases import contributions, mean_loss, texts, tiny
from kanformer.errors import ConfigError, DataError
from kanformer.interpret import Target, ablate, faithfulness, truth_check
from kanformer.interpret.truth.ranks import spearman


def plain_ablation(model, path, name, output, source, batches) -> float:
    """Loss with an edge replaced by its mean, minus loss, without any of the code under test."""
    block = model.get_submodule(path)
    read = []
    handle = getattr(block, name).register_forward_hook(lambda module, args, out: read.append(args[0].detach()))
    before = float(mean_loss(model, batches).detach())
    handle.remove()
    kept = torch.cat([x[batch["attention_mask"] != 0] for x, batch in zip(read, batches, strict=True)])
    mean = contributions(block, name, kept)[:, output, source].mean().detach()

    def replace(module, args, out):
        out = out.clone()
        phi = contributions(block, name, args[0].flatten(0, 1))[:, output, source].view(out.shape[:-1])
        out[..., output] += mean - phi
        return out

    handle = getattr(block, name).register_forward_hook(replace)
    after = float(mean_loss(model, batches).detach())
    handle.remove()
    return after - before


@pytest.mark.parametrize(("kind", "edges"), [("gpt2", "full"), ("llama", "full"), ("llama", "shared")])
def test_ablation_is_what_it_says(kind, edges):
    model, batches = tiny(kind, edges=edges, grid_size=3), texts()
    path = next(iter(kanformer.collect(model, batches)))
    names = ["kan_down"] if edges == "shared" else ["kan_up", "kan_down"]
    targets = [(path, name, output, source) for name in names for output, source in ((0, 1), (5, 7))]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = ablate(model, batches, targets)
    expected = [plain_ablation(model, *target, batches) for target in targets]
    torch.testing.assert_close(found.change, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-9)
    assert found.loss == pytest.approx(float(mean_loss(model, batches).detach()), abs=1e-9) and found.units == 12
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_function_is_all_of_its_edges():
    model, batches = tiny("gpt2", edges="shared", groups=4, grid_size=3), texts()
    found = ablate(model, batches, [Target("transformer.h.0.mlp", "kan_functions", -1, 2)])
    changed = copy.deepcopy(model)
    block = changed.transformer.h[0].mlp
    read = []
    handle = block.kan_down.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for batch in batches:
        changed(**batch)
    handle.remove()
    mean = torch.cat([h[batch["attention_mask"] != 0] for h, batch in zip(read, batches, strict=True)]).mean(0)
    with torch.no_grad():
        block.kan_down.bias += block.kan_down.weight[:, 6:9] @ mean[6:9]
        block.kan_down.weight[:, 6:9] = 0
    expected = float((mean_loss(changed, batches) - mean_loss(model, batches)).detach())
    assert float(found.change[0]) == pytest.approx(expected, abs=1e-9)


def test_the_standard_error_is_that_of_paired_sequences():
    model = tiny("gpt2", edges="full", grid_size=3)
    batches = texts(count=3, sequences=4, padded=False)
    stats = kanformer.collect(model, batches)
    target = stats.top(1)
    singly = torch.cat([ablate(model, {k: v[row : row + 1] for k, v in batch.items()}, target, stats=stats).change for batch in batches for row in range(4)])
    found = ablate(model, batches, target, stats=stats)
    assert float(found.change[0]) == pytest.approx(float(singly.mean()), rel=1e-9)
    assert float(found.error[0]) == pytest.approx(float(singly.std() / 12**0.5), rel=1e-9)
    assert bool(ablate(model, {k: v[:1] for k, v in batches[0].items()}, target, stats=stats).error.isnan().all())


def trained(edges: str, **kan) -> tuple:
    """A tiny language model that has learned a text with structure, and held-out batches of it."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(2, 40, (40, 2), generator=generator)

    def batch(count: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, 40, (count, 1), generator=generator)
        for _ in range(11):
            choice = (torch.rand(count, generator=generator) < 0.2).long()
            ids = torch.cat([ids, table[(ids[:, -1] + 3 * ids[:, max(0, ids.shape[1] - 3)]) % 40, choice].unsqueeze(1)], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    model = tiny("gpt2", torch.float32, edges=edges, grid_size=3, **kan)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        loss = mean_loss(model, [batch(32)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.double().eval(), [batch(32) for _ in range(4)]


@pytest.mark.parametrize("edges", ["full", "shared"])
def test_the_default_score_ranks_as_the_truth_does(edges):
    model, batches = trained(edges)
    stats = kanformer.collect(model, batches, scores="all")
    check = truth_check(model, batches, stats, k=25, random=25)
    assert check.by == "effect" and int(check.chosen.sum()) == 25 and len(set(check.measured.targets)) == 50
    assert check.spearman == pytest.approx(spearmanr(check.predicted, check.measured.change).statistic, abs=1e-12)
    assert check.spearman >= 0.9, check.correlations()
    assert check.correlations()["effect"]["all"] == check.spearman
    figure = check.plot()
    figure.canvas.draw()
    assert "Spearman" in figure.get_suptitle() and len(figure.axes) == 2
    assert "measured" in figure.axes[0].get_ylabel() and "25 targets" not in str(check)
    drawn = [line for line in figure.axes[1].lines if len(line.get_xdata()) == 25]
    assert len(drawn) == 2


def test_functions_are_checked_too():
    model, batches = trained("shared")
    stats = kanformer.collect(model, batches, scores="all")
    check = truth_check(model, batches, stats, k=12, random=12, functions=True)
    assert {target.map for target in check.measured.targets} == {"kan_functions"} and check.spearman >= 0.85


def test_rank_correlation_with_ties():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        one, two = (torch.randint(0, 6, (30,), generator=generator).double() for _ in range(2))
        assert spearman(one, two) == pytest.approx(spearmanr(one, two).statistic, abs=1e-12)
    assert spearman(torch.ones(3), torch.arange(3.0)) != spearman(torch.ones(3), torch.arange(3.0))


@pytest.mark.parametrize(("kind", "edges"), [("gpt2", "full"), ("llama", "shared"), ("bert", "shared")])
def test_header_numbers(kind, edges):
    model, batches = tiny(kind, edges=edges, grid_size=3), texts()
    original = tiny(kind, seed=0, edges=edges, grid_size=3)
    kanformer.unpatch_model(original)
    found = faithfulness(model, batches, original=original, name="random ids")
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches) and found.sequences == 12 and found.batches == 3
    assert "random ids" in str(found) and found.original is not None
    if kind == "bert":
        assert found.original == 0 and found.patched > 0
    else:
        assert found.patched == pytest.approx(float(mean_loss(model, batches).detach()), abs=1e-9)
        assert found.original == pytest.approx(float(mean_loss(original, batches).detach()), abs=1e-9)
        assert found.all_ablated == pytest.approx(_all_ablated(model, batches), abs=1e-9)
    more = found.replace(pruned=0.5 * (found.original + found.all_ablated), all_ablated=found.original + 1)
    assert more.recovered(more.original) == 1 and more.recovered(more.all_ablated) == 0
    if kind == "gpt2":
        again = faithfulness(
            model, batches, original=original, pruned=original, snapped=model, stats=kanformer.collect(model, batches, layers=1, name="random ids")
        )
        assert again == found.replace(pruned=found.original, snapped=found.patched)  # statistics of one layer would leave the other unablated
    assert set(more.to_dict()["recovered"]) == {"patched", "pruned"} and found.replace(original=None).recovered() is None


def _all_ablated(model, batches) -> float:
    from kanformer.layers import KANFeedForward

    blocks = [module for module in model.modules() if isinstance(module, KANFeedForward)]
    handles, outputs = [], {block: [] for block in blocks}
    for block in blocks:
        handles.append(block.register_forward_hook(lambda module, args, out: outputs[module].append(out.detach())))
    mean_loss(model, batches)
    for handle in handles:
        handle.remove()
    handles = []
    for block in blocks:
        rows = torch.cat([out[batch["attention_mask"] != 0] for out, batch in zip(outputs[block], batches, strict=True)])
        mean = rows.mean(0)
        handles.append(block.register_forward_hook(lambda module, args, out, mean=mean: mean.expand_as(out)))
    loss = float(mean_loss(model, batches).detach())
    for handle in handles:
        handle.remove()
    return loss


def test_bad_targets():
    model, batches = tiny("gpt2", edges="full", grid_size=2), texts(1)
    with pytest.raises(ConfigError, match="outputs 0 to 7"):
        ablate(model, batches, [(0, "kan_down", 8, 0)])
    with pytest.raises(ConfigError, match="kan_up, kan_down"):
        ablate(model, batches, [(0, "kan_functions", -1, 0)])
    with pytest.raises(ConfigError, match="layer"):
        ablate(model, batches, [(7, "kan_down", 0, 0)])
    with pytest.raises(ConfigError, match="no edges"):
        ablate(model, batches, [])
    with pytest.raises(DataError, match="no tokens"):
        ablate(model, [], [(0, "kan_down", 0, 0)])
    bare = kanformer.collect(model, batches, scores=())
    with pytest.raises(DataError, match="scores="):
        ablate(model, batches, [(0, "kan_down", 0, 0)], stats=bare)
    with pytest.raises(ConfigError, match="no scores"):
        truth_check(model, batches, bare)
    with pytest.raises(ConfigError, match="k="):
        truth_check(model, batches, bare, k=1, random=0)
