"""The tables of docs/scaling.md: counts and formulas for models that do not fit here, with what was measured here to trust them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from kanformer.benchmark import full_width, plan
from kanformer.benchmark.plan import LLAMA, Counts
from kanformer.surgery.tables import table

GPUS = {"Llama-3.2-1B": 8, "Llama-3-8B": 8, "Llama-3-70B": 64}
LENGTH, UTILISATION = 4096, 0.4
TOKENS = {"local": (20e6, 50e6, 100e6), "kl": (20e6, 250e6, 700e6), "finetune": (20e6, 100e6)}
SIZES = ((2048, 8192, 256), (4096, 14336, 256), (8192, 28672, 64))
ELIMINATED, GRAMS = (1024, 2048, 4096), (4096, 8192, 14336)
SMALL: dict[str, Any] = {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12}
_GB = 1e9


def report_plan(rounds: int, dtypes: list[torch.dtype], paths: tuple[str, ...]) -> Iterator[str]:
    """The tables, one text each, the quick ones first; time and memory are measured on this machine where their title says so."""
    yield f"assumed: GPUs of 80 GB, {LENGTH} tokens per GPU and micro-batch, {UTILISATION:.0%} of {plan.H100_FLOPS / 1e12:.0f} TFLOPS (bf16, dense) each"
    yield from _check()
    whole = {name: plan.count(plan.llama_config(name), name=name) for name in LLAMA}
    half = {name: plan.count(plan.llama_config(name), 0.5, name=name) for name in LLAMA}
    yield "parameters (counted on the meta device; r = 0.5 by formula)\n" + _parameters(whole, half)
    saved = {name: full_width.saved_bytes(plan.llama_config(name), 128) for name in LLAMA if _fits(whole[name])}
    yield "measured: bytes per token kept for the backward pass, one layer, bf16\n" + _kept(saved)
    for name in saved:
        yield f"{name} on {GPUS[name]} GPUs: GB per GPU (counted; activations from the measured bytes)\n" + _memory(whole[name], half[name], saved[name])
    yield "counted: FLOPs per token, and hours for so many tokens\n" + _hours(whole, half)
    yield "calibration and checkpoints, GB (counted)\n" + _storage(whole, half)
    yield "measured: adding to a Gram matrix (float64)\n" + _gram(rounds)
    yield "measured: second-order elimination down to half, float64; larger ones extrapolated\n" + _elimination()
    yield "measured: a block, forward and backward, over its MLP"
    yield from _blocks(rounds, dtypes, paths)


def _fits(counts: Counts) -> bool:
    return full_width.free_bytes() > 1.5 * plan.LOW * (counts.mlp + counts.attention) + 2**30


def _check() -> Iterator[str]:
    from transformers import LlamaConfig

    config = LlamaConfig(**{"num_key_value_heads": 4, "tie_word_embeddings": False, **SMALL})
    counts = plan.count(config)
    predicted = full_width.predicted_step(counts, 4 * 128, full_width.saved_bytes(config, 128, dtype=torch.float32))
    real = full_width.real_step(config, 4, 128)
    rows = [(name, f"{predicted[name] / 1e6:.1f}", f"{real[name] / 1e6:.1f}", f"{predicted[name] / real[name]:.4f}") for name in real]
    title = f"measured against the formulas: a step of {counts.student / 1e6:.0f} million parameters, float32, 4 x 128 tokens, MB"
    yield f"{title}\n{table(('', 'formula', 'measured', 'ratio'), rows, right=(1, 2, 3))}"


def _parameters(whole: dict[str, Counts], half: dict[str, Counts]) -> str:
    rows = [
        (
            name,
            f"{c.teacher / 1e9:.3f}",
            f"{c.student / 1e9:.3f}",
            f"{c.layers * c.mlp / 1e9:.3f}",
            f"{c.kan / c.mlp:.4f}",
            f"{half[name].width}",
            f"{half[name].student / 1e9:.3f}",
        )
        for name, c in whole.items()
    ]
    return table(("model", "B before", "B patched", "B in MLPs", "KAN/MLP", "h at r=0.5", "B at r=0.5"), rows, right=range(1, 7))


def _kept(saved: dict[str, dict[str, float]]) -> str:
    rows = [(name, *(f"{values[part]:,.0f}" for part in ("layer", "block", "head"))) for name, values in saved.items()]
    return table(("model", "layer", "KAN-FFN alone", "head and loss (counted)"), rows, right=(1, 2, 3))


def _memory(whole: Counts, half: Counts, saved: dict[str, float]) -> str:
    cases = [
        ("finetune, r=1", whole, "finetune", {}),
        ("finetune, r=1, checkpointing", whole, "finetune", {"checkpointing": True}),
        ("distill local, r=0.5", half, "local", {}),
        ("distill local, r=0.5, rest shared with the teacher", half, "local", {"shared": True}),
        ("distill KL, r=0.5, all trained, checkpointing", half, "kl", {"checkpointing": True}),
        ("the same, the teacher sharded (not built)", half, "kl", {"checkpointing": True, "spread": True}),
    ]
    rows = []
    for title, counts, stage, options in cases:
        share = {name: value * (counts.width / counts.h if name == "block" else 1.0) for name, value in saved.items()}
        found = plan.memory(counts, stage, GPUS[whole.name], LENGTH, share, **options)
        parts = (found.weights, found.gradients, found.optimizer, found.gathered, found.teacher, found.activations, found.total)
        rows.append((title, *(f"{part / _GB:.1f}" for part in parts)))
    return table(("", "weights", "gradients", "Adam", "gathered", "teacher", "activations", "all"), rows, right=range(1, 8))


def _hours(whole: dict[str, Counts], half: dict[str, Counts]) -> str:
    rows = []
    for name in whole:
        for stage, checkpointing in (("local", False), ("kl", True), ("finetune", True)):
            counts = whole[name] if stage == "finetune" else half[name]
            flops = plan.flops_per_token(counts, stage, LENGTH, checkpointing=checkpointing)
            times = ", ".join(f"{tokens / 1e6:.0f}M: {plan.hours(flops, tokens, GPUS[name], UTILISATION):.2f} h" for tokens in TOKENS[stage])
            micro = flops / (GPUS[name] * plan.H100_FLOPS * UTILISATION) * 1e6
            rows.append((f"{name}, {GPUS[name]} GPUs", stage, f"r={1 if stage == 'finetune' else 0.5}", f"{flops / 1e9:.1f}", f"{micro:.2f}", times))
    return table(("model", "stage", "", "GFLOP/token", "µs/token", "tokens: hours"), rows, right=(3, 4))


def _storage(whole: dict[str, Counts], half: dict[str, Counts]) -> str:
    rows = []
    for name, counts in whole.items():
        block, everything = plan.calibration_bytes(counts)
        local, full = plan.checkpoint_bytes(half[name], "local"), plan.checkpoint_bytes(counts, "finetune")
        numbers = (block, everything, *local, *full)
        rows.append((name, *(f"{number / _GB:.2f}" for number in numbers)))
    head = ("model", "a block's statistics", "all blocks'", "local r=0.5: model", "Adam", "finetune: model", "Adam")
    return table(head, rows, right=range(1, 7))


def _gram(rounds: int, tokens: int = 128) -> str:
    rows = []
    for h in GRAMS:
        seconds, size = full_width.measure_gram(h, tokens, max(1, rounds // 3))
        shown = ["memory does not reach"] * 2 if math.isnan(seconds) else [f"{1e3 * seconds:.2f}", f"{1.25 * h * h / seconds / 1e9:.1f}"]
        rows.append((f"{h}", f"{size / _GB:.2f}", *shown))
    return table(("h", "GB", "core-ms per token", "GFLOPS a core"), rows, right=range(4))


def _elimination() -> str:
    sizes, times = ELIMINATED, []
    for h in sizes:
        times.append(full_width.measure_elimination(h))
    slope = statistics.linear_regression([math.log(h) for h in sizes], [math.log(t) for t in times]).slope
    rows = [(f"{h}", f"{t:.1f}", "measured") for h, t in zip(sizes, times, strict=True)]
    rows += [(f"{h}", f"{times[-1] * (h / sizes[-1]) ** 3:.0f}", "extrapolated with h^3") for h in (8192, 14336, 28672)]
    return table(("h", "core-seconds a block", ""), rows, right=(0, 1)) + f"\nfitted exponent {slope:.2f}"


def _blocks(rounds: int, dtypes: list[torch.dtype], paths: tuple[str, ...]) -> Iterator[str]:
    for d, h, tokens in SIZES:
        for dtype in dtypes:
            rows = full_width.measure_block(d, h, tokens, dtype, rounds, paths)
            yield "\n".join(map(str, rows)) or f"{d} x {h} x {tokens} {dtype}: memory does not reach"
