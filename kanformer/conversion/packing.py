"""A block's statistics as named tensors and back, bit for bit, also in the middle of a stream."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.conversion.affine import AffineMoments
from kanformer.conversion.statistics import ChannelRange, FFNStatistics

_RANGES = ("inputs", "preactivations", "hidden")
_VECTORS = ("total", "squares", "low", "high")
_AFFINE = ("gram", "cross", "squares")


def to_tensors(statistics: FFNStatistics) -> dict[str, Tensor]:
    """All of it on the CPU; of the Gram matrix the upper triangle row by row, h (h + 1) / 2 numbers of 8 bytes."""
    found: dict[str, Tensor] = {}
    for name in _RANGES:
        ranges: ChannelRange = getattr(statistics, name)
        found[f"{name}.count"] = torch.tensor(ranges.count)
        found[f"{name}.generator"] = ranges.sample.generator.get_state()
        found[f"{name}.keys"] = ranges.sample.keys
        if ranges.count:
            found |= {f"{name}.{vector}": getattr(ranges, vector) for vector in _VECTORS}
        if ranges.sample.rows is not None:
            found[f"{name}.rows"] = ranges.sample.rows
    if statistics.gram is not None:
        found["gram"] = pack_upper(statistics.gram)
    if statistics.affine is not None:
        found |= {f"affine.{name}": getattr(statistics.affine, name) for name in _AFFINE}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def from_tensors(name: str, tensors: dict[str, Tensor], *, gram: bool, affine: bool) -> FFNStatistics:
    """What `to_tensors` took apart, on the CPU.

    Raises:
        KeyError, ValueError, RuntimeError: a tensor is missing, or not of its shape.
    """
    statistics = FFNStatistics(name, gram, affine)
    for kind in _RANGES:
        ranges: ChannelRange = getattr(statistics, kind)
        ranges.count = int(tensors[f"{kind}.count"])
        ranges.sample.generator.set_state(tensors[f"{kind}.generator"])
        ranges.sample.keys, ranges.sample.rows = tensors[f"{kind}.keys"], tensors.get(f"{kind}.rows")
        if ranges.count:
            for vector in _VECTORS:
                setattr(ranges, vector, tensors[f"{kind}.{vector}"])
    if statistics.tokens and gram:
        statistics.gram = unpack_upper(tensors["gram"], statistics.hidden.total.numel())
    if statistics.tokens and affine:
        statistics.affine = AffineMoments(0, 0)
        for part in _AFFINE:
            setattr(statistics.affine, part, tensors[f"affine.{part}"])
    return statistics


def pack_upper(matrix: Tensor) -> Tensor:
    """The upper triangle (n (n + 1) / 2,) of a matrix (n, n), row by row, with the diagonal."""
    packed, at = matrix.new_empty(matrix.shape[0] * (matrix.shape[0] + 1) // 2), 0
    for row in range(matrix.shape[0]):
        length = matrix.shape[0] - row
        packed[at : at + length] = matrix[row, row:]
        at += length
    return packed


def unpack_upper(packed: Tensor, size: int) -> Tensor:
    """The matrix (size, size) with zeros below the diagonal.

    Raises:
        ValueError: another number of values.
    """
    if packed.numel() != size * (size + 1) // 2:
        raise ValueError(f"{packed.numel():,} numbers are no triangle of {size} rows")
    matrix, at = packed.new_zeros(size, size), 0
    for row in range(size):
        length = size - row
        matrix[row, row:] = packed[at : at + length]
        at += length
    return matrix
