"""Moving and refining grids of single layers: the function stays, or nothing does."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import nn

from kanformer.conversion.histogram import ChannelRecorder
from kanformer.errors import ConfigError, DataError, ShapeError
from kanformer.layers import EdgeFunctions, KANLinear
from kanformer.layers.density import Density
from layer_cases import BASES, trained

D = 6
KINDS = {
    "per channel": lambda **options: EdgeFunctions(D, **options),
    "in groups": lambda **options: EdgeFunctions(D, 3, **options),
    "full": lambda **options: KANLinear(D, 5, **options),
}
ALL = {"uniform": {}, **BASES}
READING = {name: options for name, options in ALL.items() if name != "rational"}
SPLINES = {name: ALL[name] for name in ("uniform", "free knots", "linear beyond")}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def each(table):
    return pytest.mark.parametrize("options", table.values(), ids=table)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def relative(after: torch.Tensor, before: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


@torch.no_grad()
def spline(module, x):
    return module.spline(x)


@torch.no_grad()
def make_cubic(module):
    """Gives every function a cubic polynomial of its own, which every cubic grid can hold."""
    points = torch.linspace(*(float(bound[0]) for bound in module.grid_bounds), 201, dtype=torch.float64)
    for coef in module.kan_coef.view(-1, *module.kan_coef.shape[-2:]) if isinstance(module, KANLinear) else [module.kan_coef.t()]:
        y = torch.stack([points**p for p in range(4)], -1) @ torch.randn(4, module.kan_grid.shape[0], dtype=torch.float64)
        coef.copy_(module.basis.fit(y, points.unsqueeze(-1).expand_as(y), module.kan_grid.double()).t())
    return module


# Updating.


@each(ALL)
@each_kind
def test_a_zero_spline_stays_zero_to_the_bit(make, options):
    layer = make(**options)
    nn.init.zeros_(layer.kan_coef)
    x = torch.randn(50, D) * 3 + 5
    before, grid = layer(x), layer.kan_grid.clone()
    report = layer.update_grid(x)
    assert not layer.kan_coef.any() and torch.equal(layer(x), before) and not torch.equal(layer.kan_grid, grid)
    assert report.change == report.rounded_change == report.outside_after == 0 < report.outside_before


@each({**SPLINES, "chebyshev": ALL["chebyshev"]})
@each_kind
def test_a_function_that_the_new_grid_can_hold_is_kept(make, options):
    layer = make(grid_size=5, **options)
    layer = trained(layer) if options.get("basis") == "chebyshev" else make_cubic(layer)
    x = torch.rand(400, D) * torch.linspace(0.5, 3, D) - 1
    parameter, before = layer.kan_coef, spline(layer, x)
    report = layer.update_grid(x)
    lo, hi = layer.grid_bounds
    assert layer.kan_coef is parameter and float((hi - lo).max()) < 4
    assert report.change < 1e-8 and report.even_change < 1e-8 and report.rounded_change < 1e-6
    assert relative(spline(layer, x), before) < 1e-5
    # The range: what was seen, and a hundredth more on each side.
    channels = x.view(-1, layer.kan_grid.shape[0], D // layer.kan_grid.shape[0]).transpose(1, 2).flatten(0, 1)
    width = channels.amax(0) - channels.amin(0)
    torch.testing.assert_close(lo, channels.amin(0) - 0.01 * width)
    torch.testing.assert_close(hi, channels.amax(0) + 0.01 * width)
    again = state(layer)
    layer.update_grid(x)
    assert same(layer, again), "the same data a second time change no bit"


@each(SPLINES)
@each_kind
def test_a_function_that_would_change_is_refused_unless_told(make, options):
    layer, x = trained(make(**options)), torch.randn(500, D).clamp(-3.9, 3.9)
    before, y = state(layer), spline(layer, x)
    with pytest.raises(ConfigError, match=r"update the grid.*got a fit that changes.*at most 1e-05.*as it was.*tolerance=None") as caught:
        layer.update_grid(x)
    assert same(layer, before)
    report = layer.update_grid(x, tolerance=None)
    lo, hi = (bound.repeat_interleave(D // len(bound)) for bound in layer.grid_bounds)
    inside = ((x >= lo) & (x <= hi)).all(1)
    assert 1e-3 < relative(spline(layer, x[inside]), y[inside]) <= report.change < 0.3
    layer.load_state_dict(before)
    if layer.basis.knots == "uniform":  # the way out that the message names
        layer.refine_grid(int(re.search(r"grid_size=(\d+)", str(caught.value)).group(1)))
        assert layer.update_grid(x).change < 1e-5 and relative(spline(layer, x[inside]), y[inside]) < 1e-5


@each(READING)
@each_kind
@pytest.mark.parametrize("values", [[-1.0, 0.2, 1.3], [0.7, -0.4]], ids=["three values", "two samples"])
def test_data_that_leave_the_fit_open_keep_their_values(make, options, values):
    layer = trained(make(**options))
    x = torch.tensor(values * (20 if len(values) == 3 else 1)).unsqueeze(1).expand(-1, D).clone()
    before = spline(layer, x)
    report = layer.update_grid(x)
    assert report.change < 1e-5 and relative(spline(layer, x), before) < 1e-5
    assert layer.kan_coef.isfinite().all() and layer.kan_coef.abs().max() < 1e3, "and do not blow up elsewhere"
    even = torch.linspace(*(float(bound[0]) for bound in layer.grid_bounds), 100)
    assert spline(layer, even.unsqueeze(1).expand(-1, D)).abs().max() < 50
    again = state(layer)
    assert layer.update_grid(x).change < 1e-13 and same(layer, again), "nothing is left to do"


@each(READING)
def test_constant_channels_keep_their_range_or_take_it_along(options):
    layer = trained(EdgeFunctions(3, **options))
    x = torch.randn(100, 3).clamp(-2, 2)
    x[:, 1], x[:, 2] = 2.5, 3.9e4
    before = spline(layer, x)
    layer.update_grid(x, tolerance=None)
    lo, hi = layer.grid_bounds
    assert (float(lo[1]), float(hi[1])) == (-4, 4) and lo[2] < 3.9e4 < hi[2]
    assert layer.kan_grid.isfinite().all() and (layer.kan_grid.diff(dim=1) > 0).all()
    assert torch.equal(spline(layer, x)[:, 1], before[:, 1])


def test_free_knots_are_a_mix_of_even_and_quantiles():
    layer, eps = EdgeFunctions(2, grid_size=6, knots="free"), 0.3
    x = torch.rand(4001, 2).square() * torch.tensor([1.0, 5.0])
    layer.update_grid(x, grid_eps=eps, margin=0.0)
    for channel in range(2):
        column = x[:, channel].double().numpy()
        even, levels = np.linspace(column.min(), column.max(), 7), np.quantile(column, np.linspace(0, 1, 7))
        inner = eps * even + (1 - eps) * levels
        step = (inner[-1] - inner[0]) / 6
        want = np.concatenate([inner[0] - step * np.arange(3, 0, -1), inner, inner[-1] + step * np.arange(1, 4)])
        np.testing.assert_allclose(layer.kan_grid[channel].numpy(), want, atol=1e-3 * step)


def test_free_knots_of_few_values_stay_apart():
    layer = EdgeFunctions(1, grid_size=16, knots="free")
    layer.update_grid(torch.tensor([[0.0], [1.0], [2.0]]).repeat(50, 1), grid_eps=0.02)
    assert (layer.kan_grid.diff(dim=1) > 1e-3 * 2 / 16).all()


def test_one_outlier_does_not_take_the_grid_and_is_reported():
    layer = EdgeFunctions(2)
    x = torch.randn(1000, 2)
    x[0] = 1000.0
    x[1:41, 1] = -5.0
    report = layer.update_grid(x)
    assert (report.hi < 200).all() and report.tokens == 1000
    assert report.outside_before == pytest.approx(float((x.abs() > 4).double().mean())) and report.outside_after == pytest.approx(1 / 1000)
    assert torch.equal(report.old_lo, torch.full((2,), -4.0, dtype=torch.float64)) and torch.equal(report.lo.float(), layer.grid_bounds[0])


def test_the_reported_change_is_the_one_that_is_there():
    layer = trained(EdgeFunctions(4).double())
    x = torch.randn(300, 4, dtype=torch.float64).clamp(-2.5, 2.5)
    before, old = spline(layer, x), layer.kan_grid.clone()
    report = layer.update_grid(x, tolerance=None)
    brute = ((spline(layer, x) - before).square().mean(0) / before.square().mean(0)).sqrt()
    assert report.change == pytest.approx(float(brute.max()), rel=1e-6) == report.rounded_change
    assert not torch.equal(layer.kan_grid, old)


@each_kind
def test_half_precision_coefficients_are_rounded_once(make):
    layer = trained(make(dtype=torch.bfloat16))
    exact = make(dtype=torch.float64)
    exact.kan_coef.data.copy_(layer.kan_coef)
    x = torch.randn(300, D)
    reports = [module.update_grid(x, tolerance=None) for module in (layer, exact)]
    assert torch.equal(layer.kan_coef, exact.kan_coef.to(torch.bfloat16)) and layer.kan_grid.dtype == torch.float32
    assert reports[0].change == pytest.approx(reports[1].change) and reports[0].rounded_change > reports[0].change


def test_a_rational_function_only_moves_its_figure():
    layer, x = trained(EdgeFunctions(D, basis="rational")), torch.randn(100, D) * 5
    before = spline(layer, x)
    assert layer.update_grid(x).change == 0 and torch.equal(spline(layer, x), before)
    assert float(layer.grid_bounds[1].max()) > 6


def test_more_than_a_twentieth_outside_warns():
    x = torch.zeros(200, 2)
    x[:6], x[6:12] = 1.0, -1.0  # 6 % lie just beyond four standard deviations
    with pytest.warns(UserWarning, match=r"EdgeFunctions: 6\.0% of the values lie outside its grid.*update_grids") as caught:
        EdgeFunctions(2).update_grid(x, margin=0.0)
    assert caught[0].filename == __file__, "the warning points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EdgeFunctions(2).update_grid(torch.randn(200, 2))


@pytest.mark.parametrize(
    ("data", "options", "error", "says"),
    [
        (torch.zeros(5, D + 1), {}, ShapeError, r"expected \(\.\.\., 6\)"),
        (torch.zeros(5, D, dtype=torch.long), {}, ShapeError, "floating-point"),
        (torch.zeros(0, D), {}, DataError, "no samples"),
        (torch.full((3, D), torch.nan), {}, DataError, "not all finite"),
        (torch.randn(5, D), {"grid_eps": 0}, ConfigError, r"grid_eps=0, expected a number in \(0, 1\]"),
        (torch.randn(5, D), {"grid_eps": "a"}, ConfigError, "grid_eps='a'"),
        (torch.randn(5, D), {"margin": -1}, ConfigError, "margin=-1"),
        (torch.randn(5, D), {"tolerance": -1}, ConfigError, "tolerance=-1"),
    ],
)
@each_kind
def test_unusable_samples_and_settings_are_refused(make, data, options, error, says):
    layer = trained(make())
    before = state(layer)
    with pytest.raises(error, match=says):
        layer.update_grid(data, **options)
    assert same(layer, before)


def test_coefficients_that_are_not_finite_are_named():
    layer = EdgeFunctions(2)
    layer.kan_coef.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        layer.update_grid(torch.randn(20, 2), tolerance=None)
    with pytest.raises(ConfigError, match="meta device"):
        EdgeFunctions(2, device="meta").update_grid(torch.randn(20, 2))


# Refining.


@each(SPLINES)
@pytest.mark.parametrize(("order", "factor"), [(0, 2), (1, 3), (2, 2), (3, 3), (5, 2)])
def test_a_nested_grid_holds_the_same_spline(options, order, factor):
    layer = trained(EdgeFunctions(2, grid_size=4, spline_order=order, **options).double())
    if "knots" in options:
        layer.update_grid(torch.randn(500, 2, dtype=torch.float64), tolerance=None)
    old_grid, old_coef = layer.kan_grid.numpy().copy(), layer.kan_coef.detach().numpy().copy()
    lo, hi = (bound.numpy() for bound in layer.grid_bounds)
    report = layer.refine_grid(4 * factor)
    assert report.change < 1e-12 and layer.kan_coef.shape == (2, 4 * factor + order)
    for row in range(2):
        x = np.linspace(lo[row], hi[row], 999)[1:-1]
        old, new = (BSpline(grid[row], coef[row], order)(x) for grid, coef in ((old_grid, old_coef), (layer.kan_grid.numpy(), layer.kan_coef.detach().numpy())))
        np.testing.assert_allclose(new, old, atol=1e-11 * np.abs(old).max())


@each({**SPLINES, "chebyshev": ALL["chebyshev"], "fourier": ALL["fourier"]})
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refining_keeps_the_function_and_what_the_parameter_is(make, options, dtype):
    layer = trained(make(grid_size=4, dtype=dtype, **options))
    layer.kan_coef.requires_grad_(False)
    x = torch.rand(500, D) * 7.9 - 3.95
    before = spline(layer, x)
    report = layer.refine_grid(12)
    assert report.change < 1e-12 and relative(spline(layer, x), before) < (2e-2 if dtype == torch.bfloat16 else 1e-6)
    assert (layer.kan_coef.dtype, layer.kan_coef.requires_grad, layer.basis.grid_size) == (dtype, False, 12)
    assert layer.kan_grid.dtype == torch.float32 and torch.equal(report.lo.float(), layer.grid_bounds[0])
    twin = make(grid_size=12, dtype=dtype, **options)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(spline(twin, x), spline(layer, x))
    x = x.float().requires_grad_()
    layer.kan_coef.requires_grad_()
    layer(x.to(dtype)).sum().backward()
    assert layer.kan_coef.grad.isfinite().all()


@pytest.mark.parametrize("name", ["chebyshev", "fourier"])
def test_polynomials_and_harmonics_nest_in_any_larger_basis_for_all_x(name):
    layer, x = trained(EdgeFunctions(D, basis=name, grid_size=4).double()), torch.randn(200, D, dtype=torch.float64) * 6
    before = spline(layer, x)
    layer.refine_grid(7)
    torch.testing.assert_close(spline(layer, x), before, rtol=1e-12, atol=1e-12)


@each({**SPLINES, "rbf": ALL["rbf"]})
@each_kind
def test_a_grid_that_does_not_nest_is_the_nearest_fit_if_told(make, options):
    layer, x = trained(make(grid_size=4, **options)), torch.rand(500, D) * 7.9 - 3.95
    before, y = state(layer), spline(layer, x)
    size = 10 if "basis" in options else 26
    with pytest.raises(ConfigError, match=r"refine the grid.*at most 1e-06") as caught:
        layer.refine_grid(size)
    assert same(layer, before) and layer.basis.grid_size == 4
    assert ("a multiple of 4, such as 28" in str(caught.value)) == ("basis" not in options)
    report = layer.refine_grid(size, tolerance=None)
    assert relative(spline(layer, x), y) < 2 * report.change < 0.1
    before = state(layer)
    assert layer.refine_grid(size).change < 1e-14 and same(layer, before), "to the same size: nothing happens"


@pytest.mark.parametrize("size", [3, 0, 8.0, "8", True])
@each_kind
def test_a_size_that_is_no_refinement_is_refused(make, size):
    layer = trained(make(grid_size=4))
    before = state(layer)
    with pytest.raises(ConfigError, match=r"refine the grid.*grid_size=.*an integer >= 4"):
        layer.refine_grid(size)
    assert same(layer, before)
    with pytest.raises(ConfigError, match="no grid to refine"):
        make(basis="rational").refine_grid(16)


# Streamed statistics.


@pytest.mark.parametrize("shift", [0.0, 30.0], ids=["alike", "apart"])
@pytest.mark.parametrize("groups", [4, 2])
def test_merged_recorders_are_one_recorder(groups, shift):
    x = torch.randn(3000, 4) * torch.tensor([1.0, 5.0, 0.1, 1.0])
    x[2000:] += shift
    x[::700] *= 1000
    parts = []
    for rows in (x, x[:2000], x[2000:], x[:0]):
        recorder = ChannelRecorder(4, groups, torch.full((groups,), -1.0), torch.full((groups,), 1.0))
        for piece in rows.split(190):
            if len(piece):
                recorder.add(piece)
        parts.append(recorder)
    whole, merged = parts[0], parts[1]
    merged.merge(parts[2])
    parts[3].merge(merged)
    one, two = whole.finish(), parts[3].finish()
    assert one.count == two.count == 3000 and torch.equal(one.outside, two.outside)
    torch.testing.assert_close([one.mean, one.variance, one.minimum, one.maximum], [two.mean, two.variance, two.minimum, two.maximum])
    torch.testing.assert_close([two.counts.sum(1), two.sums.sum(1)], [one.counts.sum(1), one.sums.sum(1)])
    nodes, share = two.density()
    assert (two.as_density().nodes.diff(dim=1) >= 0).all()
    assert ((nodes >= two.minimum.amin() - 1e-6) & (nodes <= two.maximum.amax() + 1e-6))[share > 0].all(), "no rounding that poses as values"
    torch.testing.assert_close((nodes * share).sum(1), one.mean.view(groups, -1).mean(1), rtol=1e-6, atol=1e-6)
    spread = one.variance.view(groups, -1).amax(1).sqrt() if shift else one.quantile(0.9) - one.quantile(0.1)
    for level in (0.05, 0.3, 0.5, 0.7, 0.95):
        assert ((one.quantile(level) - two.quantile(level)).abs() < 0.05 * spread).all()


def test_a_histogram_gives_the_grid_that_the_samples_give():
    x = torch.randn(4000, 4) * torch.linspace(0.5, 2, 4)
    layers = [EdgeFunctions(4, 2, knots="free") for _ in range(2)]
    recorder = ChannelRecorder(4, 2, *layers[0].grid_bounds)
    for piece in x.split(333):
        recorder.add(piece)
    layers[0].update_grid(x)
    report = layers[1].update_grid(recorder.finish().as_density())
    assert isinstance(recorder.finish().as_density(), Density) and report.outside_before == pytest.approx(float((x.abs() > 4).double().mean()))
    torch.testing.assert_close(layers[1].grid_bounds, layers[0].grid_bounds)
    assert (layers[1].kan_grid - layers[0].kan_grid).abs().max() < 0.03
