"""What the grid compares: the arms' sizes in every row, and the settings of each run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kanformer.errors import ConfigError, did_you_mean
from kanformer.pretraining.arms import ARMS, Arm, chosen_arms
from kanformer.pretraining.settings import ROWS, ModelArguments, PretrainArguments, RunArguments
from kanformer.pretraining.sizes import Size, deviation, matched, size_of
from kanformer.surgery.tables import table

_SHARED = (
    *("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "weight_decay", "lr_scheduler_type", "warmup_steps", "max_grad_norm"),
    *("loss_watchdog_threshold", "logging_steps", "save_steps", "eval_blocks", "backend"),
    *(field.name for field in dataclasses.fields(ModelArguments)),
)


@dataclass(frozen=True)
class Entry:
    """An arm in a row.

    Attributes:
        row: "params", "flops" or "time".
        steps: optimizer steps of its runs.
        reuses: whether the runs are those of the row "params", because the arm is a baseline or within the tolerance there.
    """

    arm: Arm
    row: str
    size: Size
    steps: int
    reuses: bool

    @property
    def run_row(self) -> str:
        """The row whose runs count here."""
        return "params" if self.reuses else self.row


class Plan:
    """All entries of a grid.

    Args:
        folder: of the corpus.
        vocab_size: tokens of its vocabulary.
        digest: what its data are, see `text.digest`.
        times: step time of each arm over its baseline's; absent: there are no entries for equal time yet.

    Raises:
        ConfigError: unknown arms or rows, learning rates that are no rates, or an arm that cannot be matched.
    """

    def __init__(self, arguments: PretrainArguments, folder: Path, vocab_size: int, digest: str = "", times: Mapping[str, float] | None = None) -> None:
        self.arguments, self.folder, self.vocab_size, self.digest, self.times = arguments, folder, vocab_size, digest, times
        self.rates = _rates(arguments)
        for row in arguments.rows:
            if row not in ROWS:
                raise ConfigError("choose the rows", got=repr(row), expected=f"any of {', '.join(ROWS)}", hint=did_you_mean(str(row), ROWS))
        self.rows = [row for row in ROWS if row in arguments.rows or row == "params"]
        self.arms = chosen_arms(arguments.arms)
        widths = {"swiglu": arguments.swiglu_width, "mlp": arguments.mlp_width}
        self.baselines = {name: size_of(ARMS[name], arguments, widths[name], vocab_size) for name in dict.fromkeys(arm.baseline for arm in self.arms)}
        self.entries = {(arm.name, row): entry for arm in self.arms for row in self.rows if (entry := self._entry(arm, row)) is not None}

    def _entry(self, arm: Arm, row: str) -> Entry | None:
        baseline, limit, steps = self.baselines[arm.baseline], self.arguments.tolerance, self.arguments.max_steps
        if arm.is_baseline:
            return Entry(arm, row, baseline, steps, row != "params")
        size = matched(arm, self.arguments, self.vocab_size, baseline, "parameters", limit)
        if row == "params":
            return Entry(arm, row, size, steps, False)
        if row == "flops":
            if deviation(size.flops, baseline.flops) <= limit:
                return Entry(arm, row, size, steps, True)
            return Entry(arm, row, matched(arm, self.arguments, self.vocab_size, baseline, "flops", limit), steps, False)
        if self.times is None:
            return None
        scaled = max(1, round(steps / self.times[arm.name]))
        return Entry(arm, row, size, steps, True) if deviation(scaled, steps) <= limit else Entry(arm, row, size, scaled, False)

    def seeds(self, arm: Arm) -> list[int]:
        """The seeds of an arm, the first of which is that of the trials."""
        headline = self.arguments.headline_seeds if arm.host == "llama" else None
        return [self.arguments.first_seed + number for number in range(headline or self.arguments.seeds)]

    def run(self, entry: Entry, rate: float, seed: int) -> RunArguments:
        """The settings of one run."""
        shared = {name: getattr(self.arguments, name) for name in _SHARED}
        shared["max_steps"] = entry.steps
        return RunArguments(
            **shared,
            output_dir=str(self.folder / entry.arm.name / f"equal-{entry.run_row}" / f"lr{rate:g}-seed{seed}"),
            data_dir=str(self.folder / "data"),
            data_digest=self.digest,
            arm=entry.arm.name,
            width=entry.size.width,
            learning_rate=rate,
            new_module_learning_rate=rate,
            spline_learning_rate=rate * self.arguments.function_learning_rate_ratio,
            seed=seed,
            resume=True,
            disable_tqdm=True,
        )

    def trials(self, arm: Arm) -> list[RunArguments]:
        """The runs that choose the arm's learning rate, lowest rate first."""
        return [self.run(self.entries[arm.name, "params"], rate, self.arguments.first_seed) for rate in self.rates]

    def number_of_runs(self) -> int:
        """All runs, those that are finished included."""
        further = sum(len(self.seeds(entry.arm)) - (entry.row == "params") for entry in self.entries.values() if not entry.reuses)
        return len(self.arms) * len(self.rates) + further

    def __str__(self) -> str:
        header = ("host", "arm", "row", "h", "FFN params", "over", "model params", "FLOP/token", "over", "steps", "runs")
        rows = [self._line(entry) for entry in self.entries.values()]
        settings, tokens = self.arguments, self.arguments.max_steps * self.arguments.per_device_train_batch_size * self.arguments.max_length
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        unknown = " (equal time is planned after its measurement)" if "time" in self.rows and self.times is None else ""
        return "\n".join(
            [
                table(header, rows, right=range(3, 11)),
                f"{self.number_of_runs()} runs{unknown}: learning rates {rates} with seed {settings.first_seed}, then {settings.seeds} seeds"
                + (f", {settings.headline_seeds} of host llama" if settings.headline_seeds else ""),
                f"{tokens:,} tokens per run ({settings.max_steps} steps of {settings.per_device_train_batch_size} x {settings.max_length}), "
                f"vocabulary of {self.vocab_size:,}, {settings.num_hidden_layers} layers of d={settings.hidden_size}",
            ]
        )

    def _line(self, entry: Entry) -> tuple[str, ...]:
        size, base = entry.size, self.baselines[entry.arm.baseline]
        count = 0 if entry.reuses else len(self.seeds(entry.arm)) + (len(self.rates) - 1 if entry.row == "params" else 0)
        return (
            entry.arm.host,
            entry.arm.name,
            f"equal {entry.row}",
            str(size.width),
            f"{size.parameters:,}",
            f"{size.parameters / base.parameters:.4f}",
            f"{size.model_parameters:,}",
            f"{size.flops:,}",
            f"{size.flops / base.flops:.4f}",
            str(entry.steps),
            "reused" if entry.reuses else str(count),
        )


def walk(plan: Plan) -> Iterator[Entry]:
    """The entries that have runs of their own, the most wanted first: row by row, and the gated arms first."""
    for row in plan.rows:
        yield from (entry for entry in plan.entries.values() if entry.row == row and not entry.reuses)


def _rates(arguments: PretrainArguments) -> list[float]:
    try:
        rates = sorted({float(rate) for rate in arguments.learning_rates})
    except (TypeError, ValueError):
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError("choose the learning rates", got=repr(arguments.learning_rates), expected="a list of numbers > 0")
    return rates
