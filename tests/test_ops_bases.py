"""Every basis through both operators: the paths are one function, with start, inner numbers, second derivatives and torch's own checks."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from torch.autograd import gradcheck, gradgradcheck

from kanformer.bases import basis_of, make_basis
from kanformer.errors import ConfigError
from kanformer.ops import edge_functions, full_edges, reference_edge_functions, reference_full_edges, uniform, use_backend
from layer_cases import BASES

PAIRS = {"edge_functions": (edge_functions, reference_edge_functions), "full_edges": (full_edges, reference_full_edges)}
ALL = {"uniform splines": {"basis": "bspline"}, **BASES}
each_op = pytest.mark.parametrize("op", PAIRS)
each_basis = pytest.mark.parametrize("basis", ALL.values(), ids=ALL)


def made(basis, grid_size=4, spline_order=3):
    options = {name: value for name, value in basis.items() if name != "basis"}
    return make_basis(basis["basis"], grid_size, spline_order, **options)


def problem(op, basis, channels=6, rows=None, outputs=4, dtype=torch.float64, tokens=9):
    """(x, start, coef, grid, inner, basis): inputs in and around the grids, free knots at uneven places."""
    basis = made(basis) if isinstance(basis, dict) else basis
    rows = channels if op == "full_edges" else rows or channels
    lo = torch.rand(rows, dtype=torch.float64) * 2 - 3
    grid = basis.make_grid(lo, lo + 3 + torch.rand(rows, dtype=torch.float64))
    if basis.knots == "free":
        grid = grid + 0.3 * (grid[:, 1:2] - grid[:, :1]) * torch.rand_like(grid)
    x = (torch.randn(tokens, channels, dtype=torch.float64) * 2).to(dtype)
    coef = torch.randn((outputs, basis.n_basis, channels) if op == "full_edges" else (rows, basis.n_basis), dtype=torch.float64).to(dtype)
    start = torch.randn(tokens, outputs if op == "full_edges" else channels, dtype=torch.float64).to(dtype)
    inner = torch.randn(rows, basis.n_inner, dtype=torch.float64).to(dtype) if basis.n_inner else None
    return x, start, coef, grid.to(dtype if dtype == torch.float64 else torch.float32), inner, basis


def results(function, x, start, coef, grid, inner, basis):
    """Output and every gradient of a weighted sum of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, start, coef, inner) if tensor is not None]
    own = leaves[3] if inner is not None else None
    y = function(leaves[0], leaves[2], grid, basis, own, start=leaves[1])
    weight = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)


@pytest.mark.parametrize("rows", [None, 1, 3])
@each_op
@each_basis
def test_values_and_every_gradient_are_the_references(op, basis, rows):
    values = problem(op, basis, rows=rows)
    for got, want in zip(*(results(function, *values) for function in PAIRS[op]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 7, 33, 130])
@each_op
@each_basis
def test_odd_sizes_and_chunks_change_nothing(op, basis, channels, monkeypatch):
    values = problem(op, basis, channels=channels, tokens=33)
    whole = results(PAIRS[op][0], *values)
    monkeypatch.setattr(uniform, "CHUNK_BYTES", channels * 8 * 20 * 3)
    for got, want in zip(results(PAIRS[op][0], *values), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@each_op
@each_basis
def test_empty_batches_and_any_memory_layout(op, basis):
    x, _, coef, grid, inner, basis = problem(op, basis)
    function = PAIRS[op][0]
    assert function(x[:0], coef, grid, basis, inner).shape[0] == 0
    strided = torch.stack([x, x], -1).flatten(1)[:, ::2]
    assert not strided.is_contiguous()
    torch.testing.assert_close(function(strided, coef, grid, basis, inner), function(x, coef, grid, basis, inner), rtol=0, atol=0)
    deep = function(x.view(3, 1, 3, -1), coef, grid, basis, inner)
    torch.testing.assert_close(deep.flatten(0, 2), function(x, coef, grid, basis, inner))


@each_op
@each_basis
def test_gradcheck_once_and_twice(op, basis):
    x, start, coef, grid, inner, basis = problem(op, basis, channels=3, tokens=4)
    leaves = [tensor.requires_grad_() for tensor in (x, start, coef, inner) if tensor is not None]

    def function(x, start, coef, inner=None):
        return PAIRS[op][0](x, coef, grid, basis, inner, start=start)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@each_op
@each_basis
def test_nan_and_infinity_neither_crash_nor_spread(op, basis):
    x, _, coef, grid, inner, basis = problem(op, basis)
    clean = PAIRS[op][0](x, coef, grid, basis, inner)
    x[1, 2], x[4, 0], x[5, 0] = math.nan, math.inf, -math.inf
    y = PAIRS[op][0](x, coef, grid, basis, inner)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[[1, 4, 5]] = True
    torch.testing.assert_close(y[~touched], clean[~touched])
    assert y[1].isnan().any()
    want = PAIRS[op][1](x, coef, grid, basis, inner)
    torch.testing.assert_close(y, want, equal_nan=True)


@each_op
@each_basis
def test_torchs_own_checks_of_an_operator(op, basis):
    x, start, coef, grid, inner, basis = problem(op, basis, dtype=torch.float32)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in (x, start, coef)]
    arguments = (*leaves, grid, None if inner is None else inner.requires_grad_(), basis.spec, True)
    torch.library.opcheck(getattr(torch.ops.kanformer, op).default, arguments)


@each_op
@each_basis
def test_the_compiled_path_is_the_eager_one_within_rounding(op, basis):
    small = made(basis, grid_size=3, spline_order=2 if len(basis) > 1 else 3)  # options make long formulas, which take long to compile
    values = problem(op, small, channels=33, tokens=70, dtype=torch.float32)
    with use_backend("eager"):
        eager = results(PAIRS[op][0], *values)
    with use_backend("compile"):
        compiled = results(PAIRS[op][0], *values)
    exact = results(PAIRS[op][1], *(value.double() if isinstance(value, torch.Tensor) else value for value in values))
    for fast, plain, want in zip(compiled, eager, exact, strict=True):
        # The compiled path is as near to float64 as the eager one is.
        assert (fast.double() - want).norm() <= 2 * (plain.double() - want).norm() + 1e-6 * want.norm()
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("op", PAIRS)
def test_the_compiled_path_keeps_bf16_policy_and_nan(op):
    values = problem(op, {"basis": "bspline"}, channels=32, tokens=64, dtype=torch.bfloat16)
    values[0][3, 2], values[0][5, 1] = math.nan, math.inf
    exact = results(PAIRS[op][1], *(value.double() if isinstance(value, torch.Tensor) else value for value in values))
    with use_backend("compile"):
        compiled = results(PAIRS[op][0], *values)
    for got, want in zip(compiled[:2], exact[:2], strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    for got, want in zip(compiled, exact, strict=True):
        assert got.dtype == torch.bfloat16
        good = ~(got.isnan() | want.isnan())
        assert (got.double() - want)[good].norm() <= 0.01 * want[good].norm()


# The formulas that are exported, and the names.


@each_basis
def test_the_sympy_members_are_the_members(basis):
    basis = made(basis, grid_size=3, spline_order=2)
    if basis.knots == "free" or basis.extrapolation == "linear":
        pytest.skip("formulas are given for uniform knots, inside the range")
    lo, hi = -1.0, 2.0
    x = sympy.Symbol("x", real=True)
    members = basis.sympy_members(x, sympy.Rational(-1), sympy.Rational(2))
    assert len(members) == basis.n_basis
    points = torch.linspace(lo + 0.05, hi - 0.05, 7, dtype=torch.float64)
    inner = torch.tensor([[0.3, 0.1, 0.2, 0.05]], dtype=torch.float64) if basis.n_inner else None
    grid = basis.make_grid(torch.tensor([lo], dtype=torch.float64), torch.tensor([hi], dtype=torch.float64))
    want = basis.evaluate(points.unsqueeze(-1), grid, inner)[:, 0]
    numbers = dict(zip(sympy.symbols("b1:5"), (0.3, 0.1, 0.2, 0.05), strict=True))
    for c, member in enumerate(members):
        got = torch.tensor([float(member.subs({**numbers, x: sympy.Float(float(point))})) for point in points], dtype=torch.float64)
        torch.testing.assert_close(got, want[:, c], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "limit"), [("identity", 1e-9), ("silu", 1e-5), ("gelu", 2.5e-3), ("tanh", 1e-5), ("sigmoid", 1e-5), ("relu", 2e-2)])
def test_a_rational_function_starts_as_a_known_one(name, limit):
    """Largest error on [-3, 3] with the path that runs; a denominator of degree 4 that is at least 1 cannot follow relu's kink closer."""
    from kanformer.layers.base_functions import base_function

    basis = make_basis("rational")
    x = torch.linspace(-3, 3, 2001, dtype=torch.float64).unsqueeze(-1)
    grid = basis.make_grid(torch.tensor([-3.0]), torch.tensor([3.0])).double()
    want = base_function(name)(x)
    inner = basis.fit_inner(want, x, grid)
    coef = basis.fit(want, x, grid, inner)
    assert (edge_functions(x, coef, grid, basis, inner) - want).abs().max() <= limit


@each_basis
def test_a_basis_is_told_by_its_spec(basis):
    basis = made(basis)
    assert basis_of(basis.spec) == basis


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knots": "fre"}, "Did you mean 'free'"),
        ({"extrapolation": "liner"}, "Did you mean 'linear'"),
        ({"basis": "rbf", "knots": "free"}, "Only B-splines"),
        ({"basis": "rational", "extrapolation": "linear"}, "meant for all x"),
        ({"basis": "fourier", "extrapolation": "linear"}, "meant for all x"),
    ],
)
def test_options_that_a_basis_does_not_have_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_basis(options.pop("basis", "bspline"), **options)


def test_an_unknown_backend_names_the_near_ones():
    with pytest.raises(ConfigError, match="Did you mean 'compile'"), use_backend("compiled"):
        pass
