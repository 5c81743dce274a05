"""Fitting formulas to all functions of a model: closed forms, a search by matrix products, then Levenberg and Marquardt, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.histogram import ChannelStats
from kanformer.errors import ConfigError, DataError, did_you_mean
from kanformer.interpret.blocks import find_layer
from kanformer.interpret.collect import LayerStats
from kanformer.interpret.curves import apply_base
from kanformer.interpret.scores import score_layer
from kanformer.interpret.symbolic import outcomes
from kanformer.interpret.symbolic.candidates import fit_candidates
from kanformer.interpret.symbolic.fits import MapFits, SymbolicFits
from kanformer.interpret.symbolic.functions import Chosen, values_at
from kanformer.interpret.symbolic.importance import first_by_loss, scores_of
from kanformer.interpret.symbolic.library import Family, choose
from kanformer.interpret.symbolic.nodes import NodeScale, node_scale
from kanformer.interpret.symbolic.points import NODES, Points, make_points
from kanformer.interpret.symbolic.targets import base_label, label_family
from kanformer.layers import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear

CHUNK = 8192
_KEPT = 2**22  # numbers of `candidates`, at most
Edges = int | Iterable[Any] | Tensor | None


@dataclass(frozen=True)
class Tolerances:
    """When a formula is good enough; see `fit_symbolic`."""

    tol_node: float = 0.01
    r2_min: float = 0.99
    tie: float = 0.001
    negligible: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not 0 <= value < 10 or (name == "r2_min" and value > 1):
                raise ConfigError("fit formulas", got=f"{name}={value!r}", expected="a number from 0 on" + (" to 1" if name == "r2_min" else ""))


@torch.no_grad()
def fit_symbolic(
    model: nn.Module,
    stats: Mapping[str, LayerStats] | LayerStats,
    *,
    layer: str | int | Sequence[str | int] | None = None,
    map: str | None = None,
    edges: Edges = None,
    library: Iterable[str] | None = None,
    tol_node: float = 0.01,
    r2_min: float = 0.99,
    tie: float = 0.001,
    negligible: float = 1e-3,
    node_std: Mapping[str, Mapping[str, Tensor]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> SymbolicFits:
    """Finds a formula for every learned function, and says where there is none. The model is not touched.

    Of each function psi_g (shared edges) or phi[o, i] (full edges), base part included, all families of the library are fitted as
    c * f(a * (x - t)) + e * x + d under the density of the data that `collect` saw. A family is accepted if 1 - its error is enough in both
    measures, R2 >= r2_min and nrmse <= tol_node; of the accepted ones within `tie` of the best R2 (the equivalence set) the simplest is chosen.
    Outcomes: "negligible" (weight below `negligible`: the formula is a constant), "linear", "unique" (one family in the equivalence set),
    "ambiguous" (several), "unsnappable" (none accepted).

    Args:
        model, stats: the model that `collect` ran and what it returned.
        layer: path or number of a block, or several; None means all. map: "kan_functions", "kan_up", "kan_gate" or "kan_down"; None means all.
        edges: None for all functions; a number for the top k of each map by `effect` or `sens` where `collect` was asked for them, else by
            `score_layer`; or the functions themselves: groups (shared edges), pairs (input, output) (full edges).
        library: names of families, see `kanformer.interpret.symbolic.library`; None means all, registered ones too.
        tol_node: largest error relative to the node's standard deviation. r2_min: least R2, in [0, 1].
        tie: R2 within which families count as equally good. negligible: weight below which a function is a constant to its node.
        node_std: standard deviations of the outputs, (out,), by path and map, for full edges; else they are the outputs' own, as `collect` measured
            them, or without any (`scores=()`) come from the edges' variances as if those were uncorrelated.
        progress: called with a line of text per map.

    Raises:
        ConfigError: an unknown layer, map, family or edge, or a tolerance out of range. DataError: no learned functions there, one token, constant
        inputs, or functions that are not finite (the message names the layer).
    """
    tolerances, families = Tolerances(tol_node, r2_min, tie, negligible), choose(library)
    found: dict[str, dict[str, MapFits]] = {}
    for block, seen in _layers(model, stats, layer):
        maps = dict(block.spline_modules())
        if map is not None and map not in maps:
            raise ConfigError("fit formulas", subject=seen.path, got=f"map={map!r}", hint=did_you_mean(str(map), maps) if maps else "It has no functions.")
        for name, module in maps.items():
            if map not in (None, name):
                continue
            where = f"{seen.path or type(model).__name__}, {name}"
            if not seen.tokens:
                raise DataError("fit formulas", subject=where, got="a block that no token reached", hint="Collect on data that reach it.")
            chosen = _chosen(block, seen, name, module, edges)
            points = make_points(module, seen.maps[name], where)
            given = (node_std or {}).get(seen.path, {}).get(name)
            scale = node_scale(block, seen, name, module, points, given)
            one = fit_map(module, points, chosen, families, tolerances, scale, where=where)
            by, worth = scores_of(seen, name, chosen)
            one = replace(one, path=seen.path, map=name, tokens=seen.maps[name].count, score_name=by, score=worth)
            found.setdefault(seen.path, {})[name] = one
            if progress is not None:
                progress(f"{where}: " + ", ".join(f"{count:,} {outcome}" for outcome, count in found[seen.path][name].counts().items() if count))
    if not found:
        raise DataError("fit formulas", subject=type(model).__name__, got="no map with learned functions", hint="Blocks with edges='mlp' have none.")
    return SymbolicFits(found, getattr(stats, "header", None))


def fit_module(
    module: EdgeFunctions | KANLinear, seen: ChannelStats, *, library: Iterable[str] | None = None, node_std: Tensor | None = None, **tolerances: float
) -> MapFits:
    """Fits all functions of one module, with the statistics of its inputs; see `fit_symbolic`.

    Without `node_std` (out,) the nodes' deviations come from the edges' variances.
    """
    points = make_points(module, seen, type(module).__name__)
    chosen = every(module)
    scale = node_scale(None, None, "", module, points, node_std)
    return fit_map(module, points, chosen, choose(library), Tolerances(**tolerances), scale, where=type(module).__name__, tokens=seen.count)


@torch.no_grad()
def fit_map(
    module: EdgeFunctions | KANLinear,
    points: Points,
    chosen: Chosen,
    families: Sequence[Family],
    tolerances: Tolerances,
    scale: NodeScale,
    *,
    where: str,
    tokens: int = 0,
) -> MapFits:
    """Fits the chosen functions of one map, a few inputs at a time, on the module's device."""
    if module.kan_formulas is not None:
        raise ConfigError("fit formulas", subject=where, got="functions that were replaced by formulas already", hint="Take them back first: unsnap(model).")
    device = module.kan_coef.device
    keep = len(chosen) * len(families) * 5 <= _KEPT
    parts: list[dict[str, Tensor]] = []
    base_points = apply_base(module.base, points.all_x().to(device))
    local = points.to(device)
    base = base_label(module.base)
    for edges in _chunks(chosen.input):
        here = Chosen(chosen.input[edges], chosen.output[edges])
        values = values_at(module, points, here)
        if not bool(values.isfinite().all()):
            raise DataError("fit formulas", subject=where, got="functions that are not finite", hint="Look at the coefficients and the base function.")
        rows = here.input.to(device)
        fitted = fit_candidates(values, base_points, local, rows, families, tolerances.tie, label_family(base))
        node, weighting = scale.of(here)
        parts.append(
            {
                name: value.cpu()
                for name, value in outcomes.decide(fitted, values, node.to(device), weighting.to(device), tolerances, keep, label_family(base)).items()
            }
        )
    joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    x = points.centre.unsqueeze(1) + points.scale.unsqueeze(1) * points.nodes[:, :NODES]
    return MapFits(
        path="",
        map="",
        shared=isinstance(module, EdgeFunctions),
        base=base,
        families=tuple(family.name for family in families),
        complexities=tuple(family.complexity for family in families),
        input=chosen.input,
        output=chosen.output,
        low=points.low[chosen.input],
        high=points.high[chosen.input],
        nodes=x,
        candidates=joined.pop("candidates", None),
        tokens=tokens,
        n_functions=len(every(module)),
        node_source=scale.source,
        settings=dict(vars(tolerances)),
        **joined,
    )


def every(module: EdgeFunctions | KANLinear) -> Chosen:
    """All functions of a map."""
    if isinstance(module, EdgeFunctions):
        return Chosen(torch.arange(module.groups), torch.full((module.groups,), -1))
    inputs, outputs = torch.arange(module.in_features), torch.arange(module.out_features)
    return Chosen(inputs.repeat_interleave(len(outputs)), outputs.repeat(len(inputs)))


def _layers(model: nn.Module, stats: Mapping[str, LayerStats] | LayerStats, layer) -> Iterator[tuple[Any, LayerStats]]:
    if isinstance(stats, LayerStats) or (layer is not None and isinstance(layer, str | int)):
        yield find_layer(model, stats, layer)
        return
    for path in stats if layer is None else layer:
        block, seen = find_layer(model, stats, path)
        if layer is not None or (seen.maps and seen.tokens):
            yield block, seen


def _chosen(block, seen: LayerStats, name: str, module: EdgeFunctions | KANLinear, edges: Edges) -> Chosen:
    if edges is None:
        return every(module)
    if isinstance(edges, int):
        if edges < 1:
            raise ConfigError("choose edges", subject=f"{seen.path}, {name}", got=f"edges={edges}", expected="at least 1")
        ranked = first_by_loss(seen, name, edges) or score_layer(block, seen, top=edges)[name]
        return _sorted(ranked.input, ranked.output)
    try:
        wanted = torch.as_tensor(edges if isinstance(edges, Tensor) else list(edges), dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError("choose edges", got=repr(edges)[:100], expected="a number, groups, or pairs (input, output)") from error
    shared, limits = isinstance(module, EdgeFunctions), (module.groups,) if isinstance(module, EdgeFunctions) else (module.in_features, module.out_features)
    wanted = wanted.reshape(-1, 1) if shared and wanted.dim() == 1 else wanted
    if wanted.dim() != 2 or wanted.shape[1] != len(limits) or not len(wanted):
        got = f"{tuple(wanted.shape)} numbers"
        raise ConfigError("choose edges", subject=f"{seen.path}, {name}", got=got, expected="groups" if shared else "pairs (input, output), one at least")
    bad = (wanted < 0) | (wanted >= torch.tensor(limits))
    if bool(bad.any()):
        first = tuple(wanted[bad.any(1)][0].tolist())
        raise ConfigError("choose edges", subject=f"{seen.path}, {name}", got=f"edge {first}", expected=f"numbers below {limits}")
    wanted = wanted.unique(dim=0)
    return _sorted(wanted[:, 0], torch.full((len(wanted),), -1) if shared else wanted[:, 1])


def _sorted(inputs: Tensor, outputs: Tensor) -> Chosen:
    order = (inputs * (int(outputs.max()) + 2) + outputs).argsort()
    return Chosen(inputs[order], outputs[order])


def _chunks(inputs: Tensor) -> Iterator[slice]:
    """Runs of whole inputs with about `CHUNK` functions, or parts of one input that has more."""
    _, counts = inputs.unique_consecutive(return_counts=True)
    start = stop = 0
    for count in counts.tolist():
        if stop > start and stop + count - start > CHUNK:
            yield slice(start, stop)
            start = stop
        stop += count
        while stop - start > CHUNK:
            yield slice(start, start + CHUNK)
            start += CHUNK
    if stop > start:
        yield slice(start, stop)
