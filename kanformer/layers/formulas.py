"""Learned functions that were replaced by formulas: c * f(a * (x - t)) + e * x + d, all of one family in one operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.errors import ConfigError, ShapeError
from kanformer.layers.formula_functions import formula_function
from kanformer.ops.reference import work_dtype

if TYPE_CHECKING:
    from kanformer.layers.grids import GridModule

NUMBERS = ("a", "t", "c", "e", "d")
_STRAIGHT = ("const", "x")  # all in e and d
_FUNCTION = {"base": None, "base_x": None, "cubic": "x^3"}  # families whose name is not their function's; None: the module's own base
_EDGES_AT_ONCE = 4096


class Formulas(nn.Module):
    """The formulas of one map, in the alphabetic order of their families.

    Args:
        families: how many formulas there are of each family: "const", "x", "base" and "base_x" (f is the base b, a = 1, t = 0), "cubic"
            (f is x^3), or the name of a `formula_function`.
        width: numbers that name a function: 1 (its group, shared edges) or 2 (input and output, full edges).
        trainable: whether a, t, c, e, d are parameters; else they are buffers.
        dtype: of the numbers, float32 or float64.

    State: `kan_index` (n, width) int64, `kan_numbers` (5, n): a, t, c, e, d, kept in float32 when the model is cast to less.
    """

    kan_index: Tensor
    kan_numbers: Tensor

    def __init__(self, families: Mapping[str, int], width: int, *, trainable: bool = False, device=None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, count in families.items():
            if name not in _STRAIGHT and (function := _FUNCTION.get(name, name)) is not None:
                formula_function(function)
            if type(count) is not int or count < 1:
                raise ConfigError("make formulas", subject=name, got=f"{count!r} of them", expected="an integer >= 1")
        self.families = dict(sorted(families.items()))  # config.json does not keep an order
        self.width, self.trainable = width, trainable
        count = sum(families.values())
        self.register_buffer("kan_index", torch.zeros(count, width, dtype=torch.int64, device=device))
        numbers = torch.zeros(len(NUMBERS), count, dtype=dtype, device=device)
        if trainable:
            self.kan_numbers = nn.Parameter(numbers)
        else:
            self.register_buffer("kan_numbers", numbers)

    def __len__(self) -> int:
        return self.kan_index.shape[0]

    def parts(self) -> list[tuple[str, slice]]:
        """(family, where its formulas lie)."""
        found, start = [], 0
        for name, count in self.families.items():
            found.append((name, slice(start, start + count)))
            start += count
        return found

    def check(self, rows: tuple[int, ...]) -> None:
        """Raises ShapeError unless every index names another function of a map with `rows` inputs (and outputs), and all numbers are finite."""
        index = self.kan_index
        limits = torch.tensor(rows, device=index.device)
        if bool(((index < 0) | (index >= limits)).any()) or len(index.unique(dim=0)) != len(index):
            raise ShapeError("read formulas", got="an index that names no function, or one twice", expected=f"different ones below {rows}")
        if not bool(self.kan_numbers.isfinite().all()):
            raise ShapeError("read formulas", got="numbers that are not finite")

    def grouped(self, x: Tensor, base: nn.Module) -> Tensor:
        """The formulas' values at x (..., n, channels per group), in x's shape and dtype."""
        dtype = work_dtype(x)
        wide = x.to(dtype)
        a, t, c, e, d = (row.unsqueeze(-1) for row in self.kan_numbers.to(dtype))
        pieces = []
        for part, function in self._curved(base):
            piece = e[part] * wide[..., part, :] + d[part]
            pieces.append(piece if function is None else piece + c[part] * function(a[part] * (wide[..., part, :] - t[part])))
        return torch.cat(pieces, -2).to(x.dtype)

    def summed(self, x: Tensor, outputs: int, base: nn.Module) -> Tensor:
        """sum over the formulas of each output of their values at x (..., inputs): (..., outputs). Full edges only."""
        dtype = work_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        source, target = self.kan_index.unbind(1)
        a, t, c, e, d = self.kan_numbers.to(dtype)
        constant = torch.zeros(outputs, dtype=dtype, device=x.device).index_add(0, target, d)
        y = F.linear(flat, _matrix(target, source, e, outputs, x.shape[-1]), constant)
        for (part, function), (name, _) in zip(self._curved(base), self.parts(), strict=True):
            if function is None:
                continue
            if name in ("base", "base_x"):
                y = y + F.linear(function(flat), _matrix(target[part], source[part], c[part], outputs, x.shape[-1]))
                continue
            for some in _split(part):
                values = c[some] * function(a[some] * (flat.index_select(1, source[some]) - t[some]))
                y = y.index_add(1, target[some], values)
        return y.view(*x.shape[:-1], outputs)

    def values(self, which: int, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The formula at place `which` of `kan_index`, at any x, in float64."""
        name = next(name for name, part in self.parts() if part.start <= which < part.stop)
        a, t, c, e, d = self.kan_numbers[:, which].double()
        y = e * x + d
        if name in _STRAIGHT:
            return y
        return y + c * _function(name, base)(a * (x - t))

    def _curved(self, base: nn.Module) -> list:
        return [(part, None if name in _STRAIGHT else _function(name, base)) for name, part in self.parts()]

    def _apply(self, fn, recurse: bool = True):
        before = self.kan_numbers
        super()._apply(fn, recurse)
        now = self.kan_numbers
        if now.dtype.itemsize < 4 and (now.is_meta or not before.is_meta):
            kept = before.detach().to(device=now.device, dtype=torch.float32)
            if isinstance(now, nn.Parameter):
                now.data = kept
            else:
                self.kan_numbers = kept
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {count}" for name, count in self.families.items()) + (", trainable" if self.trainable else "")


def _function(name: str, base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    function = _FUNCTION.get(name, name)
    return base if function is None else formula_function(cast(str, function)).value


def _matrix(target: Tensor, source: Tensor, values: Tensor, outputs: int, inputs: int) -> Tensor:
    """(outputs, inputs) with the values at their edges and 0 elsewhere."""
    flat = torch.zeros(outputs * inputs, dtype=values.dtype, device=values.device)
    return flat.index_add(0, target * inputs + source, values).view(outputs, inputs)


def _split(part: slice) -> list[slice]:
    return [slice(start, min(start + _EDGES_AT_ONCE, part.stop)) for start in range(part.start, part.stop, _EDGES_AT_ONCE)]


@torch.no_grad()
def make_formulas(
    index: Tensor, numbers: Tensor, family: Tensor, names: Sequence[str], *, trainable: bool = False, device=None, dtype: torch.dtype = torch.float32
) -> Formulas:
    """The formulas that stand at `index` (n, width) with `numbers` (n, 5), each of the family `names[family]`."""
    alphabetic = torch.tensor([sorted(names).index(name) for name in names])
    order = alphabetic[family].argsort(stable=True)
    counts = {names[code]: count for code, count in enumerate(torch.bincount(family, minlength=len(names)).tolist()) if count}
    made = Formulas(counts, index.shape[1], trainable=trainable, device=device, dtype=dtype)
    made.kan_index.copy_(index[order])
    made.kan_numbers.copy_(numbers[order].t())
    return made


@contextlib.contextmanager
def formulas_out(modules: Iterable[GridModule]) -> Iterator[None]:
    """Learned functions everywhere instead of their formulas, for a while."""
    held = [(module, module.kan_formulas) for module in modules]
    try:
        for module, _ in held:
            module.kan_formulas = None
        yield
    finally:
        for module, formulas in held:
            module.kan_formulas = formulas
