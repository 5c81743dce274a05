"""The layers inside torch's machinery: compiled whole, exported, checkpointed, autocast, transformed, over all bases."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from kanformer.layers import KANFeedForward
from layer_cases import BASES, D, feed_forward, trained

ALL = {"uniform splines": {"basis": "bspline"}, **BASES}
each_block = pytest.mark.parametrize(
    ("edges", "basis"), [(edges, basis) for edges in ("shared", "full") for basis in ALL.values()], ids=[f"{e} {b}" for e in ("shared", "full") for b in ALL]
)


def block(edges: str, basis: dict, gated: bool = True) -> KANFeedForward:
    return trained(feed_forward(edges, gated, **basis))


def gradients(function, module, x):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))


def assert_like(found, wanted, rtol=1e-4):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().max()))


@each_block
def test_compiled_as_one_graph(edges, basis):
    torch._dynamo.reset()  # it counts the blocks of the other tests as recompilations of this one
    module, x = block(edges, basis), torch.randn(2, 5, D)
    whole = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_like(gradients(whole, module, x), gradients(module, module, x))
    assert_like(gradients(whole, module, x[:1]), gradients(module, module, x[:1]))


@each_block
def test_exported_without_an_operator_of_ours(edges, basis):
    module, x = block(edges, basis).eval(), torch.randn(4, 5, D)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert not any("kanformer" in str(node.target) for node in program.graph.nodes)
    for batch in (x, torch.randn(7, 5, D)):
        want = module(batch).detach()
        torch.testing.assert_close(program.module()(batch), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@each_block
def test_activation_checkpointing_changes_no_bit(edges, basis, reentrant):
    module, x = block(edges, basis), torch.randn(3, D)

    def run(x):
        return checkpoint(module, x, use_reentrant=reentrant)

    def backward(function):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        function(leaf).square().sum().backward()
        return [leaf.grad, *(parameter.grad.clone() for parameter in module.parameters())]

    for got, want in zip(backward(run), backward(module), strict=True):
        assert torch.equal(got, want)


@each_block
def test_autocast_keeps_the_spline_argument_precise(edges, basis):
    module, x = block(edges, basis), torch.randn(64, D)
    exact = gradients(module, module, x)
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(lambda x: module(x).float(), module, x)
    assert (low[0] - exact[0]).norm() <= 0.03 * exact[0].norm()
    assert all(got.dtype == torch.float32 and got.isfinite().all() for got in low)


@each_block
def test_per_sample_gradients_and_jacobians(edges, basis):
    module, x = block(edges, basis).double(), torch.randn(3, D, dtype=torch.float64)
    jacobians = vmap(jacrev(module))(x)
    for row in range(3):
        want = torch.autograd.functional.jacobian(module, x[row])
        torch.testing.assert_close(jacobians[row], want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().sum()

    per_sample = vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    module.zero_grad()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-6, atol=1e-6 * float(parameter.grad.abs().max()))
