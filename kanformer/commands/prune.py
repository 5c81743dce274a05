"""`kanformer prune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kanformer.commands.shared import load, need, need_free, save_model, text_batches, tokenizer_of
from kanformer.training.arguments import option


@dataclass
class PruneArguments:
    """Settings of `kanformer prune`."""

    model: str = option("", "folder or hub id of a patched model")
    out: str = option("", "folder for the pruned model; with --dry_run for curve.csv, curve.json and curve.png, if given")
    text: str | None = option(None, "text, one per line; absent: docstrings of Python's standard library")
    texts: int = option(256, "texts to use", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    what: str = option(
        "edges", "what is taken out: edges (which become zeros) or neurons (hidden channels, which make the matrices smaller)", ("edges", "neurons")
    )
    keep: float | None = option(None, "share of the effect that stays, per output (neurons: per block); absent: 0.95, or what the next two say")
    sparsity: float | None = option(None, "instead: fraction of all edges or channels that goes")
    loss_budget: float | None = option(None, "instead: how much the loss may rise")
    by: str | None = option(None, "the score that ranks; absent: effect")
    dry_run: bool = option(False, "print the loss over the sparsity and stop")


def prune(arguments: PruneArguments) -> None:
    """Scores the edges, takes out what is worth least, and saves the model."""
    from kanformer.interpret import collect
    from kanformer.interpret.pruning import prune as prune_model
    from kanformer.interpret.pruning import prune_curve
    from kanformer.surgery.folders import write_folder

    need(arguments.model, "model")
    if not arguments.dry_run:
        need(arguments.out, "out")
        need_free(arguments.out)
    model = load(arguments.model)
    batches = list(text_batches(model, arguments.model, arguments.text, arguments.texts, arguments.max_length))
    stats = collect(model, batches, 2**62, print, scores=tuple(dict.fromkeys(("std", arguments.by or "effect"))))
    if arguments.dry_run:
        curve = prune_curve(model, stats, batches, what=arguments.what, by=arguments.by, progress=print)
        print(curve)
        if arguments.out:
            _write(curve, Path(arguments.out))
        return
    amounts: dict[str, Any] = {"keep": arguments.keep, "sparsity": arguments.sparsity, "loss_budget": arguments.loss_budget}
    done = prune_model(model, stats, what=arguments.what, by=arguments.by, batches=batches, inplace=True, **amounts)
    print(done)
    tokenizer = tokenizer_of(arguments.model)
    write_folder(Path(arguments.out), lambda folder: save_model(model, tokenizer, folder))
    print(f"saved: {arguments.out}")


def _write(curve, folder: Path) -> None:
    import io

    from kanformer.interpret.plot import make_folder, write_file

    make_folder(folder, "the curve")
    curve.to_csv(folder / "curve.csv")
    curve.to_json(folder / "curve.json")
    picture = io.BytesIO()
    curve.plot().savefig(picture, dpi=110)
    write_file(folder / "curve.png", picture.getvalue())
    print(f"curve.csv, curve.json and curve.png in {folder}")
