"""`kanformer scores`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kanformer.commands.shared import layers_of, load, load_original, need, need_no_file, table_formats, text_batches, text_name, words
from kanformer.training.arguments import option

if TYPE_CHECKING:
    from kanformer.interpret.collecting.stats import ModelStats
    from kanformer.interpret.scoring.table import Table
    from kanformer.interpret.truth.check import TruthCheck

_ALL = 2**62  # tokens: all of the texts
_SHOWN = 20


@dataclass
class ScoresArguments:
    """Settings of `kanformer scores`."""

    model: str = option("", "folder or hub id of a patched model")
    out: str = option("scores", "folder for the tables (scores, functions), the statistics (stats), and the figure truth.png")
    text: str | None = option(None, "text, one per line; absent: docstrings of Python's standard library")
    texts: int = option(256, "texts to use", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    scores: str = option("all", "scores to collect, with commas between them: std, l1, range, share, sens, effect1, effect, nonlinearity, nonbase, delta")
    by: str | None = option(None, "score that ranks; absent: the first of effect, sens and std that is collected")
    top: int = option(1000, "edges, and functions, in the tables; the statistics keep the scores of all", ge=1)
    format: str = option("csv,json", "of the tables: csv, json, parquet, with commas between them")
    layer: str | None = option(None, "paths or numbers of blocks, with commas between them; absent: all")
    original: str | None = option(None, "folder or hub id of the model before it was patched, for the header")
    truth: int | None = option(None, "measure the mean ablation of so many first edges and as many random ones, and draw truth.png", ge=1)
    contexts: int = option(5, "tokens to keep per input channel and place on the curve; 0 for none", ge=0)
    logits: int = option(10, "tokens to keep per output channel of the direct effect on the vocabulary; 0 for none", ge=0)
    skip_first_token: bool = option(False, "leave each text's first token out of everything")
    probes: int = option(1, "draws per text for the curvature in effect", ge=1)
    keep: int | None = option(None, "edges to keep per map, the first ones, where the scores of all do not fit into memory; absent: all", ge=1)


def scores(arguments: ScoresArguments) -> None:
    """Collects statistics, prints the header and the first edges, and writes tables, statistics, and on demand the truth figure."""
    from kanformer.errors import ConfigError
    from kanformer.interpret import collect, faithfulness, truth_check
    from kanformer.interpret.plot import make_folder

    need(arguments.model, "model")
    need_no_file(arguments.out)
    formats, out = table_formats(arguments.format, arguments.out), Path(arguments.out)
    wanted = arguments.scores if arguments.scores == "all" else words(arguments.scores)
    if not wanted:
        raise ConfigError("collect statistics", got=f"scores={arguments.scores!r}", expected="all, or names of scores")
    model = load(arguments.model)
    original = load_original(arguments.original, model)
    batches = list(text_batches(model, arguments.model, arguments.text, arguments.texts, arguments.max_length))
    options = {"skip_first_token": arguments.skip_first_token, "layers": layers_of(arguments.layer), "probes": arguments.probes, "top": arguments.keep}
    amounts = {"contexts": arguments.contexts, "logits": arguments.logits}
    stats = collect(model, batches, _ALL, print, scores=wanted, name=text_name(arguments.text), **amounts, **options)
    first = stats.top(arguments.top, arguments.by)
    stats.header = faithfulness(model, batches, original=original, stats=stats)
    print(stats.header)
    print(stats.top(min(_SHOWN, arguments.top), arguments.by))
    make_folder(out, "the scores")
    stats.save(out / "stats")
    written = [*_tables(stats, first.by, arguments.top, formats, out), "stats"]
    if arguments.truth is not None:
        check = truth_check(model, batches, stats, k=arguments.truth, random=arguments.truth, by=first.by, progress=print)
        print(check)
        written += _truth(check, out)
    print(f"in {out}: {', '.join(written)}")


def _tables(stats: ModelStats, by: str, top: int, formats: list[str], out: Path) -> list[str]:
    """Writes the first edges, and with shared edges the first functions, in all formats; gives the files' names."""
    found = {"scores": stats.top(top, by)}
    if any(layer.functions for layer in stats.values()):
        found["functions"] = stats.top(top, by, functions=True)
    names = []
    for name, table in found.items():
        writers: dict[str, Callable[[Path], object]] = _writers(table)
        for each in formats:
            writers[each](out / f"{name}.{each}")
            names.append(f"{name}.{each}")
    return names


def _writers(table: Table) -> dict[str, Callable[[Path], object]]:
    return {"csv": table.to_csv, "json": table.to_json, "parquet": table.to_parquet}


def _truth(check: TruthCheck, out: Path) -> list[str]:
    from kanformer.interpret.plot import render, write_file

    write_file(out / "truth.png", render(check.plot()))
    return ["truth.png"]
