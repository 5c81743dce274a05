"""Parameter groups and learning rates against values worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kanformer.layers import KANFeedForward
from kanformer.surgery.replacing.apply import patch_model
from kanformer.training.optimizer import learning_rate_factor, make_optimizer, parameter_groups
from kanformer.training.settings import LoopArguments
from model_cases import BY_NAME

ARGUMENTS = LoopArguments(learning_rate=1e-4, new_module_learning_rate=1e-3, weight_decay=0.1)


@pytest.fixture
def model():
    return patch_model(BY_NAME["bert"].build(), edges="shared")


def names_by_group(model, **changes) -> dict[tuple[float, float], set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[tuple[float, float], set[str]] = {}
    for group in parameter_groups(model, dataclasses.replace(ARGUMENTS, **changes)):
        found.setdefault((group["lr"], group["weight_decay"]), set()).update(names[id(p)] for p in group["params"])
    return found


def kan_names(model) -> set[str]:
    return {f"{path}.{name}" for path, block in model.named_modules() if isinstance(block, KANFeedForward) for name, _ in block.named_parameters()}


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    model.bert.embeddings.requires_grad_(False)
    found = [id(p) for group in parameter_groups(model, ARGUMENTS) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad) and len(set(found)) == len(found)


def test_only_matrices_outside_the_splines_are_decayed_and_kan_blocks_have_their_own_rate(model):
    groups = names_by_group(model)
    assert set(groups) == {(1e-4, 0.0), (1e-4, 0.1), (1e-3, 0.0), (1e-3, 0.1)}
    assert groups[1e-3, 0.0] | groups[1e-3, 0.1] == kan_names(model)
    assert {".".join(name.split(".")[-2:]) for name in groups[1e-3, 0.1]} == {"kan_up.weight", "kan_down.weight"}
    assert any(name.endswith("kan_coef") for name in groups[1e-3, 0.0])
    for name in groups[1e-4, 0.1] | groups[1e-3, 0.1]:
        assert name.endswith("weight") and "LayerNorm" not in name
    for name in groups[1e-4, 0.0] | groups[1e-3, 0.0]:
        assert name.endswith(("bias", "kan_coef")) or "LayerNorm" in name


def test_splines_can_have_a_rate_of_their_own(model):
    groups = names_by_group(model, spline_learning_rate=1e-2)
    assert groups[1e-2, 0.0] == {name for name in kan_names(model) if name.endswith("kan_coef")} and (1e-2, 0.1) not in groups
    assert groups[1e-3, 0.0] | groups[1e-3, 0.1] == kan_names(model) - groups[1e-2, 0.0]
    assert set(names_by_group(model, spline_learning_rate=0.0)) == {(1e-4, 0.0), (1e-4, 0.1), (1e-3, 0.0), (1e-3, 0.1), (0.0, 0.0)}


def test_full_edges_decay_the_base_weights_but_no_spline():
    groups = names_by_group(patch_model(BY_NAME["bert"].build(), edges="full"))
    assert not any("kan_coef" in name for name in groups[1e-3, 0.1]) and any("kan_base_weight" in name for name in groups[1e-3, 0.1])


def test_the_optimizer_knows_each_groups_peak_rate(model):
    optimizer = make_optimizer(model, ARGUMENTS)
    assert [group["peak_lr"] for group in optimizer.param_groups] == [group["lr"] for group in parameter_groups(model, ARGUMENTS)]
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 5: 1.0, 9: 1.0}),
        ("linear", 0, {0: 1.0, 5: 0.5, 9: 0.1}),
        ("linear", 4, {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 7: 0.5, 10: 0.0}),
        ("linear", 0.2, {0: 1 / 3, 1: 2 / 3, 2: 1.0, 6: 0.5}),
        ("cosine", 0, {0: 1.0, 5: 0.525, 10: 0.05}),
        ("cosine", 2, {0: 1 / 3, 2: 1.0, 6: 0.525, 10: 0.05}),
        ("constant", 20, {0: 1 / 21, 9: 10 / 21}),
        ("linear", 10, {9: 10 / 11}),
    ],
)
def test_schedules_against_hand_written_values(schedule, warmup, expected):
    arguments = LoopArguments(max_steps=10, lr_scheduler_type=schedule, warmup_steps=warmup)
    assert {step: learning_rate_factor(step, arguments) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.05, 3])
def test_no_step_stands_still_or_exceeds_the_peak(schedule, warmup):
    arguments = LoopArguments(max_steps=30, lr_scheduler_type=schedule, warmup_steps=warmup)
    factors = [learning_rate_factor(step, arguments) for step in range(30)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) > 0.9
