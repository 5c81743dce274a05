"""The linear control: closed form against a direct solution and brute force, its budget, and its place in a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kanformer.conversion.affine import AffineMoments
from kanformer.errors import ConfigError
from kanformer.layers import KANFeedForward
from kanformer.study.linear import LinearMap, fit_linear, linear_blocks, linear_parameters, load_maps, rank_within, save_maps
from kanformer.surgery.calibrating.calibrate import calibrate
from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.saving.loading import load_model
from kanformer.training.data import pad
from study_cases import teacher
from training_cases import texts, tokenizer

IN, OUT, ROWS = 7, 5, 400


@pytest.fixture
def rows():
    """(x, y) of a noisy map, the channels of x correlated and of different scales."""
    x = torch.randn(ROWS, IN, dtype=torch.float64) @ torch.randn(IN, IN, dtype=torch.float64) * torch.logspace(-1, 1, IN, dtype=torch.float64) + 3
    return x, torch.tanh(x @ torch.randn(IN, OUT, dtype=torch.float64) / 10) + 0.1 * torch.randn(ROWS, OUT, dtype=torch.float64) - 2


def moments_of(x, y, pieces=3):
    moments = AffineMoments(IN, OUT)
    for part_x, part_y in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        moments.update(part_x, part_y)
    return moments


def augmented(x, y, ridge):
    """Centred rows, and rows below them whose squared error is the ridge's penalty."""
    x, y = x - x.mean(0), y - y.mean(0)
    penalty = max(ridge, 1e-10) * x.var(0, unbiased=False).mean()
    return np.vstack([x.numpy(), float(ROWS * penalty) ** 0.5 * np.eye(IN)]), np.vstack([y.numpy(), np.zeros((IN, OUT))])


def objective(weight, x, y, ridge):
    wide, tall = augmented(x, y, ridge)
    return float(((wide @ weight - tall) ** 2).sum())


def whole(fitted: LinearMap) -> np.ndarray:
    return (fitted.right if fitted.left is None else fitted.right @ fitted.left).numpy()


@pytest.mark.parametrize("ridge", [0.0, 1e-5, 0.3])
def test_the_full_map_is_the_direct_least_squares_solution(rows, ridge):
    x, y = rows
    fitted = fit_linear(moments_of(x, y), None, ridge)
    wide, tall = augmented(x, y, ridge)
    expected = np.linalg.lstsq(wide, tall, rcond=None)[0]
    assert np.allclose(whole(fitted), expected, rtol=1e-6, atol=1e-8)
    assert torch.allclose(fitted(x).mean(0), y.mean(0), atol=1e-9)  # the bias takes up the means


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("rank", [0, 1, 3, OUT])
def test_the_low_rank_map_is_the_one_that_the_svd_of_the_fitted_rows_gives(rows, rank, ridge):
    x, y = rows
    fitted = fit_linear(moments_of(x, y), rank, ridge)
    wide, tall = augmented(x, y, ridge)
    full = np.linalg.lstsq(wide, tall, rcond=None)[0]
    right = np.linalg.svd(wide @ full)[2][:rank]
    assert np.allclose(whole(fitted), full @ right.T @ right, rtol=1e-5, atol=1e-7)
    assert np.linalg.matrix_rank(whole(fitted)) == rank
    assert fitted.parameters == linear_parameters(rank, IN, OUT) == rank * (IN + OUT) + OUT


def test_no_alternating_least_squares_finds_a_better_low_rank_map(rows):
    x, y = rows
    wide, tall = augmented(x, y, 0.01)
    best = objective(whole(fit_linear(moments_of(x, y), 2, 0.01)), x, y, 0.01)
    dice, found = np.random.default_rng(0), []
    for _ in range(5):
        left = dice.normal(size=(2, OUT))
        for _ in range(300):
            right = np.linalg.lstsq(wide, tall @ np.linalg.pinv(left), rcond=None)[0]
            left = np.linalg.lstsq(wide @ right, tall, rcond=None)[0]
        found.append(objective(right @ left, x, y, 0.01))
    assert min(found) == pytest.approx(best, rel=1e-6) and all(value >= best * (1 - 1e-9) for value in found)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5000))
def test_the_rank_is_the_greatest_that_fits(d, o, budget):
    if budget < o:
        with pytest.raises(ConfigError, match="linear map"):
            rank_within(budget, d, o)
        return
    rank = rank_within(budget, d, o)
    assert linear_parameters(rank, d, o) <= budget
    if rank is not None:
        assert linear_parameters(rank + 1, d, o) > budget and linear_parameters(None, d, o) > budget


def test_maps_are_saved_and_read_back(rows, tmp_path):
    x, y = rows
    maps = {"a.b": fit_linear(moments_of(x, y), None, 1e-5), "c": fit_linear(moments_of(x, y), 2, 1e-5)}
    save_maps(maps, tmp_path / "maps.safetensors")
    loaded = load_maps(tmp_path / "maps.safetensors")
    assert loaded.keys() == maps.keys() and loaded["a.b"].left is None
    for name, each in maps.items():
        assert torch.allclose(loaded[name](x.float()), each(x).float(), rtol=1e-4, atol=1e-4) and loaded[name].parameters == each.parameters


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_maps_stand_in_the_place_of_the_blocks_and_leave_no_trace(name, tmp_path):
    folder = teacher(tmp_path / "teacher", name)
    batch = pad(tokenizer()(texts(6))["input_ids"], 0)
    found = calibrate(load_model(folder), [batch], gram=False)
    maps = {path: fit_linear(seen.affine, None, 1e-5) for path, seen in found.statistics.items()}
    model = patch_model(load_model(folder), edges="mlp").eval()
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, KANFeedForward)}
    path, block = next(iter(blocks.items()))
    x = torch.randn(2, 3, block.in_features)
    with torch.no_grad():
        before, inside = block(x), model(**batch)[0]
        with linear_blocks(model, maps):
            assert torch.allclose(block(x), maps[path](x), atol=1e-6)
            assert (model(**batch)[0] - inside).abs().max() > 1e-4
        assert torch.equal(block(x), before) and torch.equal(model(**batch)[0], inside)
