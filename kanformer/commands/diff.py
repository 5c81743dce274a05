"""`kanformer diff`."""

from __future__ import annotations

from dataclasses import dataclass

from kanformer.commands.shared import load, need, text_batches
from kanformer.training.arguments import option


@dataclass
class DiffArguments:
    """Settings of `kanformer diff`."""

    model: str = option("", "folder or hub id of a patched model")
    other: str = option("", "the second model, of the same shape: for example the first one fine-tuned")
    out: str = option("diff", "folder for functions.*, edges.* and changes.png")
    text: str | None = option(None, "text, one per line; absent: docstrings of Python's standard library")
    texts: int = option(256, "texts to use", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    top: int = option(1000, "functions in the tables, the most changed ones", ge=1)
    draw: int = option(24, "functions to draw", ge=1)
    format: str = option("csv", "of the tables", ("csv", "json", "parquet"))


def diff(arguments: DiffArguments) -> None:
    """Compares the learned functions of two models on data, prints how far each map moved, and writes tables and a figure."""
    import io

    from kanformer.interpret import collect
    from kanformer.interpret.differences import compare_functions
    from kanformer.interpret.drawing.changes import plot_changes
    from kanformer.interpret.plot import make_folder, write_file

    need(arguments.model, "model")
    need(arguments.other, "other")
    model, other = load(arguments.model), load(arguments.other)
    batches = list(text_batches(model, arguments.model, arguments.text, arguments.texts, arguments.max_length))
    stats = collect(model, batches, 2**62, print, scores=("std",))
    found = compare_functions(model, other, stats)
    print(found)
    out = make_folder(arguments.out, "the differences")
    kinds = {one.kind for maps in found.maps.values() for one in maps.values()}
    for kind in sorted(kinds):
        table = found.top(arguments.top, functions=kind == "function")
        writers = {"csv": table.to_csv, "json": table.to_json, "parquet": table.to_parquet}
        writers[arguments.format](out / f"{kind}s.{arguments.format}")
    picture = io.BytesIO()
    plot_changes(model, other, stats, found, top=arguments.draw, names=(arguments.model, arguments.other)).savefig(picture, dpi=110)
    write_file(out / "changes.png", picture.getvalue())
    print(f"{', '.join(f'{kind}s.{arguments.format}' for kind in sorted(kinds))} and changes.png in {out}")
