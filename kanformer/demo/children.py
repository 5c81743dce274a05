"""The child processes of the demo, and the folders that they read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from kanformer.errors import KanformerError


def accelerate_launch(module: str, config: Path, threads: int) -> list[str]:
    """The command line of one training process on this machine."""
    fixed = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "bf16" if fast_bf16() else "no", "--dynamo_backend", "no"]
    device = [] if torch.cuda.is_available() else ["--cpu"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *fixed, *device, "--num_cpu_threads_per_process", str(threads)]
    return [*launch, "-m", module, "--config", str(config)]


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware, about twice as fast as float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def call(commands: list[list[str]]) -> float:
    """Runs children side by side; each shows its own progress, and the failure of one is ours.

    Returns:
        The most memory that this process and its children held together, in GiB, looked at twice a second.

    Raises:
        KanformerError: a child failed; the others are stopped.
    """
    # So few steps do not earn back the start of a compiler, most of a minute with both cores busy.
    environment = {"KANFORMER_BACKEND": "eager", **os.environ, "TOKENIZERS_PARALLELISM": "false"}
    children = [subprocess.Popen(command, env=environment) for command in commands]
    peak = 0.0
    try:
        while any(child.poll() is None for child in children):
            _check(commands, children)
            peak = max(peak, memory_in_use())
            time.sleep(0.5)
        _check(commands, children)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
    return peak


def _check(commands: list[list[str]], children: list[subprocess.Popen]) -> None:
    for command, child in zip(commands, children, strict=True):
        if child.poll():
            program = " ".join(command[1:4])
            raise KanformerError("go on with the demo", got=f"exit code {child.returncode} from {program} ...", hint="Its own message stands above.")


def memory_in_use() -> float:
    """GiB of this process and all below it, shared pages counted once where the system tells."""
    total = 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # it has just ended
            continue
        total += getattr(memory, "pss", memory.rss)
    return total / 2**30


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """The model and its tokenizer, as from_pretrained reads them."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
