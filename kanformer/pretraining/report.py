"""The report of a grid: table, CSV of rows and of runs, figure; and the same for a page of the docs."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from kanformer.pretraining.figure import draw
from kanformer.pretraining.outcomes import outcome
from kanformer.pretraining.plan import Plan
from kanformer.pretraining.summary import Summary, summarize
from kanformer.surgery.folders import replace_file
from kanformer.surgery.tables import table

PAGE = "pretraining.md"
_TITLES = {"params": "equal parameters, equal steps", "flops": "equal FLOPs per token, equal steps", "time": "equal training time"}


def write_report(plan: Plan) -> list[dict[str, Any]]:
    """Prints the tables and writes report.md, report.csv, runs.csv and report.png into the folder of the corpus, and into `docs_dir` if it is set.

    Returns:
        The rows of report.csv.
    """
    path = plan.folder / "timing.json"
    found = summarize(plan, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
    rows = [_row(plan, each) for each in found]
    text, name = markdown(plan, found), plan.folder.name
    figure = draw(found, name)
    for folder, stem in [(plan.folder, "report"), *([(Path(plan.arguments.docs_dir), f"pretraining-{name}")] if plan.arguments.docs_dir else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{stem}.csv", _csv(rows))
        figure.savefig(folder / f"{stem}.png", dpi=110)
    replace_file(plan.folder / "report.md", text)
    replace_file(plan.folder / "runs.csv", _csv(_runs(plan)))
    if plan.arguments.docs_dir:
        put_in_page(Path(plan.arguments.docs_dir) / PAGE, name, text)
    print(_terminal(found))
    print(f"report: {plan.folder / 'report.md'}, report.csv, runs.csv, report.png")
    return rows


def markdown(plan: Plan, found: list[Summary]) -> str:
    """The rows as a table each, never mixed, and what must be said beside them."""
    settings, lines = plan.arguments, []
    tokens = settings.max_steps * settings.per_device_train_batch_size * settings.max_length
    lines.append(
        f"`{plan.folder.name}`, {settings.vocabulary} vocabulary of {plan.vocab_size:,}; {settings.num_hidden_layers} layers, d={settings.hidden_size}, "
        f"context {settings.max_length}; {settings.max_steps} steps, {tokens:,} tokens per run; learning rates tried by every arm: "
        f"{', '.join(f'{rate:g}' for rate in plan.rates)}. CE in nats per token on held-out blocks; ± and [ ] are 95 % t intervals over seeds."
    )
    for row in plan.rows:
        for host in plan.baselines:
            part = [each for each in found if each.entry.row == row and each.entry.arm.baseline == host]
            if part:
                lines += ["", f"**{_TITLES[row]}, against {host}**", "", *_markdown_table(part)]
    notes = _notes(found)
    return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])]) + "\n"


_HEADER = ("arm", "h", "FFN params", "FLOP/token", "steps", "lr", "seeds", "CE", "bits/byte", "CE - baseline's", "in %", "reading", "tokens/s", "peak MiB")


def _markdown_table(part: list[Summary]) -> list[str]:
    rows = [_HEADER, tuple("---" for _ in _HEADER), *(_cells(each, part[0]) for each in part)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _terminal(found: list[Summary]) -> str:
    parts: dict[tuple[str, str], list[Summary]] = {}
    for each in found:
        parts.setdefault((each.entry.row, each.entry.arm.baseline), []).append(each)
    drawn = [
        f"{_TITLES[row]}, against {base}\n" + table(_HEADER, [_cells(each, part[0]) for each in part], right=(1, 2, 3, 4))
        for (row, base), part in parts.items()
    ]
    return "\n\n".join([*drawn, *(f"note: {note}" for note in _notes(found))])


def _cells(each: Summary, base: Summary) -> tuple[str, ...]:
    size, own = each.entry.size, base.entry.size
    mean, half = each.difference
    interval = "-" if mean is None else f"{mean:+.4f}" + ("" if half is None else f" [{mean - half:+.4f}, {mean + half:+.4f}]")
    percent, width = each.percent
    shown = "-" if percent is None else f"{percent:+.2f}" + ("" if width is None else f" ± {width:.2f}")
    done = len(each.losses)
    seeds = f"{done}" + (f" of {done + each.missing + _failed_seeds(each)}" if each.missing or _failed_seeds(each) else "")
    return (
        each.entry.arm.name,
        str(size.width),
        f"{size.parameters:,} ({size.parameters / own.parameters:.4f})",
        f"{size.flops:,} ({size.flops / own.flops:.4f})",
        str(each.entry.steps),
        "-" if each.learning_rate is None else f"{each.learning_rate:g}" + ("*" if each.edge else ""),
        seeds,
        _with_interval(each.loss),
        _with_interval(each.bits_per_byte),
        interval,
        shown,
        each.verdict + (" (same runs as at equal parameters)" if each.entry.reuses and not each.entry.arm.is_baseline else ""),
        "-" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f} ({1 / each.ratio:.3f})" if each.ratio else "-",
        "-" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:,.0f}",
    )


def _with_interval(pair: tuple[float | None, float | None]) -> str:
    mean, half = pair
    return "-" if mean is None else f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")


def _failed_seeds(each: Summary) -> int:
    return sum(name.startswith("seed") for name in each.failed)


def _notes(found: list[Summary]) -> list[str]:
    """What a reader of the table must know: best rates at the edge, failures, missing runs, single seeds."""
    notes = []
    for each in found:
        name = f"{each.entry.arm.name}, equal {each.entry.row}"
        if each.entry.row == "params" and each.edge == "only":
            notes.append(f"{each.entry.arm.name}: one learning rate only was tried.")
        elif each.entry.row == "params" and each.edge:
            notes.append(f"* {each.entry.arm.name}: its best learning rate is the {each.edge} that was tried; a better one may lie beyond.")
        if not each.entry.reuses or each.entry.row == "params":
            notes += [f"{name}: {what} FAILED: {error}" for what, error in each.failed.items() if each.entry.row == "params" or what.startswith("seed")]
            if each.missing:
                notes.append(f"{name}: {each.missing} of its runs are not finished.")
            if len(each.losses) == 1:
                notes.append(f"{name}: one seed only, so no interval.")
    return notes


def _row(plan: Plan, each: Summary) -> dict[str, Any]:
    """A line of report.csv, plain values."""
    size, base = each.entry.size, plan.baselines[each.entry.arm.baseline]
    pairs = {"ce": each.loss, "bits_per_byte": each.bits_per_byte, "ce_difference": each.difference, "ce_difference_percent": each.percent}
    return {
        "corpus": plan.folder.name,
        "row": f"equal {each.entry.row}",
        "host": each.entry.arm.host,
        "arm": each.entry.arm.name,
        "baseline": each.entry.arm.baseline,
        "width": size.width,
        "ffn_parameters": size.parameters,
        "ffn_parameters_ratio": size.parameters / base.parameters,
        "model_parameters": size.model_parameters,
        "flops_per_token": size.flops,
        "flops_ratio": size.flops / base.flops,
        "steps": each.entry.steps,
        "reuses_equal_params": each.entry.reuses,
        "learning_rate": each.learning_rate,
        "learning_rate_at_edge": each.edge or "",
        "seeds": len(each.losses),
        "failed": len(each.failed),
        "missing": each.missing,
        **{f"{name}{suffix}": value for name, pair in pairs.items() for suffix, value in zip(("", "_half_interval"), pair, strict=True)},
        "reading": each.verdict,
        "step_ms": each.step_ms,
        "step_time_ratio": each.ratio,
        "tokens_per_second": each.tokens_per_second,
        "peak_memory_bytes": each.peak_bytes,
    }


def _runs(plan: Plan) -> list[dict[str, Any]]:
    """Every run that has ended, trials too."""
    from kanformer.pretraining.outcomes import best_rate

    runs = {run.output_dir: run for arm in plan.arms for run in plan.trials(arm)}
    for entry in plan.entries.values():
        rate = best_rate(plan, entry.arm)
        for seed in plan.seeds(entry.arm) if rate is not None else ():
            run = plan.run(entry, rate, seed)  # type: ignore[arg-type]
            runs[run.output_dir] = run
    ended = [(path, outcome(run)) for path, run in runs.items()]
    return [
        {
            "arm": each.run.arm,
            "row": Path(path).parent.name,
            "width": each.run.width,
            "steps": each.run.max_steps,
            "learning_rate": each.run.learning_rate,
            "seed": each.run.seed,
            "ce": each.loss,
            "bits_per_byte": (each.results or {}).get("eval_bits_per_byte"),
            "train_seconds": (each.results or {}).get("train_seconds"),
            "peak_memory_bytes": (each.results or {}).get("peak_memory_bytes"),
            "error": each.error or "",
        }
        for path, each in ended
        if each is not None
    ]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def put_in_page(page: Path, name: str, text: str) -> bool:
    """Puts the tables between the page's two marks for this corpus; whether it has them."""
    begin, end = (f"<!-- {which} pretraining {name} -->" for which in ("begin", "end"))
    found = page.read_text(encoding="utf-8") if page.is_file() else ""
    if begin not in found or end not in found:
        return False
    replace_file(page, re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{text}{end}", found, flags=re.DOTALL))
    return True
