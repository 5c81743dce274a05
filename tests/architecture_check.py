"""One model type through the whole life of a patch: plan, patch, save, load, unpatch; each time the outputs are compared."""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kanformer
from architecture_factory import NotBuildable, difference, first_line, outputs, tiny_model
from architecture_scan import missed
from kanformer.errors import NoFeedForwardError

LOOSE = 1e-6  # what blocks with convolutions, fused maps or stacked experts may differ by, relative
EQUAL, DIFFERS, REFUSED, NOT_FOUND, NOT_BUILDABLE, CRASH = (
    "patched, equal",
    "patched, differs",
    "refused",
    "no feed-forward block found",
    "not buildable",
    "crash",
)


@dataclasses.dataclass
class Result:
    """What became of one model type.

    Attributes:
        status: one of the six above; `reason` says more.
        patched, run: blocks replaced, and how many of those the forward called.
        refused: blocks by "class: reason".
        missed: modules by class that look like feed-forward blocks by their shapes and are not in the plan.
        difference: of the outputs after patching, relative; the same for `unpatched`.
        reload: "equal", or what went wrong in save_pretrained and from_pretrained.
    """

    model_type: str
    status: str
    reason: str = ""
    model_class: str = ""
    parameters: int = 0
    patched: int = 0
    run: int = 0
    families: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: dict[str, int] = dataclasses.field(default_factory=dict)
    missed: dict[str, int] = dataclasses.field(default_factory=dict)
    difference: float = 0.0
    reload: str = ""
    unpatched: float = 0.0

    @property
    def fine(self) -> bool:
        """Patched without a change in the outputs, or left alone with a reason."""
        return self.status in (EQUAL, NOT_FOUND, NOT_BUILDABLE) or (self.status == REFUSED and bool(self.reason))


def check(model_type: str, progress: Callable[[str], None] = lambda step: None) -> Result:
    """Builds a tiny model of this type, patches it exactly and compares. Never raises.

    Args:
        progress: is told the step that begins.
    """
    result = Result(model_type, CRASH)
    try:
        progress("build")
        model, inputs = tiny_model(model_type)
        progress("patch")
        _check_model(model, inputs, result)
    except NotBuildable as error:
        result.status, result.reason = NOT_BUILDABLE, str(error)
    except Exception as error:
        result.status, result.reason = CRASH, first_line(error)
    return result


def _check_model(model: Any, inputs: dict[str, Any], result: Result) -> None:
    result.model_class, result.parameters = type(model).__name__, sum(parameter.numel() for parameter in model.parameters())
    before = outputs(model, inputs)
    try:
        plan = kanformer.plan_surgery(model)
    except NoFeedForwardError as error:
        result.status, result.reason, result.missed = NOT_FOUND, first_line(error), missed(model, ())
        return
    refused = [refusal.path for refusal in plan.refusals]
    result.refused = dict(Counter(f"{type(model.get_submodule(refusal.path)).__name__}: {refusal.reason}" for refusal in plan.refusals))
    result.missed = missed(model, [*refused, *(block.path for block in plan.blocks)])
    if not plan.blocks:
        result.status, result.reason = REFUSED, "; ".join(result.refused)
        return
    result.patched, result.families = len(plan.blocks), dict(Counter(block.family for block in plan.blocks))
    exact = all(_exact(model.get_submodule(block.path)) for block in plan.blocks) and not any(site.spec.activation.startswith("=") for site in plan.sites)
    allowed = 0.0 if exact else LOOSE
    wide = None if exact else copy.deepcopy(model)
    kanformer.patch_model(model, exclude_modules="|".join(map(re.escape, refused)) or None)
    after, result.run = _count_run(model, inputs, [block.path for block in plan.blocks])
    result.difference = difference(before, after)
    result.status = EQUAL if result.difference <= allowed else DIFFERS
    result.reason = "" if result.status == EQUAL else f"{result.difference:.1e}"
    if result.status == DIFFERS and wide is not None:
        _compare_in_double(wide, inputs, refused, result)
    disturb_functions(model)
    result.reload = _reload(model, inputs)
    kanformer.unpatch_model(model)
    result.unpatched = difference(before, outputs(model, inputs))
    if result.unpatched:
        result.status, result.reason = DIFFERS, f"{result.unpatched:.1e} after unpatch_model"
    if result.reload != "equal" and (stock := _reload(model, inputs)) != "equal":
        result.reload = f"{result.reload} (unpatched too: {stock})"


def _compare_in_double(model: Any, inputs: dict[str, Any], refused: list[str], result: Result) -> None:
    """Tells rounding, which a model may magnify, from another function."""
    model, inputs = (
        model.double(),
        {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in inputs.items()},
    )
    before = outputs(model, inputs)
    kanformer.patch_model(model, exclude_modules="|".join(map(re.escape, refused)) or None)
    off = difference(before, outputs(model, inputs))
    if off <= 1e-12:
        result.status, result.reason = EQUAL, f"{result.difference:.1e} in float32 is rounding: {off:.1e} in float64"


def _exact(block: nn.Module) -> bool:
    """Whether bit-equality is due: every weight belongs to an nn.Linear, and none is gate and up in one, which are multiplied apart after patching."""
    maps = [module for module in block.modules() if any(True for _ in module.parameters(recurse=False))]
    linear = [module for module in maps if type(module) is nn.Linear]
    return linear == maps and not any(up.out_features == 2 * down.in_features and up.in_features == down.out_features for up in linear for down in linear)


def _count_run(model: nn.Module, inputs: dict[str, Any], paths: list[str]) -> tuple[dict[str, Tensor], int]:
    """The outputs, and how many of the blocks at these paths took part."""
    called: set[str] = set()
    hooks = [model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path)) for path in paths]
    try:
        return outputs(model, inputs), len(called)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def disturb_functions(model: nn.Module) -> None:
    """Gives the learned functions a shape of their own, as training would, so that a reload has something to lose."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "kan_coef" in name or "kan_functions" in name:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _reload(model: Any, inputs: dict[str, Any]) -> str:
    """Saves, loads and compares."""
    try:
        expected = outputs(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder)
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()  # a mapped file is not aligned as torch's own memory is, and other kernels round differently
        worst = difference(expected, outputs(loaded.eval(), inputs))
    except Exception as error:
        return f"error: {first_line(error, 120)}"
    return "equal" if worst == 0 else f"differs {worst:.1e}"
