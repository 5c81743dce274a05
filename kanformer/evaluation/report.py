"""What an evaluation prints and writes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from kanformer.evaluation.corpus import CorpusResult
from kanformer.surgery.tables import table

_LANGUAGE = {
    "ce": ("CE", "{:.4f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "kl": ("KL", "{:.5f}"),
    "top1_agreement": ("top-1", "{:.4f}"),
}
_ENCODER = {"embedding_cosine": ("cosine, embedding", "{:.5f}"), "hidden_cosine": ("cosine, hidden", "{:.5f}")}
_KEPT = {
    "recovered_zero": ("recovered, zero", "{:.4f}"),
    "recovered_mean": ("recovered, mean", "{:.4f}"),
    "explained_variance": ("expl. var.", "{:.4f}"),
}


def corpus_table(result: CorpusResult) -> str:
    """A row per variant, a column per number that is measured; "-" where there is none."""
    first = next(iter(result.rows.values()))
    encoder = "hidden_cosine" in first
    known = {**(_ENCODER if encoder else _LANGUAGE), **_KEPT}
    columns = {key: column for key, column in known.items() if any(key in row for row in result.rows.values())}
    rows = [
        [name.replace("_", " "), *("-" if row.get(key) is None else text.format(row[key]) for key, (_, text) in columns.items())]
        for name, row in result.rows.items()
    ]
    scored = "" if encoder else f", {result.scored_tokens:,} predicted" + (f" ({result.scored_bytes:,} bytes)" if result.scored_bytes else "")
    head = f"{result.name}: {result.source}, {result.texts:,} texts, {result.tokens:,} tokens{scored}"
    return f"{head}\n{table(['', *(name for name, _ in columns.values())], rows, right=range(1, 1 + len(columns)))}"


def speed_lines(speed: dict[str, float], memory: dict[str, Any], batches: int, device: str) -> list[str]:
    """Tokens per second and memory, and how they were measured."""
    lines = []
    if speed:
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in speed.items())
        ratio = f" ({speed['patched'] / speed['teacher']:.3f} of the teacher's)" if "teacher" in speed else ""
        lines.append(f"tokens/s: {rates}{ratio}; median of {batches} batches, forward only, on {device}")
    return [*lines, f"peak memory: {memory['bytes'] / 2**30:.2f} GiB ({memory['kind']}, all models together)"]


def layer_csv(results: Sequence[CorpusResult]) -> str:
    """Explained variance per corpus and layer."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["corpus", "layer", "explained_variance", "explained_variance_without_functions"])
    for result in results:
        writer.writerows([result.name, path, f"{row['patched']:.8f}", f"{row['without_functions']:.8f}"] for path, row in result.layers.items())
    return text.getvalue()


def plain(values: Any) -> Any:
    """The same for JSON, which knows no numbers that are not finite: these become null."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
