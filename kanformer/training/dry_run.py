"""What a run would train, on how much and in how much memory: printed instead of training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kanformer.surgery.compare import compare
from kanformer.surgery.tables import table
from kanformer.training.optimizer import parameter_groups
from kanformer.training.settings import LoopArguments
from kanformer.training.steps import examples_per_step, with_steps
from kanformer.training.task import Task

_SAMPLE = 64  # examples whose tokens are counted


def dry_run(task: Task, arguments: LoopArguments, accelerator: Any, teacher: nn.Module | None = None) -> dict[str, Any]:
    """Prints the plan of a training and returns its numbers: `layers` (see `Comparison.to_dict`), `groups`, `data` and `memory` in bytes."""
    group = examples_per_step(arguments, accelerator.num_processes)
    arguments = with_steps(arguments, task.examples, group)
    layers = compare(task.model)
    found = {"layers": layers.to_dict(), "groups": _groups(task, arguments), "data": _data(task, arguments, group), "memory": _memory(task, teacher)}
    if accelerator.is_main_process:
        print("\n".join([str(layers), "", groups_table(found["groups"]), data_line(found["data"], accelerator.num_processes), memory_line(found["memory"])]))
        print("dry run: nothing was trained and nothing written")
    accelerator.end_training()
    return found


def _groups(task: Task, arguments: LoopArguments) -> list[dict[str, Any]]:
    return [
        {
            "group": group["kind"],
            "learning_rate": group["lr"],
            "weight_decay": group["weight_decay"],
            "tensors": len(group["params"]),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
        }
        for group in parameter_groups(task.module, arguments)
    ]


def groups_table(groups: Iterable[dict[str, Any]]) -> str:
    """Trainable parameters by group of the optimizer."""
    rows = [(g["group"], f"{g['learning_rate']:g}", f"{g['weight_decay']:g}", f"{g['tensors']:,}", f"{g['parameters']:,}") for g in groups]
    total = sum(g["parameters"] for g in groups)
    return table(("trained", "learning rate", "weight decay", "tensors", "parameters"), [*rows, ("all", "", "", "", f"{total:,}")], right=range(1, 5))


def _data(task: Task, arguments: LoopArguments, group: int) -> dict[str, Any]:
    count = _SAMPLE if task.examples is None else min(task.examples, _SAMPLE)
    order = task.order(arguments, group)
    mask = task.batch([order[position] for position in range(count)]).get("attention_mask")
    return {
        "examples": task.examples,
        "examples_per_step": group,
        "tokens_per_step": None if mask is None else round(int(mask.sum()) / count * group),
        "max_steps": arguments.max_steps,
        "epochs": None if task.examples is None else arguments.max_steps * group / task.examples,
    }


def data_line(data: dict[str, Any], processes: int) -> str:
    """Examples, steps and epochs."""
    examples = "a stream" if data["examples"] is None else f"{data['examples']:,} training examples"
    tokens = "" if data["tokens_per_step"] is None else f" of about {data['tokens_per_step']:,} tokens in all"
    epochs = "" if data["epochs"] is None else f", {data['epochs']:.2f} epochs"
    each = f"{data['examples_per_step']:,} examples{tokens} per step on {processes} process{'es' if processes > 1 else ''}"
    return f"data: {examples}; {each}; {data['max_steps']:,} steps{epochs}"


def _memory(task: Task, teacher: nn.Module | None) -> dict[str, int]:
    trained = sum(parameter.nbytes for parameter in task.module.parameters() if parameter.requires_grad)
    found = {"weights": tensor_bytes(task.model), "gradients": trained, "optimizer states": 2 * trained}
    return found if teacher is None else {**found, "teacher": tensor_bytes(teacher)}


def tensor_bytes(model: nn.Module) -> int:
    """Of a model's parameters and buffers, each counted once."""
    tensors: dict[int, torch.Tensor] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def memory_line(memory: dict[str, int]) -> str:
    """What is there before the first batch, on each process."""
    parts = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in memory.items())
    return f"memory per process, before activations: {parts}; together {sum(memory.values()) / 1e6:,.1f} MB"
