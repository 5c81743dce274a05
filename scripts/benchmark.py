"""Time and memory of KAN-FFNs over the MLP that was there, as ratios of one run: python scripts/benchmark.py [--dtype float32] [--threads 2] [--out FILE.csv].

Every variant is checked against float64 before it is timed. The variants of a shape take turns, so that all see the same machine; medians.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from kanformer import KANConfig, KANFeedForward, use_backend
from kanformer.conversion.widths import mlp_parameters, width_within

SHAPES = ((256, 1024, 1024), (384, 1536, 2048), (768, 3072, 512))  # d, h, tokens
VARIANTS = {
    "shared spline": {"edges": "shared"},
    "shared rational": {"edges": "shared", "basis": "rational"},
    "full edges, MLP's parameters": {"edges": "full", "grid_size": 5},
}
BACKENDS = ("eager", "compile")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def make(d: int, h: int, settings: dict, dtype: torch.dtype) -> KANFeedForward:
    """A block with trained-looking functions; full edges at the width that has the MLP's parameters."""
    config = KANConfig(**settings)
    form = {"gated": False, "up_bias": True, "down_bias": True}
    width = width_within(mlp_parameters(d, h, **form), d, config, **form) if config.edges == "full" else h
    block = KANFeedForward(d, width, activation="gelu", config=config)
    block.reset_parameters()
    for parameter in block.spline_parameters():
        nn.init.normal_(parameter, std=0.05)
    return block.to(dtype)


def step(block: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """A forward and a backward pass; returns the output and the gradient of x."""

    def run() -> list[torch.Tensor]:
        block.zero_grad(set_to_none=True)
        x.grad = None
        y = block(x)
        y.backward(grad)
        assert x.grad is not None
        return [y.detach(), x.grad]

    return run


def check(name: str, block: KANFeedForward, x: torch.Tensor, grad: torch.Tensor, found: list[torch.Tensor]) -> None:
    """Raises SystemExit if the path that is timed computes something else than float64 does."""
    import copy

    exact = copy.deepcopy(block).double()
    with use_backend("eager"):
        wanted = step(exact, x.detach()[:64].double().requires_grad_(), grad[:64].double())()
    for got, want in zip(found, wanted, strict=True):
        error = float((got[:64].double() - want).norm() / want.norm())
        if not error <= TOLERANCE[x.dtype]:
            raise SystemExit(f"error: {name} is off by {error:.1e} of its norm, so it is not timed")


def measure(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> list[dict]:
    """One row per variant and backend: milliseconds of forward and backward, and their ratio to the MLP's."""
    d, h, tokens = shape
    x, grad = torch.randn(tokens, d).to(dtype).requires_grad_(), torch.randn(tokens, d).to(dtype)
    runs: dict[tuple[str, str], Callable] = {("MLP", "-"): step(make(d, h, {"edges": "mlp"}, dtype), x, grad)}
    for name, settings in VARIANTS.items():
        block = make(d, h, settings, dtype)
        for backend in BACKENDS:
            runs[name, backend] = step(block, x, grad)
            with use_backend(backend):
                check(name, block, x, grad, runs[name, backend]())
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(rounds + 1):
        for (name, backend), run in runs.items():
            with use_backend("auto" if backend == "-" else backend):
                started = time.perf_counter()
                run()
                if turn:  # the first round warms up
                    times[name, backend].append(1e3 * (time.perf_counter() - started))
    base = statistics.median(times["MLP", "-"])
    medians = {key: statistics.median(values) for key, values in times.items()}
    common = {"d": d, "h": h, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    return [{**common, "variant": name, "backend": backend, "ms": round(ms, 2), "over_mlp": round(ms / base, 3)} for (name, backend), ms in medians.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="CSV file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}, torch {torch.__version__}")
    rows: list[dict] = []
    for dtype in arguments.dtype:
        for shape in SHAPES:
            for row in measure(shape, getattr(torch, dtype), arguments.rounds):
                rows.append(row)
                size = "{d} x {h} x {tokens}".format(**row)
                print(f"{size:18} {row['dtype']:9} {row['variant']:29} {row['backend']:8} {row['ms']:8.2f} ms  {row['over_mlp']:6.3f} x MLP", flush=True)
    if arguments.out:
        with open(arguments.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
