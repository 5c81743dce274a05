"""The benchmark: settings, order, output."""

from __future__ import annotations

import csv
import dataclasses
from dataclasses import dataclass

from kanformer.training.arguments import option

SECTIONS = ("all", "ffn", "limit", "decode", "scaling", "surgery", "plan")


@dataclass
class BenchmarkArguments:
    """Settings of `kanformer benchmark` and scripts/benchmark.py."""

    section: str = option("all", "what to time; plan (not in all): the tables of docs/scaling.md", SECTIONS)
    dtype: str = option("both", "numbers of weights and inputs", ("both", "float32", "bfloat16"))
    path: str = option("both", "eager, compiled, or both; triton on a GPU", ("both", "eager", "compile", "triton"))
    rounds: int = option(9, "timed rounds, of which the median counts", ge=1)
    threads: int = option(0, "CPU threads; 0: as torch chooses", ge=0)
    device: str = option("cpu", "cpu or cuda", ("cpu", "cuda"))
    peers: bool = option(False, "also time efficient-kan, fast-kan, pykan and rational_kat where they are installed")
    out: str | None = option(None, "CSV file for the rows")


def benchmark(arguments: BenchmarkArguments) -> None:
    """Prints a line per measurement and writes the rows."""
    import torch

    from kanformer.benchmark import ffn, maps
    from kanformer.benchmark.peers import measure_peers
    from kanformer.benchmark.plan_tables import report_plan
    from kanformer.benchmark.race import Row, machine
    from kanformer.benchmark.scaling import measure_exponents
    from kanformer.benchmark.surgery import measure_surgery

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16] if arguments.dtype == "both" else [getattr(torch, arguments.dtype)]
    paths = ("eager", "compile") if arguments.path == "both" else (arguments.path,)
    rounds, device = arguments.rounds, arguments.device
    rows: list[Row] = []

    def wanted(section: str) -> bool:
        return arguments.section in ("all", section)

    def add(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            print(row, flush=True)

    print(machine(torch.get_num_threads()))
    for dtype in dtypes:
        if wanted("ffn"):
            for shape in ffn.SHAPES:
                add(ffn.measure_ffn(shape, dtype, rounds, paths, device))
        if arguments.peers:
            add(measure_peers(ffn.SHAPES[0], dtype, rounds, print, device))
        if wanted("limit"):
            for shape in maps.LIMIT_SHAPES:
                add(maps.measure_limit(shape, dtype, rounds, paths, device))
        if wanted("decode"):
            for shape in maps.DECODE_SHAPES:
                add(maps.measure_decode(shape, dtype, rounds, device))
    if wanted("scaling"):
        for name, exponent in measure_exponents(max(3, rounds // 2), paths[-1], device).items():
            print(f"time of full edges ({paths[-1]}) grows with {name} to the power {exponent:.2f}", flush=True)
    if wanted("surgery"):
        for line in measure_surgery(min(rounds, 5)):
            print(line, flush=True)
    if arguments.section == "plan":
        for text in report_plan(rounds, dtypes, paths):
            print(text, end="\n\n", flush=True)
    if arguments.out:
        with open(arguments.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)
        print(f"rows: {arguments.out}")


def main() -> None:
    """scripts/benchmark.py."""
    import sys

    from kanformer.training.entry import run

    run(BenchmarkArguments, benchmark, sys.argv[1:], "benchmark.py", "Times KAN-FFNs against the MLP that was there, as ratios of one run.")
