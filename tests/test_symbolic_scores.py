"""What collect measured, used by the fits: nodes' deviations, which functions come first, and which formulas are reverted first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kanformer
from interpret_cases import texts, tiny
from kanformer.errors import ConfigError
from kanformer.interpret.symbolic import MapFits, SymbolicFits, fit_symbolic, snap
from kanformer.layers import KANFeedForward

LOOSE = {"tol_node": 5.0, "r2_min": 0.3}


def outputs_of(model, name: str) -> dict[str, torch.Tensor]:
    """What a map of every block gives on the tokens of `texts()`, (tokens, out)."""
    found: dict[str, list] = {}
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, KANFeedForward)}
    handles = [getattr(block, name).register_forward_hook(lambda _, args, y, path=path: found.setdefault(path, []).append(y)) for path, block in blocks.items()]
    with torch.no_grad():
        for batch in texts():
            model(**batch)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"] != 0 for batch in texts()]
    return {path: torch.cat([y[mask] for y, mask in zip(parts, masks, strict=True)]) for path, parts in found.items()}


def test_nodes_are_measured_where_collect_was():
    model = tiny("gpt2", edges="full", grid_size=3)
    fits = fit_symbolic(model, kanformer.collect(model, texts()))
    for name in ("kan_up", "kan_down"):
        for path, y in outputs_of(model, name).items():
            one = fits[path][name]
            assert one.node_source == "measured"
            torch.testing.assert_close(one.weight, one.std / y.std(0, correction=0)[one.output])
    model = tiny("llama", edges="shared", groups=6, grid_size=3)
    stats = kanformer.collect(model, texts())
    measured, bare = fit_symbolic(model, stats), fit_symbolic(model, kanformer.collect(model, texts(), scores=()))
    for path, y in outputs_of(model, "kan_down").items():
        weight = model.get_submodule(path).kan_down.weight
        parts = (weight.square() * stats[path].hidden_variance).sum(0).view(6, -1).sum(1)
        one, other = measured[path]["kan_functions"], bare[path]["kan_functions"]
        assert (one.node_source, other.node_source) == ("measured", "independent")
        torch.testing.assert_close(one.weight.square(), (parts / y.var(0, correction=0).sum()).detach())
        torch.testing.assert_close(other.weight.square(), (parts / parts.sum()).detach())


@pytest.mark.parametrize(("kind", "kan"), [("gpt2", {"edges": "full"}), ("llama", {"edges": "shared"}), ("gpt2", {"edges": "shared", "groups": 4})])
@pytest.mark.parametrize("by", ["effect", "sens"])
def test_the_first_functions_are_those_of_the_score(kind, kan, by):
    model = tiny(kind, grid_size=3, **kan)
    stats = kanformer.collect(model, texts(1), scores=("std", "sens", *([by] if by != "sens" else [])))
    fits = fit_symbolic(model, stats, edges=3, **LOOSE)
    for path, layer in stats.items():
        for name, one in fits[path].items():
            table = layer.top(3, by, map=name, functions=kan["edges"] == "shared")
            wanted = sorted(zip(table.columns["input"], table.columns["output"], table.columns[by], strict=True))
            assert list(zip(one.input.tolist(), one.output.tolist(), one.score.tolist(), strict=True)) == wanted and one.score_name == by
    with pytest.raises(ConfigError, match="edges=0"):
        fit_symbolic(model, stats, edges=0)


def test_statistics_of_the_first_edges_only():
    model = tiny("gpt2", edges="full", grid_size=3)
    stats = kanformer.collect(model, texts(1), scores=("effect",), top=5)
    one = fit_symbolic(model, stats, edges=5, layer=0)["transformer.h.0.mlp"]["kan_up"]
    assert one.score is not None and one.score.tolist() == [
        row["effect"] for row in sorted(stats.layer(0).top(5, map="kan_up"), key=lambda row: (row["input"], row["output"]))
    ]
    with pytest.raises(ConfigError, match=r"keep the first 5 edges.*top=6"):
        fit_symbolic(model, stats, edges=6)
    every = fit_symbolic(model, stats, layer=0)["transformer.h.0.mlp"]["kan_up"]
    assert every.score is not None and int(every.score.isfinite().sum()) == 5 and every.loss_effect is None
    assert torch.equal(every.score[[every.find(int(i), int(o)) for i, o in zip(one.input, one.output, strict=True)]], one.score)


def _stays(done, fits: SymbolicFits, effects: list) -> tuple[torch.Tensor, torch.Tensor]:
    """The effects of the accepted functions that have formulas, and of those that were reverted."""
    stays, goes = [], []
    for one, effect in zip(fits.all_maps(), effects, strict=True):
        formulas = getattr(done.model.get_submodule(one.path), one.map).kan_formulas
        held = set() if formulas is None else {tuple(row) for row in formulas.kan_index.tolist()}
        kept = torch.tensor([(int(i), int(o)) in held for i, o in zip(one.input, one.output, strict=True)])
        stays.append(effect[kept & one.accepted])
        goes.append(effect[~kept & one.accepted])
    return torch.cat(stays), torch.cat(goes)


@pytest.mark.parametrize("by", ["effect", "sens", "mixed"])
def test_what_costs_the_loss_most_is_reverted_first(by):
    model, batches = tiny("gpt2", edges="full", grid_size=3), texts(1)
    stats = kanformer.collect(model, batches, scores=("std", "sens" if by == "sens" else "effect"))
    fits = fit_symbolic(model, stats, **LOOSE)
    if by == "mixed":  # scores of one map only cannot be compared with the rest
        path = next(iter(fits))
        fits = SymbolicFits({**fits, path: {name: _without(one) if name == "kan_up" else one for name, one in fits[path].items()}})
    with torch.no_grad():
        before = model(**batches[0]).logits

    def moved(outputs, batch):
        return (outputs.logits - before).square().mean()

    whole = snap(model, fits, batches=batches, loss=moved)
    kept = snap(model, fits, batches=batches, loss=moved, loss_budget=whole.loss / 4)
    effects = [one.effect if by == "mixed" else one.loss_effect for one in fits.all_maps()]
    stays, goes = _stays(kept, fits, effects)
    assert len(stays) and len(goes) and stays.max() <= goes.min()
    for one in fits.all_maps():
        if one.score is not None:
            left = 1 - one.r2
            wanted = one.score * left.sqrt() if by == "sens" else one.score.abs() * left
            torch.testing.assert_close(one.loss_effect, wanted)


def _without(one: MapFits) -> MapFits:
    return replace(one, score=None, score_name="")
