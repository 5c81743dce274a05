"""Timing things against each other: they take turns, so that all see the same machine, and medians are compared."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kanformer.errors import KanformerError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Row:
    """One timed thing.

    Attributes:
        section, size, dtype, variant, path: what it is.
        ms: median milliseconds. ratio: over the row of its reference, whose own ratio is 1.
    """

    section: str
    size: str
    dtype: str
    variant: str
    path: str
    ms: float
    ratio: float

    def __str__(self) -> str:
        return f"{self.size:18} {self.dtype:9} {self.variant:30} {self.path:8} {self.ms:9.3f} ms  {self.ratio:6.3f}"


@dataclass(frozen=True)
class Runner:
    """One entrant: `call` does the work once, `path` is the backend it runs by ("-" where there is no choice)."""

    variant: str
    path: str
    call: Callable[[], object]


def race(section: str, size: str, dtype: torch.dtype, runners: list[Runner], rounds: int) -> list[Row]:
    """Rows for all runners; the first is the reference of the ratios."""
    times: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds + 1):
        for runner, found in zip(runners, times, strict=True):
            with backend(runner.path):
                milliseconds = timed(runner.call)
            if turn:  # the first round warms up
                found.append(milliseconds)
    medians = [statistics.median(found) for found in times]
    name = str(dtype).removeprefix("torch.")
    return [Row(section, size, name, runner.variant, runner.path, ms, ms / medians[0]) for runner, ms in zip(runners, medians, strict=True)]


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call, to its end on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def backend(path: str):
    """The context in which a runner's path runs."""
    from kanformer.ops import use_backend

    return use_backend("auto" if path == "-" else path)


def step(block: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], list[Tensor]]:
    """A forward and a backward pass; returns the output and the gradient of x."""

    def run() -> list[Tensor]:
        block.zero_grad(set_to_none=True)
        x.grad = None
        y = block(x)
        y.backward(grad)
        assert x.grad is not None
        return [y.detach(), x.grad]

    return run


def check(name: str, block: nn.Module, x: Tensor, grad: Tensor, found: list[Tensor]) -> None:
    """Raises KanformerError if the path that is to be timed computes something else than float64 does."""
    import copy

    exact = copy.deepcopy(block).double()
    with backend("eager"):
        wanted = step(exact, x.detach()[:64].double().requires_grad_(), grad[:64].double())()
    for got, want in zip(found, wanted, strict=True):
        error = float((got[:64].double() - want).norm() / want.norm())
        if not error <= TOLERANCE[x.dtype]:
            raise KanformerError(
                "time a path", subject=name, got=f"an error of {error:.1e} of the norm against float64", expected=f"at most {TOLERANCE[x.dtype]:g}"
            )


def machine(threads: int) -> str:
    """The line that every table of figures needs."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # no Linux
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), {name}"
    return f"{name}, {threads} threads, Python {platform.python_version()}, torch {torch.__version__}"
