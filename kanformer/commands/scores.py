"""`kanformer scores`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kanformer.commands.shared import load, need, text_batches, words
from kanformer.training.arguments import option


@dataclass
class ScoresArguments:
    """Settings of `kanformer scores`."""

    model: str = option("", "folder or hub id of a patched model")
    out: str = option("scores", "folder for the table scores.*, header.json, the statistics (stats) and truth.png")
    text: str | None = option(None, "text, one per line; absent: docstrings of Python's standard library")
    texts: int = option(256, "texts to use", ge=1)
    max_length: int = option(128, "tokens per text", ge=2)
    scores: str = option("all", "names of scores, with commas between them, or all")
    by: str | None = option(None, "the score that ranks; absent: effect, else sens, else std")
    top: int = option(1000, "edges in the table, the first of the model", ge=1)
    functions: bool = option(False, "rank whole functions of shared edges instead of edges")
    format: str = option("csv", "of the table", ("csv", "json", "parquet"))
    original: str | None = option(None, "the model before it was patched, for the share of its loss that the patched one recovers")
    truth: int = option(0, "take out that many edges, one by one, and compare with the prediction", ge=0)


def scores(arguments: ScoresArguments) -> None:
    """Scores all edges on data, prints the first of them under the header's numbers, and writes table and statistics."""
    import json

    from kanformer.interpret import collect, faithfulness, truth_check
    from kanformer.interpret.plot import make_folder, write_file
    from kanformer.surgery.folders import replace_file

    need(arguments.model, "model")
    model = load(arguments.model)
    original = None if arguments.original is None else load(arguments.original)
    batches = list(text_batches(model, arguments.model, arguments.text, arguments.texts, arguments.max_length))
    wanted: Any = "all" if arguments.scores == "all" else tuple(words(arguments.scores))
    stats = collect(model, batches, 2**62, print, scores=wanted, name=arguments.text or "docstrings")
    table = stats.top(arguments.top, by=arguments.by, functions=arguments.functions)
    header = faithfulness(model, batches, original=original, stats=stats)
    out = make_folder(arguments.out, "the scores")
    writers = {"csv": table.to_csv, "json": table.to_json, "parquet": table.to_parquet}
    writers[arguments.format](out / f"scores.{arguments.format}")
    replace_file(out / "header.json", json.dumps(header.to_dict(), indent=2) + "\n")
    stats.save(out / "stats")
    print(header)
    print(stats.top(min(20, arguments.top), by=arguments.by, functions=arguments.functions))
    if arguments.truth:
        import io

        check = truth_check(model, batches, stats, k=arguments.truth, random=arguments.truth)
        print(check)
        picture = io.BytesIO()
        check.plot().savefig(picture, dpi=110)
        write_file(out / "truth.png", picture.getvalue())
    print(f"scores.{arguments.format}, header.json and stats in {out}")
