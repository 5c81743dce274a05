"""From a fitted KAN to a formula of the whole network."""

import math

import pytest
import sympy
import torch

from kanformer import KAN
from kanformer.errors import ConfigError, DataError, KanformerError, ShapeError, SurgeryError

F64 = torch.float64


def samples(count, seed=0, inputs=2):
    return torch.rand(count, inputs, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2 - 1


def law(x):
    return torch.exp(torch.sin(math.pi * x[:, 0]) + x[:, 1] ** 2)


@pytest.fixture(scope="module")
def fitted():
    x = samples(500)
    network = KAN([2, 1, 1], grid_size=3, dtype=F64)
    network.fit(x, law(x), steps=10)
    network.update_grid(x)
    network.refine(12)
    network.fit(x, law(x), optimizer="lm", steps=20, grid_update=0)
    return network, x


def copy_of(network):
    made = KAN(network.width, **{**network.settings, "grid_range": network.settings["grid_range"]}, dtype=F64)
    made.load_state_dict(network.state_dict())
    return made


def test_the_papers_toy_becomes_its_own_formula(fitted):
    network, x = copy_of(fitted[0]), fitted[1]
    fits = network.symbolic(x)
    assert fits.open_edges() == [] and "sin" in str(fits)
    assert network.snap(fits) == 3
    history = network.fit(x, law(x), optimizer="lm", steps=30, grid_update=0)
    assert history.best["train_rmse"] < 1e-10  # the numbers of the right formula can be trained to the last digit
    (found,) = network.formula(samples(300, seed=1), names=["u", "v"])
    u, v = sympy.symbols("u v", real=True)
    assert sympy.simplify(found - sympy.exp(sympy.sin(sympy.pi * u) + v**2)) == 0


def test_fitting_formulas_changes_nothing_and_they_come_out_again(fitted):
    network, x = copy_of(fitted[0]), fitted[1]
    before = network(x)
    fits = network.symbolic(x)
    assert torch.equal(network(x), before)
    network.snap(fits)
    assert 0 < float((network(x) - before).detach().abs().max()) < 0.05
    with pytest.raises(SurgeryError, match="unsnap"):
        network.snap(fits)
    network.unsnap()
    assert torch.equal(network(x), before)


def test_multiplication_nodes_are_products_in_the_formula():
    x = samples(200)
    network = KAN([2, [0, 1]], dtype=F64)
    y = (2 * x[:, 0] + 1) * (x[:, 1] - 3)
    network.fit(x, y, optimizer="lm", steps=60, grid_update=0)
    network.snap(network.symbolic(x, library=["x"]))
    network.fit(x, y, optimizer="lm", steps=30, grid_update=0)
    (found,) = network.formula(samples(100, seed=1))
    a, b = sympy.symbols("x0 x1", real=True)
    assert sympy.expand(found - (2 * a + 1) * (b - 3)).subs({a: 0.3, b: -0.4}) == pytest.approx(0, abs=1e-2)


def test_an_open_network_has_no_formula_and_its_edges_are_named(fitted):
    network, x = copy_of(fitted[0]), fitted[1]
    with pytest.raises(ConfigError, match=r"edges without a formula: layers\.0 0 -> 0, layers\.0 1 -> 0, layers\.1 0 -> 0"):
        network.formula(x)
    fits = network.symbolic(x, library=["x"])
    assert (0, 0, 0) in fits.open_edges() and "nearest" in str(fits)
    network.snap(fits)
    with pytest.raises(ConfigError, match="edges without a formula"):
        network.formula(x)


def test_bad_samples_and_fits_of_others_are_errors(fitted):
    network, x = fitted
    for bad, kind in ((x[:, :1], ShapeError), (x[:1], DataError), (x * math.nan, DataError), ("abc", DataError)):
        with pytest.raises(kind) as caught:
            network.symbolic(bad)
        assert isinstance(caught.value, KanformerError)
    other = KAN([2, 3, 1], dtype=F64)
    with pytest.raises(ConfigError, match="another network"):
        network.snap(other.symbolic(x))
    snapped = copy_of(network)
    snapped.snap(snapped.symbolic(x))
    with pytest.raises(ConfigError, match="3 names"):
        snapped.formula(x, names=["a", "b", "c"])


def test_the_formula_is_the_network_on_samples_it_has_not_seen(fitted):
    network, x = copy_of(fitted[0]), fitted[1]
    network.snap(network.symbolic(x))
    fresh = samples(200, seed=2)
    (found,) = network.formula(fresh, tolerance=1e-2, simplify=False)
    values = sympy.lambdify(sympy.symbols("x0 x1", real=True), found, "numpy")(*fresh.T.numpy())
    wanted = network(fresh)[:, 0].detach()
    assert float((torch.as_tensor(values) - wanted).square().mean().sqrt()) <= 1e-2 * float(wanted.std(correction=0))
