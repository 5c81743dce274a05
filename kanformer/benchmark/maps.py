"""Single maps of full edges over their limit: the bare matrix products with in * (n_basis + 1) columns."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanformer.benchmark.race import TOLERANCE, Row, Runner, backend, check, race, step
from kanformer.errors import KanformerError
from kanformer.layers import KANLinear

LIMIT_SHAPES = ((384, 1536, 2048), (1536, 384, 2048))  # in, out, tokens: wide and narrow
DECODE_SHAPES = ((768, 3072, 5), (3072, 768, 5), (768, 3072, 16), (3072, 768, 16))  # in, out, grid_size


def make_map(features: int, outputs: int, grid_size: int, dtype: torch.dtype, device: str) -> KANLinear:
    """A map with trained-looking functions."""
    layer = KANLinear(features, outputs, grid_size=grid_size)
    nn.init.normal_(layer.kan_coef, std=0.05)
    return layer.to(device, dtype)


def measure_limit(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int, paths: tuple[str, ...], device: str = "cpu") -> list[Row]:
    """Forward and backward of a full-width map; the limit multiplies numbers that are there already."""
    features, outputs, tokens = shape
    layer = make_map(features, outputs, 5, dtype, device)
    x, grad = torch.randn(tokens, features, device=device).to(dtype).requires_grad_(), torch.randn(tokens, outputs, device=device).to(dtype)
    columns = features * (layer.basis.n_basis + 1)
    basis, weight = torch.randn(tokens, columns, device=device).to(dtype), torch.randn(outputs, columns, device=device).to(dtype)

    def limit() -> list[Tensor]:
        return [F.linear(basis, weight), grad @ weight, grad.t() @ basis]

    runners = [Runner("bare GEMMs", "-", limit)]
    for path in paths:
        call = step(layer, x, grad)
        with backend(path):
            check("full edges", layer, x, grad, call())
        runners.append(Runner("full edges", path, call))
    return race("limit", f"{features} > {outputs} x {tokens}", dtype, runners, rounds)


@torch.no_grad()
def measure_decode(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int, device: str = "cpu") -> list[Row]:
    """One token through a full-width map, over the bare product of a vector with all its numbers."""
    features, outputs, grid_size = shape
    layer = make_map(features, outputs, grid_size, dtype, device)
    x = torch.randn(1, features, device=device).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    error = float((layer(x).double() - exact).norm() / exact.norm())
    if not error <= TOLERANCE[dtype]:
        raise KanformerError("time a path", subject="one token", got=f"an error of {error:.1e} against float64", expected=f"at most {TOLERANCE[dtype]:g}")
    columns = features * (layer.basis.n_basis + 1)
    basis, weight = torch.randn(1, columns, device=device).to(dtype), torch.randn(outputs, columns, device=device).to(dtype)
    runners = [Runner("bare GEMV", "-", lambda: F.linear(basis, weight)), Runner("one token", "eager", lambda: layer(x))]
    return race("decode", f"{features} > {outputs}, G={grid_size}", dtype, runners, max(rounds, 25))
