"""A mixture's experts: the sums, their gradients, what is traced, and what calibration and masks see of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kanformer
from kanformer import KANConfig, KANFeedForward
from kanformer.conversion.batches import token_mask
from kanformer.layers import KANExperts

D, H, EXPERTS = 6, 10, 4


def experts(call="routed", edges="shared", **options):
    torch.manual_seed(0)
    config = KANConfig(edges=edges, grid_size=4)
    blocks = [KANFeedForward(D, H, gated=True, config=config, dtype=torch.float64) for _ in range(EXPERTS)]
    for block in blocks:
        block.reset_parameters()
        for parameter in block.spline_parameters():
            nn.init.normal_(parameter, std=0.2)
    return KANExperts(blocks, call, **options)


def routing(tokens=9, chosen=2, last=EXPERTS):
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(last, generator=generator)[:chosen] for _ in range(tokens)])
    return torch.randn(tokens, D, generator=generator, dtype=torch.float64), index, torch.rand(tokens, chosen, generator=generator, dtype=torch.float64)


def one_by_one(module, x, index, weights):
    """The definition: for every token the weighted sum of its experts, alone."""
    rows = []
    for token, numbers, shares in zip(x, index.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for number, share in zip(numbers, shares, strict=True):
            beyond = token if module.identities else torch.zeros_like(token)
            y = module.kan_experts[number](token[None])[0] if number < EXPERTS else beyond
            total = total + share * (y if module.expert_norm is None or number >= EXPERTS else module.expert_norm(y))
        rows.append(total)
    return torch.stack(rows)


def gradients(y, *inputs):
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("edges", ["shared", "full", "mlp"])
@pytest.mark.parametrize(("last", "options"), [(EXPERTS, {}), (EXPERTS + 1, {}), (EXPERTS + 2, {"identities": True})], ids=["all", "beyond", "identities"])
def test_routed_experts_are_the_weighted_sum_of_the_chosen(edges, last, options):
    module = experts(edges=edges, **options)
    x, index, weights = routing(last=last)
    x.requires_grad_(), weights.requires_grad_()
    wanted = [x, weights, *module.parameters()]
    expected = one_by_one(module, x, index, weights)
    right_gradients = gradients(expected, *wanted)
    for actual in (module(x, index, weights), module._traced(x, index, weights)):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
        for left, right in zip(gradients(actual, *wanted), right_gradients, strict=True):
            left, right = (torch.zeros(()) if gradient is None else gradient for gradient in (left, right))
            assert torch.allclose(left, right, rtol=1e-10, atol=1e-12)


def test_a_norm_comes_before_the_weights():
    module = experts(expert_norm=nn.LayerNorm(D, dtype=torch.float64))
    x, index, weights = routing()
    assert torch.allclose(module(x, index, weights), one_by_one(module, x, index, weights), rtol=1e-12)


def test_sorted_rows_and_all_experts_at_once():
    x = routing(tokens=EXPERTS * 3)[0]
    by_expert = torch.cat([experts().kan_experts[i](x[3 * i : 3 * i + 3]) for i in range(EXPERTS)])
    assert torch.equal(experts("sorted")(x), by_expert)
    shares = torch.rand(2, 6, EXPERTS, dtype=torch.float64)
    module, states = experts("weighted"), x.view(2, 6, D)
    expected = sum(module.kan_experts[i](states) * shares[..., i, None] for i in range(EXPERTS))
    assert torch.allclose(module(states, shares), expected, rtol=1e-6)


def test_no_tokens_and_an_expert_without_tokens():
    module = experts()
    assert module(torch.empty(0, D, dtype=torch.float64), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2, dtype=torch.float64)).shape == (0, D)
    x, _, weights = routing()
    index = torch.zeros(9, 2, dtype=torch.long)
    module(x, index, weights).sum().backward()
    assert module.kan_experts[0].kan_up.weight.grad.any()
    assert all(not parameter.grad.any() for parameter in module.kan_experts[1].parameters())  # zeros, not None
    module.zero_grad()
    module.eval()(x, index, weights).sum().backward()
    assert module.kan_experts[1].kan_up.weight.grad is None


@pytest.mark.parametrize("edges", ["shared", "full"])
def test_the_penalty_is_that_of_the_experts_with_tokens(edges):
    module = experts(edges=edges).train()
    x, index, weights = routing()
    index = index.clamp(max=1)
    found = []
    for mode in (True, False):
        with kanformer.regularize(module.train(mode), l1=1.0, entropy=1.0) as penalty:
            module(x, index, weights)
        found.append(penalty())
    assert torch.isfinite(found[0]) and torch.equal(*found)


def test_it_compiles_without_a_break_and_exports():
    module = experts()
    x, index, weights = routing()
    expected = module(x, index, weights)
    compiled = torch.compile(module, fullgraph=True, backend="eager")(x, index, weights)
    exported = torch.export.export(module, (x, index, weights)).module()(x, index, weights)
    assert torch.allclose(compiled, expected, rtol=1e-12) and torch.allclose(exported, expected, rtol=1e-12)


def test_a_call_that_does_not_fit_is_an_error():
    x, index, weights = routing()
    with pytest.raises(TypeError, match="1 tensors beside the hidden states, expected 2"):
        experts()(x, index)
    with pytest.raises(ValueError, match="call='all'"):
        experts("all")
    with pytest.raises(TypeError, match="expected 0"):
        experts("sorted")(x, index, weights)


def test_masks_speak_of_the_tokens_that_an_expert_was_given():
    module, seen = experts(), {}
    x, index, weights = routing(tokens=10)
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])}
    for number, block in enumerate(module.kan_experts):
        block.register_forward_pre_hook(lambda block, args, number=number: seen.update({number: args[0][token_mask(args[0], batch)]}))
    module(x, index, weights)
    kept = batch["attention_mask"].reshape(-1).bool()
    for number, rows in seen.items():
        assert torch.equal(rows, x[(index == number).any(1) & kept])
    assert token_mask(x, batch) is not None and sum(len(rows) for rows in seen.values()) == 2 * int(kept.sum())


def test_the_penalty_and_the_grids_see_every_expert():
    module = experts().float()
    x, index, weights = (each.float() if each.is_floating_point() else each for each in routing(tokens=64))
    with kanformer.regularize(module, l1=1.0) as penalty:
        module(x, index, weights)
    penalty().backward()
    assert all(block.kan_functions.kan_coef.grad.any() for block in module.kan_experts)
    stats = kanformer.collect(Holder(module, index, weights), {"x": x})
    assert [one.tokens for one in stats.values()] == [(index == number).sum() for number in range(EXPERTS)]


class Holder(nn.Module):
    """Gives an experts module its routing."""

    def __init__(self, module, index, weights):
        super().__init__()
        self.module, self.index, self.weights = module, index, weights

    def forward(self, x):
        return self.module(x, self.index, self.weights)
