"""The penalty on learned functions, and their numbers, for users of transformers' own Trainer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from kanformer.conversion.regularize import Penalty, check_weights, regularize
from kanformer.errors import ConfigError, NoFeedForwardError
from kanformer.layers.density import OUTSIDE_LIMIT, warn_outside
from kanformer.layers.magnitudes import NODES
from kanformer.surgery.grids import outside_fractions
from kanformer.training.function_numbers import FunctionNumbers, coefficient_norms, functions_of
from kanformer.training.trainer_loss import loss_of, micro_batches, with_loss


class KANCallback(TrainerCallback):
    """Adds `kanformer.regularize`'s penalty to what transformers' Trainer minimises, and logs how the learned functions are doing:

        Trainer(model, args, callbacks=[KANCallback(l1=1e-6, entropy=1e-3)], ...)    # or, after it was made:
        KANCallback(l1=1e-6, entropy=1e-3).install(trainer)

    How the penalty gets in. A callback is never shown its Trainer, but it is shown the model: a forward hook, there from the begin of an
    optimizer step to the optimizer and not in evaluation, adds to `outputs.loss` a term whose value is 0 and whose gradient is the
    penalty's. So Trainer subclasses nothing, accelerate wraps what it likes (autocast, DistributedDataParallel, the scaler of fp16), and
    the loss that is logged stays the task's own, to be compared with runs without a penalty. Every micro-batch of a step counts the same,
    whatever Trainer scales its loss by: a step's penalty is the mean of theirs, as in `sum((loss + penalty()) / k for each of k micro-batches)`.
    A loss that is not the model's (`label_smoothing_factor`, `compute_loss_func`, your own `compute_loss`) never meets that hook: this is an
    error that says so, and `install` is the way, which adds the penalty where Trainer calls `accelerator.backward`, and moves the callback
    before those of `report_to`, which otherwise are told a line before the numbers are in it.

    What is logged, with the next line that has a loss: of the first micro-batch of every `report_steps`-th step (on each process its own)
    `kan_spline_share` (mean over layers of sum |spline part| / (that + sum |base part|), bias apart), `kan_l1`, `kan_entropy`, `kan_smoothness`
    (without their weights; whether or not they have any), `kan_penalty` (with them); `kan_outside_max` and, by layer, `kan_outside/PATH`, the
    fraction of its values beyond the grid; `kan_coef_norm` and `kan_coef_grad_norm`, 2-norms over all coefficients before the step, gradients
    as the optimizer gets them (averaged, clipped). Above 5 % outside one warning is given. Dropout is on in these passes; `outside_data`, run
    in eval mode, is looked at for the fractions instead.

    Nothing of it is state: a run that goes on from a checkpoint with an equal callback ends where the straight run ends.

    Args:
        l1, entropy, smoothness, nodes, through_inputs: see `kanformer.regularize`. All weights 0: the numbers only.
        report_steps: steps between reports; None means `logging_steps`.
        outside_data: batches as for `kanformer.outside_fractions`, of which a report says how many values lie outside.
        per_layer: whether `kan_outside/PATH` is logged; it is in `outside` anyway.

    Attributes:
        outside: of the last report, the fraction of values outside the grid by layer.

    Raises:
        ConfigError: a weight that is negative or not finite, `report_steps` below 1.
    """

    def __init__(
        self,
        *,
        l1: float = 0.0,
        entropy: float = 0.0,
        smoothness: float = 0.0,
        nodes: int | None = NODES,
        through_inputs: bool = True,
        report_steps: int | None = None,
        outside_data: Iterable[Mapping[str, Any]] | None = None,
        per_layer: bool = True,
    ) -> None:
        if report_steps is not None and report_steps < 1:
            raise ConfigError("make a KANCallback", subject="report_steps", got=report_steps, expected="None or at least 1")
        self.weights = {"l1": l1, "entropy": entropy, "smoothness": smoothness}
        self.options: dict[str, Any] = {"nodes": nodes}
        self.through_inputs, self.report_steps, self.per_layer = through_inputs, report_steps, per_layer
        self.outside_data = list(outside_data) if outside_data is not None and not isinstance(outside_data, Mapping) else outside_data
        self.outside: dict[str, float] = {}
        self._installed = self._warned = self._due = False
        self._stack = contextlib.ExitStack()
        self._penalty: Penalty | None = None
        self._watch: FunctionNumbers | None = None
        self._numbers: dict[str, float] = {}
        self._added = self._reached = 0  # penalties that losses were given, and that backward passes came to
        check_weights(self.weights, nodes)

    def install(self, trainer: Any) -> KANCallback:
        """Gives the callback to a Trainer that is made already, for losses of every kind and for the trackers; returns itself."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        if not self._installed:
            backward = trainer.accelerator.backward

            def with_penalty(loss: Tensor, **options: Any) -> None:
                if self._penalty is not None:
                    loss = loss + self._penalty().to(loss.device) / trainer.current_gradient_accumulation_steps
                backward(loss, **options)

            trainer.accelerator.backward = with_penalty
        self._installed = True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.close()
        if not functions_of(model):
            raise NoFeedForwardError(
                "train with a KANCallback", subject=type(model).__name__, got="no learned functions", hint="Patch it first: kanformer.patch_model(model)."
            )
        if args.n_gpu > 1:
            raise ConfigError(
                "train with a KANCallback", got=f"{args.n_gpu} GPUs in one process", hint="Start one process per GPU: accelerate launch, torchrun."
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any) -> None:
        self.close()
        if any(self.weights.values()):
            self._penalty = self._stack.enter_context(regularize(model, **self.weights, **self.options, through_inputs=self.through_inputs))
        if (state.global_step + 1) % (self.report_steps or state.logging_steps) == 0 or (args.logging_first_step and not state.global_step):
            self._watch = FunctionNumbers(model, **self.options)
            self._stack.callback(self._watch.close)
        self._added = self._reached = 0
        share = 1 / micro_batches(args, state, train_dataloader)
        processes = args.world_size if args.average_tokens_across_devices else 1

        def after(module: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> Any:
            if self._watch is not None:
                self._numbers, self.outside = self._watch.take()
                self._watch, self._due = None, True
            if self._penalty is None or self._installed or not torch.is_grad_enabled():
                return None
            # A loss that is divided by the items of the whole step is summed over micro-batches, and multiplied by the number of processes that
            # average it; any other is divided by the number of micro-batches later.
            return self._with_penalty(output, share / processes if "num_items_in_batch" in named else 1.0)

        self._stack.callback(model.register_forward_hook(after, with_kwargs=True).remove)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.close()
        if self._added > self._reached:
            raise ConfigError(
                "add the penalty to the loss",
                got="a loss that is not the one that the model returns",
                hint="Give the callback to the trainer by KANCallback(...).install(trainer) instead of callbacks=[...].",
            )
        if self._due:
            self._due = False
            self._complete(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs and self._numbers:
            logs.update(self._numbers)
            state.log_history[-1].update(self._numbers)
            self._numbers = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Takes the hooks off the model, which an interrupted step leaves there."""
        self._stack.close()
        self._penalty = self._watch = None

    def _with_penalty(self, output: Any, share: float) -> Any:
        """The model's output with a loss of the same value, whose gradient is that of loss + share * penalty."""
        assert self._penalty is not None
        self._added += 1
        loss = loss_of(output)
        if loss is None:
            return output
        penalty = self._penalty()
        penalty.register_hook(self._count)
        return with_loss(output, loss + (share * (penalty - penalty.detach())).to(loss))

    def _count(self, grad: Tensor) -> None:
        self._reached += 1

    def _complete(self, model: nn.Module) -> None:
        """Adds to the numbers of a forward pass what is known when the gradients are, and those of `outside_data`."""
        if self.outside_data is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # ours comes once
                self.outside = outside_fractions(model, self.outside_data)
        worst = max(self.outside, key=self.outside.__getitem__)
        if self.outside[worst] > OUTSIDE_LIMIT and not self._warned:
            self._warned = True
            warn_outside(worst, self.outside[worst])
        self._numbers |= {
            "kan_penalty": sum(weight * self._numbers[f"kan_{name}"] for name, weight in self.weights.items()),
            "kan_coef_norm": coefficient_norms(model, lambda coef: coef),
            "kan_coef_grad_norm": coefficient_norms(model, lambda coef: coef.grad),
            "kan_outside_max": self.outside[worst],
        }
        if self.per_layer:
            self._numbers |= {f"kan_outside/{path}": fraction for path, fraction in self.outside.items()}
