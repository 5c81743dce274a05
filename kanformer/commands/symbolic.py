"""`kanformer symbolic`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kanformer.commands.shared import load, need, need_free, save_model, text_batches, tokenizer_of, words
from kanformer.training.arguments import option


@dataclass
class SymbolicArguments:
    """Settings of `kanformer symbolic`."""

    model: str = option("", "folder or hub id of a patched model")
    out: str = option("formulas", "folder for formulas.csv and formulas.json, and for the snapped model (model)")
    text: str | None = option(None, "text, one per line; absent: docstrings of Python's standard library")
    texts: int = option(256, "texts to use", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    layer: str | None = option(None, "paths or numbers of blocks, with commas between them; absent: all")
    top: int | None = option(None, "functions to fit per map, the most important ones; absent: all", ge=1)
    library: str | None = option(None, "families of formulas, with commas between them, for example tanh,silu,x^2; absent: all")
    tol_node: float = option(0.01, "largest error of a formula relative to its node's standard deviation", ge=0)
    r2_min: float = option(0.99, "least R2 of a formula", ge=0, le=1)
    tie: float = option(0.001, "R2 within which families are equally good, so that the simplest of them is taken", ge=0)
    snap: bool = option(False, "replace the functions by their formulas, measure the loss, and save the model")
    loss_budget: float | None = option(None, "how much the loss may rise by snapping; absent: no limit", ge=0)
    trainable: bool = option(False, "the formulas' numbers become parameters of the snapped model")


def symbolic(arguments: SymbolicArguments) -> None:
    """Fits formulas, prints the outcomes per layer, writes the tables, and on demand saves a snapped model."""
    from kanformer.errors import ConfigError
    from kanformer.interpret import collect
    from kanformer.interpret.plot import make_folder
    from kanformer.interpret.symbolic import fit_symbolic, snap, write_csv, write_json
    from kanformer.surgery.folders import write_folder

    need(arguments.model, "model")
    if arguments.loss_budget is not None and not arguments.snap:
        raise ConfigError("fit formulas", got="a loss_budget without snapping", hint="Add --snap.")
    out = Path(arguments.out)
    if arguments.snap:
        need_free(str(out / "model"))
    model = load(arguments.model)
    batches = list(text_batches(model, arguments.model, arguments.text, arguments.texts, arguments.max_length))
    layers = None if arguments.layer is None else [int(word) if word.lstrip("-").isdigit() else word for word in words(arguments.layer)]
    library = None if arguments.library is None else words(arguments.library)
    tolerances: dict[str, Any] = {"tol_node": arguments.tol_node, "r2_min": arguments.r2_min, "tie": arguments.tie}
    fits = fit_symbolic(model, collect(model, batches), layer=layers, edges=arguments.top, library=library, progress=print, **tolerances)
    print(fits)
    make_folder(out, "the formulas")
    write_csv(fits, out / "formulas.csv")
    write_json(fits, out / "formulas.json")
    print(f"formulas.csv and formulas.json in {out}")
    if not arguments.snap:
        return
    done = snap(model, fits, loss_budget=arguments.loss_budget, batches=batches, trainable=arguments.trainable, inplace=True)
    print(done)
    tokenizer = tokenizer_of(arguments.model)
    write_folder(out / "model", lambda folder: save_model(model, tokenizer, folder))
    print(f"saved: {out / 'model'}")
