"""Parameter groups and the learning rate's course."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from kanformer.errors import ConfigError, did_you_mean
from kanformer.layers import KANFeedForward
from kanformer.layers.grids import GridModule
from kanformer.training.settings import LoopArguments


def parameter_groups(model: nn.Module, arguments: LoopArguments) -> list[dict]:
    """Trainable parameters by kind (rest, KAN block, spline) and decay; splines, biases and norms are never decayed."""
    functions = [module for module in model.modules() if isinstance(module, GridModule)]
    blocks = [module for module in model.modules() if isinstance(module, KANFeedForward | GridModule)]
    new = {id(parameter) for block in blocks for parameter in block.parameters()}
    splines = {id(parameter) for module in functions for parameter in (module.kan_coef, module.kan_inner)}
    splines |= {id(parameter) for module in functions if module.kan_formulas is not None for parameter in module.kan_formulas.parameters()}
    new_rate = arguments.new_module_learning_rate
    rates = {"rest": arguments.learning_rate, "kan": new_rate, "spline": new_rate if arguments.spline_learning_rate is None else arguments.spline_learning_rate}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "spline" if id(parameter) in splines else "kan" if id(parameter) in new else "rest"
            groups.setdefault((kind, kind != "spline" and parameter.dim() >= 2), []).append(parameter)
    return [
        {"kind": kind, "params": parameters, "lr": rates[kind], "weight_decay": arguments.weight_decay if decayed else 0.0}
        for (kind, decayed), parameters in sorted(groups.items())
    ]


def make_optimizer(
    model: nn.Module, arguments: LoopArguments | None = None, *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, **rates: float | None
) -> torch.optim.AdamW:
    """AdamW in which KAN blocks and learned functions have learning rates of their own, and splines, grids, biases and norms no weight decay.

    For transformers' Trainer, whose schedule then scales each group's own rate:

        Trainer(model, args, optimizers=(kanformer.make_optimizer(model, learning_rate=1e-5, new_module_learning_rate=1e-4), None), ...)

    Args:
        model: a patched model; parameters that need no gradient are left out, grids are buffers.
        arguments: where rates that are not named come from; None means the scripts' defaults.
        rates: `learning_rate` (1e-4), `new_module_learning_rate` (1e-3), `spline_learning_rate` (that of the blocks), `weight_decay` (0).

    Returns:
        An optimizer whose groups keep their peak learning rate as `peak_lr` too.

    Raises:
        ConfigError: a rate that does not exist, or one below 0.
    """
    known = ("learning_rate", "new_module_learning_rate", "spline_learning_rate", "weight_decay")
    for name, rate in rates.items():
        if name not in known:
            raise ConfigError("make the optimizer", got=f"{name}={rate!r}", hint=did_you_mean(name, known))
        if not (rate is None and name == "spline_learning_rate") and not (isinstance(rate, int | float) and 0 <= rate < math.inf):
            raise ConfigError("make the optimizer", subject=name, got=repr(rate), expected="a finite number >= 0")
    arguments = dataclasses.replace(arguments or LoopArguments(), **rates)  # type: ignore[arg-type]
    groups = [{**group, "peak_lr": group["lr"]} for group in parameter_groups(model, arguments)]
    return torch.optim.AdamW(groups, betas=betas, eps=eps)


def learning_rate_factor(step: int, arguments: LoopArguments) -> float:
    """Share of the peak learning rate in step 0, 1, ...: linear warm-up, then the schedule down to 0 (cosine: to 5 %; inverse_sqrt as in transformers)."""
    warmup = arguments.warmup_steps if arguments.warmup_steps >= 1 else arguments.warmup_steps * arguments.max_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, arguments.max_steps - warmup)
    if arguments.lr_scheduler_type == "cosine":
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
    if arguments.lr_scheduler_type == "inverse_sqrt":
        timescale = warmup or 10_000
        return math.sqrt(timescale / (step - warmup + timescale))
    return 1 - done if arguments.lr_scheduler_type == "linear" else 1.0
