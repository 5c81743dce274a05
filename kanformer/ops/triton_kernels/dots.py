"""Matrix products with one factor made in registers: where they pay, their tiles, and their precision."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kanformer.ops.triton_kernels.launch import INTERPRETED, cells, power_of_two

# Outputs up to which the basis is made inside the product. By the roofline of an H200 (perf.md, section 4; bf16, K = 11 in), writing and
# reading the basis takes as long as the bare GEMM has work for 350 outputs. A fused kernel saves that, but makes the basis again for every
# tile of 256 outputs (a quarter of the tensor cores' time) and reaches perhaps two thirds of cuBLAS. In units of a GEMM with 350 outputs,
# fused against materialised: 256 outputs 1.4 : 1.8, 512 outputs 2.8 : 2.5. So: as long as one tile takes all outputs.
WIDE = 256

_PROGRAMS = 256  # wanted of a launch: about two for each multiprocessor, so that one makes its basis while the other multiplies


class Tiles(NamedTuple):
    """`rows` x `outputs` sums of a program; 16-bit factors go to the tensor cores, wider ones (whose operands stay in registers) in smaller bits."""

    rows: int
    outputs: int
    depth: int

    @classmethod
    def of(cls, outputs: int, dtype: torch.dtype) -> Tiles:
        """Tiles that take all outputs at once, with factors of this dtype."""
        width = power_of_two(outputs, 16, WIDE)
        return cls(64, width, 32) if dtype.itemsize == 2 else cls(32, width, 16)


def is_narrow(x: Tensor, coef: Tensor) -> bool:
    """Whether the basis is made inside the product. Not in float64, whose products cuBLAS knows best."""
    return coef.shape[0] <= WIDE and torch.float64 not in (x.dtype, coef.dtype)


def splits_of(length: int, least: int, programs: int) -> int:
    """Into how many parts a sum over `length` is split, each of `least` terms or more, to have programs enough. Depends on the shapes only."""
    return max(1, min(length // least, cells(_PROGRAMS, max(1, programs))))


def precision_of(coef: Tensor) -> dict[str, Any]:
    """float32 products as torch's own are set to be; the interpreter cannot multiply bf16."""
    return {"PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee", "UPCAST": INTERPRETED and coef.dtype.itemsize == 2}


@triton.jit
def dot(a, b, total, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b, in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)
