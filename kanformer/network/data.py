"""Samples and targets as tensors that a network can be fitted to, or an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kanformer.errors import DataError, ShapeError
from kanformer.network.kan import KAN


@dataclass(frozen=True)
class Samples:
    """x (n, inputs) and y (n, outputs), or (n,) of class numbers, in the network's dtype and place."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


def samples_for(network: KAN, X: Any, y: Any, *, classes: bool = False, what: str = "training data") -> Samples:
    """Checked samples; y of one output may be (n,).

    Raises:
        ShapeError: widths or lengths that do not fit. DataError: no sample, one alone, or numbers that are not finite.
    """
    action, like = "fit a KAN", network.maps[0].kan_coef
    x = _tensor(X, like, f"X of the {what}")
    target = _tensor(y, like, f"y of the {what}", whole=classes)
    if x.dim() != 2 or x.shape[1] != network.in_features:
        raise ShapeError(action, subject=what, got=f"X of shape {tuple(x.shape)}", expected=f"(n, {network.in_features}), as width={network.width} says")
    if classes:
        if target.dim() != 1 or len(target) != len(x):
            raise ShapeError(action, subject=what, got=f"y of shape {tuple(target.shape)}", expected=f"class numbers ({len(x)},)")
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < network.out_features:
            raise DataError(
                action, subject=what, got=f"classes {int(target.min())} to {int(target.max())}", expected=f"0 to {network.out_features - 1}, an output each"
            )
    else:
        target = target.unsqueeze(1) if target.dim() == 1 and network.out_features == 1 else target
        if target.shape != (len(x), network.out_features):
            expected = f"({len(x)}, {network.out_features}), as X and width={network.width} say"
            raise ShapeError(action, subject=what, got=f"y of shape {tuple(target.shape)}", expected=expected)
    if len(x) < 2:
        raise DataError(action, subject=what, got=f"{len(x)} samples", expected="at least 2: grids need a range")
    for name, values in (("X", x), ("y", target)):
        bad = ~values.isfinite() if values.is_floating_point() else torch.zeros(len(values), dtype=torch.bool)
        if bool(bad.any()):
            rows = bad.flatten(1).any(1) if bad.dim() > 1 else bad
            first = int(rows.nonzero()[0])
            raise DataError(
                action, subject=what, got=f"{int(rows.sum())} of {len(x)} rows of {name} with NaN or infinity, the first row {first}", expected="finite numbers"
            )
    return Samples(x, target)


def _tensor(values: Any, like: Tensor, what: str, whole: bool = False) -> Tensor:
    try:
        found = values if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError("fit a KAN", subject=what, got=type(values).__name__, expected="an array of numbers", hint=str(error)) from error
    if found.is_complex():
        raise DataError("fit a KAN", subject=what, got=str(found.dtype), expected="real numbers")
    return found.detach().to(device=like.device, dtype=torch.long if whole else like.dtype)


def inputs_for(network: KAN, X: Any, action: str) -> Tensor:
    """Checked samples without targets, (n, inputs).

    Raises:
        ShapeError, DataError: see `samples_for`.
    """
    x = _tensor(X, network.maps[0].kan_coef, "X")
    if x.dim() != 2 or x.shape[1] != network.in_features:
        raise ShapeError(action, got=f"X of shape {tuple(x.shape)}", expected=f"(n, {network.in_features}), as width={network.width} says")
    if len(x) < 2 or not bool(x.isfinite().all()):
        raise DataError(action, got=f"{len(x)} samples, not all finite" if len(x) > 1 else f"{len(x)} samples", expected="at least 2, all finite")
    return x
