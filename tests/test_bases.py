"""The bases: a contract that every file in `bases/` must meet, and B-splines against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import interpolate

from kanformer import bases
from kanformer.bases import make_basis
from kanformer.bases.base import Basis
from kanformer.bases.bspline import local_polynomials
from kanformer.errors import ConfigError

DEGREES = range(6)
SIZES = (1, 2, 5, 16)


def grid_of(basis: Basis, lo: float = -2.0, hi: float = 3.0, rows: int = 1) -> torch.Tensor:
    return basis.make_grid(torch.full((rows,), lo, dtype=torch.float64), torch.full((rows,), hi, dtype=torch.float64))


def scipy_members(x: torch.Tensor, knots: torch.Tensor, degree: int, derivative: int = 0) -> torch.Tensor:
    """Each member as scipy's B-spline on its own knots, 0 elsewhere: (points, n_basis)."""
    columns = []
    for first in range(len(knots) - degree - 1):
        member = interpolate.BSpline.basis_element(knots[first : first + degree + 2].numpy(), extrapolate=False)
        columns.append(np.nan_to_num((member.derivative(derivative) if derivative else member)(x.numpy())))
    return torch.from_numpy(np.stack(columns, -1))


# The contract of every basis.


@pytest.fixture(params=bases.available())
def any_basis(request) -> Basis:
    return make_basis(request.param, 5, 3)


def test_a_basis_says_its_name_and_source(any_basis):
    assert any_basis.name in bases.available() and len(any_basis.source) > 20


def test_a_basis_gives_n_basis_members_for_any_leading_shape(any_basis):
    grid = grid_of(any_basis, rows=4)
    for shape in ((4,), (3, 4), (2, 0, 4), (2, 3, 5, 4)):
        assert any_basis.evaluate(torch.randn(shape, dtype=torch.float64), grid).shape == (*shape, any_basis.n_basis)


def test_grid_bounds_are_the_range_the_grid_was_made_for(any_basis):
    lo, hi = torch.tensor([-1.0, 0.5, 100.0]), torch.tensor([-0.5, 7.0, 1e4])
    for got, want in zip(any_basis.grid_bounds(any_basis.make_grid(lo, hi)), (lo, hi), strict=True):
        torch.testing.assert_close(got, want)


def test_the_derivative_is_that_of_the_members(any_basis):
    grid = grid_of(any_basis, rows=2)
    x = (torch.rand(200, 2, dtype=torch.float64) * 8 - 4).requires_grad_()
    expected = torch.stack([torch.autograd.grad(any_basis.evaluate(x, grid)[..., c].sum(), x)[0] for c in range(any_basis.n_basis)], -1)
    torch.testing.assert_close(any_basis.derivative(x.detach(), grid), expected)


def test_fitting_samples_of_a_combination_gives_its_function_back(any_basis):
    grid = grid_of(any_basis, rows=3)
    x = torch.rand(300, 3, dtype=torch.float64) * 5 - 2
    coef = torch.randn(3, any_basis.n_basis, dtype=torch.float64)
    y = (any_basis.evaluate(x, grid) * coef).sum(-1)
    fitted = any_basis.fit(y, x, grid)
    torch.testing.assert_close((any_basis.evaluate(x, grid) * fitted).sum(-1), y, rtol=0, atol=1e-9)


def test_a_fit_that_the_samples_do_not_determine_is_small_and_goes_through_them(any_basis):
    grid = grid_of(any_basis)
    x = torch.full((20, 1), 0.3, dtype=torch.float64)
    fitted = any_basis.fit(torch.full_like(x, 2.0), x, grid)
    assert fitted.norm() < 20  # the smallest of all solutions, not an exploded one
    torch.testing.assert_close((any_basis.evaluate(x, grid) * fitted).sum(-1), torch.full_like(x, 2.0))


def test_a_basis_is_an_immutable_value(any_basis):
    assert any_basis == make_basis(any_basis.name, 5, 3) != make_basis(any_basis.name, 6, 3)
    with pytest.raises(AttributeError):
        any_basis.grid_size = 9


# B-splines.


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "non-uniform"])
@pytest.mark.parametrize("cells", SIZES)
@pytest.mark.parametrize("degree", DEGREES)
def test_members_and_derivatives_are_scipys(degree, cells, uniform):
    basis = make_basis("bspline", cells, degree)
    grid = grid_of(basis) if uniform else (torch.rand(1, cells + 2 * degree + 1, dtype=torch.float64) + 0.1).cumsum(-1)
    span = grid[0, -1] - grid[0, 0]
    x = grid[0, 0] - span / 4 + torch.rand(300, dtype=torch.float64) * span * 1.5
    torch.testing.assert_close(basis.evaluate(x.unsqueeze(-1), grid)[:, 0], scipy_members(x, grid[0], degree), rtol=0, atol=1e-12)
    if degree:
        torch.testing.assert_close(basis.derivative(x.unsqueeze(-1), grid)[:, 0], scipy_members(x, grid[0], degree, 1), rtol=0, atol=1e-10)


@given(degree=st.integers(0, 5), cells=st.integers(1, 16), lo=st.floats(-100, 100), width=st.floats(0.01, 100), position=st.floats(0, 1, exclude_max=True))
def test_members_sum_to_one_inside_the_range_and_are_not_negative(degree, cells, lo, width, position):
    basis = make_basis("bspline", cells, degree)
    members = basis.evaluate(torch.tensor([[lo + position * width]], dtype=torch.float64), grid_of(basis, lo, lo + width))
    assert abs(members.sum().item() - 1) < 1e-9 and members.min() >= -1e-12


@pytest.mark.parametrize("cells", SIZES)
@pytest.mark.parametrize("degree", DEGREES)
def test_polynomials_up_to_the_degree_are_reproduced(degree, cells):
    """Marsden's identity: the coefficients of x^p are known, the mean products of p of the k inner knots."""
    basis = make_basis("bspline", cells, degree)
    grid = grid_of(basis)
    x = torch.rand(100, 1, dtype=torch.float64) * 5 - 2
    for power in range(degree + 1):
        inner = grid[0].unfold(0, degree, 1)[1 : 1 + basis.n_basis] if degree else torch.empty(basis.n_basis, 0)
        coef = torch.stack([_mean_product(knots.tolist(), power) for knots in inner]).double()
        torch.testing.assert_close((basis.evaluate(x, grid) * coef).sum(-1), x**power, rtol=1e-9, atol=1e-9)


def _mean_product(knots: list[float], power: int) -> torch.Tensor:
    symmetric = np.polynomial.polynomial.polyfromroots(knots)[::-1] if knots else np.ones(1)
    return torch.tensor(symmetric[power] * (-1) ** power / math.comb(len(knots), power), dtype=torch.float64)


@pytest.mark.parametrize("degree", DEGREES)
def test_a_member_is_zero_off_its_own_knots_and_not_on_them(degree):
    basis = make_basis("bspline", 4, degree)
    grid = grid_of(basis)
    x = torch.linspace(-12, 12, 997, dtype=torch.float64)
    members = basis.evaluate(x.unsqueeze(-1), grid)[:, 0]
    for c in range(basis.n_basis):
        inside = (x > grid[0, c]) & (x < grid[0, c + degree + 1])
        assert (members[inside, c] > 0).all() and (members[~inside, c] == 0).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300, -1e300])
def test_members_are_zero_far_outside(value):
    basis = make_basis("bspline", 4, 3)
    members = basis.evaluate(torch.tensor([[value]], dtype=torch.float64), grid_of(basis))
    assert torch.equal(members, torch.zeros_like(members))


def test_nan_stays_nan_and_does_not_touch_its_neighbours():
    basis = make_basis("bspline", 4, 3)
    members = basis.evaluate(torch.tensor([[0.5], [math.nan]], dtype=torch.float64), grid_of(basis))
    assert members[1].isnan().all() and members[0].isfinite().all()


@pytest.mark.parametrize("degree", DEGREES)
def test_local_polynomials_are_the_members_on_one_cell(degree):
    factors = torch.tensor(local_polynomials(degree), dtype=torch.float64)
    u = torch.rand(50, dtype=torch.float64)
    powers = torch.stack([u**power for power in range(degree + 1)], -1)
    knots = torch.arange(-degree, degree + 2, dtype=torch.float64)
    torch.testing.assert_close(powers @ factors.T, scipy_members(u, knots, degree), rtol=0, atol=1e-12)


# Names and sizes.


def test_an_unknown_basis_names_the_near_ones():
    with pytest.raises(ConfigError, match=r"find a basis.*'bsplin'.*Did you mean 'bspline'"):
        make_basis("bsplin")


@pytest.mark.parametrize("name", ["base", "__init__", "", "../bspline"])
def test_files_that_are_no_bases_are_not_found(name):
    with pytest.raises(ConfigError, match="find a basis"):
        make_basis(name)


@pytest.mark.parametrize(("cells", "degree"), [(0, 3), (-1, 3), (5, -1), (2.5, 3), ("8", 3), (8, 1.0), (None, 3)])
def test_sizes_that_make_no_grid_are_refused(cells, degree):
    with pytest.raises(ConfigError, match=r"make a basis.*grid_size >= 1"):
        make_basis("bspline", cells, degree)
