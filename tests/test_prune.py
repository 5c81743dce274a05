"""Pruned models are the model with edges held at their means; what was taken out stays out, through training and files."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any, cast

import pytest
import torch

import kanformer
from interpret_cases import texts, tiny
from kanformer.errors import CheckpointError, ConfigError, DataError, SurgeryError
from kanformer.interpret import collect
from kanformer.interpret.blocks import find_blocks
from kanformer.interpret.pruning.choose import masks_by_share, masks_by_sparsity
from kanformer.interpret.truth.hold import Positions, Target, held_at_means
from kanformer.layers import KANLinear
from kanformer.layers.masks import MaskedLinear
from model_cases import same_state, snapshot

_KINDS = {
    "shared": {"edges": "shared"},
    "groups": {"edges": "shared", "groups": 4},
    "full": {"edges": "full", "grid_size": 3},
}
_MODELS = [(model, kind) for model in ("gpt2", "llama", "bert") for kind in _KINDS]


def collected(kind: str, edges: str, padded: bool = False, **settings) -> tuple[Any, list, Any]:
    model = tiny(kind, **_KINDS[edges], **settings)
    batches = texts(padded=padded)
    return model, batches, collect(model, batches, scores=("std", "effect"))


def outputs(model, batches):
    with torch.no_grad():
        found = [model(**batch) for batch in batches]
    return torch.cat([one.logits if hasattr(one, "logits") else one.last_hidden_state for one in found])


@pytest.mark.parametrize(("kind", "edges"), _MODELS)
def test_a_pruned_model_is_the_model_with_these_edges_at_their_means(kind, edges):
    model, batches, stats = collected(kind, edges)
    before = snapshot(model)
    pruned = kanformer.prune(model, stats, sparsity=0.4, batches=batches)
    assert same_state(snapshot(model), before)
    targets = [Target(path, name, int(o), int(i)) for (path, name), mask in masks_by_sparsity(stats, 0.4, None).items() for o, i in (~mask).nonzero()]
    positions = Positions()
    positions.start(batches[0])
    with held_at_means(model, stats, targets, positions):
        wanted = outputs(model, batches[:1])
    torch.testing.assert_close(outputs(pruned.model, batches[:1]), wanted, rtol=1e-9, atol=1e-10)
    assert pruned.sparsity == pytest.approx(0.4, abs=0.01) and pruned.change is not None
    assert all(row["outputs"] == mask.any(1).sum() for row, mask in zip(pruned.alive, masks_by_sparsity(stats, 0.4, None).values(), strict=True))


@pytest.mark.parametrize(("kind", "edges"), _MODELS)
@pytest.mark.parametrize("what", ["edges", "neurons"])
def test_keeping_everything_is_the_identity(kind, edges, what):
    model, batches, stats = collected(kind, edges)
    pruned = kanformer.prune(model, stats, keep=1.0, what=what)
    assert pruned.model is not model and pruned.sparsity == 0
    assert same_state(snapshot(pruned.model), snapshot(model))
    assert torch.equal(outputs(pruned.model, batches), outputs(model, batches))


def _count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _up(block) -> Any:
    return block.kan_up.kan_base_weight if isinstance(block.kan_up, KANLinear) else block.kan_up.weight


@pytest.mark.parametrize(("kind", "edges"), _MODELS)
def test_pruned_channels_leave_the_matrices_and_the_model_is_that_with_them_held(kind, edges):
    model, batches, stats = collected(kind, edges)
    pruned = kanformer.prune(model, stats, sparsity=0.5, what="neurons", batches=batches)
    assert any(now < before for now, before in pruned.hidden.values())
    assert _count(pruned.model) < _count(model)
    masks = {path: torch.ones(12, dtype=torch.bool) for path in pruned.hidden}
    changed = torch.zeros(())
    for path, block in find_blocks(pruned.model).items():
        old = find_blocks(model)[path]
        masks[path] = torch.stack([(_up(block) == row).all(1).any() for row in _up(old)])
        assert int(masks[path].sum()) == block.hidden_features == pruned.hidden[path][0]
        changed = changed + (~masks[path]).sum()
    assert int(changed) > 0
    targets = [Target(path, "kan_down", o, int(i)) for path, stay in masks.items() for i in (~stay).nonzero() for o in range(8)]
    positions = Positions()
    positions.start(batches[0])
    with held_at_means(model, stats, targets, positions):
        wanted = outputs(model, batches[:1])
    torch.testing.assert_close(outputs(pruned.model, batches[:1]), wanted, rtol=1e-9, atol=1e-10)


def test_each_output_keeps_the_fewest_edges_with_the_share_and_at_least_one():
    _, _, stats = collected("gpt2", "full")
    for place, mask in masks_by_share(stats, 0.8, None).items():
        score = stats[place[0]].scores[place[1]].values["effect"].double().clamp(min=0)
        for row, stay in zip(score, mask, strict=True):
            kept, total = row[stay].sum(), row.sum()
            assert stay.any() and (kept >= 0.8 * total - 1e-12)
            if int(stay.sum()) > 1:
                assert kept - row[stay].min() < 0.8 * total  # one fewer would not do
    for mask in masks_by_sparsity(stats, 0.99, None).values():
        assert bool(mask.any(1).all())


def test_a_budget_is_kept_and_something_is_taken_out():
    model, batches, stats = collected("gpt2", "shared")
    pruned = kanformer.prune(model, stats, loss_budget=0.05, batches=batches)
    assert pruned.change is not None and pruned.change <= 0.05 and pruned.sparsity > 0.05
    assert len(pruned.trials) == 7 and "change" in str(pruned)
    none = kanformer.prune(model, stats, loss_budget=0.0, batches=batches)
    assert none.change is not None and none.change <= 0


@pytest.mark.parametrize("edges", ["shared", "full"])
def test_what_was_taken_out_stays_out_while_the_rest_learns(edges):
    model, batches, stats = collected("gpt2", edges)
    model = cast(Any, kanformer.prune(model, stats, sparsity=0.5).model)
    masks: dict[str, Any] = {name: module for name, module in model.named_modules() if getattr(module, "kan_mask", None) is not None}
    assert masks and all(isinstance(module, KANLinear | MaskedLinear) for module in masks.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = {name: module.kan_coef.detach().clone() if isinstance(module, KANLinear) else module.weight.detach().clone() for name, module in masks.items()}
    for batch in batches:
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    for name, module in masks.items():
        weight, mask = cast(Any, (module.kan_coef, module.kan_mask.unsqueeze(1)) if isinstance(module, KANLinear) else (module.weight, module.kan_mask))
        out = (~mask).expand_as(weight)
        assert weight.grad is not None and int(out.sum()) and bool((weight[out] == 0).all()) and bool((weight.grad[out] == 0).all())
        assert bool((weight != before[name])[~out].any())


_LOAD = """
import sys, torch, transformers, kanformer
from safetensors.torch import save_file
found = {}
for place in sys.argv[2:]:
    folder, name = place.split("=")
    out = getattr(transformers, name).from_pretrained(folder)(torch.arange(2, 14).unsqueeze(0))
    found[folder] = (out.logits if hasattr(out, "logits") else out.last_hidden_state).detach()
save_file(found, sys.argv[1])
"""
_SAVED = [("gpt2", "full", "edges"), ("llama", "groups", "neurons"), ("llama", "full", "edges"), ("bert", "shared", "edges")]


def test_pruned_models_save_and_load_bit_for_bit_in_a_fresh_process(tmp_path):
    from safetensors.torch import load_file

    wanted, classes = {}, []
    for kind, edges, what in _SAVED:
        model, _, stats = collected(kind, edges, dtype=torch.float32)
        pruned: Any = kanformer.prune(model, stats, sparsity=0.5, what=what)
        if what == "edges":  # twice, so that masks meet masks
            pruned = kanformer.prune(pruned.model, stats, sparsity=0.6)
        folder = tmp_path / f"{kind}-{edges}"
        model.save_pretrained(folder / "all")
        pruned.model.save_pretrained(folder / "pruned")
        record = json.loads((folder / "pruned" / "config.json").read_text())["quantization_config"]
        sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("pruned", "all")]
        if what == "neurons":
            assert sizes[0] < sizes[1] and sum(site["hidden"] for site in record["sites"]) < 24
        else:
            assert record["version"] == 4 and all(site["pruned"] for site in record["sites"])
        assert same_state(snapshot(type(model).from_pretrained(folder / "pruned")), snapshot(pruned.model))
        wanted[str(folder / "pruned")] = outputs(pruned.model, [{"input_ids": torch.arange(2, 14).unsqueeze(0)}])
        classes.append(f"{folder / 'pruned'}={type(model).__name__}")
    subprocess.run([sys.executable, "-c", _LOAD, str(tmp_path / "out.safetensors"), *classes], check=True)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_damaged_mask_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    model, _, stats = collected("gpt2", "full", dtype=torch.float32)
    cast(Any, kanformer.prune(model, stats, sparsity=0.3).model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("kan_mask"))
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="edges that were taken out and are not zero"):
        type(model).from_pretrained(tmp_path)


def test_a_pruned_model_is_copied_cast_unpatched_and_collected_like_any():
    model, batches, stats = collected("gpt2", "full")
    pruned = kanformer.prune(model, stats, sparsity=0.5).model
    twin = copy.deepcopy(pruned)
    assert torch.equal(outputs(twin, batches), outputs(pruned, batches))
    twin.half()
    assert all(module.kan_mask.dtype == torch.bool for module in twin.modules() if getattr(module, "kan_mask", None) is not None)
    again = collect(pruned, batches, scores=("std",))
    for path, layer in again.items():
        for name, one in layer.scores.items():
            mask = getattr(find_blocks(pruned)[path], name).kan_mask
            assert bool((one.values["std"][~mask] == 0).all())


def test_the_curve_measures_what_pruning_does_and_changes_nothing(tmp_path):
    model, batches, stats = collected("llama", "shared")
    before = snapshot(model)
    curve = kanformer.prune_curve(model, stats, batches, points=(0.0, 0.3, 0.6))
    assert same_state(snapshot(model), before)
    assert curve.rows[0]["change"] == pytest.approx(0, abs=1e-12)
    for row in curve.rows[1:]:
        assert row["change"] == pytest.approx(kanformer.prune(model, stats, sparsity=row["sparsity"], batches=batches).change, rel=1e-9)
    assert json.loads(curve.to_json(tmp_path / "curve.json"))["rows"] == curve.rows
    assert len(curve.to_csv(tmp_path / "curve.csv").splitlines()) == 4 and "sparsity" in str(curve)
    assert curve.plot().axes[0].get_xlabel() == "fraction of edges taken out"


def test_inplace_prunes_the_model_itself():
    model, batches, stats = collected("gpt2", "shared")
    copied = kanformer.prune(model, stats, sparsity=0.4).model
    assert kanformer.prune(model, stats, sparsity=0.4, inplace=True).model is model
    assert torch.equal(outputs(model, batches), outputs(copied, batches))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep=0.0, expected a share"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"keep": 0.9, "sparsity": 0.5}, "one of keep, sparsity, loss_budget"),
        ({"loss_budget": 0.1}, "a loss_budget and no batches"),
        ({"what": "layers"}, "edges or neurons"),
        ({"by": "efect"}, "Did you mean"),
    ],
)
def test_wrong_options_are_errors_and_change_nothing(settings, message):
    model, _, stats = collected("gpt2", "shared")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        kanformer.prune(model, stats, inplace=True, **settings)
    assert same_state(snapshot(model), before)


def test_what_cannot_be_pruned_says_so():
    model, batches, stats = collected("gpt2", "shared")
    with pytest.raises(DataError, match="statistics of another model"):
        kanformer.prune(tiny("llama"), stats)
    with pytest.raises(ConfigError, match="first edges only"):
        kanformer.prune(model, collect(model, batches, scores=("effect",), top=5))
    with pytest.raises(ConfigError, match="without scores"):
        kanformer.prune(model, collect(model, batches, scores=()))
    experts = tiny("mixtral")
    with pytest.raises(ConfigError, match="a mixture of experts"):
        kanformer.prune(experts, collect(experts, batches, scores=("effect",)))
    fits = kanformer.fit_symbolic(model, stats, tol_node=9.0, r2_min=0.0)
    with pytest.raises(SurgeryError, match="Prune before you snap"):
        kanformer.prune(kanformer.snap(model, fits).model, stats)
