"""The report of a study: Markdown, CSV and figure, of whatever has been run."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from kanformer.study.results import FORMATS, PRIMARY, ArmResult, Interval, StudyResult, collect, ratios_of
from kanformer.study.settings import StudyArguments, checked_goals
from kanformer.surgery.folders import replace_file

LABELS = {"kan": "KAN, shared edges", "mlp": "MLP, pruned alike", "random_mlp": "MLP, random start", "linear": "linear map", "kan_full": "KAN, full edges"}


def write_report(out: Path, arguments: StudyArguments) -> str:
    """Writes report.md, results.csv and frontier.png into the study's folder, copies them into docs_dir if asked to, and returns the Markdown.

    Raises:
        ConfigError: no study in the folder.
    """
    from kanformer.study.figure import draw_frontier

    found, goals = collect(out), checked_goals(arguments)
    name = out.resolve().name
    text = markdown(found, goals, name)
    replace_file(out / "report.md", text)
    replace_file(out / "results.csv", table_csv(found))
    figure = draw_frontier(found, goals, out / "frontier.png") if found.first else None
    if arguments.docs_dir:
        docs = Path(arguments.docs_dir)
        replace_file(docs / f"{name}.md", f"{text}\n![Quality over parameters]({name}.png)\n" if figure else text)
        replace_file(docs / f"{name}.csv", table_csv(found))
        if figure:
            shutil.copyfile(figure, docs / f"{name}.png")
    return f"{text}\nwritten: {out / 'report.md'}, {out / 'results.csv'}" + (f", {figure}" if figure else "")


def markdown(found: StudyResult, goals: dict[float, float], name: str) -> str:
    """Everything in words and tables."""
    parts = [f"# {name}\n", _setting(found), *(_corpus(found, number) for number in range(len(found.corpora))), _differences(found)]
    parts += [_without_functions(found), _goals(found, goals), _open(found)]
    return "\n".join(part for part in parts if part)


def _setting(found: StudyResult) -> str:
    plan = found.plan
    texts, tokens = plan["texts"], sorted(plan["tokens"].values())
    train = f"{texts['train'][0]} ({texts['train'][1]:,} texts)"
    lines = [f"Original: {Path(plan['teacher']).name} ({plan['class']}), {found.arms[0].facts['original']:,} parameters in its feed-forward blocks."]
    if tokens:
        steps = ", then ".join(f"{steps:,} steps of {texts} texts{' in bf16' if bf16 else ''}" for steps, texts, bf16 in plan["stages"])
        count = f"{tokens[0]:,}" + (f" to {tokens[-1]:,}" if tokens[-1] > tokens[0] else "")
        lines.append(f"Trained methods: {steps} of {train}, {count} tokens; of one seed all read the same texts in the same order.")
    else:
        lines.append(f"Nothing is trained; text: {train}.")
    seeds = plan["seeds"]
    if len(seeds) > 1:
        lines.append(f"± is half the width of the 95 % t-interval of the mean over {len(seeds)} seeds ({', '.join(map(str, seeds))}).")
    else:
        lines.append("One seed: there is no interval, and a difference says nothing of another seed.")
    return "\n".join(lines) + "\n"


def _corpus(found: StudyResult, corpus: int) -> str:
    name, source, count = found.corpora[corpus]
    rows = [_row(arm, found, corpus) for arm in found.arms]
    original = [_format(found.teacher(corpus, metric), metric) for metric in found.metrics]
    head = ["ratio", "blocks", "parameters", "reached", "tokens", "runs", *(FORMATS[metric][0] for metric in found.metrics)]
    if any(cell != "-" for cell in original):
        rows = [["", "original", f"{found.arms[0].facts['original']:,}", "1.0000", "-", "-", *original], *rows]
    return f"## {name.capitalize()}: {source}, {count:,} texts\n\n{_table(head, rows)}\n"


def _row(arm: ArmResult, found: StudyResult, corpus: int) -> list[str]:
    intervals = [arm.over_seeds(corpus, metric) for metric in found.metrics]
    cells = ["-" if each is None else each.text(FORMATS[metric][1]) for each, metric in zip(intervals, found.metrics, strict=True)]
    runs = f"{len(arm.done)}" if len(arm.done) == len(arm.outcomes) else f"{len(arm.done)} of {len(arm.outcomes)}"
    if len(arm.done) < len(arm.outcomes) and any("failed" in each.problem or "diverged" in each.problem for each in arm.outcomes):
        runs += " (failed)"
    tokens = f"{arm.tokens:,}" if arm.tokens else {"none": "exact start", "closed form": "closed form"}.get(arm.facts["training"], "-")
    return [f"{arm.ratio:g}", LABELS[arm.method], f"{arm.parameters:,}", f"{arm.reached:.4f}", tokens, runs, *cells]


def _format(value: float | None, metric: str) -> str:
    return "-" if value is None else f"{value:{FORMATS[metric][1]}}"


def _differences(found: StudyResult) -> str:
    metric = found.primary
    rows = []
    for ratio in ratios_of(found.arms):
        for corpus, (name, *_) in enumerate(found.corpora):
            each = found.difference(ratio, corpus, metric)
            if each is not None:
                shown = f"{each.mean:+.5f}" + ("" if each.half is None else f" ± {each.half:.5f}")
                values = ", ".join(f"{value:+.5f}" for value in each.values)
                rows.append([f"{ratio:g}", name, _equal(found, ratio), shown, values, _verdict(each, PRIMARY[metric])])
    if not rows:
        return ""
    better = "more" if PRIMARY[metric] > 0 else "less"
    head = ["ratio", "corpus", "parameters, KAN / MLP", "difference", "by seed", "reading"]
    return f"## KAN minus pruned MLP: {FORMATS[metric][0]} ({better} is better), seed by seed\n\n{_table(head, rows)}\n"


def _equal(found: StudyResult, ratio: float) -> str:
    pair = [found.arm(method, ratio) for method in ("kan", "mlp")]
    return f"{pair[0].parameters / pair[1].parameters:.5f}" if pair[0] and pair[1] else "-"


def _verdict(difference: Interval, sign: int) -> str:
    if not any(difference.values):
        return "equal"
    if difference.half is None:
        return "one pair: no interval"
    if abs(difference.mean) <= difference.half:
        return "a tie: the interval holds 0"
    return "the KAN is better" if difference.mean * sign > 0 else "the KAN is worse"


def _without_functions(found: StudyResult) -> str:
    metric, rows = found.primary, []
    for arm in found.arms:
        for corpus, (name, *_) in enumerate(found.corpora):
            both = [arm.over_seeds(corpus, metric, variant) for variant in ("patched", "without_functions")]
            if arm.method.startswith("kan") and both[0] and both[1]:
                rows.append([f"{arm.ratio:g}", LABELS[arm.method], name, *(each.text(FORMATS[metric][1]) for each in both if each)])
    if not rows:
        return ""
    head = ["ratio", "blocks", "corpus", FORMATS[metric][0], "the same without functions"]
    return f"## The learned functions switched off (their splines set to zero, the rest as trained)\n\n{_table(head, rows)}\n"


def _goals(found: StudyResult, goals: dict[float, float]) -> str:
    rows, metric = [], found.primary
    sign = PRIMARY[metric]
    for ratio, goal in sorted(goals.items(), reverse=True):
        arm = found.arm("kan", ratio)
        reached = arm.over_seeds(0, metric) if arm else None
        met = "not run" if reached is None else "yes" if (reached.mean - goal) * sign >= 0 else "no"
        rows.append([f"{ratio:g}", f"{'>=' if sign > 0 else '<='} {goal:g}", "-" if reached is None else reached.text(".4f"), met])
    if not rows:
        return ""
    return f"## Goals of the KAN: {FORMATS[metric][0]} on held-out text\n\n{_table(['ratio', 'goal', 'reached', 'met'], rows)}\n"


def _open(found: StudyResult) -> str:
    rows = [[outcome.name, outcome.problem] for arm in found.arms for outcome in arm.outcomes if outcome.problem]
    return f"## Runs without a result\n\n{_table(['run', 'why'], rows)}\n" if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def table_csv(found: StudyResult) -> str:
    """A line per run, corpus, variant and metric; one without numbers for a run that has no result."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "ratio", "seed", "parameters", "original_parameters", "reached_ratio", "tokens", "corpus", "variant", "metric", "value", "problem"]
    )
    for arm in found.arms:
        for outcome in arm.outcomes:
            head = [arm.method, f"{arm.ratio:g}", "" if outcome.seed is None else outcome.seed, arm.parameters, arm.facts["original"], f"{arm.reached:.6f}"]
            if outcome.result is None:
                writer.writerow([*head, "", "", "", "", "", outcome.problem])
                continue
            for corpus in outcome.result["corpora"]:
                for variant, values in corpus["rows"].items():
                    numbers = {metric: value for metric, value in values.items() if isinstance(value, int | float)}
                    writer.writerows([*head, outcome.result.get("tokens", 0), corpus["name"], variant, metric, repr(v), ""] for metric, v in numbers.items())
    return text.getvalue()
