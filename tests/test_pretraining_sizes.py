"""Arms and the widths at which they cost the same: against counting real models, and against trying every width."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanformer.errors import ConfigError
from kanformer.layers import KANFeedForward
from kanformer.pretraining.arms import ARMS, BASELINES, chosen_arms, make_model
from kanformer.pretraining.settings import ModelArguments
from kanformer.pretraining.sizes import deviation, matched, nearest_width, size_of
from pretraining_cases import SHAPE

SMALL = ModelArguments(**SHAPE)
REAL = ModelArguments(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, max_length=64)
BASE_WIDTH = {"swiglu": 341, "mlp": 512}


def feed_forward(model):
    return [module for name, module in model.named_modules() if name.endswith(".mlp")]


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_size_is_what_the_real_model_has(name, layers):
    shape = ModelArguments(**{**SHAPE, "num_hidden_layers": layers})
    model = make_model(ARMS[name], shape, 24, 30)
    size = size_of(ARMS[name], shape, 24, 30)
    blocks = feed_forward(model)
    assert len(blocks) == layers and all(isinstance(block, KANFeedForward) != ARMS[name].is_baseline for block in blocks)
    assert size.parameters == sum(p.numel() for block in blocks for p in block.parameters())
    assert size.model_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name, ffn", [("swiglu", 6 * 16 * 24 + 2 * 24), ("mlp", 4 * 16 * 24 + 24)])
def test_flops_of_a_baseline_by_hand(name, ffn):
    size = size_of(ARMS[name], SMALL, 24, 30)
    projections, scores, head = 2 * 4 * 16 * 16, 4 * 8 * 16, 2 * 16 * 30
    assert size.ffn_flops == ffn and size.flops == ffn + projections + scores + head


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if not arm.is_baseline])
@pytest.mark.parametrize("quantity", ["parameters", "flops"])
def test_every_arm_matches_its_baseline_within_a_percent(name, quantity):
    arm = ARMS[name]
    base = size_of(ARMS[arm.baseline], REAL, BASE_WIDTH[arm.baseline], 66)
    size = matched(arm, REAL, 66, base, quantity, 0.01)
    assert deviation(getattr(size, quantity), getattr(base, quantity)) < 0.01


@pytest.mark.parametrize("name", ["gated_kan_bspline", "kan_full"])
@pytest.mark.parametrize("quantity", ["parameters", "flops"])
def test_the_width_is_the_best_of_all(name, quantity):
    arm = ARMS[name]
    base = size_of(ARMS[arm.baseline], SMALL, 16, 30)
    costs = {width: getattr(size_of(arm, SMALL, width, 30), quantity) for width in range(1, 21)}
    target = getattr(base, quantity)
    best = min(costs, key=lambda width: (abs(costs[width] - target), width))
    assert matched(arm, SMALL, 30, base, quantity, 0.5).width == best


@given(st.integers(1, 50), st.integers(0, 1000), st.integers(1, 100_000))
def test_nearest_width_against_trying_all(slope, start, target):
    found = nearest_width(lambda width: start + slope * width, target)
    top = target // slope + 3
    assert found == min(range(1, top + 1), key=lambda width: (abs(start + slope * width - target), width))


def test_a_width_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="a million"):
        nearest_width(lambda width: 5, 6)


def test_an_arm_that_cannot_be_matched_is_refused_with_what_was_reached():
    base = size_of(ARMS["mlp"], SMALL, 12, 30)
    with pytest.raises(ConfigError, match=r"kan_full, equal parameters.*at width \d+, \d+\.\d+ %.*at most 0.001 %"):
        matched(ARMS["kan_full"], SMALL, 30, base, "parameters", 1e-5)


def test_arms_come_with_their_baselines_and_unknown_ones_are_refused():
    assert [arm.name for arm in chosen_arms([])] == list(ARMS)
    assert [arm.name for arm in chosen_arms(["kan_full"])] == ["mlp", "kan_full"]
    assert set(BASELINES.values()) == {name for name, arm in ARMS.items() if arm.is_baseline}
    with pytest.raises(ConfigError, match="gated_kan_bspline"):
        chosen_arms(["gated_kan_bsplin"])


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="num_attention_heads"):
        make_model(ARMS["swiglu"], ModelArguments(**{**SHAPE, "num_attention_heads": 3}), 8, 30)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if not arm.is_baseline and "full" not in name])
def test_shared_edges_start_as_the_stock_block(name):
    """Exact: at the same width and seed, the arm and its baseline are one function before the first step."""
    import torch

    models = []
    for arm in (ARMS[name], ARMS[ARMS[name].baseline]):
        torch.manual_seed(5)
        models.append(make_model(arm, SMALL, 24, 30).eval())
    ids = torch.randint(0, 30, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_no_arm_has_dropout():
    import torch
    from torch import nn

    for arm in ARMS.values():
        model = make_model(arm, SMALL, 24, 30).train()
        assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout)), arm.name
        ids = torch.randint(0, 30, (2, 8))
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits), arm.name


@given(st.lists(st.integers(1, 40), min_size=30, max_size=30), st.integers(0, 700))
def test_nearest_width_of_a_cost_that_is_no_straight_line(steps, target):
    costs = [sum(steps[: width + 1]) for width in range(30)]
    found = nearest_width(lambda width: costs[width - 1] if width <= 30 else costs[-1] + 1000 * (width - 30), target)
    every = [*costs, costs[-1] + 1000]
    assert found == min(range(1, 32), key=lambda width: (abs(every[width - 1] - target), width))
