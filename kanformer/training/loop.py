"""The training loop on accelerate: exact gradient accumulation, evaluations, early stopping, checkpoints, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kanformer.conversion.regularize import regularize
from kanformer.errors import CheckpointError
from kanformer.ops.spread import is_sharded
from kanformer.surgery.folders import reason, replace_file, write_folder
from kanformer.surgery.saving.hub import save_pretrained
from kanformer.surgery.saving.loading import load_model
from kanformer.training.arguments import to_yaml
from kanformer.training.checkpoint import RESULTS, drop_old
from kanformer.training.data import micro_batches
from kanformer.training.distribution import check_same_start, is_deepspeed, ready_to_wrap
from kanformer.training.journal import Journal, Window
from kanformer.training.models import is_patched
from kanformer.training.optimizer import learning_rate_factor, make_optimizer
from kanformer.training.settings import LoopArguments
from kanformer.training.sharding import (
    all_finite,
    any_sharded,
    full_optimizer_state,
    full_state_dict,
    load_full_optimizer_state,
    load_full_state_dict,
    reshard,
    settle_root,
)
from kanformer.training.steps import examples_per_step, with_steps
from kanformer.training.stopping import Stopping, diverged
from kanformer.training.task import Task
from kanformer.training.trackers import start_trackers


class Trainer:
    """Runs a `Task` for `max_steps` or until it gets no better, from the newest complete checkpoint when asked to resume."""

    def __init__(self, task: Task, arguments: LoopArguments, accelerator: Any, start_step: int = 0, checkpoint: Path | None = None) -> None:
        group = examples_per_step(arguments, accelerator.num_processes)
        arguments = with_steps(arguments, task.examples, group)
        self.task, self.arguments, self.accelerator = task, arguments, accelerator
        self.output_dir = Path(arguments.output_dir)
        self.step, self.tokens = start_step, 0
        optimizer = make_optimizer(task.module, arguments)
        check_same_start(task.module)
        ready_to_wrap(accelerator, task.module, task.model, arguments)
        self.module, self.optimizer = accelerator.prepare(task.module, optimizer)
        settle_root(self.module)
        self.order, self.group = task.order(arguments, group), group
        self.results: dict[str, Any] = {}
        self.journal, self.window = Journal(self.output_dir, accelerator), Window()
        self.stopping = Stopping(arguments, task.metrics)
        self.evaluated: tuple[int, dict[str, float]] | None = None  # the step and metrics of the last evaluation
        if checkpoint is not None:
            self._load(checkpoint)

    def train(self) -> dict[str, Any]:
        """Trains, evaluates, saves the final model into `output_dir` and returns the results.

        Raises:
            TrainingDiverged: the loss is not finite, or beyond the watchdog's limit; checkpoints before that stand.
        """
        if self.accelerator.is_main_process:
            replace_file(self.output_dir / "config.yaml", to_yaml(self.arguments))
            self.journal.cut(self.step, self._finished())
        start_trackers(self.accelerator, self.arguments, self.step)
        started, begun = time.time(), self.step
        if self.arguments.eval_on_start and not begun:
            self._evaluate()
        self._run_steps()
        self._check_weights()
        seconds = time.time() - started
        final = self._final_metrics()
        self.results = {**final, "steps": self.step, "tokens": self.tokens, "train_seconds": round(seconds, 3), "steps_this_run": self.step - begun}
        if self.arguments.early_stopping_patience or self.arguments.load_best_model_at_end:
            self.results |= {"best_step": self.stopping.best_step, f"best_{self.stopping.metric}": self.stopping.best}
        self._finish()
        return self.results

    def _finished(self) -> bool:
        return self.step >= self.arguments.max_steps or self.stopping.stop

    def _run_steps(self) -> None:
        from tqdm.auto import tqdm

        arguments = self.arguments
        with tqdm(
            total=arguments.max_steps,
            initial=self.step,
            unit="step",
            desc=str(self.output_dir)[-24:],
            position=arguments.progress_position,
            disable=arguments.disable_tqdm or not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=0.5,
        ) as bar:
            while not self._finished():
                loss, metrics, count, tokens = self._optimize()
                self.window.add(loss, metrics, count, tokens)
                self.tokens += tokens
                self.step += 1
                self.stopping.watch(self.step, loss / count)
                bar.update(1)
                bar.set_postfix(loss=f"{loss / count:.4g}", tok_s=f"{self.window.tokens_per_second():,.0f}")
                self._write_down()

    def _write_down(self) -> None:
        """What is due after this step: a line of metrics, an evaluation, a checkpoint."""
        arguments, best = self.arguments, False
        if self.step % arguments.logging_steps == 0 or self.step == arguments.max_steps:
            self._write_window()
        if arguments.eval_steps and self.step % arguments.eval_steps == 0 and self.step < arguments.max_steps:
            best = self.stopping.see(self.step, self._evaluate())
            if self.stopping.stop and self.window.count:
                self._write_window()
        due = arguments.save_steps and self.step % arguments.save_steps == 0 and not self.stopping.above
        if due or (best and arguments.load_best_model_at_end):
            self._check_weights()
            self._save()

    def _write_window(self) -> None:
        self.journal.write(self.step, {**self.window.summary(), "learning_rate": self.optimizer.param_groups[-1]["lr"], "tokens": self.tokens})
        self.window = Window()

    def _final_metrics(self) -> dict[str, float]:
        """Held-out metrics of the weights that are saved: the last ones, or the best if asked for."""
        if self.evaluated is None or self.evaluated[0] != self.step:
            self.stopping.see(self.step, self._evaluate())
        assert self.evaluated is not None
        best = self.stopping.best_step
        if self.arguments.load_best_model_at_end and best not in (0, self.step):
            self._load_best(self.output_dir / f"checkpoint-{best}")
            return {f"eval_{name}": value for name, value in self._measure().items()}
        return {f"eval_{name}": value for name, value in self.evaluated[1].items()}

    def _load_best(self, checkpoint: Path) -> None:
        loaded = load_model(str(checkpoint), type(self.task.model).__name__)
        load_full_state_dict(self.task.model, loaded.state_dict())

    def _optimize(self) -> tuple[float, dict[str, float], float, int]:
        """One optimizer step. Returns (summed loss, summed metrics, items, tokens) over all processes."""
        arguments, accelerator = self.arguments, self.accelerator
        self.module.train()
        indices = micro_batches(
            self.order,
            self.step,
            accelerator.process_index,
            accelerator.num_processes,
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
        )
        batches = [{key: value.to(accelerator.device) for key, value in self.task.batch(chosen).items()} for chosen in indices]
        counts = torch.stack([self.task.items(batch).double().to(accelerator.device) for batch in batches])
        total = accelerator.reduce(counts.sum(), "sum")
        factor = learning_rate_factor(self.step, arguments)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        sums: Tensor | None = None
        names: list[str] = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            if is_deepspeed(accelerator):
                accelerator.sync_gradients = last  # it takes its step within the last backward pass
            with contextlib.nullcontext() if last else accelerator.no_sync(self.module):
                objective, loss, metrics = self._objective(batch, counts[number])
                # DDP, FSDP and DeepSpeed average gradients over processes, so each adds its share of the global mean times their number.
                accelerator.backward(objective * (accelerator.num_processes / total).to(loss.dtype))
            names = ["loss", *metrics]
            values = torch.stack([loss.detach().double(), *(metric.detach().double() for metric in metrics.values())])
            sums = values if sums is None else sums + values
        assert sums is not None
        tokens = torch.tensor(sum(_tokens(batch) for batch in batches), dtype=torch.float64, device=accelerator.device)
        reduced = accelerator.reduce(torch.cat([sums, tokens.view(1)]), "sum").tolist()
        norm = _number(accelerator.clip_grad_norm_(self.module.parameters(), arguments.max_grad_norm or math.inf))
        # A gradient scaler (fp16) leaves out steps whose gradient overflows, so there that is no failure.
        if not math.isfinite(reduced[0]) or not (accelerator.scaler or math.isfinite(norm)):
            raise diverged(f"loss {reduced[0]} and gradient norm {norm} in step {self.step + 1}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return reduced[0], dict(zip(names[1:], reduced[1:-1], strict=True)), float(total), int(reduced[-1])

    def _objective(self, batch: dict[str, Tensor], items: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(what is minimised, its summed loss, summed metrics): the penalty on the functions counts once per item, to be averaged as the loss is."""
        arguments = self.arguments
        l1, entropy, smoothness = arguments.kan_l1, arguments.kan_entropy, arguments.kan_smoothness
        if not (l1 or entropy or smoothness):
            loss, metrics = self.module(batch)
            return loss, loss, metrics
        with regularize(self.task.module, l1=l1, entropy=entropy, smoothness=smoothness) as penalty:
            loss, metrics = self.module(batch)
            objective = loss + penalty() * items.to(loss.dtype)
        return objective, loss, {**metrics, **{f"kan_{name}": value * items for name, value in penalty.values.items()}}

    def _evaluate(self) -> dict[str, float]:
        """Held-out metrics, and a line of them."""
        metrics = self._measure()
        self.journal.write(self.step, {f"eval_{name}": value for name, value in metrics.items()})
        self.evaluated = (self.step, metrics)
        return metrics

    def _measure(self) -> dict[str, float]:
        self.module.eval()
        with torch.no_grad():
            metrics = self.task.evaluate()
        reshard(self.module)
        self.accelerator.wait_for_everyone()
        if not all(math.isfinite(value) for value in metrics.values()):
            raise diverged(f"{metrics} on held-out text after step {self.step}")
        return metrics

    def _check_weights(self) -> None:
        """Before weights are written: the last step may have ruined them."""
        if not all_finite(self.module.parameters()):
            raise diverged(f"weights that are not finite after step {self.step}")

    def _save(self) -> None:
        """A complete checkpoint of model, optimizer, what decides when to stop, and every process' random state."""
        states, main = self._gather_random_states(), self.accelerator.is_main_process
        weights, optimizer = self._weights(), full_optimizer_state(self.optimizer, main)
        if main:
            info = {"step": self.step, "tokens": self.tokens, "arguments": dataclasses.asdict(self.arguments)}
            state = {"optimizer": optimizer, "random": states, "window": self.window.state(), "stopping": self.stopping.state()}
            if self.task.stream is not None:
                state["stream"] = {"group": self.group, **self.task.stream.state()}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()

            def fill(folder: Path) -> None:
                self._save_model(folder, weights)
                torch.save(state, folder / "training_state.pt")

            write_folder(self.output_dir / f"checkpoint-{self.step}", fill, info)
            drop_old(self.output_dir, self.arguments.save_total_limit, self.stopping.best_step if self.arguments.load_best_model_at_end else None)
        self.accelerator.wait_for_everyone()

    def _weights(self) -> dict[str, Any] | None:
        """The whole weights on the main process (elsewhere nothing) where they are spread over processes; None where the model has them."""
        model, main = self.task.model, self.accelerator.is_main_process
        if is_deepspeed(self.accelerator):
            prefix = next(f"{path}." if path else "" for path, module in self.task.module.named_modules() if module is model)
            gathered = self.accelerator.get_state_dict(self.module) or {}  # ZeRO 3 gives them to the main process only
            return {name.removeprefix(prefix): tensor for name, tensor in gathered.items() if name.startswith(prefix)}
        return full_state_dict(model, main) if any_sharded(model.parameters()) else None

    def _gather_random_states(self) -> list[list[Tensor]]:
        from accelerate.utils import gather_object

        device = self.accelerator.device
        return gather_object([[torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]])

    def _load(self, checkpoint: Path) -> None:
        try:
            # Of spread states each process reads its own part only.
            state = torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True, mmap=any_sharded(self.module.parameters()))
            load_full_optimizer_state(self.optimizer, state["optimizer"])
            self.tokens = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["tokens"]
            self.window.sums, self.window.count = state["window"]
            self.stopping.load(state.get("stopping") or self.stopping.state())  # version 0.2 had none
            if self.accelerator.scaler is not None and "scaler" in state:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                "go on from the checkpoint", subject=checkpoint, got=reason(error), hint="Delete that folder to go on from the checkpoint before it."
            ) from error
        self._load_stream(state.get("stream"), checkpoint)
        best = self.output_dir / f"checkpoint-{self.stopping.best_step}"
        if self.arguments.load_best_model_at_end and self.stopping.best_step and not best.is_dir():
            raise CheckpointError(
                "go on from the checkpoint",
                subject=checkpoint,
                got=f"no {best.name}, whose model is the best so far",
                hint="Go on without --load_best_model_at_end.",
            )
        if len(state["random"]) == self.accelerator.num_processes:
            self._set_random_state(state["random"][self.accelerator.process_index])

    def _load_stream(self, state: dict[str, Any] | None, checkpoint: Path) -> None:
        """Lets a stream go on where it was; it counts in examples, so steps must hold as many as before."""
        if self.task.stream is None:
            return
        if state is None or state["group"] != self.group:
            before = "data that were not streamed" if state is None else f"{state['group']} examples per step"
            hint = "Keep streaming, and per_device_train_batch_size x gradient_accumulation_steps x processes, as they were."
            raise CheckpointError("go on from the checkpoint", subject=checkpoint, got=before, expected=f"a stream, {self.group} per step", hint=hint)
        self.task.stream.load(state)

    def _set_random_state(self, states: list[Tensor] | Tensor) -> None:
        host, *device = states if isinstance(states, list) else [states]  # up to version 0.2 the host's alone
        torch.set_rng_state(host)
        if device and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(device[0], self.accelerator.device)

    def _save_model(self, folder: Path, weights: dict[str, Any] | None) -> None:
        self.task.model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        self.task.tokenizer.save_pretrained(folder)

    def _save_final(self, folder: Path, weights: dict[str, Any] | None) -> None:
        card = self.output_dir / "model" / "README.md"
        if card.is_file():  # of a run that is finished a second time: somebody may have written into it
            shutil.copyfile(card, folder / card.name)
        if is_patched(self.task.model):
            save_pretrained(self.task.model, folder, tokenizer=self.task.tokenizer, base_model=self.task.base, state_dict=weights)
        else:  # a stock model, as the baseline of a comparison is
            self._save_model(folder, weights)

    def _finish(self) -> None:
        weights = self._weights()
        if self.accelerator.is_main_process:
            write_folder(self.output_dir / "model", lambda folder: self._save_final(folder, weights))
            replace_file(self.output_dir / RESULTS, json.dumps(self.results, indent=2))
        self.accelerator.wait_for_everyone()


def _tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch; images count as one each."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))


def _number(norm: Any) -> float:
    """A gradient norm, which FSDP gives spread over processes and DeepSpeed not before its first step."""
    return 0.0 if norm is None else float(norm.full_tensor() if is_sharded(norm) else norm)
