"""The fast maps against their plain references: values, every gradient, and what must hold for any input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BSpline as ScipySpline
from torch.autograd import gradcheck

from kanformer.bases import make_basis
from kanformer.ops import edge_functions, full_edges, reference_edge_functions, reference_full_edges, uniform

DEGREES = range(6)
PAIRS = {"edge_functions": (edge_functions, reference_edge_functions), "full_edges": (full_edges, reference_full_edges)}
each_op = pytest.mark.parametrize("op", PAIRS)


def problem(op, channels=7, cells=5, degree=3, groups=None, outputs=4, dtype=torch.float64):
    """(coef, grid, basis): every row its own range; for edge_functions with fewer rows than channels if groups is given."""
    basis = make_basis("bspline", cells, degree)
    rows = channels if op == "full_edges" else groups or channels
    lo = torch.rand(rows, dtype=torch.float64) * 2 - 3
    grid = basis.make_grid(lo, lo + 2 + torch.rand(rows, dtype=torch.float64) * 3)
    shape = (outputs, basis.n_basis, channels) if op == "full_edges" else (rows, basis.n_basis)
    return torch.randn(shape, dtype=torch.float64).to(dtype), grid.to(dtype if dtype == torch.float64 else torch.float32), basis


def results(function, x, coef, grid, basis, weight=None):
    """Output and both gradients of a weighted sum of it."""
    x, coef = x.detach().clone().requires_grad_(), coef.detach().clone().requires_grad_()
    y = function(x, coef, grid, basis)
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) if weight is None else weight
    return y.detach(), *torch.autograd.grad((y * weight).sum(), (x, coef))


def assert_same(op, x, coef, grid, basis, atol=1e-10):
    fast, plain = PAIRS[op]
    for got, want in zip(results(fast, x, coef, grid, basis), results(plain, x, coef, grid, basis), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("cells", [1, 2, 7, 16])
@pytest.mark.parametrize("degree", DEGREES)
@each_op
def test_values_and_gradients_are_the_references(op, degree, cells):
    x = torch.randn(33, 7, dtype=torch.float64) * 3  # a good part lies outside the grids
    assert_same(op, x, *problem(op, cells=cells, degree=degree))


@pytest.mark.parametrize("channels", [1, 7, 33, 130])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 1, 2), (33,)], ids=str)
@each_op
def test_any_leading_shape_and_odd_sizes(op, shape, channels):
    assert_same(op, torch.randn(*shape, channels, dtype=torch.float64) * 2, *problem(op, channels=channels))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_channels_of_a_group_share_its_function(groups):
    coef, grid, basis = problem("edge_functions", channels=12, groups=groups)
    x = torch.randn(40, 12, dtype=torch.float64)
    assert_same("edge_functions", x, coef, grid, basis)
    spread = edge_functions(x, coef.repeat_interleave(12 // groups, 0), grid.repeat_interleave(12 // groups, 0), basis)
    torch.testing.assert_close(edge_functions(x, coef, grid, basis), spread)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@each_op
def test_memory_layout_does_not_matter(op, layout):
    x = {
        "transposed": torch.randn(7, 20, dtype=torch.float64).t(),
        "strided": torch.randn(20, 14, dtype=torch.float64)[:, ::2],
        "expanded": torch.randn(1, 7, dtype=torch.float64).expand(20, 7),
    }[layout]
    coef, grid, basis = problem(op)
    assert not x.is_contiguous()
    leaf = x.contiguous().requires_grad_()
    fast = PAIRS[op][0]
    torch.testing.assert_close(fast(x, coef, grid, basis), fast(leaf, coef, grid, basis), rtol=0, atol=0)
    weight = torch.randn(fast(x, coef, grid, basis).shape[::-1], dtype=torch.float64).t()  # an upstream gradient that is not contiguous either
    for got, want in zip(results(fast, x, coef, grid, basis, weight), results(PAIRS[op][1], x, coef, grid, basis, weight), strict=True):
        torch.testing.assert_close(got, want)


@each_op
def test_chunks_change_nothing(op, monkeypatch):
    x, (coef, grid, basis) = torch.randn(50, 7, dtype=torch.float64), problem(op)
    whole = results(PAIRS[op][0], x, coef, grid, basis)
    monkeypatch.setattr(uniform, "CHUNK_BYTES", 7 * 8 * 20 * 3)
    for got, want in zip(results(PAIRS[op][0], x, coef, grid, basis), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["input only", "coefficients only"])
@each_op
def test_each_gradient_alone_is_the_one_of_both(op, needs):
    x, (coef, grid, basis) = torch.randn(9, 7, dtype=torch.float64), problem(op)
    both = results(PAIRS[op][0], x, coef, grid, basis)[1:]
    leaves = [x.clone().requires_grad_(needs[0]), coef.clone().requires_grad_(needs[1])]
    y = PAIRS[op][0](*leaves, grid, basis)
    (y * torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum().backward()
    for leaf, need, want in zip(leaves, needs, both, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("degree", DEGREES)
@each_op
def test_gradcheck_in_float64(op, degree):
    coef, grid, basis = problem(op, channels=4, degree=degree)
    x = (torch.randn(2, 5, 4, dtype=torch.float64) * 3).requires_grad_()
    assert gradcheck(lambda x, coef: PAIRS[op][0](x, coef, grid, basis), (x, coef.requires_grad_()))


@pytest.mark.parametrize("degree", DEGREES)
def test_shared_functions_are_scipys_splines(degree):
    """In range and beyond: scipy's own range is widened to the extended knots by k more knots with coefficients 0."""
    coef, grid, basis = problem("edge_functions", channels=3, degree=degree)
    x = torch.rand(500, 3, dtype=torch.float64) * 14 - 7
    y = edge_functions(x, coef, grid, basis)
    for row in range(3):
        step = (grid[row, 1] - grid[row, 0]).item()
        knots = grid[row, 0].item() + step * torch.arange(-degree, grid.shape[1] + degree).numpy()
        spline = ScipySpline(knots, torch.nn.functional.pad(coef[row], (degree, degree)).numpy(), degree, extrapolate=False)
        want = torch.from_numpy(spline(x[:, row].numpy())).nan_to_num(0.0)
        torch.testing.assert_close(y[:, row], want, rtol=0, atol=1e-10)


# Properties.


@given(degree=st.integers(0, 5), cells=st.integers(1, 16), position=st.floats(0, 1, exclude_max=True))
def test_equal_coefficients_give_a_constant_in_range(degree, cells, position):
    coef, grid, basis = problem("edge_functions", channels=3, cells=cells, degree=degree)
    lo, hi = basis.grid_bounds(grid)
    y = edge_functions((lo + position * (hi - lo)).unsqueeze(0), torch.full_like(coef, 2.5), grid, basis)
    torch.testing.assert_close(y, torch.full_like(y, 2.5))


@given(degree=st.integers(0, 5), cells=st.integers(1, 16), member=st.integers(0, 20))
def test_a_coefficient_acts_on_its_own_knots_only(degree, cells, member):
    coef, grid, basis = problem("edge_functions", channels=1, cells=cells, degree=degree)
    member %= basis.n_basis
    x = torch.linspace(-9, 9, 400, dtype=torch.float64).unsqueeze(-1)
    changed = coef.clone()
    changed[0, member] += 1
    moved = edge_functions(x, changed, grid, basis) != edge_functions(x, coef, grid, basis)
    inside = (x > grid[0, member]) & (x < grid[0, member + degree + 1])
    assert not moved[~inside].any()
    assert moved.any() or not inside.any()


@given(order=st.permutations(range(7)), degree=st.integers(0, 5))
def test_permuting_the_channels_permutes_the_functions(order, degree):
    x, (coef, grid, basis) = torch.randn(11, 7, dtype=torch.float64), problem("edge_functions", degree=degree)
    assert torch.equal(edge_functions(x[:, order], coef[order], grid[order], basis), edge_functions(x, coef, grid, basis)[:, order])


@given(inputs=st.permutations(range(7)), outputs=st.permutations(range(4)))
def test_permuting_inputs_changes_no_output_and_permuting_outputs_permutes_them(inputs, outputs):
    x, (coef, grid, basis) = torch.randn(11, 7, dtype=torch.float64), problem("full_edges")
    y = full_edges(x, coef, grid, basis)
    torch.testing.assert_close(full_edges(x[:, inputs], coef[:, :, inputs], grid[inputs], basis), y)
    torch.testing.assert_close(full_edges(x, coef[outputs], grid, basis), y[:, outputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@each_op
def test_outside_the_extended_grid_values_and_gradients_are_zero(op, dtype):
    coef, grid, basis = problem(op, dtype=dtype)
    ends = torch.stack([grid[:, 0] - 1, grid[:, -1] + 1, grid[:, -1] * 0 + 1e30, grid[:, -1] * 0 - math.inf, grid[:, -1] * 0 + math.inf])
    for result in results(PAIRS[op][0], ends.to(dtype), coef, grid, basis):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("degree", [0, 1, 3])
@each_op
def test_nan_reaches_exactly_its_own_outputs(op, degree):
    x, (coef, grid, basis) = torch.randn(6, 7), problem(op, degree=degree, dtype=torch.float32)
    x[2, 3] = math.nan
    y, grad_x, grad_coef = results(PAIRS[op][0], x, coef, grid, basis)
    where = torch.zeros_like(x, dtype=torch.bool)
    where[2, 3] = True
    assert torch.equal(grad_x.isnan(), where)
    assert torch.equal(y.isnan(), where if op == "edge_functions" else where.any(-1, keepdim=True).expand_as(y))
    hit = grad_coef[3] if op == "edge_functions" else grad_coef[..., 3]
    # A piecewise constant has no position in its cell that could carry the nan to the coefficients.
    assert hit.isnan().any() or degree == 0
    assert grad_coef.isnan().sum() == hit.isnan().sum()


# Low precision.


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=["bf16", "fp16"])
def test_shared_functions_in_low_precision_lose_the_rounding_of_the_result_only(dtype, unit):
    coef, grid, basis = problem("edge_functions", channels=64, cells=16, dtype=dtype)
    x = torch.randn(500, 64).to(dtype)
    exact = reference_edge_functions(x.double(), coef.double(), grid.double(), basis)
    error = (edge_functions(x, coef, grid, basis).double() - exact).abs()
    assert (error <= unit * exact.abs() + 2e-5).all()


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=["bf16", "fp16"])
def test_full_edges_in_low_precision_lose_one_rounding_of_the_basis_and_one_of_the_result(dtype, unit):
    coef, grid, basis = problem("full_edges", channels=64, cells=16, dtype=dtype)
    x = torch.randn(500, 64).to(dtype)
    exact, size = (reference_full_edges(x.double(), c.double(), grid.double(), basis) for c in (coef, coef.abs()))
    error = (full_edges(x, coef, grid, basis).double() - exact).abs()
    assert (error <= unit * exact.abs() + unit * size).all()
    assert error.pow(2).mean().sqrt() < unit * exact.pow(2).mean().sqrt()


@each_op
def test_gradients_in_bf16_are_within_one_percent(op):
    coef, grid, basis = problem(op, channels=32, dtype=torch.bfloat16)
    x = torch.randn(2000, 32).bfloat16()
    weight = torch.randn(2000, 32 if op == "edge_functions" else 4).bfloat16()
    low = results(PAIRS[op][0], x, coef, grid, basis, weight)
    exact = results(PAIRS[op][1], x.double(), coef.double(), grid.double(), basis, weight.double())
    for got, want in zip(low, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() <= 0.01 * want.norm()
