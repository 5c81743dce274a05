"""`kanformer symbolic`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kanformer.commands.shared import (
    layers_of,
    load,
    load_original,
    need,
    need_free,
    need_no_file,
    save_model,
    table_formats,
    text_batches,
    text_name,
    tokenizer_of,
    words,
)
from kanformer.training.arguments import option

if TYPE_CHECKING:
    from kanformer.interpret.symbolic import SymbolicFits


@dataclass
class SymbolicArguments:
    """Settings of `kanformer symbolic`."""

    model: str = option("", "folder or hub id of a patched model")
    out: str = option("formulas", "folder for the tables (formulas.csv, formulas.json), and for the snapped model (model)")
    format: str = option("csv,json", "of the tables: csv, json, parquet, with commas between them")
    text: str | None = option(None, "text, one per line; absent: docstrings of Python's standard library")
    texts: int = option(256, "texts to use", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    layer: str | None = option(None, "paths or numbers of blocks, with commas between them; absent: all")
    top: int | None = option(None, "functions to fit per map, the most important ones; absent: all", ge=1)
    rank: str = option("std", "what chooses the top functions and what is reverted first; sens and effect take a backward pass", ("std", "sens", "effect"))
    library: str | None = option(None, "families of formulas, with commas between them, for example tanh,silu,x^2; absent: all")
    tol_node: float = option(0.01, "largest error of a formula relative to its node's standard deviation", ge=0)
    r2_min: float = option(0.99, "least R2 of a formula", ge=0, le=1)
    tie: float = option(0.001, "R2 within which families are equally good, so that the simplest of them is taken", ge=0)
    snap: bool = option(False, "replace the functions by their formulas, measure the loss, and save the model")
    loss_budget: float | None = option(None, "how much the loss may rise by snapping; absent: no limit", ge=0)
    original: str | None = option(None, "folder or hub id of the model before it was patched, for the header")
    trainable: bool = option(False, "the formulas' numbers become parameters of the snapped model")


def symbolic(arguments: SymbolicArguments) -> None:
    """Fits formulas, prints header and outcomes per layer, writes the tables, and on demand saves a snapped model."""
    from kanformer.errors import ConfigError
    from kanformer.interpret import collect, faithfulness
    from kanformer.interpret.plot import make_folder
    from kanformer.interpret.symbolic import fit_symbolic, snap
    from kanformer.surgery.folders import write_folder

    need(arguments.model, "model")
    need_no_file(arguments.out)
    formats, out = table_formats(arguments.format, arguments.out), Path(arguments.out)
    if arguments.loss_budget is not None and not arguments.snap:
        raise ConfigError("fit formulas", got="a loss_budget without snapping", hint="Add --snap.")
    if arguments.snap:
        need_free(str(out / "model"))
    model = load(arguments.model)
    original = load_original(arguments.original, model)
    batches = list(text_batches(model, arguments.model, arguments.text, arguments.texts, arguments.max_length))
    library = None if arguments.library is None else words(arguments.library)
    tolerances: dict[str, Any] = {"tol_node": arguments.tol_node, "r2_min": arguments.r2_min, "tie": arguments.tie}
    layers = layers_of(arguments.layer)
    stats = collect(model, batches, scores=tuple(dict.fromkeys(("std", arguments.rank))), name=text_name(arguments.text))
    fits = fit_symbolic(model, stats, layer=layers, edges=arguments.top, library=library, progress=print, **tolerances)
    fits.header = faithfulness(model, batches, original=original, stats=stats)
    print(fits.header)
    print(fits)
    make_folder(out, "the formulas")
    print(f"{_write(fits, formats, out)} in {out}")
    if not arguments.snap:
        return
    done = snap(model, fits, loss_budget=arguments.loss_budget, batches=batches, trainable=arguments.trainable)
    fits.header = faithfulness(model, batches, original=original, snapped=done.model, stats=stats)
    print(done)
    print(fits.header)
    _write(fits, formats, out)  # once more, with what snapping costs
    tokenizer = tokenizer_of(arguments.model)
    write_folder(out / "model", lambda folder: save_model(done.model, tokenizer, folder))
    print(f"saved: {out / 'model'}")


def _write(fits: SymbolicFits, formats: list[str], out: Path) -> str:
    """Writes the tables in these formats; gives their names."""
    from kanformer.interpret.symbolic import write_csv, write_json, write_parquet

    writers = {"csv": write_csv, "json": write_json, "parquet": write_parquet}
    names = [f"formulas.{each}" for each in formats]
    for each, name in zip(formats, names, strict=True):
        writers[each](fits, out / name)
    return ", ".join(names)
