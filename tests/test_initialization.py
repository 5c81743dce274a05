"""Where layers start: weights that keep the variance through a stack, and functions that are zero, noise or fitted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kanformer.bases import available
from kanformer.config import KANConfig
from kanformer.errors import ConfigError
from kanformer.layers import EdgeFunctions, KANFeedForward, KANLinear, SharedKANLinear
from kanformer.layers.initialization import preserve_variance_

each_basis = pytest.mark.parametrize("basis", available())
each_map = pytest.mark.parametrize("layer", [KANLinear, SharedKANLinear], ids=["full", "shared"])


@torch.no_grad()
@each_basis
@each_map
@pytest.mark.parametrize("base", ["silu", "gelu", "identity"])
def test_a_stack_of_twelve_keeps_the_variance_within_ten_percent(layer, basis, base):
    x = torch.randn(1000, 512)
    for _ in range(12):
        x = layer(512, 512, basis=basis, base=base, bias=False)(x)
    assert 0.9 < x.var() < 1.1


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("edges", ["shared", "full", "mlp"])
def test_a_random_block_keeps_the_variance(edges, gated):
    block = KANFeedForward(128, 384, gated=gated, config=KANConfig(edges=edges, init="random"))
    block.reset_parameters()
    assert 0.9 < block(torch.randn(2000, 128)).var() < 1.1


def test_rows_are_orthogonal_have_their_norm_and_sum_to_zero():
    weight = torch.empty(40, 96)
    preserve_variance_(weight, nn.Identity(), 4.0)
    torch.testing.assert_close(weight.norm(dim=1), torch.full((40,), 2.0), rtol=1e-3, atol=0)
    assert weight.sum(1).abs().max() < 1e-5
    gram = weight @ weight.t() / 4
    assert (gram - torch.eye(40)).abs().max() < 0.25  # orthogonal but for the mean that was taken off
    wide = torch.empty(8, 2000, dtype=torch.bfloat16)
    preserve_variance_(wide, nn.Identity())
    assert (wide.float().norm(dim=1) - 1).abs().max() < 0.01


def test_few_inputs_are_not_made_alike():
    weight = torch.empty(64, 2)
    preserve_variance_(weight, nn.Identity())
    assert (weight[:, 0] * weight[:, 1] > 0).any() and abs(float((weight @ torch.randn(2, 5000)).var()) - 1) < 0.3


# Functions.

FITS = {  # largest error on [-3, 3] with grid_size 8, or where only the rational functions are meant, nothing
    "bspline": {"identity": 1e-5, "silu": 1e-3, "gelu": 2e-3, "sigmoid": 1e-3},
    "chebyshev": {"identity": 1e-5, "silu": 1e-3, "gelu": 6e-3, "sigmoid": 1e-3},
    "fourier": {"identity": 1e-4, "silu": 1e-3, "gelu": 1e-3, "sigmoid": 1e-3},
    "rational": {"identity": 1e-6, "silu": 1e-5, "gelu": 1.4e-3, "relu": 1.4e-2, "tanh": 1e-5, "sigmoid": 1e-5},
    "rbf": {"tanh": 0.1, "sigmoid": 0.1},
}


@pytest.mark.parametrize(("basis", "function", "error"), [(basis, name, error) for basis, fits in FITS.items() for name, error in fits.items()])
def test_a_function_is_fitted_over_the_range(basis, function, error):
    """The rational functions of degrees 5 and 4 come no nearer to gelu than 1.3e-3 and to relu than 1.3e-2; with those as base they are exact."""
    from kanformer.layers.base_functions import base_function

    module = EdgeFunctions(3, basis=basis, base="zero", grid_range=(-3.0, 3.0))
    module.init_functions("fit", function=function)
    x = torch.linspace(-3, 3, 2001).unsqueeze(1).expand(-1, 3)
    assert (module(x) - base_function(function)(x)).abs().max() <= error


@each_basis
def test_a_base_that_is_the_function_already_leaves_nothing_to_learn(basis):
    module = EdgeFunctions(2, basis=basis, base="gelu")
    module.init_functions("fit", function=F.gelu)
    x = torch.randn(50, 2)
    torch.testing.assert_close(module(x), F.gelu(x), rtol=0, atol=1e-6)


@torch.no_grad()
def test_full_edges_are_fitted_as_base_weight_times_the_function():
    layer = KANLinear(5, 4, base="identity", grid_range=(-3.0, 3.0), grid_size=16)
    layer.init_functions("fit", function="tanh")
    x = torch.rand(60, 5) * 6 - 3
    assert (layer(x) - F.linear(torch.tanh(x), layer.kan_base_weight, layer.kan_bias)).abs().max() < 2e-3


@torch.no_grad()
@each_basis
def test_zero_and_noise(basis):
    module, x = EdgeFunctions(4, basis=basis, base="gelu"), torch.randn(20_000, 4)
    module.init_functions("noise", std=0.5)
    several = torch.stack([(module.init_functions("noise", std=0.5), module.spline(x).square().mean())[1] for _ in range(40)])
    assert 0.3 < several.mean().sqrt() < 0.75
    module.init_functions("zero")
    assert torch.equal(module(x), F.gelu(x))


def test_wrong_starts_are_errors():
    module = EdgeFunctions(4)
    with pytest.raises(ConfigError, match="Did you mean 'noise'"):
        module.init_functions("nois")
    with pytest.raises(ConfigError, match="a function with init='fit'"):
        module.init_functions("fit")
    with pytest.raises(ConfigError, match="only there"):
        module.init_functions("zero", function="gelu")
