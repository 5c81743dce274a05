"""Fitting a network to samples, by L-BFGS or Levenberg-Marquardt on all of them or by Adam on batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kanformer.conversion.regularize import regularize
from kanformer.errors import ConfigError, DataError, TrainingDiverged, did_you_mean
from kanformer.network.data import Samples, samples_for
from kanformer.network.history import History
from kanformer.network.kan import KAN
from kanformer.network.least_squares import LevenbergMarquardt

OPTIMIZERS = ("lbfgs", "adam", "lm")
LOSSES = ("mse", "cross_entropy")
Metric = Callable[[Tensor, Tensor], Any]
_FALLBACK_RATE = 1e-3
_ADAM_RATE = 1e-2


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        optimizer: "lbfgs" (all samples, up to `inner_steps` iterations with strong Wolfe line search per step), "adam", or "lm"
            (Levenberg-Marquardt: small networks, squared errors, no regularisation; by far the most exact).
        steps: optimizer steps, >= 1.
        lr: learning rate; None: 1 for lbfgs, 1e-2 for adam.
        loss: "mse", "cross_entropy" (y are class numbers), or a function of (outputs, targets) that gives a scalar.
        regularization: weight of l1 * |Phi|_1 + entropy * S(Phi), arXiv 2404.19756 equation 2.20.
        l1, entropy: its parts.
        grid_update: how many times the grids move onto the data, evenly over `stop_grid_update` of the steps, the first before step 1; 0: never.
        stop_grid_update: fraction of the steps after which grids stay. grid_eps: see `KANLinear.update_grid`.
        batch_size: for adam; None takes all samples. seed: of the batches' order.
        patience: steps without a better metric after which to stop; None: all steps.
        metrics: name and function of (outputs, targets), computed on the validation data, or the training data where there are none.
        inner_steps: iterations within one step of lbfgs.
        progress: show a bar.
    """

    optimizer: str = "lbfgs"
    steps: int = 50
    lr: float | None = None
    loss: str | Callable[[Tensor, Tensor], Tensor] = "mse"
    regularization: float = 0.0
    l1: float = 1.0
    entropy: float = 1.0
    grid_update: int = 5
    stop_grid_update: float = 0.5
    grid_eps: float = 0.02
    batch_size: int | None = None
    seed: int = 0
    patience: int | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    inner_steps: int = 20
    progress: bool = False

    def __post_init__(self) -> None:
        action = "fit a KAN"
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(action, got=f"optimizer={self.optimizer!r}", hint=did_you_mean(str(self.optimizer), OPTIMIZERS))
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise ConfigError(action, got=f"loss={self.loss!r}", hint=did_you_mean(self.loss, LOSSES))
        for name, least in (("steps", 1), ("grid_update", 0), ("inner_steps", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ConfigError(action, got=f"{name}={getattr(self, name)!r}", expected=f"an integer >= {least}")
        for name in ("batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(action, got=f"{name}={value!r}", expected="None or an integer >= 1")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(action, got=f"lr={self.lr}", expected="a positive number")
        if self.batch_size is not None and self.optimizer != "adam":
            expected = f"optimizer='adam': {self.optimizer} needs the same samples in every step"
            raise ConfigError(action, got=f"batch_size={self.batch_size} with {self.optimizer}", expected=expected)
        if self.optimizer == "lm" and (self.loss != "mse" or self.regularization or self.lr is not None):
            got = f"loss={self.loss!r}, regularization={self.regularization}, lr={self.lr} with lm"
            raise ConfigError(action, got=got, expected="loss='mse' alone: it solves least squares, and has no learning rate", hint="Use optimizer='lbfgs'.")
        if not (math.isfinite(self.regularization) and self.regularization >= 0):
            raise ConfigError(action, got=f"regularization={self.regularization}", expected="a finite number >= 0")


def fit(network: KAN, X: Any, y: Any, X_val: Any = None, y_val: Any = None, **settings: Any) -> History:
    """Trains `network` in place on X (n, inputs) and y (n, outputs) or (n,). Settings: `FitSettings`.

    The state with the best metric is kept: the error on the validation data, or, without any, what was minimised. Where L-BFGS
    diverges the best state comes back and Adam does the steps that are left; the history says so.

    Raises:
        ConfigError: an unknown setting or a bad value. ShapeError, DataError: see `samples_for`; a constant target.
        TrainingDiverged: both optimizers did; the network holds its best state.
    """
    known = list(FitSettings.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise ConfigError("fit a KAN", got=f"setting {name!r}", hint=did_you_mean(name, known))
    if (X_val is None) != (y_val is None):
        raise ConfigError("fit a KAN", got="one of X_val and y_val", expected="both or none")
    chosen = FitSettings(**settings)
    classes = chosen.loss == "cross_entropy"
    train = samples_for(network, X, y, classes=classes)
    held = None if X_val is None else samples_for(network, X_val, y_val, classes=classes, what="validation data")
    if bool((train.y == train.y[:1]).all()):
        raise DataError("fit a KAN", subject="y", got=f"the constant {train.y[0].tolist()} in all {len(train)} samples", expected="a target that varies")
    return _Fit(network, train, held, chosen, classes).run()


class _Fit:
    def __init__(self, network: KAN, train: Samples, held: Samples | None, settings: FitSettings, classes: bool) -> None:
        self.network, self.train, self.held, self.settings, self.classes = network, train, held, settings, classes
        self.loss = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}[settings.loss] if isinstance(settings.loss, str) else settings.loss
        self.error = "error_rate" if classes else "rmse"
        self.history = History(metric=f"val_{self.error}" if held is not None else "loss")
        self.best, self.best_state = math.inf, self._state()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.kind = settings.optimizer
        self.numbers: dict[str, float] = {}

    def run(self) -> History:
        training, bar = self.network.training, self._bar()
        self.network.train()
        try:
            self._steps(bar)
        finally:
            if self.history.rows:
                self.network.load_state_dict(self.best_state)
            self.network.train(training)
            bar.close()
        return self.history

    def _steps(self, bar: Any) -> None:
        optimizer: Any = self._optimizer()
        since_best = 0
        for step in range(1, self.settings.steps + 1):
            if self._moves_grids(step):
                self.network.update_grid(self.train.x, grid_eps=self.settings.grid_eps)
                optimizer = self._optimizer()
            if not self._step(optimizer):
                optimizer = self._recover(step)
                continue
            row = self._row(step)
            self.history.rows.append(row)
            bar.update()
            bar.set_postfix_str(f"{self.history.metric} {row[self.history.metric]:.3g}")
            if row[self.history.metric] < self.best:
                self.best, self.best_state, self.history.best_step, since_best = row[self.history.metric], self._state(), step, 0
            else:
                since_best += 1
            if self.settings.patience is not None and since_best >= self.settings.patience:
                self.history.stopped = "patience"
                return
            if self.kind != "adam" and self._stands_still(optimizer):
                self.history.stopped = "converged"
                return

    def _stands_still(self, optimizer: Any) -> bool:
        """Whether nothing changes any more, three steps of L-BFGS or one of Levenberg-Marquardt, and no grid will move."""
        rows = self.history.rows[-3:]
        still = not optimizer.moved if self.kind == "lm" else len(rows) == 3 and len({row["loss"] for row in rows}) == 1
        return still and not any(map(self._moves_grids, range(int(rows[-1]["step"]) + 1, self.settings.steps + 1)))

    def _step(self, optimizer: Any) -> bool:
        """One step; False where the loss or a parameter is no number any more."""
        if self.kind == "lm":
            self.numbers = {"loss": optimizer.step(), "penalty": 0.0}
        elif self.kind == "lbfgs":
            optimizer.step(lambda: self._backward(optimizer, self.train.x, self.train.y))
        else:
            for rows in self._batches():
                self._backward(optimizer, self.train.x[rows], self.train.y[rows])
                optimizer.step()
        return all(math.isfinite(value) for value in self.numbers.values()) and all(bool(p.isfinite().all()) for p in self.network.parameters())

    def _backward(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        weight = self.settings.regularization
        if not weight:
            total = loss = self.loss(self.network(x), y)
            penalty = torch.zeros(())
        else:
            with regularize(self.network, l1=self.settings.l1, entropy=self.settings.entropy) as watched:
                loss = self.loss(self.network(x), y)
            penalty = weight * watched()
            total = loss + penalty
        total.backward()
        self.numbers = {"loss": float(total.detach()), "penalty": float(penalty.detach())}
        return total

    def _batches(self) -> list[Tensor]:
        size = self.settings.batch_size
        if size is None or size >= len(self.train):
            return [torch.arange(len(self.train))]
        return [torch.randperm(len(self.train), generator=self.generator)[:size]]

    @torch.no_grad()
    def _row(self, step: int) -> dict[str, float]:
        outputs = self.network(self.train.x)
        row = {"step": float(step), **self.numbers, f"train_{self.error}": self._error(outputs, self.train.y)}
        if self.settings.batch_size is None:
            row["loss"] = float(self.loss(outputs, self.train.y)) + self.numbers["penalty"]
        samples = self.train
        if self.held is not None:
            outputs, samples = self.network(self.held.x), self.held
            row[f"val_{self.error}"] = self._error(outputs, samples.y)
        return row | {name: float(metric(outputs, samples.y)) for name, metric in self.settings.metrics.items()}

    def _error(self, outputs: Tensor, y: Tensor) -> float:
        if self.classes:
            return float((outputs.argmax(-1) != y).double().mean())
        return float((outputs - y).double().square().mean().sqrt())

    def _moves_grids(self, step: int) -> bool:
        if not self.settings.grid_update:
            return False
        last = max(1, int(self.settings.stop_grid_update * self.settings.steps))
        every = max(1, last // self.settings.grid_update)
        return step <= last and (step - 1) % every == 0 and (step - 1) // every < self.settings.grid_update

    def _optimizer(self) -> Any:
        if self.kind == "lm":
            return LevenbergMarquardt(self.network, self.train.x, self.train.y)
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if self.kind == "adam":
            rate = (self.settings.lr or _ADAM_RATE) if self.settings.optimizer == "adam" else _FALLBACK_RATE
            return torch.optim.Adam(parameters, lr=rate)
        return torch.optim.LBFGS(
            parameters, lr=self.settings.lr or 1.0, max_iter=self.settings.inner_steps, history_size=10,
            line_search_fn="strong_wolfe", tolerance_grad=1e-32, tolerance_change=1e-32,
        )  # fmt: skip

    def _recover(self, step: int) -> Any:
        """Back to the best state, and on with Adam."""
        self.network.load_state_dict(self.best_state)
        if self.kind == "adam":
            self.history.stopped = "diverged"
            raise TrainingDiverged(
                "fit a KAN", got=f"a loss that is no number in step {step}", expected="finite numbers",
                hint="The network holds its best state. Scale X and y to about 1, or lower lr.",
            )  # fmt: skip
        self.kind = "adam"
        name = {"lbfgs": "L-BFGS", "lm": "Levenberg-Marquardt"}[self.settings.optimizer]
        note = f"{name} diverged in step {step}; back to the best state, and on with Adam (lr {_FALLBACK_RATE:g})."
        self.history.notes.append(note)
        warnings.warn(note, stacklevel=6)
        return self._optimizer()

    def _state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    def _bar(self) -> Any:
        from tqdm.auto import tqdm

        return tqdm(total=self.settings.steps, desc="fit", disable=not self.settings.progress)
