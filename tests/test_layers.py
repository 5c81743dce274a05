"""What the layers compute: formulas, gradients, dtypes, starting points."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from kanformer.layers import EdgeFunctions, KANLinear, SharedKANLinear
from kanformer.layers.feed_forward import copy_linear
from kanformer.ops import reference_edge_functions, reference_full_edges
from layer_cases import BASES, LAYERS, D, H, each_layer, feed_forward, trained


def test_a_kan_linear_is_the_papers_formula():
    layer = trained(KANLinear(D, 5).double())
    nn.init.normal_(layer.kan_bias)
    x = torch.randn(20, D, dtype=torch.float64) * 3
    want = layer.kan_bias + F.silu(x) @ layer.kan_base_weight.T + reference_full_edges(x, layer.kan_coef, layer.kan_grid, layer.basis)
    torch.testing.assert_close(layer(x), want, rtol=1e-6, atol=1e-6)  # the knots were rounded to float32


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_a_shared_kan_linear_is_a_linear_map_of_the_learned_functions(groups):
    layer = trained(SharedKANLinear(D, 5, groups, base="tanh"))
    functions = layer.kan_functions
    x = torch.randn(20, D)
    psi = torch.tanh(x) + reference_edge_functions(x, functions.kan_coef, functions.kan_grid, functions.basis)
    torch.testing.assert_close(layer(x), F.linear(psi, layer.kan_weight, layer.kan_bias))


def test_neighbouring_channels_form_a_group():
    layer = EdgeFunctions(D, groups=3, base="relu")
    nn.init.ones_(layer.kan_coef.data[1])
    assert (layer.spline(torch.zeros(D)) != 0).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("edges", ["shared", "full", "mlp"])
def test_a_feed_forward_is_its_maps_one_after_the_other(edges, gated):
    block = trained(feed_forward(edges, gated))
    x = torch.randn(4, D)
    up, psi, down = block.kan_up, block.kan_functions, block.kan_down
    want = down(psi(block.kan_gate(x)) * up(x)) if gated else down(psi(up(x)))
    torch.testing.assert_close(block(x), want, rtol=0, atol=0)
    assert isinstance(psi, EdgeFunctions) == (edges == "shared")
    assert isinstance(up, KANLinear) == isinstance(down, KANLinear) == (edges == "full")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("edges", ["shared", "full"])
def test_a_new_block_computes_what_the_mlp_computes(edges, gated, dtype):
    gate, up, down = (nn.Linear(D, H, dtype=dtype), nn.Linear(D, H, bias=False, dtype=dtype), nn.Linear(H, D, dtype=dtype))
    block = feed_forward(edges, gated, dtype=dtype)
    copy_linear(block.kan_up, up.weight, None)
    copy_linear(block.kan_down, down.weight, down.bias)
    if gated:
        copy_linear(block.kan_gate, gate.weight, gate.bias)
    x = torch.randn(50, D, dtype=dtype)
    want = down(F.gelu(gate(x)) * up(x)) if gated else down(F.gelu(F.linear(x, up.weight, torch.zeros(H, dtype=dtype))))
    assert torch.equal(block(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@each_layer
def test_the_output_has_the_leading_shape_and_dtype_of_the_input(make, dtype):
    layer = make(dtype=dtype)
    width = layer(torch.randn(D, dtype=dtype)).shape[-1]
    for shape in ((), (0,), (3,), (2, 0, 4), (2, 3, 4)):
        y = layer(torch.randn(*shape, D, dtype=dtype))
        assert y.shape == (*shape, width) and y.dtype == dtype and y.isfinite().all()


@each_layer
def test_every_token_is_mapped_for_itself(make):
    layer, x = trained(make()).double(), torch.randn(3, 4, D, dtype=torch.float64)
    single = torch.stack([layer(token) for token in x.reshape(-1, D)])
    torch.testing.assert_close(layer(x).reshape(single.shape), single, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1), rtol=1e-9, atol=1e-10)


@each_layer
def test_gradcheck_of_input_and_all_parameters(make):
    layer = trained(make(dtype=torch.float64).double())
    names = [name for name, _ in layer.named_parameters()]
    x = (torch.randn(3, D, dtype=torch.float64) * 2).requires_grad_()
    many = sum(value.numel() for value in layer.parameters()) > 400  # then along random directions, not number by number
    assert gradcheck(lambda x, *values: functional_call(layer, dict(zip(names, values, strict=True)), (x,)), (x, *layer.parameters()), fast_mode=many)


@pytest.mark.parametrize("base", ["silu", "gelu", "identity"])
@pytest.mark.parametrize("layer", [KANLinear, SharedKANLinear])
def test_the_second_derivative_is_there(layer, base):
    """Differential equations, solved by the network, need it."""
    module = trained(layer(2, 3, base=base, grid_size=3)).double()
    x = torch.randn(3, 2, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in module.named_parameters()]
    assert gradgradcheck(lambda x, *values: functional_call(module, dict(zip(names, values, strict=True)), (x,)), (x, *module.parameters()))


@each_layer
def test_nan_and_infinity_show_in_their_own_tokens_only(make):
    layer, x = trained(make()), torch.randn(5, D)
    clean = layer(x)
    x[1, 2], x[3, 0] = math.nan, math.inf
    y = layer(x)
    assert not y[1].isfinite().all() and not y[3].isfinite().all()
    torch.testing.assert_close(y[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("edges", ["shared", "full"])
def test_autocast_stays_near_full_precision(edges):
    block, x = trained(feed_forward(edges, True)), torch.randn(64, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert (y.float() - block(x)).norm() < 0.02 * block(x).norm()
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in block.parameters())


def test_dropout_acts_in_training_only():
    block = feed_forward("shared", False, hidden_dropout=0.5, output_dropout=0.5)
    x = torch.randn(200, D)
    assert 0.4 < (block(x) == 0).float().mean() < 0.6
    assert torch.equal(block.eval()(x), block(x)) and (block(x) != 0).all()
    block = feed_forward("shared", False, hidden_dropout=1.0)
    torch.testing.assert_close(block(x), block.kan_down.bias.expand(200, D))


@pytest.mark.parametrize("options", [*({"base": base} for base in ("identity", "silu", "gelu", "relu", "tanh")), *BASES.values()], ids=str)
@pytest.mark.parametrize("layer", [KANLinear, SharedKANLinear])
def test_a_fresh_map_keeps_the_variance_within_ten_percent(layer, options):
    assert 0.9 < layer(256, 256, **options)(torch.randn(4000, 256)).var() < 1.1


def test_only_layers_with_functions_list_spline_parameters():
    names = {
        (edges, gated): [name for name, _ in feed_forward(edges, gated).spline_modules()] for edges in ("shared", "full", "mlp") for gated in (False, True)
    }
    assert names["shared", True] == names["shared", False] == ["kan_functions"] and names["mlp", True] == []
    assert names["full", False] == ["kan_up", "kan_down"] and names["full", True] == ["kan_gate", "kan_up", "kan_down"]
    assert [parameter.shape for parameter in feed_forward("shared", True).spline_parameters()] == [(H, 4 + 3)]


def test_set_grid_range_moves_the_grids_where_the_functions_live():
    layer = EdgeFunctions(2, base="relu", grid_size=5)
    nn.init.ones_(layer.kan_coef)
    layer.set_grid_range(torch.tensor([-1.0, 10.0]), torch.tensor([1.0, 30.0], dtype=torch.float64))
    torch.testing.assert_close(layer.spline(torch.tensor([[0.0, 20.0], [20.0, -5.0]])), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(layer.grid_bounds, (torch.tensor([-1.0, 10.0]), torch.tensor([1.0, 30.0])))


def test_the_printed_form_names_the_sizes():
    assert "in_features=6, out_features=5, bias=False, basis=bspline, grid_size=1, spline_order=1" in repr(LAYERS["KANLinear without bias"]())
    assert "in_features=6, out_features=5, bias=True" in repr(SharedKANLinear(D, 5)) and "6, groups=3, basis=bspline" in repr(EdgeFunctions(D, 3))
    assert "in_features=6, hidden_features=10, gated=True, edges=shared" in repr(feed_forward("shared", True)) and "sin" in repr(
        EdgeFunctions(D, base=torch.sin)
    )
