"""The benchmark script: it measures what it says, and refuses to time a path that computes something else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("benchmark_script", Path(__file__).resolve().parents[1] / "scripts" / "benchmark.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BACKENDS = ("eager",)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_has_a_row_relative_to_the_mlp(script, dtype):
    rows = script.measure((64, 256, 96), dtype, rounds=1)
    assert [row["variant"] for row in rows] == ["MLP", *script.VARIANTS]
    assert rows[0]["over_mlp"] == 1.0 and all(row["ms"] > 0 and row["over_mlp"] > 0 for row in rows)


def test_a_path_that_computes_something_else_is_not_timed(script):
    block = script.make(64, 256, {"edges": "shared"}, torch.float32)
    x, grad = torch.randn(96, 64).requires_grad_(), torch.randn(96, 64)
    y, grad_x = script.step(block, x, grad)()
    script.check("shared spline", block, x, grad, [y, grad_x])
    with pytest.raises(SystemExit, match="off by"):
        script.check("shared spline", block, x, grad, [y * 1.01, grad_x])
