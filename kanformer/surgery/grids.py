"""Moving, refining and checking the grids of all learned functions of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.batches import run_batches, select_tokens
from kanformer.conversion.histogram import ChannelRecorder
from kanformer.conversion.processes import reduced, take_over, together
from kanformer.errors import ConfigError, DataError, NoFeedForwardError
from kanformer.layers.density import warn_outside
from kanformer.layers.grids import GridModule
from kanformer.layers.regrid import GridReport, Regrid, plan_refinement, plan_update
from kanformer.surgery.record import find_records, set_record

Batches = Iterable[Mapping[str, Any]]


def update_grids(
    model: nn.Module, batches: Batches, *, grid_eps: float = 0.02, margin: float = 0.01, tolerance: float | None = 1e-5, max_tokens: int | None = None
) -> dict[str, GridReport]:
    """Moves every grid onto the data that reach it and refits the coefficients in place, all of them or none; see `GridModule.update_grid`.

    One streaming pass in eval mode without gradients: padding (attention_mask 0) is ignored, memory does not grow with the data. Warns where
    afterwards more than 5 % of a layer's values lie outside its grid. Parameters stay the same objects, so an optimizer goes on (its
    moments belong to the old coefficients). Under torch.distributed all processes must call it on the unwrapped model, each with its own share
    of the data: all end with the same grids and coefficients, made from all of it.

    Args:
        model: a patched model, or any module with `KANLinear` or `EdgeFunctions` in it.
        batches: mappings of the model's inputs, moved to its device; a single mapping is one batch.
        grid_eps, margin, tolerance: see `GridModule.update_grid`.
        max_tokens: stop after this many tokens per layer and process; None means all.

    Returns:
        A report per layer, by its path.

    Raises:
        NoFeedForwardError: no learned functions in the model. DataError: no tokens, or values that are not finite.
        ConfigError: a wrong setting, or a fit that changes a function by more than `tolerance`. The model is then as it was.
    """
    modules = _grid_modules(model, "update the grids")
    recorders = {path: ChannelRecorder(channels, module.kan_grid.shape[0], *module.grid_bounds) for path, module, channels in modules}
    _stream("update the grids", model, modules, batches, max_tokens, {path: recorder.add for path, recorder in recorders.items()})

    def plan() -> list[Regrid]:
        options = {"grid_eps": grid_eps, "margin": margin, "tolerance": tolerance}
        return [plan_update(module, recorders[path].finish().as_density(), name=path, **options) for path, module, _ in modules]

    for recorder in recorders.values():
        recorder.all_reduce()
    _check_seen("update the grids", {path: recorder.moments.count for path, recorder in recorders.items()})
    plans = together("update the grids", plan)
    reports = {path: planned.apply() for (path, _, _), planned in zip(modules, plans, strict=True)}
    for path, module, _ in modules:
        take_over(module.kan_grid)
        take_over(module.kan_coef)
        warn_outside(path, reports[path].outside_after)
    return reports


def refine_grids(model: nn.Module, grid_size: int, *, tolerance: float | None = 1e-6) -> dict[str, GridReport]:
    """Gives every learned function a grid of `grid_size` intervals over the same range, all of them or none; see `GridModule.refine_grid`.

    The coefficients become new parameters: make the optimizer again after it. `save_pretrained` stores the new grid size.

    Args:
        model: a patched model, or any module with `KANLinear` or `EdgeFunctions` in it.
        grid_size: G', at least the present one; a multiple of it keeps B-splines exactly.
        tolerance: largest relative change of a function, root mean square over its range; None accepts the nearest fit.

    Returns:
        A report per layer, by its path.

    Raises:
        NoFeedForwardError: no learned functions in the model. ConfigError: G' too small, a basis without a grid, or a change beyond
        `tolerance`. The model is then as it was.
    """
    modules = _grid_modules(model, "refine the grids")
    plans = [plan_refinement(module, grid_size, tolerance=tolerance, name=path) for path, module, _ in modules]
    before = [(module, module.kan_coef, module.kan_grid, module.basis) for _, module, _ in modules]
    try:
        reports = {path: planned.apply() for (path, _, _), planned in zip(modules, plans, strict=True)}
        for holder, record in find_records(model):
            record.sites = tuple(dataclasses.replace(site, config=site.config.replace(grid_size=grid_size)) for site in record.sites)
            set_record(holder, record)
    except BaseException:
        for module, coef, grid, basis in before:
            module.kan_coef, module.kan_grid, module.basis = coef, grid, basis
        raise
    for _, module, _ in modules:
        take_over(module.kan_coef)
    return reports


def outside_fractions(model: nn.Module, batches: Batches, *, max_tokens: int | None = None) -> dict[str, float]:
    """Which fraction of the values that reach each layer's learned functions lies outside its grid. Warns above 5 %; changes nothing.

    The pass, `batches`, `max_tokens`, several processes and errors are as with `update_grids`.

    Returns:
        Fractions in [0, 1] by the layer's path.
    """
    modules = _grid_modules(model, "look at the grids")
    counts = {path: torch.zeros(2, dtype=torch.int64) for path, _, _ in modules}  # outside, all

    def counter(path: str, module: GridModule, channels: int) -> Callable[[Tensor], None]:
        lo, hi = (bound.repeat_interleave(channels // len(bound)) for bound in module.grid_bounds)

        def add(rows: Tensor) -> None:
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            counts[path] += torch.tensor([int(((rows < lo) | (rows > hi)).sum()), rows.numel()])

        return add

    _stream("look at the grids", model, modules, batches, max_tokens, {path: counter(path, module, channels) for path, module, channels in modules})
    totals = {path: reduced(count).tolist() for path, count in counts.items()}
    _check_seen("look at the grids", {path: total[1] for path, total in totals.items()})
    fractions = {path: total[0] / total[1] for path, total in totals.items()}
    for path, fraction in fractions.items():
        warn_outside(path, fraction)
    return fractions


_Modules = list[tuple[str, GridModule, int]]


def _grid_modules(model: nn.Module, action: str) -> _Modules:
    """(path, module, channels) of all learned functions, each once."""
    found = [(path, module, module.grid_channels) for path, module in model.named_modules() if isinstance(module, GridModule)]
    if not found:
        raise NoFeedForwardError(action, subject=type(model).__name__, got="no learned functions in it", hint="Patch it first: kanformer.patch_model(model).")
    return found


def _stream(action: str, model: nn.Module, modules: _Modules, batches: Batches, max_tokens: int | None, take: dict[str, Callable[[Tensor], None]]) -> None:
    """Runs the model over the batches; `take` gets the rows (tokens, channels) that reach each module, without padding."""
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(action, got=f"max_tokens={max_tokens}", expected="None or at least 1")
    batch: dict[str, Any] = {}
    counts = dict.fromkeys(take, 0)

    def watch(path: str, module: GridModule):
        def hook(module: nn.Module, args: tuple) -> None:
            rows = select_tokens(args[0].detach(), batch, path)
            rows = rows if max_tokens is None else rows[: max_tokens - counts[path]]
            if not rows.shape[0]:
                return
            if not bool(rows.isfinite().all()):
                raise DataError(
                    action, subject=path, got="NaN or infinity in its input", hint="Look at the weights of the layers before it and at the batches."
                )
            counts[path] += rows.shape[0]
            take[path](rows)

        return module.register_forward_pre_hook(hook)

    handles = [watch(path, module) for path, module, _ in modules]
    try:
        together(action, lambda: run_batches(model, batches, batch, lambda _: max_tokens is not None and min(counts.values()) >= max_tokens))
    finally:
        for handle in handles:
            handle.remove()


def _check_seen(action: str, counts: dict[str, int]) -> None:
    empty = [path for path, count in counts.items() if not count]
    if empty:
        raise DataError(action, subject=", ".join(empty[:4]), got="no tokens", hint="The batches are empty, fully masked, or never reach these layers.")
