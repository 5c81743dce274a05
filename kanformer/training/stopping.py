"""When a run ends before `max_steps`: evaluations that get no better, losses that got out of hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kanformer.errors import ConfigError, TrainingDiverged, did_you_mean
from kanformer.training.settings import LoopArguments

_MORE_IS_BETTER = ("accuracy", "precision", "recall", "f1", "spearman", "top1_agreement", "embedding_cosine")


class Stopping:
    """Keeps the best evaluation and counts those since that were no better, as transformers' `EarlyStoppingCallback` does.

    Args:
        arguments: `metric_for_best_model`, `greater_is_better`, `early_stopping_*`, `loss_watchdog_*`.
        metrics: what the evaluations measure; the first where `metric_for_best_model` names none.

    Attributes:
        best, best_step: the best value so far (None before the first evaluation) and its step (0).
        waited: evaluations in a row that were not better than the best by more than the threshold.
        above: steps in a row whose loss lay above the watchdog's threshold.

    Raises:
        ConfigError: `metric_for_best_model` is not measured.
    """

    def __init__(self, arguments: LoopArguments, metrics: Sequence[str]) -> None:
        self.arguments = arguments
        self.metric = (arguments.metric_for_best_model or metrics[0]).removeprefix("eval_")
        if self.metric not in metrics:
            raise ConfigError("start training", subject="metric_for_best_model", got=repr(self.metric), hint=did_you_mean(self.metric, metrics))
        self.sign = 1 if (self.metric in _MORE_IS_BETTER if arguments.greater_is_better is None else arguments.greater_is_better) else -1
        self.best: float | None = None
        self.best_step = self.waited = self.above = 0

    def see(self, step: int, metrics: dict[str, float]) -> bool:
        """Takes an evaluation in; whether it is the best so far."""
        value = metrics[self.metric]
        gain = math.inf if self.best is None else self.sign * (value - self.best)
        self.waited = 0 if gain > self.arguments.early_stopping_threshold else self.waited + 1
        if gain > 0:
            self.best, self.best_step = value, step
        return gain > 0

    @property
    def stop(self) -> bool:
        """Whether patience is at its end."""
        patience = self.arguments.early_stopping_patience
        return patience is not None and self.waited >= patience

    def watch(self, step: int, loss: float) -> None:
        """Takes the mean loss of a step in.

        Raises:
            TrainingDiverged: `loss_watchdog_patience` steps in a row lay above `loss_watchdog_threshold`.
        """
        limit, patience = self.arguments.loss_watchdog_threshold, self.arguments.loss_watchdog_patience
        self.above = self.above + 1 if limit is not None and loss > limit else 0
        if self.above and self.above >= patience:
            raise diverged(f"a loss above {limit:g} in {patience} steps in a row, {loss:.4g} in step {step}")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run stops where the straight one does."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited, "above": self.above}

    def load(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.waited, self.above = (state[name] for name in ("best", "best_step", "waited", "above"))


def diverged(got: str) -> TrainingDiverged:
    """The error that ends a run with exit code 3."""
    return TrainingDiverged("go on training", got=got, hint="Lower the learning rate; the checkpoints before this step stand.")
