"""The finished runs of a grid as rows: an arm in a comparison, means over seeds, differences to the baseline seed by seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kanformer.experiments.intervals import mean_interval
from kanformer.pretraining.outcomes import Outcome, best_rate, edge, outcome
from kanformer.pretraining.plan import Entry, Plan


@dataclass(frozen=True)
class Summary:
    """An arm in a row. Intervals are half the width of a 95 % t interval over seeds, None for fewer than two.

    Attributes:
        learning_rate: the best of the trials; None while they are not finished, or where all failed. edge: "lowest" or "highest" of those tried.
        losses, base_losses: held-out cross-entropy (nats per token) by seed, of the arm and of its baseline.
        failed: error by seed, or by "lr..." for a trial. missing: seeds that are not done yet.
        step_ms, ratio: of a training step, measured in turns; None where it was not.
    """

    entry: Entry
    learning_rate: float | None
    edge: str | None
    losses: dict[int, float]
    base_losses: dict[int, float]
    bits_per_byte: tuple[float | None, float | None]
    failed: dict[str, str]
    missing: int
    peak_bytes: int | None
    step_ms: float | None
    ratio: float | None
    tokens_per_second: float | None

    @property
    def loss(self) -> tuple[float | None, float | None]:
        return mean_interval(list(self.losses.values()))

    @property
    def differences(self) -> dict[int, float]:
        """Cross-entropy minus the baseline's with the same seed; below 0 is better."""
        return {} if self.entry.arm.is_baseline else {seed: loss - self.base_losses[seed] for seed, loss in self.losses.items() if seed in self.base_losses}

    @property
    def difference(self) -> tuple[float | None, float | None]:
        return mean_interval(list(self.differences.values()))

    @property
    def percent(self) -> tuple[float | None, float | None]:
        """The mean difference in percent of the baseline's mean over the same seeds."""
        base = mean_interval([self.base_losses[seed] for seed in self.differences])[0]
        mean, half = self.difference
        return (None, None) if base is None or mean is None else (100 * mean / base, None if half is None else 100 * half / base)

    @property
    def verdict(self) -> str:
        """What the interval of the difference allows to say."""
        mean, half = self.difference
        if self.entry.arm.is_baseline:
            return "baseline"
        if mean is None:
            return "no result"
        if half is None:
            return "one seed, no interval"
        return "tie" if abs(mean) <= half else "better" if mean < 0 else "worse"


def summarize(plan: Plan, times: dict[str, Any]) -> list[Summary]:
    """A summary of every entry, row by row, from the folders of the runs. Nothing is run."""
    rates = {arm.name: best_rate(plan, arm) for arm in plan.arms}
    ordered = [entry for row in plan.rows for entry in plan.entries.values() if entry.row == row]
    return [_summary(plan, entry, rates, times) for entry in ordered]


def _summary(plan: Plan, entry: Entry, rates: dict[str, float | None], times: dict[str, Any]) -> Summary:
    arm, rate = entry.arm, rates[entry.arm.name]
    ended = _by_seed(plan, entry, rate)
    finished = {seed: each.results for seed, each in ended.items() if each is not None and each.results is not None}
    base = _by_seed(plan, plan.entries[arm.baseline, entry.row], rates[arm.baseline])
    failed = {f"seed{seed}": str(each.error) for seed, each in ended.items() if each is not None and each.error is not None}
    trials = [outcome(run) for run in plan.trials(arm)]
    failed |= {f"lr{each.run.learning_rate:g}": str(each.error) for each in trials if each is not None and each.error is not None}
    missing = sum(each is None for each in ended.values()) if rate is not None else len(plan.seeds(arm)) if None in trials else 0
    timed = times.get(arm.name, {})
    tokens = plan.arguments.per_device_train_batch_size * plan.arguments.max_length
    return Summary(
        entry=entry,
        learning_rate=rate,
        edge=None if rate is None else edge(plan, rate),
        losses={seed: results["eval_loss"] for seed, results in finished.items()},
        base_losses={seed: each.loss for seed, each in base.items() if each is not None and each.loss is not None},
        bits_per_byte=mean_interval([results["eval_bits_per_byte"] for results in finished.values()]),
        failed=failed,
        missing=missing,
        peak_bytes=max((results["peak_memory_bytes"] for results in finished.values()), default=None),
        step_ms=timed.get("ms"),
        ratio=timed.get("ratio"),
        tokens_per_second=1e3 * tokens / timed["ms"] if timed else None,
    )


def _by_seed(plan: Plan, entry: Entry, rate: float | None) -> dict[int, Outcome | None]:
    return {} if rate is None else {seed: outcome(plan.run(entry, rate, seed)) for seed in plan.seeds(entry.arm)}
