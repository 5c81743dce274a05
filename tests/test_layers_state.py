"""What the layers keep for backward, how they are moved, copied and stored, and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from kanformer.config import KANConfig
from kanformer.errors import ConfigError, ShapeError
from kanformer.layers import EdgeFunctions, KANFeedForward, KANLinear, SharedKANLinear
from layer_cases import D, each_layer, each_layer_with_grid, grids, trained

# What they keep for backward.


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the distinct storages saved for backward, without parameters, buffers and the input."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers(), x)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_shared_block_keeps_no_more_for_backward_than_the_mlp(gated, dtype):
    d, h, tokens = 384, 1536, 2048
    block, control = (KANFeedForward(d, h, gated=gated, config=KANConfig(edges=edges), dtype=dtype) for edges in ("shared", "mlp"))
    x = torch.randn(tokens, d, dtype=dtype).requires_grad_()
    hidden = tokens * h * dtype.itemsize
    assert saved_bytes(block, x) <= saved_bytes(control, x) == (4 if gated else 2) * hidden


@pytest.mark.parametrize("base", ["identity", "silu", "gelu"])
def test_a_full_edge_map_keeps_its_input_only(base):
    x = torch.randn(512, 64).requires_grad_()
    assert saved_bytes(KANLinear(64, 32, base=base), x) == 0


# Moved, copied, stored.


@each_layer_with_grid
def test_the_grid_keeps_its_bits_when_the_model_is_cast_down(make):
    layer = make()
    before = [grid.clone() for grid in grids(layer)]
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(), lambda m: m.to("meta").to(torch.bfloat16)):
        layer = cast(layer)
        assert all(grid.dtype == torch.float32 for grid in grids(layer))
        assert all(grid.is_meta or torch.equal(grid, old) for grid, old in zip(grids(layer), before, strict=True))
    assert all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
    assert before and all(grid.dtype == torch.float64 for grid in grids(make().double()))


@each_layer
def test_all_state_is_called_kan_and_comes_back(make):
    layer, other = trained(make()), make()
    state = layer.state_dict()
    assert all("kan_" in name for name in state)
    other.load_state_dict(state)
    x = torch.randn(4, D)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
@each_layer
def test_a_copy_computes_the_same_and_shares_nothing(make, duplicate):
    layer, x = trained(make()), torch.randn(4, D)
    twin = duplicate(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.fill_(7.0)
    assert torch.equal(layer(x), before)


@each_layer
def test_a_layer_made_on_meta_is_filled_from_a_checkpoint(make):
    source, layer = trained(make()), make(device="meta")
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = torch.randn(4, D)
    assert torch.equal(layer(x), source(x))


@each_layer
def test_reset_parameters_starts_anew(make):
    layer = trained(make())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1e6)
    before = [grid.clone() for grid in grids(layer)]
    layer.reset_parameters()
    assert all(parameter.abs().max() <= 3 for parameter in layer.parameters())
    assert all(not parameter.any() for name, parameter in layer.named_parameters() if name.endswith(("bias", "functions.kan_coef")))
    assert all(torch.equal(grid, old) for grid, old in zip(grids(layer), before, strict=True))


# What they refuse.


@pytest.mark.parametrize("shape", [(), (D + 1,), (D, D - 1), (D, 1)], ids=str)
@each_layer
def test_an_input_of_another_width_is_refused(make, shape):
    with pytest.raises(ShapeError, match=r"apply .*expected \(\.\.\., 6\)"):
        make()(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@each_layer
def test_an_input_that_is_not_floating_point_is_refused(make, dtype):
    with pytest.raises(ShapeError, match="expected a floating-point tensor"):
        make()(torch.zeros(2, D, dtype=dtype))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KANLinear(0, 3), "in_features=0"),
        (lambda: KANLinear(3, 2.0), "out_features=2.0"),
        (lambda: SharedKANLinear(-1, 3), "in_features=-1"),
        (lambda: SharedKANLinear(6, 3, groups=4), "4 groups for 6 channels"),
        (lambda: EdgeFunctions(6, 0), "groups=0"),
        (lambda: KANFeedForward(6, "10"), "hidden_features='10'"),
        (lambda: KANFeedForward(6, 10, config=KANConfig(groups=3)), "3 groups for 10 channels"),
        (lambda: KANLinear(3, 3, basis="bsplin"), "Did you mean 'bspline'"),
        (lambda: KANLinear(3, 3, base="gelu_tan"), "Did you mean 'gelu_tanh'"),
        (lambda: KANLinear(3, 3, grid_size=0), "grid_size=0"),
        (lambda: EdgeFunctions(3, spline_order=-1), "spline_order=-1"),
        *((lambda pair=pair: EdgeFunctions(3, grid_range=pair), "lo < hi") for pair in [(1, 1), (2, -2), (0, math.nan), (0, math.inf), (1e8, 1e8 + 1)]),
    ],
)
def test_sizes_and_names_that_make_no_layer_are_refused(make, says):
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("lo", "hi"), [([0.0], [1.0]), ([0.0, 0.0], [1.0, 0.0]), ([0.0, math.nan], [1.0, 1.0]), ([0.0, 0.0], [1.0, math.inf]), ([0.0, 1e8], [1.0, 1e8])]
)
def test_a_wrong_range_is_refused_and_leaves_the_grid_alone(lo, hi):
    layer = EdgeFunctions(2)
    before = layer.kan_grid.clone()
    with pytest.raises(ShapeError, match="set the range of a grid"):
        layer.set_grid_range(torch.tensor(lo), torch.tensor(hi))
    assert torch.equal(layer.kan_grid, before)
