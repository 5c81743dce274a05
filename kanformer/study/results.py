"""What the runs of a study found, gathered from their folders: means and intervals over seeds, differences seed by seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kanformer.errors import ConfigError
from kanformer.experiments.intervals import mean_interval
from kanformer.study.one import RESULT
from kanformer.surgery.folders import reason

PLAN, FAILURE = "study.json", "failure.json"
PRIMARY = {"embedding_cosine": 1, "ce": -1}  # what a model is judged by; 1: the greater the better
FORMATS = {
    "embedding_cosine": ("cosine of embeddings", ".4f"),
    "hidden_cosine": ("cosine of hidden states", ".4f"),
    "ce": ("CE", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "kl": ("KL", ".4f"),
    "top1_agreement": ("top-1 agreement", ".4f"),
    "recovered_zero": ("recovered, zero", ".4f"),
    "recovered_mean": ("recovered, mean", ".4f"),
    "explained_variance": ("explained variance", ".4f"),
}


@dataclass(frozen=True)
class Interval:
    """Mean of `values` and half the width of its 95 % t-interval, which is None for fewer than two."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def half(self) -> float | None:
        return mean_interval(self.values)[1]

    def text(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + ("" if self.half is None else f" ± {self.half:{spec}}")


@dataclass(frozen=True)
class Outcome:
    """One run: `result` is None where there is none, and `problem` says why."""

    name: str
    seed: int | None
    result: dict[str, Any] | None
    problem: str = ""

    def value(self, corpus: int, metric: str, variant: str = "patched") -> float | None:
        if self.result is None:
            return None
        return self.result["corpora"][corpus]["rows"].get(variant, {}).get(metric)


@dataclass(frozen=True)
class ArmResult:
    """A method at a ratio with its runs; `facts` are what the plan says of it."""

    method: str
    ratio: float
    facts: dict[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def done(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.result is not None]

    @property
    def parameters(self) -> int:
        return next((outcome.result["parameters"] for outcome in self.outcomes if outcome.result), self.facts["parameters"])

    @property
    def reached(self) -> float:
        return self.parameters / self.facts["original"]

    @property
    def tokens(self) -> int:
        return next((outcome.result.get("tokens", 0) for outcome in self.outcomes if outcome.result), 0)

    def over_seeds(self, corpus: int, metric: str, variant: str = "patched") -> Interval | None:
        values = [outcome.value(corpus, metric, variant) for outcome in self.done]
        known = [value for value in values if value is not None]
        return Interval(tuple(known)) if known and len(known) == len(values) else None


@dataclass(frozen=True)
class StudyResult:
    """All of it. `metrics` are those that were measured, the one that a model is judged by first."""

    plan: dict[str, Any]
    arms: tuple[ArmResult, ...]

    @property
    def corpora(self) -> list[tuple[str, str, int]]:
        return [tuple(each) for each in self.plan["texts"]["corpora"]]  # type: ignore[misc]

    @property
    def first(self) -> dict[str, Any] | None:
        return next((outcome.result for arm in self.arms for outcome in arm.done), None)

    @property
    def metrics(self) -> list[str]:
        rows = {} if self.first is None else self.first["corpora"][0]["rows"]["patched"]
        return [name for name in FORMATS if rows.get(name) is not None]

    @property
    def primary(self) -> str:
        return next((name for name in PRIMARY if name in self.metrics), "embedding_cosine")

    def teacher(self, corpus: int, metric: str) -> float | None:
        return None if self.first is None else self.first["corpora"][corpus]["rows"]["teacher"].get(metric)

    def arm(self, method: str, ratio: float) -> ArmResult | None:
        return next((arm for arm in self.arms if (arm.method, arm.ratio) == (method, ratio)), None)

    def difference(self, ratio: float, corpus: int, metric: str, method: str = "kan", control: str = "mlp") -> Interval | None:
        """method - control, seed by seed; None where no seed has both."""
        pair = [self.arm(name, ratio) for name in (method, control)]
        if None in pair:
            return None
        ours, theirs = ({outcome.seed: outcome.value(corpus, metric) for outcome in arm.done} for arm in pair if arm)
        pairs = [(value, theirs.get(seed)) for seed, value in ours.items()]
        values = [value - other for value, other in pairs if value is not None and other is not None]
        return Interval(tuple(values)) if values else None


def collect(out: Path) -> StudyResult:
    """Reads what is there.

    Raises:
        ConfigError: no study in the folder.
    """
    try:
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("report on the study", subject=out, got=f"{PLAN}: {reason(error)}", hint="Run the study first, without --report_only.") from error
    runs: dict[str, list[Outcome]] = {}
    for run in plan["runs"]:
        runs.setdefault(run["arm"], []).append(_outcome(out / "runs" / run["name"], run["seed"]))
    arms = [ArmResult(arm["method"], arm["ratio"], arm, tuple(runs.get(arm["name"], ()))) for arm in plan["arms"]]
    return StudyResult(plan, tuple(arms))


def _outcome(folder: Path, seed: int | None) -> Outcome:
    found = _read(folder / RESULT)
    if found is not None:
        return Outcome(folder.name, seed, found)
    failure = _read(folder / FAILURE)
    problem = "not run yet" if failure is None else f"{'diverged' if failure['diverged'] else 'failed'}: {failure['message']}"
    return Outcome(folder.name, seed, None, problem)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def ratios_of(arms: Sequence[ArmResult]) -> list[float]:
    """The ratios, the greatest first."""
    return sorted({arm.ratio for arm in arms}, reverse=True)
