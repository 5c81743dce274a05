"""What is worth knowing of the learned functions while a model trains, from one forward pass: `FunctionNumbers`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.regularize import regularize
from kanformer.layers import EdgeFunctions, KANLinear
from kanformer.layers.grids import GridModule
from kanformer.ops.plain import without_autocast


class FunctionNumbers:
    """Watches the learned functions from now until `take`, and measures what passed through them; see `KANCallback` for the names.

    Args:
        model: a patched model, unwrapped.
        options: `nodes` of `kanformer.regularize`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self._stack = model, contextlib.ExitStack()
        self._penalty = self._stack.enter_context(regularize(model, l1=1.0, entropy=1.0, smoothness=1.0, **options))

    def close(self) -> None:
        """Stops watching."""
        self._stack.close()

    @torch.no_grad()
    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(numbers of the whole model, fraction of the values outside the grid by layer); stops watching."""
        self.close()
        counts: dict[str, list[Tensor]] = {}
        with without_autocast(torch.empty(0, device=next(self.model.parameters()).device)):
            for path, module, x, y in self._penalty.seen():
                found = _of_call(module, x, y)
                counts[path] = [old + new for old, new in zip(counts[path], found, strict=True)] if path in counts else found
            self._penalty()
        numbers = {path: [float(value) for value in values] for path, values in counts.items()}
        ran = [values for values in numbers.values() if values[3]]
        shares = [spline / max(spline + base, 1e-30) for spline, base, _, _ in ran]
        outside = {path: values[2] / values[3] for path, values in numbers.items() if values[3]}
        whole = {"kan_spline_share": sum(shares) / max(1, len(shares)), **{f"kan_{name}": float(value) for name, value in self._penalty.values.items()}}
        return whole, outside


def coefficient_norms(model: nn.Module, of: Callable[[nn.Parameter], Tensor | None]) -> float:
    """The 2-norm of `of` (the coefficients or their gradients) over all learned functions of a model, None counting as 0."""
    squares = [found.detach().float().square().sum() for module in functions_of(model) if (found := of(module.kan_coef)) is not None]
    return math.sqrt(sum(float(square) for square in squares))


def functions_of(model: nn.Module) -> list[GridModule]:
    """All learned functions of a model, each once."""
    return [module for module in model.modules() if isinstance(module, GridModule)]


def _of_call(module: KANLinear | EdgeFunctions, x: Tensor, y: Tensor) -> list[Tensor]:
    """Sums over the outputs of |spline part| and of |the rest but the bias|, and how many of how many inputs lie outside the grid, in float64."""
    if not x.shape[0]:
        return [torch.zeros((), dtype=torch.float64, device=x.device)] * 4
    spline = module.spline(x).float()
    rest = y.float() - spline
    if isinstance(module, KANLinear) and module.kan_bias is not None:
        rest = rest - module.kan_bias.float()
    lo, hi = (bound.repeat_interleave(x.shape[-1] // len(bound)) for bound in module.grid_bounds)
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    outside = ((values < lo) | (values > hi)).sum()
    return [part.double() for part in (spline.abs().sum(dtype=torch.float64), rest.abs().sum(dtype=torch.float64), outside, torch.tensor(x.numel()))]
