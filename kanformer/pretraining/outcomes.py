"""What is known of a run from its folder: nothing yet, finished, or failed; and which runs that leaves to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kanformer.errors import CheckpointError, ConfigError
from kanformer.pretraining.arms import Arm
from kanformer.pretraining.plan import Entry, Plan, walk
from kanformer.pretraining.settings import RunArguments
from kanformer.surgery.folders import reason, replace_file
from kanformer.training.checkpoint import RESULTS

SETTINGS, FAILED = "run.json", "failed.json"
_PLACES = {"output_dir", "data_dir", "resume", "disable_tqdm", "progress_position"}  # say where and how to look on, not what is run


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        results: all_results.json; None if it failed.
        error: why it failed.
    """

    run: RunArguments
    results: dict[str, Any] | None
    error: str | None = None

    @property
    def loss(self) -> float | None:
        """Held-out cross-entropy in nats per token."""
        return None if self.results is None else self.results["eval_loss"]


def outcome(run: RunArguments) -> Outcome | None:
    """How the run ended, by its folder; None where it has not.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """
    folder = Path(run.output_dir)
    _check_same(run, folder)
    for name in (RESULTS, FAILED):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if name == FAILED:
            return Outcome(run, None, str(found.get("error")))
        if {"eval_loss", "peak_memory_bytes"} <= set(found):
            return Outcome(run, found)
    return None


def _check_same(run: RunArguments, folder: Path) -> None:
    """A result may only count for the settings that made it; one that did not exist yet had what is its default now."""
    path = folder / SETTINGS
    if not path.is_file():
        return
    wanted = dataclasses.asdict(run)
    try:
        found = {**dataclasses.asdict(RunArguments()), **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError("go on with the grid", subject=path, got=reason(error), hint="Delete its folder to run it again.") from error
    changed = [name for name in {**wanted, **found} if name not in _PLACES and found.get(name, "nothing") != wanted.get(name, "nothing")]
    if changed:
        raise ConfigError(
            "go on with the grid",
            subject=folder,
            got="a run with " + ", ".join(f"{name}={found.get(name, 'nothing')!r}" for name in changed),
            expected=", ".join(f"{name}={wanted.get(name, 'nothing')!r}" for name in changed),
            hint="Choose another output_dir, or delete that folder.",
        )


def begin(run: RunArguments) -> None:
    """Writes down what is run, before it is."""
    replace_file(Path(run.output_dir) / SETTINGS, json.dumps(dataclasses.asdict(run), indent=2))


def write_failure(run: RunArguments, error: str, diverged: bool) -> None:
    """Notes that a run failed. A divergence would come again, so it stands; other failures are tried again by the next grid."""
    replace_file(Path(run.output_dir) / FAILED, json.dumps({"error": error, "diverged": diverged}, indent=2))


def forget_failures(folder: Path) -> None:
    """Removes the notes on failures that need not come again."""
    for path in folder.glob(f"*/*/*/{FAILED}"):
        try:
            diverged = json.loads(path.read_text(encoding="utf-8")).get("diverged")
        except (OSError, json.JSONDecodeError):
            diverged = False
        if not diverged:
            path.unlink()


def best_rate(plan: Plan, arm: Arm) -> float | None:
    """The learning rate whose trial has the lowest held-out cross-entropy; None before all trials have ended, or where all failed."""
    ended = [outcome(run) for run in plan.trials(arm)]
    if any(each is None for each in ended):
        return None
    finished = [(each.loss, each.run.learning_rate) for each in ended if each is not None and each.loss is not None]
    return min(finished)[1] if finished else None


def edge(plan: Plan, rate: float) -> str | None:
    """ "lowest" or "highest" where the best rate is at the end of those that were tried, so that a better one may lie beyond."""
    if len(plan.rates) == 1:
        return "only"
    return {plan.rates[0]: "lowest", plan.rates[-1]: "highest"}.get(rate)


def wanted_runs(plan: Plan) -> Iterator[RunArguments]:
    """The runs that can be started now, the most wanted first.

    Host by host the trials and then the seeds at equal parameters of the arms whose trials have ended; after that the other rows.
    """
    for baseline in plan.baselines:
        for arm in plan.arms:
            if arm.baseline == baseline:
                yield from (run for run in plan.trials(arm) if outcome(run) is None)
        yield from _of_entries(plan, [entry for entry in walk(plan) if entry.row == "params" and entry.arm.baseline == baseline])
    yield from _of_entries(plan, [entry for entry in walk(plan) if entry.row != "params"])


def _of_entries(plan: Plan, entries: list[Entry]) -> Iterator[RunArguments]:
    for entry in entries:
        rate = best_rate(plan, entry.arm)
        runs = [] if rate is None else [plan.run(entry, rate, seed) for seed in plan.seeds(entry.arm)]
        yield from (run for run in runs if outcome(run) is None)
