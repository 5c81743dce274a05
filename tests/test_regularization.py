"""L1, entropy and smoothness against their definitions, over all bases and kinds of layer; the penalty of a whole model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kanformer
from kanformer.errors import ConfigError, DataError, NoFeedForwardError
from kanformer.layers import EdgeFunctions, KANFeedForward, KANLinear, SharedKANLinear, magnitudes
from kanformer.layers.magnitudes import edge_magnitudes, function_magnitudes, quantile_nodes
from kanformer.layers.regularization import entropy, smoothness
from kanformer.surgery.replacing.apply import patch_model
from layer_cases import BASES, D, feed_forward, trained
from model_cases import BY_NAME, disturb

ALL = {"uniform splines": {"basis": "bspline"}, **BASES}
each_basis = pytest.mark.parametrize("basis", ALL.values(), ids=ALL)


def edges(module: KANLinear, x: torch.Tensor) -> torch.Tensor:
    """phi[o,i](x_i) of every token, (tokens, out, in), by the definition."""
    members = module.basis.evaluate(x, module.kan_grid.to(x.dtype), module.kan_inner)
    return module.base(x).unsqueeze(1) * module.kan_base_weight + torch.einsum("tic,oci->toi", members, module.kan_coef)


def brute(shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations 2.18 and 2.19 for |phi|_1 of the edges, none of them 0."""
    p = shares / shares.sum()
    return shares.sum(), -(p * p.log()).sum()


def full(basis: dict) -> KANLinear:
    return trained(KANLinear(D, 5, grid_size=4, **basis)).double()


def assert_same(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pieces", [False, True])
@each_basis
def test_magnitudes_and_their_gradients_are_those_of_the_definition(basis, pieces, monkeypatch):
    if pieces:  # of 2 inputs and 3 tokens
        monkeypatch.setattr(magnitudes, "_INPUTS", 4)
        monkeypatch.setattr(magnitudes, "chunk_rows", lambda size: 3)
    module, x = full(basis), (2 * torch.randn(11, D, dtype=torch.float64)).requires_grad_()
    wanted, found = edges(module, x).abs().mean(0), edge_magnitudes(module, x, nodes=None)
    assert_same([found], [wanted])
    numbers = [x, module.kan_base_weight, module.kan_coef, *([] if module.kan_inner is None else [module.kan_inner])]
    weight = torch.randn(5, D, dtype=torch.float64)
    assert_same(torch.autograd.grad((found * weight).sum(), numbers), torch.autograd.grad((wanted * weight).sum(), numbers))
    assert_same([edge_magnitudes(module, x, nodes=11)], [wanted])


@each_basis
def test_gradcheck(basis):
    module, x = full(basis), torch.randn(4, D, dtype=torch.float64).requires_grad_()
    numbers = [parameter for parameter in module.parameters() if parameter is not module.kan_bias]

    def value(x, *_):
        shares = edge_magnitudes(module, x, nodes=3)
        return shares.sum(), entropy(shares), smoothness(module)

    assert torch.autograd.gradcheck(value, (x, *numbers))


@each_basis
@pytest.mark.parametrize("groups", [None, 2])
def test_penalty_of_shared_edges(basis, groups):
    module = trained(SharedKANLinear(D, 5, groups, grid_size=4, **basis)).double()
    x = torch.randn(3, 7, D, dtype=torch.float64)
    with kanformer.regularize(module, l1=2.0, entropy=3.0) as penalty:
        module(x)
    y = module.kan_functions(x).reshape(-1, 1, D)
    l1, disorder = brute((module.kan_weight * y).abs().mean(0))
    assert_same([penalty(), penalty.values["l1"], penalty.values["entropy"]], [2 * l1 + 3 * disorder, l1, disorder])


@pytest.mark.parametrize("kind", ["shared", "full"])
@pytest.mark.parametrize("gated", [False, True])
@each_basis
def test_penalty_of_a_block_and_its_gradient(kind, gated, basis):
    block = trained(feed_forward(kind, gated, **basis)).double()
    x = torch.randn(12, D, dtype=torch.float64).requires_grad_()
    with kanformer.regularize(block, l1=1.0, entropy=1.0, nodes=None) as penalty:
        block(x)
    layers = []
    if kind == "full":
        layers = [edges(module, x).abs().mean(0) for name, module in block.spline_modules() if name != "kan_down"]
        layers.append(edges(block.kan_down, block.hidden(x)).abs().mean(0))
    else:
        y = block.kan_functions((block.kan_gate if gated else block.kan_up)(x)).unsqueeze(1)
        layers = [(y if gated else block.kan_down.weight * y).abs().mean(0)]
    wanted = sum(sum(brute(layer)) for layer in layers)
    found = penalty()
    assert_same([found], [wanted])
    numbers = [x, *(parameter for parameter in block.parameters())]
    pair = [torch.autograd.grad(value, numbers, allow_unused=True, materialize_grads=True) for value in (found, wanted)]
    assert_same(*pair)


def test_nodes_are_a_sample_of_the_same_mean_that_converges():
    x = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)
    assert_same([quantile_nodes(x, 64).mean(0)], [x.mean(0)])
    assert quantile_nodes(x, 1000) is x and torch.equal(quantile_nodes(x, 1), quantile_nodes(x, 1).sort(0).values)
    torch.testing.assert_close(quantile_nodes(x, 999)[[0, -1]], torch.stack([x.amin(0), x.amax(0)]), rtol=2e-2, atol=2e-2)
    module, x = full({"basis": "bspline"}), torch.randn(4000, D, dtype=torch.float64)
    exact = edge_magnitudes(module, x, nodes=None)
    errors = [((edge_magnitudes(module, x, nodes) - exact).abs().max() / exact.mean()).item() for nodes in (16, 64, 256)]
    assert errors[0] < 0.1 and errors[1] < 0.01 and errors[2] < 1e-3


def test_entropy_of_equal_edges_and_its_invariance():
    shares = torch.full((4, 8), 0.3, dtype=torch.float64)
    assert float(entropy(shares)) == pytest.approx(math.log(32))
    shares = torch.rand(4, 8, dtype=torch.float64)
    want = entropy(shares)
    assert_same([entropy(7 * shares), entropy(shares.t()), entropy(shares[:, torch.randperm(8)]), entropy(torch.cat([shares, 0 * shares]))], [want] * 4)
    assert 0 < float(want) < math.log(32) and float(entropy(torch.eye(1))) == 0


@pytest.mark.parametrize("zero", ["an edge", "the layer"])
@each_basis
def test_an_edge_that_is_zero_gives_zero_and_gradients_that_are_finite(basis, zero):
    module, x = trained(KANLinear(D, 5, grid_size=4, **basis)), torch.randn(9, D)
    index = (slice(None), slice(None)) if zero == "the layer" else (2, 3)
    with torch.no_grad():
        module.kan_base_weight[index] = 0
        module.kan_coef.permute(0, 2, 1)[index] = 0
    shares = edge_magnitudes(module, x)
    assert shares[index].sum().item() == 0
    value = shares.sum() + entropy(shares) + smoothness(module)
    assert value.isfinite() and (zero == "an edge" or value.item() == 0)
    value.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in (module.kan_base_weight, module.kan_coef))
    assert float(module.kan_base_weight.grad[index].abs().sum()) == 0 and float(module.kan_coef.grad.permute(0, 2, 1)[index].abs().sum()) == 0


def test_shared_functions_that_are_zero():
    module = SharedKANLinear(D, 5, base="identity")
    with kanformer.regularize(module, l1=1.0, entropy=1.0, smoothness=1.0) as penalty:
        module(torch.zeros(4, D))
    found = penalty()
    found.backward()
    assert found.item() == 0 and all(parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in module.parameters())


@each_basis
def test_smoothness_is_the_integral_of_the_squared_second_derivative(basis):
    module = trained(EdgeFunctions(2, grid_size=4, grid_range=(-3.0, 5.0), base="identity", **basis)).double()
    if module.kan_inner is not None:
        with torch.no_grad():
            module.kan_inner[:, 0] = 0  # |x| has a kink, where the integral does not exist
    s = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).unsqueeze(-1).expand(-1, 2)
    lo, hi = module.grid_bounds
    psi = module.spline(lo.double() + (hi - lo).double() * s)
    wanted = psi.diff(n=2, dim=0).square().sum() * 4000**3
    torch.testing.assert_close(smoothness(module), wanted, rtol=0.1, atol=0)
    wide = trained(EdgeFunctions(2, grid_size=4, grid_range=(-30.0, 50.0), base="identity", **basis)).double()
    wide.load_state_dict({**module.state_dict(), "kan_grid": wide.kan_grid})
    if basis["basis"] != "rational":  # its members do not scale with the grid
        torch.testing.assert_close(smoothness(wide), smoothness(module), rtol=1e-5, atol=0)


def test_smoothness_of_straight_and_kinked_functions():
    module = EdgeFunctions(1, grid_size=4, base="identity")
    with torch.no_grad():
        module.kan_coef.copy_(torch.arange(7.0).view(1, -1))
    assert float(smoothness(module)) < 1e-6
    kinked, steps = (trained(EdgeFunctions(1, grid_size=4, spline_order=order)) for order in (1, 0))
    assert float(smoothness(kinked)) > 1 and float(smoothness(steps)) > 1
    assert float(smoothness(nn.Linear(2, 2))) == 0


def test_padding_does_not_count_and_calls_add_up():
    case = BY_NAME["bert"]
    for edge in ("shared", "full"):
        model = disturb(patch_model(case.build(), edges=edge, groups=None))
        inputs = case.inputs()
        values = []
        for given in (inputs, {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)}):
            with kanformer.regularize(model, l1=1.0, entropy=1.0) as penalty:
                model(**given)
            values.append(penalty())
        torch.testing.assert_close(values[0], values[1])
        with kanformer.regularize(model, l1=1.0, entropy=1.0) as penalty:
            model(inputs["input_ids"], inputs["attention_mask"])  # not by name
            positional = penalty()
            for row in range(2):
                length = int(inputs["attention_mask"][row].sum())
                model(input_ids=inputs["input_ids"][row : row + 1, :length])
            torch.testing.assert_close(penalty(), values[0])
        torch.testing.assert_close(positional, values[0])


def test_nothing_is_left_and_nothing_is_computed_outside_the_block():
    block, x = feed_forward("full", True), torch.randn(4, D)
    with kanformer.regularize(block, l1=1.0) as penalty:
        block(x)
        assert any(module._forward_hooks for module in block.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    penalty()
    block(x)
    with pytest.raises(DataError, match="no forward pass since the last penalty"):
        penalty()
    with kanformer.regularize(block) as penalty:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
        assert float(penalty()) == 0 and not penalty.values
    with pytest.raises(RuntimeError, match="stop"), kanformer.regularize(block, l1=1.0):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in block.modules())


@pytest.mark.parametrize("kind", ["shared", "full"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind, reentrant):
    block, x = trained(feed_forward(kind, False)), torch.randn(4, D, requires_grad=True)
    gradients = []
    for through in (lambda x: checkpoint(block, x, use_reentrant=reentrant), block):
        block.zero_grad()
        with kanformer.regularize(block, l1=1.0, entropy=1.0, through_inputs=not reentrant) as penalty:
            y = through(x)
            (y.sum() + penalty()).backward()
            assert not any(layer.calls for layer in penalty._layers.values())  # the second pass did not count
        gradients.append([parameter.grad.clone() for parameter in block.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared", "full"])
def test_a_model_that_checkpoints_its_layers(kind):
    case = BY_NAME["bert"]
    model = disturb(patch_model(case.build(), edges=kind)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for _ in range(2):
        model.zero_grad()
        with kanformer.regularize(model, l1=1.0, entropy=1.0) as penalty:
            loss = model(**case.inputs()).logits.square().mean()
        (loss + penalty()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_inputs_are_left_alone_when_asked():
    block, x = trained(feed_forward("shared", False)), torch.randn(4, D, requires_grad=True)
    with kanformer.regularize(block, l1=1.0, through_inputs=False) as penalty:
        block(x)
    penalty().backward()
    assert x.grad is None and block.kan_up.weight.grad is None and block.kan_functions.kan_coef.grad is not None


@pytest.mark.parametrize("kind", ["shared", "full"])
def test_low_precision_and_autocast(kind):
    block = trained(feed_forward(kind, False)).bfloat16()
    x = torch.randn(40, D).bfloat16()
    with kanformer.regularize(block, l1=1.0, entropy=1.0, smoothness=1e-6) as penalty:
        block(x)
    low = penalty()
    assert low.dtype == torch.float32 and low.isfinite()
    low.backward()
    exact = block.float()
    with torch.autocast("cpu", torch.bfloat16), kanformer.regularize(exact, l1=1.0, entropy=1.0, smoothness=1e-6) as penalty:
        exact(x.float())
        mixed = penalty()
    torch.testing.assert_close(low, mixed, rtol=0.02, atol=0)


def test_what_cannot_be_regularised():
    with pytest.raises(NoFeedForwardError, match="no learned functions"), kanformer.regularize(nn.Linear(2, 2), l1=1.0):
        pass
    for wrong in ({"l1": -1.0}, {"entropy": math.nan}, {"smoothness": math.inf}, {"nodes": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))), kanformer.regularize(KANFeedForward(2, 2), **wrong):
            pass


@pytest.mark.parametrize("kind", ["shared", "full"])
def test_l1_drives_edges_down(kind):
    x = torch.randn(256, D)
    target = torch.stack([x[:, 0].sin(), x[:, 1].square()], 1)  # the other inputs are noise
    ends = []
    for l1 in (0.0, 0.03):
        torch.manual_seed(0)
        learner = KANLinear(D, 2) if kind == "full" else SharedKANLinear(D, 2)
        optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
        for _ in range(100):
            with kanformer.regularize(learner, l1=l1) as penalty:
                loss = (learner(x) - target).square().mean()
            optimizer.zero_grad()
            (loss + penalty()).backward()
            optimizer.step()
        with torch.no_grad():
            shares = edge_magnitudes(learner, x) if isinstance(learner, KANLinear) else learner.kan_weight.abs() * function_magnitudes(learner.kan_functions(x))
        ends.append(shares)
    assert float(ends[1][:, 2:].sum()) < 0.5 * float(ends[0][:, 2:].sum()) and float(ends[1][1, 1]) > 0.5
