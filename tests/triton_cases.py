"""The cases of the Triton kernels. `test_triton.py` runs them in a process of their own: on the GPU if there is one, and on triton's interpreter,
which has to be chosen before triton is imported. By hand: TRITON_INTERPRET=1 pytest tests/triton_cases.py"""

from __future__ import annotations

import copy
import math
import os
from typing import NamedTuple

import pytest
import torch

from kanformer import KANConfig, KANFeedForward, use_backend
from kanformer.bases import make_basis
from kanformer.ops.reference import reference_edge_functions, reference_full_edges
from kanformer.ops.triton_kernels import (
    full_edges,
    full_gradients,
    full_values,
    shared_gradients,
    shared_values,
    supports,
    wide_edges,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_hardware = pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")

BASES = {
    "degree 1": ("bspline", 3, 1),
    "degree 2, one cell": ("bspline", 1, 2),
    "cubic": ("bspline", 8, 3),
    "degree 5": ("bspline", 3, 5),
    "rational": ("rational", 1, 1),
}
each_basis = pytest.mark.parametrize("basis", [make_basis(*basis) for basis in BASES.values()], ids=BASES)
EITHER = {"cubic": make_basis("bspline", 3, 3), "rational": make_basis("rational")}
either_basis = pytest.mark.parametrize("basis", EITHER.values(), ids=EITHER)

# Largest error of a tensor relative to its norm. In bf16 half a unit in the last place is 2e-3; the basis of full edges is rounded as well.
FP32, BF16, FP64 = 1e-5, 6e-3, 1e-12


class Problem(NamedTuple):
    """The arguments of the four functions, on the device, and the gradient of the output."""

    x: torch.Tensor
    start: torch.Tensor
    coef: torch.Tensor
    grid: torch.Tensor
    inner: torch.Tensor | None
    grad: torch.Tensor

    def double(self) -> Problem:
        return Problem(*(None if tensor is None else tensor.detach().cpu().double() for tensor in self))


def problem(basis, tokens, channels, rows, outputs=None, dtype=torch.float32, coef_dtype=None) -> Problem:
    """Inputs in and around the grids; denominators with negative, positive and zero numbers."""
    lo = -1.5 * torch.rand(rows, dtype=torch.float64) - 0.5
    grid = basis.make_grid(lo, lo + 2 + torch.rand(rows, dtype=torch.float64))
    shape = (rows, basis.n_basis) if outputs is None else (outputs, basis.n_basis, channels)
    width = outputs or channels
    inner = torch.randn(rows, basis.n_inner, dtype=torch.float64) if basis.n_inner else None
    tensors = torch.randn(tokens, channels) * 1.5, torch.randn(tokens, width), torch.randn(shape), grid, inner, torch.randn(tokens, width)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = dtype, dtype, coef_dtype or (precise if outputs is None else dtype), precise, precise, dtype
    return Problem(*(None if tensor is None else tensor.to(DEVICE, wanted) for tensor, wanted in zip(tensors, dtypes, strict=True)))


def exact(reference, p: Problem, basis) -> list[torch.Tensor]:
    """Output and gradients of x, coef and inner in float64, by autograd through the plain definition."""
    p = p.double()
    leaves = [tensor.requires_grad_() for tensor in (p.x, p.coef, p.inner) if tensor is not None]
    y = reference(p.x, p.coef, p.grid, basis, p.inner, p.start)
    return [y.detach(), *torch.autograd.grad(y, leaves, p.grad)]


def found(values, gradients, p: Problem, basis) -> list[torch.Tensor]:
    y = values(p.x, p.start, p.coef, p.grid, p.inner, basis)
    assert y.dtype == p.start.dtype
    results = gradients(p.x, p.grad, p.coef, p.grid, p.inner, basis, True, True)
    assert results[0].dtype == p.x.dtype and results[1].shape == p.coef.shape
    assert (results[2] is None) == (p.inner is None)
    return [y, *(result for result in results if result is not None)]


def shared(p: Problem, basis) -> list[torch.Tensor]:
    return found(shared_values, shared_gradients, p, basis)


def full(p: Problem, basis) -> list[torch.Tensor]:
    return found(full_values, full_gradients, p, basis)


def close(got, want, *limits):
    """Every tensor within the limit on its norm-wise error, the last limit for the rest. Coefficients are about 1: so may be the norm of a tiny result."""
    for n, (one, other) in enumerate(zip(got, want, strict=True)):
        error, size = float((one.cpu().double() - other).norm()), max(1.0, float(other.norm()))
        assert error <= limits[min(n, len(limits) - 1)] * size, f"result {n}: error {error:.1e}, norm {size:.1e}"


# Shared edges.

LAYOUTS = [(1, 1, 1), (7, 33, 3), (33, 130, 2), (130, 33, 33), (130, 7, 1)]
each_layout = pytest.mark.parametrize(("tokens", "channels", "groups"), LAYOUTS)


@each_layout
@each_basis
def test_shared_edges_are_the_reference(basis, tokens, channels, groups):
    p = problem(basis, tokens, channels, groups)
    close(shared(p, basis), exact(reference_edge_functions, p, basis), FP32)


@pytest.mark.parametrize(("channels", "groups"), [(96, 2), (20, 20)])
@either_basis
def test_sums_over_many_programs_and_in_bf16(basis, channels, groups, monkeypatch):
    """Coefficients and inner numbers are float32: only x, y and their gradients are rounded."""
    monkeypatch.setattr(shared_edges_gradients(), "_STEPS", 2)
    p = problem(basis, 150, channels, groups, dtype=torch.bfloat16)
    close(shared(p, basis), exact(reference_edge_functions, p, basis), BF16, BF16, FP32)


def shared_edges_gradients():
    import importlib

    return importlib.import_module("kanformer.ops.triton_kernels.shared_gradients")


@either_basis
def test_shared_edges_in_float64(basis):
    p = problem(basis, 17, 40, 1, dtype=torch.float64)
    close(shared(p, basis), exact(reference_edge_functions, p, basis), FP64)


def test_a_denominator_of_zeros_can_leave_zero():
    basis = make_basis("rational")
    p = problem(basis, 33, 5, 5)
    p.inner[:, 1::2] = 0
    *_, grad_inner = shared(p, basis)
    q = p.double()
    *_, parts = basis.pullback(q.x, q.grad, q.coef.t(), basis.constants(q.grid, q.inner))
    close([grad_inner], [torch.stack([part.sum(0) for part in parts], -1)], FP32)


# Full edges: out 1, 7 and 40 in one product with the basis, 270 through memory.

SIZES = [(1, 1, 1), (7, 33, 7), (33, 7, 40), (33, 33, 270)]
each_size = pytest.mark.parametrize(("tokens", "channels", "outputs"), SIZES)


@each_size
@each_basis
def test_full_edges_are_the_reference(basis, tokens, channels, outputs):
    p = problem(basis, tokens, channels, channels, outputs)
    close(full(p, basis), exact(reference_full_edges, p, basis), FP32)


@pytest.mark.parametrize(("tokens", "channels"), [(130, 7), (7, 130)])
@either_basis
def test_full_edges_over_several_tiles(basis, tokens, channels):
    p = problem(basis, tokens, channels, channels, 7)
    close(full(p, basis), exact(reference_full_edges, p, basis), FP32)


@pytest.mark.parametrize("outputs", [7, 270])
@either_basis
def test_full_edges_in_bf16_also_with_float32_inputs(basis, outputs):
    for dtype in (torch.bfloat16, torch.float32):
        p = problem(basis, 70, 20, 20, outputs, dtype=dtype, coef_dtype=torch.bfloat16)
        close(full(p, basis), exact(reference_full_edges, p, basis), BF16)


@either_basis
def test_full_edges_in_float64(basis):
    p = problem(basis, 9, 7, 7, 5, dtype=torch.float64)
    close(full(p, basis), exact(reference_full_edges, p, basis), FP64)


@pytest.mark.parametrize("chunk", [1, 40_000])
@either_basis
def test_chunks_and_the_two_ways_to_full_edges_are_one_function(basis, chunk, monkeypatch):
    p = problem(basis, 11 if chunk == 1 else 150, 9, 9, 7)
    narrow = full(p, basis)
    monkeypatch.setattr(full_edges, "is_narrow", lambda x, coef: False)
    monkeypatch.setattr(wide_edges, "CHUNK_BYTES", chunk)
    close(full(p, basis), [tensor.cpu().double() for tensor in narrow], FP32)


def test_sums_that_are_split_over_programs():
    """Many channels of few tokens, and many tokens of few channels."""
    basis = make_basis("bspline", 1, 1)
    for tokens, channels in ((3, 300), (1100, 3)):
        p = problem(basis, tokens, channels, channels, 5, dtype=torch.bfloat16)
        close(full(p, basis), exact(reference_full_edges, p, basis), BF16)


# What both have in common.

KINDS = {
    "shared": (shared, shared_values, shared_gradients, None),
    "full": (full, full_values, full_gradients, 5),
    "wide": (full, full_values, full_gradients, 270),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@each_kind
@either_basis
def test_two_runs_are_bit_equal(basis, kind):
    p = problem(basis, 70, 34, 34 if kind[3] else 1, kind[3], dtype=torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(kind[0](p, basis), kind[0](p, basis), strict=True))


@each_kind
@either_basis
def test_only_what_is_asked_for(basis, kind):
    _, values, gradients, outputs = kind
    p = problem(basis, 6, 5, 5, outputs)
    whole = gradients(p.x, p.grad, p.coef, p.grid, p.inner, basis, True, True)
    x_only = gradients(p.x, p.grad, p.coef, p.grid, p.inner, basis, True, False)
    coef_only = gradients(p.x, p.grad, p.coef, p.grid, p.inner, basis, False, True)
    assert torch.equal(x_only[0], whole[0]) and x_only[1] is None
    assert torch.equal(coef_only[1], whole[1]) and coef_only[0] is None
    if p.inner is not None:  # whoever asks for neither may ask for these
        assert all(torch.equal(results[2], whole[2]) for results in (x_only, coef_only))
        assert gradients(p.x, p.grad, p.coef, p.grid, None, basis, True, True)[2] is None
    bare = values(p.x, None, p.coef, p.grid, p.inner, basis)
    torch.testing.assert_close(values(p.x, p.start, p.coef, p.grid, p.inner, basis), bare + p.start, rtol=1e-5, atol=1e-4)


@each_kind
@either_basis
def test_an_empty_batch(basis, kind):
    p = problem(basis, 0, 6, 6 if kind[3] else 3, kind[3])
    y, grad_x, *sums = kind[0](p, basis)
    assert y.shape == p.start.shape and grad_x.shape == p.x.shape
    assert all(float(total.abs().sum()) == 0 for total in sums)


@each_kind
@either_basis
def test_tensors_in_any_memory_layout(basis, kind):
    p = problem(basis, 8, 6, 6, kind[3])
    spread = Problem(*(None if t is None else torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in p))
    assert not spread.x.is_contiguous()
    assert all(torch.equal(one, other) for one, other in zip(kind[0](spread, basis), kind[0](p, basis), strict=True))


@each_kind
@either_basis
def test_nan_and_infinity_give_what_the_reference_gives_and_do_not_spread(basis, kind):
    p = problem(basis, 8, 4, 4, kind[3])
    clean = kind[0](p, basis)
    p.x[1, 2], p.x[4, 0], p.x[5, 1], p.x[6, 1] = math.nan, math.inf, -math.inf, 50.0
    y, grad_x, grad_coef, *grad_inner = kind[0](p, basis)
    reference = reference_full_edges if kind[3] else reference_edge_functions
    q = p.double()
    torch.testing.assert_close(y.cpu().double(), reference(q.x, q.coef, q.grid, basis, q.inner, q.start), equal_nan=True, rtol=1e-4, atol=1e-4)
    touched = [1, 4, 5, 6]
    kept = [row for row in range(8) if row not in touched]
    assert torch.equal(y[kept], clean[0][kept]) and torch.equal(grad_x[kept], clean[1][kept])
    lost = torch.zeros(4, dtype=torch.bool)
    lost[[2] if basis.n_inner == 0 else [0, 1, 2]] = True  # a spline is 0 at infinity, a rational function is not known there
    channels = grad_coef.isnan().cpu().any(1) if kind[3] is None else grad_coef.isnan().cpu().any(1).any(0)
    assert torch.equal(channels, lost)
    assert torch.equal(grad_x.isnan().cpu(), q.x.isnan() if basis.n_inner == 0 else ~q.x.isfinite())
    assert all(torch.equal(rows.isnan().cpu().any(1), lost) for rows in grad_inner)


@pytest.mark.parametrize("basis", ["bspline", "rational", "rbf"])
@pytest.mark.parametrize("edges", ["shared", "full"])
def test_a_block_on_this_backend_is_the_eager_block(edges, basis):
    """Through the modules; a basis without kernels goes the compiled way."""
    block = KANFeedForward(12, 20, gated=True, config=KANConfig(edges=edges, basis=basis, grid_size=4)).to(DEVICE)
    for parameter in block.spline_parameters():
        torch.nn.init.normal_(parameter)
    x, exact = torch.randn(2, 9, 12, device=DEVICE), copy.deepcopy(block).double()

    def results(module, x):
        x = x.clone().requires_grad_()
        y = module(x)
        return y.detach(), *torch.autograd.grad(y.square().mean(), [x, *module.parameters()])

    with use_backend("triton"):
        found = results(block, x)
    with use_backend("eager"):
        wanted = results(exact, x.double())
    for got, want in zip(found, wanted, strict=True):
        assert (got.double() - want).norm() <= 1e-5 * max(1.0, want.norm())


def test_which_bases_are_supported():
    assert all(supports(make_basis(*basis)) for basis in BASES.values())
    for options in ({"spline_order": 0}, {"knots": "free"}, {"extrapolation": "linear"}):
        assert not supports(make_basis("bspline", **{"grid_size": 4, **options}))
    assert not supports(make_basis("rbf"))


# The sizes of models, for hardware.


@on_hardware
@pytest.mark.parametrize(("channels", "groups"), [(4096, 8), (4096, 4096), (768, 1), (768, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_basis
def test_shared_edges_of_models(basis, channels, groups, dtype):
    p = problem(basis, 1031, channels, groups, dtype=dtype)
    limits = (FP32,) if dtype == torch.float32 else (BF16, BF16, FP32)
    close(shared(p, basis), exact(reference_edge_functions, p, basis), *limits)


@on_hardware
@pytest.mark.parametrize(("channels", "outputs"), [(768, 128), (768, 256), (768, 768), (4096, 64), (4096, 270)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@either_basis
def test_full_edges_of_models(basis, channels, outputs, dtype):
    p = problem(basis, 257, channels, channels, outputs, dtype=dtype)
    close(full(p, basis), exact(reference_full_edges, p, basis), 3 * FP32 if dtype == torch.float32 else BF16)


@on_hardware
def test_the_number_of_tokens_compiles_nothing():
    gradients = shared_edges_gradients()._gradients
    basis = make_basis("bspline", 4, 3)
    counts = set()
    for tokens in (1, 16, 17, 1000, 4096):
        shared(problem(basis, tokens, 64, 1), basis)
        counts.add(sum(len(caches[0]) for caches in gradients.device_caches.values()))
    assert len(counts) == 1
