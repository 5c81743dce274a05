"""Switching the learned functions off: what is left, and that every bit comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kanformer
from kanformer.bases import available
from kanformer.errors import NoFeedForwardError
from kanformer.layers import KANLinear, SharedKANLinear
from model_cases import BY_NAME, disturb, one_case_of_each, same_state, snapshot


@one_case_of_each
@pytest.mark.parametrize("edges", ["shared", "full", "mlp"])
def test_a_disturbed_model_becomes_the_original_and_comes_back_bit_for_bit(case, edges):
    model = case.build()
    original = case.logits(model)
    disturb(kanformer.patch_model(model, edges=edges))
    before, outputs = snapshot(model), case.logits(model)
    with kanformer.without_functions(model):
        off = case.logits(model)
    torch.testing.assert_close(off, original, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs, off) == (edges == "mlp")
    assert same_state(before, snapshot(model)) and torch.equal(case.logits(model), outputs)


@pytest.mark.parametrize("basis", available())
def test_every_basis_gives_zero(basis):
    x, base = torch.randn(7, 6), torch.nn.SiLU()
    shared, full = SharedKANLinear(6, 4, basis=basis), KANLinear(6, 4, basis=basis)
    with torch.no_grad():
        shared.kan_functions.kan_coef.normal_()
        model = nn.ModuleList([shared, full])
        with kanformer.without_functions(model):
            torch.testing.assert_close(shared(x), base(x) @ shared.kan_weight.T + shared.kan_bias)
            torch.testing.assert_close(full(x), base(x) @ full.kan_base_weight.T + full.kan_bias)
        assert not torch.allclose(full(x), base(x) @ full.kan_base_weight.T + full.kan_bias)


def test_a_fresh_exact_model_changes_nothing():
    case = BY_NAME["llama"]
    model = kanformer.patch_model(case.build(torch.bfloat16))
    outputs = case.logits(model, torch.bfloat16)
    with kanformer.without_functions(model):
        assert torch.equal(case.logits(model, torch.bfloat16), outputs)


def test_the_parameters_stay_the_same_objects_also_after_an_error_and_nested():
    model = disturb(kanformer.patch_model(BY_NAME["bert"].build()))
    before, objects = snapshot(model), [(id(p), p.data_ptr()) for p in model.parameters()]
    with pytest.raises(RuntimeError), kanformer.without_functions(model), kanformer.without_functions(model):
        raise RuntimeError
    assert same_state(before, snapshot(model)) and objects == [(id(p), p.data_ptr()) for p in model.parameters()]


def test_functions_that_hang_in_several_places_come_back():
    layer = SharedKANLinear(4, 4)
    with torch.no_grad():
        layer.kan_functions.kan_coef.fill_(2.0)
    twin = SharedKANLinear(4, 4)
    twin.kan_functions.kan_coef = layer.kan_functions.kan_coef
    with kanformer.without_functions(nn.ModuleList([layer, twin, layer])):
        assert (twin.kan_functions.kan_coef == 0).all()
    assert (layer.kan_functions.kan_coef == 2).all() and twin.kan_functions.kan_coef is layer.kan_functions.kan_coef


def test_a_model_without_kan_is_refused():
    with pytest.raises(NoFeedForwardError, match="no learned functions.*patch_model"), kanformer.without_functions(BY_NAME["bert"].build()):
        pass
