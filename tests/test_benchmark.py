"""The benchmark: it measures what it says, and refuses to time a path that computes something else."""

from __future__ import annotations

import csv
import itertools
import sys
import types

import pytest
import torch
from torch import nn

from kanformer.benchmark import ffn, maps, scaling
from kanformer.benchmark.peers import measure_peers
from kanformer.benchmark.race import Runner, check, race, step
from kanformer.benchmark.run import BenchmarkArguments, benchmark
from kanformer.errors import KanformerError

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_dtype
def test_every_variant_has_a_row_relative_to_the_mlp(dtype):
    rows = ffn.measure_ffn((64, 256, 96), dtype, 1, ("eager",))
    assert [row.variant for row in rows] == ["MLP", *ffn.VARIANTS]
    assert rows[0].ratio == 1.0 and all(row.ms > 0 and row.ratio == row.ms / rows[0].ms for row in rows)


@each_dtype
def test_maps_are_timed_over_their_limit(dtype):
    rows = [*maps.measure_limit((24, 40, 30), dtype, 1, ("eager",)), *maps.measure_decode((24, 40, 5), dtype, 1)]
    assert [row.variant for row in rows] == ["bare GEMMs", "full edges", "bare GEMV", "one token"]


def test_a_path_that_computes_something_else_is_not_timed():
    block = ffn.make(64, 256, {"edges": "shared"}, torch.float32, "cpu")
    x, grad = torch.randn(96, 64).requires_grad_(), torch.randn(96, 64)
    y, grad_x = step(block, x, grad)()
    check("shared spline", block, x, grad, [y, grad_x])
    with pytest.raises(KanformerError, match="1.0e-02"):
        check("shared spline", block, x, grad, [y * 1.01, grad_x])


def test_ratios_are_medians_over_the_first(monkeypatch):
    clock = iter([9.0, 9.0, 1.0, 4.0, 2.0, 6.0, 3.0, 5.0])
    monkeypatch.setattr("kanformer.benchmark.race.timed", lambda call: next(clock))
    rows = race("x", "1", torch.float32, [Runner("a", "-", list), Runner("b", "-", list)], 3)
    assert [(row.ms, row.ratio) for row in rows] == [(2.0, 1.0), (5.0, 2.5)]


def test_the_exponent_is_the_slope(monkeypatch):
    monkeypatch.setattr(scaling, "_case", lambda sizes, device: sizes)
    monkeypatch.setattr(scaling, "timed", lambda sizes: 7.0 * sizes["tokens"] * sizes["in"] ** 2)
    assert scaling.measure_exponents(1, "eager") == {"tokens": pytest.approx(1.0), "in": pytest.approx(2.0), "out": pytest.approx(0.0)}


def test_peers_are_timed_where_they_are_and_skipped_with_a_line_where_not(monkeypatch):
    fake = types.ModuleType("efficient_kan")
    fake.KAN = lambda widths: nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    broken = types.ModuleType("fastkan")
    broken.FastKAN = lambda widths: 1 / 0
    for name in ("efficient_kan", "fastkan", "kan", "kat_rational"):
        monkeypatch.setitem(sys.modules, name, {"efficient_kan": fake, "fastkan": broken}.get(name))
    lines = []
    rows = measure_peers((8, 16, 10), torch.float32, 1, lines.append)
    assert [row.variant for row in rows] == ["MLP", "efficient-kan"]
    assert [line.split(",")[0] for line in lines] == ["peer fast-kan: skipped", "peer pykan: skipped", "peer rational_kat: skipped"]
    assert "ZeroDivisionError" in lines[0] and "no module 'kan'" in lines[1]


def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(maps, "DECODE_SHAPES", ((16, 24, 5),))
    benchmark(BenchmarkArguments(section="decode", dtype="float32", rounds=1, out=str(tmp_path / "rows.csv")))
    with open(tmp_path / "rows.csv", encoding="utf-8") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["bare GEMV", "one token"]
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed and "one token" in printed
