"""Parameter groups and the learning rate's course."""

from __future__ import annotations

import math

import torch
from torch import nn

from kanformer.layers import KANFeedForward
from kanformer.training.settings import LoopArguments


def parameter_groups(model: nn.Module, arguments: LoopArguments) -> list[dict]:
    """Trainable parameters by kind (rest, KAN block, spline) and decay; splines, biases and norms are never decayed."""
    blocks = [module for module in model.modules() if isinstance(module, KANFeedForward)]
    new = {id(parameter) for block in blocks for parameter in block.parameters()}
    splines = {id(parameter) for block in blocks for parameter in block.spline_parameters()}
    new_rate = arguments.new_module_learning_rate
    rates = {"rest": arguments.learning_rate, "kan": new_rate, "spline": new_rate if arguments.spline_learning_rate is None else arguments.spline_learning_rate}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "spline" if id(parameter) in splines else "kan" if id(parameter) in new else "rest"
            groups.setdefault((kind, kind != "spline" and parameter.dim() >= 2), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[kind], "weight_decay": arguments.weight_decay if decayed else 0.0}
        for (kind, decayed), parameters in sorted(groups.items())
    ]


def make_optimizer(model: nn.Module, arguments: LoopArguments) -> torch.optim.AdamW:
    """AdamW with each group's own peak learning rate kept as `peak_lr`."""
    groups = [{**group, "peak_lr": group["lr"]} for group in parameter_groups(model, arguments)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


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
