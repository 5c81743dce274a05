"""Dividing a budget of parameters among blocks: never exceeded, nearly spent, within bounds, and the best division there is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kanformer
from kanformer.config import KANConfig
from kanformer.conversion import DenseFFN, FFNStatistics
from kanformer.conversion.allocate import Claim, share_out
from kanformer.conversion.error_curve import ErrorCurve, error_curve, pooled
from kanformer.conversion.prune import prune_channels
from kanformer.errors import ConfigError
from kanformer.surgery.calibrating.calibration import BlockForm, Calibration
from model_cases import BY_NAME, blocks
from test_calibration import BERT, batches, mixture

convex = st.lists(st.floats(0.01, 10.0), min_size=4, max_size=12).map(lambda falls: sorted(falls, reverse=True))


def curve_of(falls, width):
    """A curve that falls by these shares, one after each of as many equal steps."""
    errors = [sum(falls[number:]) / sum(falls) for number in range(len(falls) + 1)]
    return ErrorCurve(tuple(round(number * width / len(falls)) for number in range(len(falls) + 1)), tuple(errors), 1.0)


@st.composite
def calibrations(draw):
    """Two to five blocks of different forms, some of them groups of experts, with curves that need not be convex."""
    statistics, forms, importance, curves = {}, {}, {}, {}
    for number in range(draw(st.integers(2, 5))):
        experts = draw(st.sampled_from([0, 0, 3]))
        gated, up_bias, down_bias = draw(st.tuples(*[st.booleans()] * 3))
        form = BlockForm(draw(st.integers(8, 40)), draw(st.integers(40, 200)), gated, up_bias, down_bias, draw(st.sampled_from([0, 1])))
        site = f"layers.{number}.mlp"
        importance[site] = draw(st.floats(0.0, 3.0))
        for path in [site] if not experts else [f"{site}.kan_experts.{i}" for i in range(experts)]:
            statistics[path], forms[path] = FFNStatistics(path), form
            statistics[path].inputs.count = draw(st.integers(1, 100))
            curves[path] = curve_of(draw(st.permutations([9.0, 4.0, 3.0, 1.0, 0.5, 0.1])), form.hidden_features)
    return Calibration(statistics, True, forms, importance, curves)


@given(calibration=calibrations(), ratio=st.floats(0.4, 0.9), edges=st.sampled_from(["mlp", "shared"]), groups=st.sampled_from([None, 2]))
def test_the_budget_is_kept_and_spent(calibration, ratio, edges, groups):
    settings = {"edges": edges, "grid_size": 2, "groups": groups if edges == "shared" else None}
    floor, ceil = ratio / 2, min(1.0, ratio + 0.2)
    configs = kanformer.ratios_from_importance(calibration, ratio, floor=floor, ceil=ceil, **settings)
    spent = total = largest = 0
    full = True
    for number, config in enumerate(configs):
        members = [path for path in calibration.forms if path.split(".")[1] == str(number)]
        form = calibration.forms[members[0]]
        made = _made(form, config)
        step = config.groups or 1
        channel = len(members) * step * ((2 if form.gated else 1) * (form.in_features + form.up_bias) + form.in_features + 12)
        plain = form.parameters - form.other_parameters
        assert floor * plain - channel <= made - form.other_parameters <= ceil * plain and config.target_modules == rf"layers\.{number}\.mlp"
        full &= made - form.other_parameters > ceil * plain - channel
        spent, total, largest = spent + len(members) * made, total + len(members) * form.parameters, max(largest, channel)
    assert spent <= ratio * total and (full or spent > ratio * total - largest - 1)


def _made(form, config):
    """Parameters of the block that patching with this config makes."""
    dense = DenseFFN(
        torch.zeros(form.hidden_features, form.in_features),
        torch.zeros(form.hidden_features) if form.up_bias else None,
        torch.zeros(form.in_features, form.hidden_features),
        torch.zeros(form.in_features) if form.down_bias else None,
        torch.nn.ReLU(),
        torch.zeros(form.hidden_features, form.in_features) if form.gated else None,
        torch.zeros(form.hidden_features) if form.gated and form.up_bias else None,
    )
    from kanformer.conversion.build import empty_block, hidden_width

    block = empty_block(dense, config, hidden_width(dense, config), down_bias=True)
    return sum(parameter.numel() for parameter in block.parameters()) + form.other_parameters


@given(first=convex, second=convex, third=convex, weights=st.tuples(*[st.floats(0.01, 5.0)] * 3), budget=st.integers(0, 40))
def test_no_other_division_is_better(first, second, third, weights, budget):
    claims = [Claim(curve_of(falls, 14), weight, 1, 14, 1, 1) for falls, weight in zip((first, second, third), weights, strict=True)]

    def loss(widths):
        return sum(claim.weight * hull(claim, width) for claim, width in zip(claims, widths, strict=True))

    found = share_out(claims, budget)
    assert sum(found) == min(budget + 3, 42)
    best = min(loss(widths) for widths in itertools.product(range(1, 15), repeat=3) if sum(widths) <= budget + 3)
    assert loss(found) <= best + 1e-9


def hull(claim, width):
    """The lower convex hull of a claim's curve at a width, by brute force."""
    points = [(w, claim.curve.at(w)) for w in range(claim.low, claim.high + 1)]
    values = [y for x, y in points if x == width]
    for (x, y), (u, v) in itertools.combinations(points, 2):
        if x < width < u:
            values.append(y + (v - y) * (width - x) / (u - x))
    return min(values)


def test_more_important_blocks_of_the_same_kind_keep_more():
    curve = curve_of([4.0, 3.0, 2.0, 1.0], 100)
    names = [f"layers.{number}.mlp" for number in range(3)]
    form = BlockForm(10, 100, False, True, True, 0)
    statistics = {name: FFNStatistics(name) for name in names}
    calibration = Calibration(statistics, True, dict.fromkeys(names, form), dict(zip(names, (0.1, 1.0, 0.3), strict=True)), dict.fromkeys(names, curve))
    low, high, middle = (config.param_ratio or 0.0 for config in kanformer.ratios_from_importance(calibration, 0.5, edges="mlp"))
    assert low < middle <= high and low == pytest.approx(0.125, abs=0.02)


def test_the_curve_is_the_error_of_the_pruned_block():
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((30, 6), (6, 30)))
    dense = DenseFFN(up, None, down, None, torch.nn.GELU())
    statistics = FFNStatistics("test")
    statistics.update(dense, torch.randn(500, 6, generator=generator, dtype=torch.float64))
    curve = error_curve(dense, statistics, 1e-9)
    assert curve.widths == tuple(range(31)) and curve.errors[0] == pytest.approx(1.0) and curve.errors[30] == 0.0
    assert all(left >= right for left, right in itertools.pairwise(curve.errors))
    for width in (4, 11, 22):
        assert curve.at(width) == pytest.approx(prune_channels(dense, statistics, width, 1e-9).error, rel=0.02)
    two = pooled([(3, curve), (1, ErrorCurve(curve.widths, (1.0,) * 31, curve.variance))])
    assert two.at(11) == pytest.approx(0.75 * curve.at(11) + 0.25)


@pytest.mark.parametrize("build", [BERT.build, BY_NAME["llama"].build, mixture], ids=["bert", "llama", "mixture"])
def test_patching_by_importance_spends_the_budget(build):
    calibration = kanformer.calibrate(build(), batches(), importance_batches=2)
    model = kanformer.patch_model(build(), kanformer.ratios_from_importance(calibration, 0.5, edges="mlp"), calibration=calibration)
    ratio = kanformer.compare(model).to_dict()["feed_forward"]["parameters_ratio"]
    assert 0.48 < ratio <= 0.5 and len({block.hidden_features for block in blocks(model).values()}) > 1


def test_what_cannot_be_divided_is_refused():
    calibration = kanformer.calibrate(BERT.build(), batches(), importance_batches=1)
    first = "bert.encoder.layer.0.intermediate"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"floor": 0.6}, "floor <= param_ratio"),
        ({"ceil": 0.4}, "floor <= param_ratio"),
        ({"paths": ["nowhere"]}, "nowhere.*no statistics"),
        ({"config": KANConfig(layers_to_transform=(0,))}, "a config with layers_to_transform"),
        ({"floor": 0.001}, "fit a KAN-FFN into the budget"),
    ]
    for settings, message in refused:
        with pytest.raises(ConfigError, match=message):
            kanformer.ratios_from_importance(calibration, 0.5, **settings)
    with pytest.raises(ConfigError, match="no importance"):
        kanformer.ratios_from_importance(kanformer.calibrate(BERT.build(), batches()), 0.5)
    only = kanformer.ratios_from_importance(calibration, 0.5, paths=[first])
    assert [config.target_modules for config in only] == [r"bert\.encoder\.layer\.0\.intermediate"]
