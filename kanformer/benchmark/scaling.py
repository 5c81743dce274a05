"""How cost grows: the exponent of time over tokens, inputs and outputs, which should be one."""

from __future__ import annotations

import math
import statistics

import torch

from kanformer.benchmark.maps import make_map
from kanformer.benchmark.race import backend, step, timed

BASE = {"tokens": 512, "in": 256, "out": 256}
FACTORS = (1, 2, 4, 8)


def measure_exponents(rounds: int, path: str, device: str = "cpu") -> dict[str, float]:
    """The least-squares slope of log time over log size, forward and backward of full edges, each size grown eightfold in turn."""
    found = {}
    for name in BASE:
        calls = [_case({**BASE, name: BASE[name] * factor}, device) for factor in FACTORS]
        times: list[list[float]] = [[] for _ in calls]
        for turn in range(rounds + 2):
            for call, values in zip(calls, times, strict=True):
                with backend(path):
                    milliseconds = timed(call)
                if turn > 1:  # two rounds to compile and to warm up
                    values.append(milliseconds)
        found[name] = _slope([math.log(factor) for factor in FACTORS], [math.log(statistics.median(values)) for values in times])
    return found


def _case(sizes: dict[str, int], device: str):
    layer = make_map(sizes["in"], sizes["out"], 5, torch.float32, device)
    x = torch.randn(sizes["tokens"], sizes["in"], device=device).requires_grad_()
    return step(layer, x, torch.randn(sizes["tokens"], sizes["out"], device=device))


def _slope(x: list[float], y: list[float]) -> float:
    return statistics.linear_regression(x, y).slope
