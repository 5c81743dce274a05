"""`kanformer plot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kanformer.commands.shared import load, need, text_batches
from kanformer.training.arguments import option


@dataclass
class PlotArguments:
    """Settings of `kanformer plot`."""

    model: str = option("", "folder or hub id of a patched model")
    out: str = option("figures", "folder for the figures and functions.csv")
    text: str | None = option(None, "text, one per line; absent: docstrings of Python's standard library")
    texts: int = option(256, "texts to use", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    top: int = option(48, "functions to draw per layer", ge=1)
    y: str = option("free", "y-scale: one per function, or shared in a figure so that small functions look small", ("free", "shared"))
    format: str = option("png", "of the figures", ("png", "svg", "pdf"))


def plot(arguments: PlotArguments) -> None:
    """Draws every layer on data and says where the files are."""
    from kanformer.interpret import plot_model

    need(arguments.model, "model")
    model = load(arguments.model)
    batches = text_batches(model, arguments.model, arguments.text, arguments.texts, arguments.max_length)
    files = plot_model(model, batches, Path(arguments.out), top=arguments.top, formats=(arguments.format,), y=arguments.y, progress=print)
    print(f"{len(files)} files in {arguments.out}")
