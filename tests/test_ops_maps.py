"""Whole maps in one step, and base functions inside compiled kernels: the same numbers as the plain ways."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from kanformer import use_backend
from kanformer.errors import ConfigError
from kanformer.layers.base_functions import FunctionModule, base_function
from kanformer.ops import edge_functions, kan_linear, reference_full_edges
from kanformer.ops.fused_base import fused_base
from test_ops_bases import each_basis, problem


def whole_map(basis, dtype=torch.float64, tokens=9):
    """Arguments of `kan_linear` behind (x, base)."""
    x, _, coef, grid, inner, basis = problem("full_edges", basis, tokens=tokens, dtype=dtype)
    weight, bias = torch.randn(coef.shape[0], x.shape[1], dtype=torch.float64).to(dtype), torch.randn(coef.shape[0], dtype=torch.float64).to(dtype)
    return x, weight, bias, coef, grid, inner, basis


def plain(x, base, weight, bias, coef, grid, basis, inner):
    return reference_full_edges(x, coef, grid, basis, inner, start=F.linear(base(x), weight, bias))


def run(function, base, x, weight, bias, coef, grid, inner, basis):
    """Output and every gradient."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias, coef, inner) if tensor is not None]
    own = leaves[4] if inner is not None else None
    y = function(leaves[0], base, *leaves[1:4], grid, basis, own)
    return y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum(), leaves)


@each_basis
@pytest.mark.parametrize("base", [nn.Identity(), nn.GELU()], ids=["identity", "gelu"])
def test_a_map_in_one_step_is_the_plain_map(basis, base):
    values = whole_map(basis)
    for got, want in zip(run(kan_linear, base, *values), run(plain, base, *values), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@each_basis
def test_a_map_in_one_step_passes_gradcheck_twice(basis):
    x, weight, bias, coef, grid, inner, basis = whole_map(basis, tokens=3)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, coef)]

    def call(x, weight, bias, coef):
        return kan_linear(x, nn.Tanh(), weight, bias, coef, grid, basis, inner)

    assert gradcheck(call, leaves) and gradgradcheck(call, leaves)


def test_only_what_is_asked_for_is_differentiated():
    x, weight, bias, coef, grid, inner, basis = whole_map({"basis": "rational"})
    x, inner = x.requires_grad_(), inner.requires_grad_()
    kan_linear(x, nn.SiLU(), weight, None, coef, grid, basis, inner).sum().backward()
    assert x.grad is not None and inner.grad is not None and weight.grad is None and coef.grad is None
    assert not kan_linear(x.detach(), nn.SiLU(), weight, bias, coef, grid, basis, inner.detach()).requires_grad


def test_the_output_is_bit_equal_to_the_linear_map_while_the_functions_are_zero():
    x, weight, bias, coef, grid, _, basis = whole_map({"basis": "bspline"}, torch.float32, tokens=200)
    for base in (nn.Identity(), nn.GELU()):
        assert torch.equal(kan_linear(x, base, weight, bias, torch.zeros_like(coef), grid, basis), F.linear(base(x), weight, bias))


# Base functions inside compiled kernels.


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu", "tanh", "sigmoid", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_base_gives_the_eager_numbers(name, dtype):
    x, _, coef, grid, _, basis = problem("edge_functions", {"basis": "chebyshev"}, channels=32, tokens=70, dtype=dtype)
    base, weight = base_function(name), torch.randn(70, 32)
    assert fused_base(base, x, coef) is not None

    def results(backend, kind):
        with use_backend(backend):
            leaves = [tensor.detach().to(kind).requires_grad_() for tensor in (x, coef)]
            y = edge_functions(leaves[0], leaves[1], grid.to(torch.promote_types(kind, torch.float32)), basis, base=base)
            return y.detach(), *torch.autograd.grad((y * weight.to(kind)).sum(), leaves)

    for got, want in zip(results("compile", dtype), results("eager", torch.float64), strict=True):
        assert got.dtype == dtype and (got.double() - want).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * want.norm()


def test_a_zero_function_leaves_the_base_to_torch_bit_for_bit():
    x, _, coef, grid, _, basis = problem("edge_functions", {"basis": "bspline"}, channels=64, tokens=500, dtype=torch.float32)
    with use_backend("compile"):
        y = edge_functions(x.requires_grad_(), torch.zeros_like(coef).requires_grad_(), grid, basis, base=nn.GELU())
    assert torch.equal(y, F.gelu(x)) and fused_base(nn.GELU(), x, torch.zeros_like(coef)) is None


def test_bases_that_are_alike_share_a_kernel_and_doubtful_ones_get_none():
    x, coef = torch.randn(3, 4), torch.ones(1, 2)
    assert fused_base(nn.GELU(), x, coef) is fused_base(nn.GELU(), x, coef)
    assert fused_base(nn.GELU(), x, coef) is not fused_base(nn.GELU(approximate="tanh"), x, coef)
    assert fused_base(FunctionModule(F.silu), x, coef) is not None
    hooked = nn.GELU()
    hooked.register_forward_hook(lambda *_: None)
    patched = nn.GELU()
    patched.forward = lambda x: x
    for doubtful in (nn.PReLU(), hooked, patched, FunctionModule(lambda x: x.sin()), nn.Sequential(nn.GELU()), None):
        assert fused_base(doubtful, x, coef) is None


def test_hooks_on_a_base_still_run_when_kernels_are_compiled():
    x, _, coef, grid, _, basis = problem("edge_functions", {"basis": "bspline"}, channels=8, tokens=16, dtype=torch.float32)
    seen, base = [], nn.GELU()
    base.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with use_backend("compile"):
        edge_functions(x.requires_grad_(), coef, grid, basis, base=base)
    assert seen == [x.shape]


def test_triton_where_it_cannot_run_is_an_error_that_says_why():
    x, _, coef, grid, _, basis = problem("edge_functions", {"basis": "bspline"}, channels=8, tokens=16, dtype=torch.float32)
    reason = "one on a GPU" if importlib.util.find_spec("triton") else "pip install triton"
    with use_backend("triton"), pytest.raises(ConfigError, match=reason):
        edge_functions(x, coef, grid, basis)
