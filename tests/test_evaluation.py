"""Every number of the evaluation against the same number worked out token by token."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evaluation_cases import LENGTH, LINES, Constant, by_hand, examples, measured, mixture, original, patched, subjects
from kanformer.conversion.functions_off import without_functions
from kanformer.evaluation.ablation import OutputMeans, block_outputs, replaced_outputs
from kanformer.layers import KANExperts, KANFeedForward
from kanformer.surgery.replacing.apply import patch_model
from model_cases import BY_NAME, blocks, disturb, one_case_of_each, same_state, snapshot
from training_cases import checkpoint, tokenizer

TASKS = [("causal_lm", "llama"), ("causal_lm", "gpt2"), ("masked_lm", "bert")]
each_task = pytest.mark.parametrize(("task", "name"), TASKS, ids=["-".join(pair) for pair in TASKS])


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return {name: original(folder / name, name) for _, name in TASKS}


@pytest.fixture
def pair(originals, tmp_path, name):
    return originals[name], patched(originals[name], tmp_path / "patched")


def outputs_by_hand(model: nn.Module, rows) -> dict[str, list[torch.Tensor]]:
    """Each block's output at every token, from texts that run one by one."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        block.register_forward_hook(lambda module, args, output, path=path: seen.setdefault(path, []).append(output[0].double()))
        for path, block in blocks(model).items()
    ]
    with torch.no_grad():
        for ids, _ in rows:
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def with_constants(model: nn.Module, values: dict[str, torch.Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    for path, value in values.items():
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, Constant(value))
    return model


@each_task
def test_every_row_is_what_a_loop_over_tokens_gives(pair, task):
    found = subjects(*pair)
    assert found.task == task and not found.notes
    result, rows = measured(found, LINES, batch_size=4, seed=5), examples(task, LINES, seed=5)
    means = {path: torch.cat(outputs).mean(0) for path, outputs in outputs_by_hand(found.patched, rows).items()}
    off = copy.deepcopy(found.patched)
    for parameter in (p for block in blocks(off).values() for p in block.spline_parameters()):
        parameter.data.zero_()
    models = {
        "teacher": found.teacher,
        "patched": found.patched,
        "without_functions": off,
        "zero_ablation": with_constants(found.patched, {path: torch.zeros_like(mean) for path, mean in means.items()}),
        "mean_ablation": with_constants(found.patched, means),
    }
    wanted = {name: by_hand(model, found.teacher, rows) for name, model in models.items()}
    assert list(result.rows) == list(models)
    for name, numbers in wanted.items():
        assert result.scored_tokens == numbers.pop("count")
        assert {key: result.rows[name][key] for key in numbers} == pytest.approx(numbers, rel=2e-5, abs=2e-6), name
    ce = {name: numbers["ce"] for name, numbers in wanted.items()}
    for name in ("patched", "without_functions"):
        for kind in ("zero", "mean"):
            expected = (ce[f"{kind}_ablation"] - ce[name]) / (ce[f"{kind}_ablation"] - ce["teacher"])
            assert ce[f"{kind}_ablation"] > ce["teacher"] and result.rows[name][f"recovered_{kind}"] == pytest.approx(expected, rel=1e-3)
    assert result.tokens == sum(ids.shape[1] for ids, _ in rows) and result.texts == len(LINES)
    assert wanted["patched"]["kl"] > 0.01 and wanted["patched"]["top1_agreement"] < 1, "the patched model must differ for this test to say anything"


@each_task
def test_explained_variance_is_that_of_the_originals_output_at_its_own_input(pair, task):
    found = subjects(*pair)
    result, rows = measured(found, LINES, batch_size=5), examples(task, LINES, seed=0)
    assert len(found.sites) == len(found.blocks) == len(result.layers) == 2
    for site, block in zip(found.sites, found.blocks, strict=True):
        x: list[torch.Tensor] = []
        y: list[torch.Tensor] = []
        handles = [
            site.up.register_forward_pre_hook(lambda module, args, x=x: x.append(args[0].reshape(-1, args[0].shape[-1]))),
            site.down.register_forward_hook(lambda module, args, output, y=y: y.append(output.reshape(-1, output.shape[-1]))),
        ]
        with torch.no_grad():
            for ids, _ in rows:
                found.teacher(input_ids=ids)
            for handle in handles:
                handle.remove()
            target = torch.cat(y).double()
            off = copy.deepcopy(block)
            for parameter in off.spline_parameters():
                parameter.zero_()
            for name, each in (("patched", block), ("without_functions", off)):
                error = (each(torch.cat(x)).double() - target).square().sum(0)
                variance = (target - target.mean(0)).square().sum(0)
                assert result.layers[site.path][name] == pytest.approx(1 - float(error.sum() / variance.sum()), rel=1e-5, abs=1e-6)
    layers = [layer["patched"] for layer in result.layers.values()]
    assert result.rows["patched"]["explained_variance"] == pytest.approx(sum(layers) / 2) and max(layers) < 0.999


@each_task
def test_batches_and_padding_and_the_order_of_causal_texts_do_not_matter(pair, task):
    found = subjects(*pair)
    results = [measured(found, LINES, batch_size=size) for size in (1, 4, 64)]
    if task == "causal_lm":
        results.append(measured(found, LINES[::-1], batch_size=7))
    for result in results[1:]:
        assert (result.tokens, result.scored_tokens, result.scored_bytes) == (results[0].tokens, results[0].scored_tokens, results[0].scored_bytes)
        for name, row in results[0].rows.items():
            assert result.rows[name] == pytest.approx(row, rel=1e-4, abs=1e-6)
        for path, layer in results[0].layers.items():
            assert result.layers[path] == pytest.approx(layer, rel=1e-5, abs=1e-6)


@each_task
def test_an_exact_model_keeps_everything(originals, tmp_path, task, name):
    result = measured(subjects(originals[name], patched(originals[name], tmp_path / "patched", change=False)), LINES)
    for row in (result.rows["patched"], result.rows["without_functions"]):
        assert row["kl"] == pytest.approx(0, abs=1e-9 if name == "gpt2" else 0) and row["top1_agreement"] == 1
        assert row["recovered_zero"] == row["recovered_mean"] == pytest.approx(1, abs=1e-5)
        assert row["explained_variance"] == pytest.approx(1, abs=1e-8)
    assert result.rows["zero_ablation"]["kl"] > 0.01 and result.rows["mean_ablation"]["kl"] > 0.01


@pytest.mark.parametrize("name", ["bert"])
def test_an_encoder_is_measured_by_cosines(pair):
    found = subjects(*pair, task="encoder")
    result, words = measured(found, LINES, batch_size=4), tokenizer()
    wanted: dict[str, list[float]] = {"embedding": [], "hidden": []}
    with torch.no_grad():
        for line in LINES:
            ids = torch.tensor([words(line)["input_ids"][:LENGTH]])
            own, other = (model.base_model(ids, output_hidden_states=True).hidden_states for model in (found.patched, found.teacher))
            wanted["embedding"].append(float(F.cosine_similarity(own[-1][0].mean(0), other[-1][0].mean(0), dim=0)))
            wanted["hidden"] += [
                float(F.cosine_similarity(a, b, dim=0)) for x, y in zip(own[1:], other[1:], strict=True) for a, b in zip(x[0], y[0], strict=True)
            ]
    row = result.rows["patched"]
    assert row["embedding_cosine"] == pytest.approx(sum(wanted["embedding"]) / len(LINES), abs=1e-5) and row["embedding_cosine"] < 0.999
    assert row["hidden_cosine"] == pytest.approx(sum(wanted["hidden"]) / len(wanted["hidden"]), abs=1e-5) == pytest.approx(sum(row["layers"]) / 2)
    assert result.rows["teacher"]["embedding_cosine"] == pytest.approx(1, abs=1e-12)
    loss = {name: 1 - each["embedding_cosine"] for name, each in result.rows.items()}
    assert row["recovered_mean"] == pytest.approx((loss["mean_ablation"] - loss["patched"]) / loss["mean_ablation"])


@each_task
def test_without_a_teacher_there_is_what_needs_none(pair, task):
    alone, both = (measured(subjects(teacher, pair[1]), LINES) for teacher in (None, pair[0]))
    assert list(alone.rows) == list(both.rows)[1:] and not alone.layers
    for name, row in alone.rows.items():
        assert row == {key: both.rows[name][key] for key in ("ce", "perplexity", "bits_per_byte")}


def test_experts_are_ablated_and_said_to_be_left_out_of_the_explained_variance(tmp_path):
    teacher = mixture(tmp_path / "teacher")
    found = subjects(teacher, patched(teacher, tmp_path / "patched", change=False))
    assert found.notes == ["no explained variance of 2 blocks of experts: the two models' routers send them different tokens"] and not found.sites
    result = measured(found, LINES)
    assert result.layers == {} and result.rows["patched"]["explained_variance"] is None and result.rows["patched"]["kl"] < 1e-9
    zeroed = copy.deepcopy(found.patched)
    experts = [module for module in zeroed.modules() if isinstance(module, KANExperts)]
    for module in experts:
        module.forward = lambda x, *routing: torch.zeros_like(x)
    rows = examples("causal_lm", LINES, 0)
    assert len(experts) == 2 and result.rows["zero_ablation"]["ce"] == pytest.approx(by_hand(zeroed, found.teacher, rows)["ce"], rel=1e-5)


@one_case_of_each
def test_replaced_outputs_are_those_of_the_blocks_and_leave_no_trace(case):
    model = disturb(patch_model(case.build()))
    before, outputs = snapshot(model), case.logits(model)
    means = OutputMeans(model)
    with torch.no_grad(), means.watch({}):
        model(**case.inputs())
    values = means.means()
    assert set(values) == set(block_outputs(model)) == set(blocks(model))
    for replaced, wanted in ((None, {path: torch.zeros_like(value) for path, value in values.items()}), (values, values)):
        with replaced_outputs(model, replaced):
            found = case.logits(model)
        torch.testing.assert_close(found, case.logits(with_constants(model, wanted)), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, outputs)
    assert same_state(before, snapshot(model)) and torch.equal(case.logits(model), outputs)


def test_a_block_that_adds_a_residual_keeps_it():
    block = KANFeedForward(6, 8).eval()
    block.takes_residual = True
    x, residual = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    with torch.no_grad(), replaced_outputs(nn.ModuleList([block])):
        assert torch.equal(block(x, residual), residual)


def test_blocks_used_in_every_layer_are_measured(tmp_path):
    import transformers as tf

    values = {**BY_NAME["bert"].values, "embedding_size": 16}
    torch.manual_seed(0)
    tf.AlbertForMaskedLM(tf.AlbertConfig(**values)).save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    teacher = str(tmp_path / "teacher")
    result = measured(subjects(teacher, patched(teacher, tmp_path / "patched", change=False)), LINES)
    assert result.rows["patched"]["kl"] < 1e-9 and [layer["patched"] for layer in result.layers.values()] == pytest.approx([1.0])


def test_measuring_leaves_the_models_as_they_were(tmp_path):
    teacher = checkpoint(tmp_path / "teacher", "llama")
    found = subjects(teacher, patched(teacher, tmp_path / "patched"))
    before, state = snapshot(found.patched), torch.get_rng_state()
    measured(found, LINES)
    assert same_state(before, snapshot(found.patched)) and torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for model in (found.patched, found.teacher) for module in model.modules())
    with without_functions(found.patched):
        changed = snapshot(found.patched)
    assert not same_state(before, changed) and math.isfinite(measured(found, LINES).rows["patched"]["ce"])
