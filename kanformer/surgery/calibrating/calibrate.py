"""Running calibration batches through a model and gathering what its blocks see."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion import FFNStatistics
from kanformer.conversion.batches import run_batches, select_tokens, token_mask
from kanformer.conversion.error_curve import ErrorCurve, error_curve
from kanformer.conversion.processes import several, together
from kanformer.errors import DataError, NoFeedForwardError
from kanformer.surgery.assemble import block_paths, dense_blocks
from kanformer.surgery.calibrating.calibration import BlockForm, Calibration
from kanformer.surgery.calibrating.importance import measure_importance
from kanformer.surgery.calibrating.run_state import Run
from kanformer.surgery.finding.discover import find_sites
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.finding.spec import FFNSpec


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    gram: bool = True,
    linear: bool = True,
    importance_batches: int = 0,
    specs: Sequence[FFNSpec] | None = None,
    run: Run | None = None,
) -> Calibration:
    """Gathers, in one streaming pass, what `patch_model(model, calibration=...)` needs to know of the data, and each block's numbers.

    Under torch.distributed all processes must call it, each with its own share of the data: each gets the statistics of all of it.

    Args:
        model: an unpatched model; it is left as it was.
        batches: dicts of model inputs; padding (attention_mask 0) is ignored.
        gram: whether to gather Gram matrices of the hidden channels, (h, h) float64 per block, which pruning needs.
        linear: whether to gather what the linear share needs, (d + 1, 2 d + 1) float64 per block.
        importance_batches: on how many of the batches (the first ones, which are kept) the importance of every block is measured, running the model
            once for each block; with gram=True the error curve of every block's pruning is measured too, for `ratios_from_importance`. 0: neither.
        specs: descriptions of blocks that kanformer does not know; they come first, and what it knows applies to the rest.
        run: where the state is kept while it runs, so that it can go on after a crash (`kanformer calibrate`).

    Raises:
        NoFeedForwardError: no block found. DataError: no tokens, or inputs that are not finite.
    """
    seen = find_sites(model, specs)
    sites = [site for site in seen if site.problem() is None]
    if seen and not sites:
        raise NoFeedForwardError("calibrate", subject=type(model).__name__, got=f"no block that can be read: {seen[0].path}: {seen[0].problem()}")
    found = _empty(model, sites, gram=gram, linear=linear)
    done = 0 if run is None else run.start(found, sites)
    first: list[Mapping[str, Any]] = []
    stream: Iterable[Any] = [batches] if isinstance(batches, Mapping) else batches
    collect_into(found.statistics, model, sites, _fresh(stream, done, first, importance_batches), None if run is None else run.after_batch)
    if run is not None:
        run.after_stream()
    if importance_batches and sites:
        known = {} if run is None else run.importance()
        note = (lambda path, value: None) if run is None else run.after_block
        found.importance.update(measure_importance(model, sites, first, known, note))
        found.curves.update(_curves(sites, found.statistics) if gram else {})
    return found


def collect_statistics(model: nn.Module, sites: Sequence[Site], batches: Iterable[Mapping[str, Any]], *, gram: Collection[str]) -> dict[str, FFNStatistics]:
    """Statistics of these sites by `block_paths`, see `collect_into`.

    Args:
        gram: paths of the blocks whose Gram matrices of the hidden channels, (h, h) float64, are gathered.
    """
    statistics = {path: FFNStatistics(path, site.path in gram) for site in sites for path in block_paths(site)}
    collect_into(statistics, model, sites, batches)
    return statistics


def collect_into(
    statistics: dict[str, FFNStatistics],
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Any]],
    after: Callable[[int], None] | None = None,
) -> None:
    """One streaming pass, in eval mode and without gradients; the model is afterwards as before.

    Under torch.distributed all processes must call it, each with its own share of the data: each gets the statistics of all of it.

    Args:
        statistics: by `block_paths` of the sites, added to. An expert that no token reached has none: its grids stay as configured, and a warning says so.
        batches: dicts of model inputs; padding (attention_mask 0) is ignored.
        after: called with the number of batches after each.

    Raises:
        DataError: no batch, no unmasked token, or an input that is not finite.
    """
    names = {site: block_paths(site) for site in sites}
    batch: dict[str, Any] = {}

    def note(number: int) -> bool:
        if after is not None:
            after(number)
        return False

    handles = [_watch(site, [statistics[path] for path in paths], batch) for site, paths in names.items()]
    try:
        together("calibrate", lambda: run_batches(model, batches, batch, note))
    finally:
        for handle in handles:
            handle.remove()
    if several():
        for site in names:
            for path, dense in dense_blocks(site).items():
                statistics[path].all_reduce(dense)
    empty = [site.path for site, paths in names.items() if not any(statistics[path].tokens for path in paths)]
    if empty:
        raise DataError("calibrate", subject=", ".join(empty[:4]), got="no tokens", hint="The batches are empty, fully masked, or never reach these blocks.")
    idle = [path for path, gathered in statistics.items() if gathered.tokens == 0]
    if idle:
        warnings.warn(f"no calibration token reached {len(idle)} of {len(statistics)} blocks: experts such as {idle[0]}. Use more data.", stacklevel=3)


def _empty(model: nn.Module, sites: Sequence[Site], *, gram: bool, linear: bool) -> Calibration:
    statistics, forms = {}, {}
    for site in sites:
        for path, dense in dense_blocks(site).items():
            statistics[path], forms[path] = FFNStatistics(path, gram, linear), BlockForm.of(dense)
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    return Calibration(statistics, gram, forms, model_class=type(model).__name__, base_model=str(name or ""))


def _fresh(batches: Iterable[Mapping[str, Any]], done: int, first: list[Mapping[str, Any]], keep: int) -> Iterator[Mapping[str, Any]]:
    """The batches from number `done` on; the first `keep` of all go into `first`."""
    for number, batch in enumerate(batches):
        if number < keep:
            first.append(batch)
        if number >= done:
            yield batch


def _curves(sites: Sequence[Site], statistics: dict[str, FFNStatistics]) -> dict[str, ErrorCurve]:
    """The error curves of all blocks that can be pruned and saw tokens."""
    pairs = [pair for site in sites for pair in dense_blocks(site).items()]
    return {path: error_curve(dense, statistics[path]) for path, dense in pairs if dense.hidden_norm is None and statistics[path].tokens}


def _watch(site: Site, statistics: list[FFNStatistics], batch: dict[str, Any]) -> Any:
    """Registers a hook that adds what arrives at the block, or at each of its experts."""
    denses = site.denses()

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0].movedim(1, -1) if denses[0].channels_first else args[0]
        if not site.spec.experts:
            statistics[0].update(denses[0], select_tokens(x, batch, site.path))
            return
        mask = token_mask(x, batch, site.path)
        for gathered, dense, rows in zip(statistics, denses, _shares(site, (*args[1:], *kwargs.values()), x, len(denses)), strict=True):
            gathered.update(dense, x.reshape(-1, x.shape[-1])[rows if mask is None or site.spec.experts == "sorted" else rows & mask])

    return (site.owner if site.spec.experts else site.up).register_forward_pre_hook(look, with_kwargs=True)


def _shares(site: Site, routing: tuple, x: Tensor, experts: int) -> Iterator[Tensor]:
    """For every expert which tokens it gets, (tokens,) booleans."""
    tokens = x.numel() // x.shape[-1]
    everyone = torch.ones(tokens, dtype=torch.bool, device=x.device)
    for number in range(experts):
        if site.spec.experts == "weighted":
            yield everyone
        elif site.spec.experts == "sorted":
            yield torch.arange(tokens, device=x.device) // (tokens // experts) == number
        else:
            yield (routing[0] == number).any(-1)
