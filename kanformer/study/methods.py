"""What takes the place of a block, by method and parameter ratio: KANConfigs of equal budget, or the rank of a linear map."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kanformer.bases import make_basis
from kanformer.config import KANConfig
from kanformer.conversion.widths import mlp_parameters, width_within
from kanformer.errors import ConfigError
from kanformer.study.linear import linear_parameters, rank_within
from kanformer.surgery.planning.blocks import PlannedBlock
from kanformer.surgery.planning.plan import plan_surgery

_EDGES = {"kan": "shared", "kan_full": "full", "mlp": "mlp", "random_mlp": "mlp"}
_OF_KANS = ("basis", "groups", "grid_size", "spline_order", "grid_range", "knots", "extrapolation")
_CHANNELS = 16  # hidden channels that share a learned function, at most, where `groups` is not given


@dataclass(frozen=True)
class Arm:
    """A method at a ratio.

    Attributes:
        configs: KANConfig values, one per form of block; empty for the linear map.
        ranks: of the linear map, by the path of the block; None is the full one.
        training: "steps", "closed form" or "none" (the exact start).
        parameters, original: of all blocks, and of those that they replace.
        hidden: width of the first block, None for the linear map.
    """

    method: str
    ratio: float
    configs: tuple[dict[str, Any], ...]
    ranks: dict[str, int | None]
    training: str
    parameters: int
    original: int
    hidden: int | None

    @property
    def reached(self) -> float:
        return self.parameters / self.original

    @property
    def name(self) -> str:
        return f"{self.method}-r{self.ratio:g}"


def make_arms(teacher: nn.Module, methods: Sequence[str], ratios: Sequence[float], kan: dict[str, Any]) -> list[Arm]:
    """Every method at every ratio, the greatest ratio first. A linear map that is full at several ratios stands at the least of them.

    Args:
        kan: KANConfig values of the KANs; those of no KAN's own (which blocks, ridge) hold for all.

    Raises:
        ConfigError: a ratio that is too small for a block, a wrong value, or blocks that cannot be compared. NoFeedForwardError: no block.
    """
    common = {name: value for name, value in kan.items() if name not in _OF_KANS}
    plan = plan_surgery(teacher, KANConfig.from_dict({**common, "edges": "mlp"}))
    if plan.refusals:
        refused = plan.refusals[0]
        raise ConfigError("plan the study", subject=refused.path, got=refused.reason, hint="Leave it out: kan: {exclude_modules: [...]}.")
    expert = next((block for block in plan.blocks if block.expert), None)
    if expert is not None:
        raise ConfigError("plan the study", subject=expert.path, got="the experts of a mixture", hint="Leave them out: kan: {experts: exclude}.")
    arms = [_arm(teacher, plan.blocks, method, ratio, kan, common) for ratio in ratios for method in methods]
    return [arm for number, arm in enumerate(arms) if not any(_same_map(arm, later) for later in arms[number + 1 :])]


def _same_map(arm: Arm, other: Arm) -> bool:
    return arm.method == other.method == "linear" and arm.ranks == other.ranks


def _arm(teacher: nn.Module, blocks: Sequence[PlannedBlock], method: str, ratio: float, kan: dict[str, Any], common: dict[str, Any]) -> Arm:
    original = sum(block.mlp_parameters for block in blocks)
    if method == "linear":
        ranks = {block.path: rank_within(int(ratio * block.mlp_parameters), block.in_features, block.in_features) for block in blocks}
        count = sum(linear_parameters(ranks[block.path], block.in_features, block.in_features) for block in blocks)
        return Arm(method, ratio, (), ranks, "closed form", count, original, None)
    configs = _configs(teacher, blocks, method, ratio, kan, common)
    planned = plan_surgery(teacher, [KANConfig.from_dict(values) for values in configs]).blocks
    count = sum(block.kan_parameters for block in planned)
    training = "none" if all(values["init"] == "exact" for values in configs) else "steps"
    return Arm(method, ratio, configs, {}, training, count, original, planned[0].kan_hidden)


def _configs(
    teacher: nn.Module, blocks: Sequence[PlannedBlock], method: str, ratio: float, kan: dict[str, Any], common: dict[str, Any]
) -> tuple[dict[str, Any], ...]:
    """One config per form of block, so that all of a form have the same number of functions and the same width."""
    forms: dict[tuple, list[PlannedBlock]] = {}
    for block in blocks:
        forms.setdefault((block.in_features, block.mlp_hidden, block.gated, block.up_bias, block.down_bias), []).append(block)
    values = [_values(alike[0], method, ratio, kan, common) for alike in forms.values()]
    if len(forms) > 1:
        values = [{**each, "target_modules": [block.path for block in alike]} for each, alike in zip(values, forms.values(), strict=True)]
    if method == "random_mlp":
        widths = {block.path: block.kan_hidden for block in plan_surgery(teacher, [KANConfig.from_dict(each) for each in values]).blocks}
        for each, alike in zip(values, forms.values(), strict=True):
            each |= {"init": "random", "param_ratio": None, "width": widths[alike[0].path]}
    return tuple(values)


def _values(block: PlannedBlock, method: str, ratio: float, kan: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    own = kan if method.startswith("kan") else common
    values = {**own, "edges": _EDGES[method], "init": "prune", "param_ratio": ratio, "keep_original": False}
    if method == "kan_full":
        return {**values, "groups": None}
    if ratio == 1 and method != "random_mlp":
        return {**values, "init": "exact", "param_ratio": None, **({"groups": own.get("groups") or 1} if method == "kan" else {})}
    if method == "kan" and "groups" not in own:
        form: dict[str, Any] = {"gated": block.gated, "up_bias": block.up_bias}
        budget = int(ratio * mlp_parameters(block.in_features, block.mlp_hidden, **form, down_bias=block.down_bias))
        values["groups"] = functions_within(budget, block.in_features, KANConfig.from_dict({**own, "edges": "shared"}), **form, down_bias=True)
    return values


def functions_within(budget: int, in_features: int, config: KANConfig, **form: bool) -> int:
    """How many learned functions fit into `budget` beside the widest MLP that leaves room for one per `_CHANNELS` channels: a divisor of its width.

    Each channel that the MLP does without pays for many functions, so the two arms' widths differ by a few channels at most.
    """
    basis = make_basis(config.basis, config.grid_size, config.spline_order)
    width = width_within(budget, in_features, config.replace(edges="mlp", groups=None), **form)
    for hidden in range(width, 0, -1):
        spare = (budget - mlp_parameters(in_features, hidden, **form)) // (basis.n_basis + basis.n_inner)
        divisors = [groups for groups in range(1, min(hidden, spare) + 1) if hidden % groups == 0]
        if divisors and divisors[-1] * _CHANNELS >= hidden:
            return divisors[-1]
    raise ConfigError("fit learned functions into the budget", got=f"{budget:,} parameters", hint="Raise the ratio, or lower grid_size.")


def summary(arm: Arm) -> dict[str, Any]:
    """What the report needs of an arm, as plain JSON values."""
    values = {name: value for name, value in dataclasses.asdict(arm).items() if name not in ("configs", "ranks")}
    return {**values, "reached": arm.reached, "functions": sum(each.get("groups") or 0 for each in arm.configs)}
