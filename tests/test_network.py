"""The stand-alone KAN: its structure, its fit, its files, and what it refuses."""

import itertools
import json
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

import kanformer
from kanformer import KAN
from kanformer.errors import CheckpointError, ConfigError, DataError, KanformerError, ShapeError, TrainingDiverged
from kanformer.network.least_squares import LevenbergMarquardt

F64 = torch.float64


def toy(count=200, seed=0):
    x = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2 - 1
    return x, torch.exp(torch.sin(math.pi * x[:, 0]) + x[:, 1] ** 2)


def plain(network, x):
    """The network by scipy's splines, edge by edge, in numpy."""
    x = x.numpy()
    for map, level in zip(network.maps, network.levels[1:], strict=True):
        weight, coef, bias = (value.detach().numpy() for value in (map.kan_base_weight, map.kan_coef, map.kan_bias))
        y = np.tile(bias, (len(x), 1))
        lo, hi = (bound.double().numpy() for bound in map.grid_bounds)
        for i in range(map.in_features):
            step = (hi[i] - lo[i]) / map.basis.grid_size
            order = map.basis.spline_order
            knots = lo[i] + step * np.arange(-2 * order, map.basis.grid_size + 2 * order + 1)  # k more, so that the fading ends lie inside
            for o in range(map.out_features):
                spline = np.nan_to_num(BSpline(knots, np.pad(coef[o, :, i], order), order, extrapolate=False)(x[:, i]))
                y[:, o] += spline + weight[o, i] * x[:, i] / (1 + np.exp(-x[:, i]))
        factors = y[:, level.sums :].reshape(len(x), level.products, level.arity) if level.products else np.ones((len(x), 0, 1))
        x = np.concatenate([y[:, : level.sums], factors.prod(-1)], 1)
    return x


@pytest.mark.parametrize("width", [[2, 1], [2, 5, 1], [3, [2, 2], 2], [2, [0, 3], [1, 1]]])
def test_a_network_is_its_edges_summed_and_multiplied(width):
    network = KAN(width, mult_arity=3, dtype=F64, seed=4)
    x = torch.rand(64, network.in_features, dtype=F64) * 1.8 - 0.9
    with torch.no_grad():
        for map in network.maps:
            map.kan_coef.normal_()
            cast(Any, map.kan_bias).normal_()
    np.testing.assert_allclose(network(x).detach().numpy(), plain(network, x), rtol=1e-12, atol=1e-12)


def test_pairs_and_mult_say_the_same_and_the_list_stays_as_it_was():
    width = [2, [3, 2], 1]
    one, two = KAN(width, seed=3), KAN([2, 3, 1], mult=[0, 2, 0], seed=3)
    assert width == [2, [3, 2], 1] == one.width == two.width
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_seed_gives_the_same_network_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = KAN([2, 3, 1], seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.maps[0].kan_coef, KAN([2, 3, 1], seed=1).maps[0].kan_coef)
    assert not torch.equal(one.maps[0].kan_coef, KAN([2, 3, 1], seed=2).maps[0].kan_coef)


def test_a_fit_and_a_refinement_learn_the_papers_toy():
    (x, y), (x_val, y_val) = toy(400), toy(400, seed=1)
    network, errors = KAN([2, 1, 1], grid_size=3, dtype=F64), []
    for grid in (3, 6, 12):
        if grid > 3:
            network.refine(grid)
        history = network.fit(x, y, x_val, y_val, steps=12, grid_update=6)
        errors.append(history.best["val_rmse"])
        assert network.grid_size == grid
        with torch.no_grad():
            assert float((network(x_val)[:, 0] - y_val).square().mean().sqrt()) == pytest.approx(errors[-1], rel=1e-9)  # the best state is kept
    assert errors[0] < 0.05 and errors[1] < errors[0] / 2 and errors[2] < 2e-3
    assert "kept: step" in str(history) and history.plot().axes[0].get_yscale() == "log"


def test_a_refinement_to_a_multiple_keeps_the_function_on_the_data():
    x, y = toy()
    network = KAN([2, 3, 1], grid_size=4, dtype=F64)
    network.fit(x, y, steps=4, grid_update=2)
    network.update_grid(x)  # so that nothing lies outside
    before = network(x)
    network.refine(12)
    assert float((network(x) - before).detach().abs().max()) < 1e-5


def test_adam_on_batches_learns_too_and_metrics_are_recorded():
    x, y = toy()
    history = KAN([2, 4, 1]).fit(x, y, optimizer="adam", steps=120, batch_size=64, lr=0.02, metrics={"worst": lambda out, y: (out - y).abs().max()})
    assert history["train_rmse"][-1] < 0.5 * history["train_rmse"][0]
    assert history["worst"][-1] >= history["train_rmse"][-1]


def test_classes_are_learned_with_cross_entropy():
    x, _ = toy()
    labels = (x[:, 0] * x[:, 1] > 0).long()
    history = KAN([2, 4, 2], dtype=F64).fit(x, labels, loss="cross_entropy", steps=15)
    assert history.best["train_error_rate"] < 0.05


def test_regularisation_shrinks_what_the_edges_give():
    x, y = toy()
    sizes = []
    for weight in (0.0, 1e-2):
        network = KAN([2, 4, 1], dtype=F64)
        history = network.fit(x, y, steps=10, regularization=weight)
        with kanformer.regularize(network, l1=1.0) as penalty:
            network(x)
        sizes.append(float(penalty().detach()))
        assert (history["penalty"][-1] > 0) is (weight > 0)
    assert sizes[1] < 0.8 * sizes[0]


def test_patience_and_standing_still_end_a_fit_early():
    x, y = toy(60)
    network = KAN([2, 2, 1], dtype=F64)
    x_val, y_val = toy(60, seed=1)
    assert network.fit(x, y, x_val, y_val.flip(0), steps=200, patience=3).stopped == "patience"
    line = KAN([1, 1], dtype=F64, grid_size=2)
    history = line.fit(x[:, :1], 2 * x[:, 0] + 1, optimizer="lm", steps=200, grid_update=0)
    assert history.stopped == "converged" and history.best["train_rmse"] < 1e-7


def test_levenberg_marquardt_is_a_damped_gauss_newton_step():
    x, y = toy(40)
    network = KAN([2, [1, 1], 1], grid_size=3, dtype=F64)
    one = LevenbergMarquardt(network, x, y.unsqueeze(1), damping=0.5)
    gram, slope = one._normal_equations()
    rows = []
    for value in network(x)[:, 0]:
        network.zero_grad()
        value.backward(retain_graph=True)
        rows.append(torch.cat([cast(Any, p.grad).flatten() for p in network.parameters()]))
    jacobian, residual = torch.stack(rows), (network(x)[:, 0] - y).detach()
    torch.testing.assert_close(gram, jacobian.T @ jacobian, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope, jacobian.T @ residual, rtol=1e-9, atol=1e-12)
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    scale = gram.diagonal().clamp(min=1e-12 * float(gram.diagonal().max()))
    wanted = before - torch.linalg.solve(gram + 0.5 * torch.diag(scale), slope)
    loss = one.step()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in network.parameters()]), wanted, rtol=1e-6, atol=1e-8)
    assert one.moved and loss < float(residual.square().mean())


def test_levenberg_marquardt_reaches_the_splines_own_error():
    (x, y), (x_val, y_val) = toy(600), toy(600, seed=1)
    network, errors = KAN([2, 1, 1], grid_size=3, dtype=F64), []
    network.fit(x, y, steps=10)
    for grid in (6, 12, 24, 48):
        network.update_grid(x)
        network.refine(grid)
        errors.append(network.fit(x, y, x_val, y_val, optimizer="lm", steps=15, grid_update=0).best["val_rmse"])
    assert errors[-1] < 5e-6
    assert all(-5.5 < math.log2(b / a) < -2.5 for a, b in itertools.pairwise(errors))  # an order of 4 as G doubles, once the start is good


def test_levenberg_marquardt_refuses_what_it_cannot_do():
    x, y = toy()
    for settings in ({"regularization": 0.1}, {"loss": "cross_entropy"}, {"lr": 0.1}, {"batch_size": 8}):
        with pytest.raises(ConfigError, match="lm"):
            KAN([2, 1]).fit(x, y, optimizer="lm", **settings)
    with pytest.raises(ConfigError, match="at most 8,192"):
        KAN([2, 500, 1]).fit(x, y, optimizer="lm")


def test_the_same_fit_twice_gives_the_same_bits():
    x, y = toy(80)
    states = []
    for _ in range(2):
        network = KAN([2, 3, 1])
        network.fit(x, y, optimizer="adam", steps=10, batch_size=16)
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_lbfgs_that_diverges_falls_back_to_adam_with_the_best_state(monkeypatch):
    x, y = toy(50)
    network, real, steps = KAN([2, 2, 1], dtype=F64), torch.optim.LBFGS.step, []

    def step(self, closure):
        found = real(self, closure)
        steps.append(found)
        if len(steps) == 4:
            with torch.no_grad():
                network.maps[0].kan_coef.fill_(math.nan)
        return found

    monkeypatch.setattr(torch.optim.LBFGS, "step", step)
    with pytest.warns(UserWarning, match="L-BFGS diverged in step 4"):
        history = network.fit(x, y, steps=30)
    assert "Adam" in history.notes[0] and len(steps) == 4 and len(history) == 29
    assert all(math.isfinite(value) for value in history["loss"]) and history.best["loss"] <= history["loss"][2]


def test_a_fit_that_diverges_for_good_keeps_the_best_state():
    x, y = toy(50)
    network, seen = KAN([2, 2, 1], dtype=F64), []

    def loss(outputs, targets):
        seen.append(1)
        found = (outputs - targets).square().mean()
        return found if len(seen) < 20 else found * math.nan

    with pytest.warns(UserWarning), pytest.raises(TrainingDiverged, match="holds its best state"):
        network.fit(x, y, loss=loss, steps=30, inner_steps=5)
    assert bool(network(x).isfinite().all())


def test_files_give_the_network_back_bit_for_bit(tmp_path):
    x, y = toy(60)
    network = KAN([2, [2, 1], 1], grid_size=3, knots="free", dtype=F64)
    network.fit(x, y, steps=3)
    network.refine(6)
    network.save(tmp_path / "kan")
    again = KAN.load(tmp_path / "kan")
    assert torch.equal(network(x), again(x)) and again.width == [2, [2, 1], 1]
    network.save(tmp_path / "kan")  # over itself
    assert torch.equal(KAN.load(tmp_path / "kan")(x), network(x))


def test_damaged_files_are_errors(tmp_path):
    KAN([2, 1]).save(tmp_path / "kan")
    config, weights = tmp_path / "kan" / "config.json", tmp_path / "kan" / "model.safetensors"
    good = config.read_text()
    for bad in (
        "{",
        json.dumps({**json.loads(good), "version": 99}),
        json.dumps({**json.loads(good), "width": [3, 1]}),
        json.dumps({**json.loads(good), "grdi": 1}),
    ):
        config.write_text(bad)
        with pytest.raises(CheckpointError, match="load a KAN"):
            KAN.load(tmp_path / "kan")
    config.write_text(good)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="load a KAN"):
        KAN.load(tmp_path / "kan")
    with pytest.raises(CheckpointError, match="a folder that KAN.save wrote"):
        KAN.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("width", "settings", "message"),
    [
        ([2], {}, "expected inputs, hidden widths and outputs"),
        ([2, 0, 1], {}, "at least one node"),
        ([2, 1.5, 1], {}, "an integer"),
        ([[2, 1], 1], {}, "multiplication nodes among the inputs"),
        ([2, 3, 1], {"mult": [0, 1]}, "per level"),
        ([2, [3, 1], 1], {"mult_arity": 1}, "at least 2 factors"),
        ([2, 1], {"grid_range": (1, 1)}, "lo < hi"),
    ],
)
def test_bad_widths_are_errors(width, settings, message):
    with pytest.raises(ConfigError, match=message):
        KAN(width, **settings)


def _with_nan(x):
    x = x.clone()
    x[3] = math.nan
    return x


@pytest.mark.parametrize(
    ("change", "settings", "kind", "message"),
    [
        (lambda x, y: (x[:, :1], y), {}, ShapeError, r"X of shape \(200, 1\), expected \(n, 2\)"),
        (lambda x, y: (x, y[:50]), {}, ShapeError, r"y of shape \(50, 1\), expected \(200, 1\)"),
        (lambda x, y: (x, _with_nan(y)), {}, DataError, "1 of 200 rows of y with NaN or infinity, the first row 3"),
        (lambda x, y: (_with_nan(x), y), {}, DataError, "rows of X"),
        (lambda x, y: (x, torch.ones_like(y)), {}, DataError, r"the constant \[1.0\] in all 200 samples"),
        (lambda x, y: (x[:1], y[:1]), {}, DataError, "1 samples, expected at least 2"),
        (lambda x, y: (x, y), {"optimiser": "adam"}, ConfigError, "Did you mean 'optimizer'"),
        (lambda x, y: (x, y), {"optimizer": "sgd"}, ConfigError, "optimizer='sgd'"),
        (lambda x, y: (x, y), {"batch_size": 8}, ConfigError, "lbfgs needs the same samples"),
        (lambda x, y: (x, y), {"steps": 0}, ConfigError, "steps=0"),
        (lambda x, y: (x, y), {"X_val": torch.ones(3, 2)}, ConfigError, "both or none"),
        (lambda x, y: (x, (y * 0 + 7).long()), {"loss": "cross_entropy"}, DataError, "classes 7 to 7"),
    ],
)
def test_bad_data_are_errors_and_change_nothing(change, settings, kind, message):
    network = KAN([2, 2, 1], dtype=F64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x, y = change(*toy())
    with pytest.raises(kind, match=message) as caught:
        network.fit(x, y, **settings)
    assert isinstance(caught.value, KanformerError)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
