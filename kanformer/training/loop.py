"""The training loop on accelerate: exact gradient accumulation, metrics, checkpoints, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pickle
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.regularize import regularize
from kanformer.errors import CheckpointError, ConfigError, TrainingDiverged
from kanformer.surgery.hub import save_pretrained
from kanformer.surgery.loading import quiet_transformers
from kanformer.training.arguments import to_yaml
from kanformer.training.checkpoint import check_writable, complete_checkpoints, drop_old, reason, replace_file, write_folder
from kanformer.training.data import Order, micro_batches
from kanformer.training.optimizer import learning_rate_factor, make_optimizer
from kanformer.training.settings import LoopArguments

_RESULTS = "all_results.json"


def make_accelerator() -> Any:
    """accelerate's `Accelerator`; processes without a GPU each join over gloo, which accelerate does only when told to.

    Raises:
        ConfigError: several processes were started, but they do not know each other.
    """
    from accelerate import Accelerator

    world = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(cpu=True) if world > 1 and not torch.accelerator.is_available() else Accelerator()
    if accelerator.num_processes < world:
        raise ConfigError("start training", got=f"{world} processes, of which accelerate joined {accelerator.num_processes}", hint="Start one process.")
    return accelerator


class Task(ABC):
    """What is trained: a module whose forward gives a summed loss, its data and its evaluation."""

    module: nn.Module  # forward(batch) -> (loss summed over items, {name: summed metric})
    model: nn.Module  # what is saved
    tokenizer: Any
    base: str | None = None  # what was patched, or came from it: for the model card
    examples: int  # number of training examples
    lengths: list[int] | None = None  # their tokens, where grouping by length saves padding

    @abstractmethod
    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """The inputs of these training examples. Random choices depend on the global random state, which checkpoints carry."""

    @abstractmethod
    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """How many items (tokens or examples) the loss of this batch is summed over, a scalar."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the current weights; called on every process, same result on all."""


class Trainer:
    """Runs a `Task` for `max_steps`, from the newest complete checkpoint when asked to resume."""

    def __init__(self, task: Task, arguments: LoopArguments, accelerator: Any, start_step: int = 0, checkpoint: Path | None = None) -> None:
        self.task, self.arguments, self.accelerator = task, arguments, accelerator
        self.output_dir = Path(arguments.output_dir)
        self.step, self.tokens = start_step, 0
        optimizer = make_optimizer(task.module, arguments)
        self.module, self.optimizer = accelerator.prepare(task.module, optimizer)
        group = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
        self.order = Order(task.examples, arguments.seed, task.lengths, group)
        self.results: dict[str, Any] = {}
        self.window = _Window()
        if checkpoint is not None:
            self._load(checkpoint)

    def train(self) -> dict[str, Any]:
        """Trains, evaluates, saves the final model into `output_dir` and returns the results.

        Raises:
            TrainingDiverged: the loss is not finite; checkpoints before that stand.
        """
        from tqdm.auto import tqdm

        arguments, main = self.arguments, self.accelerator.is_main_process
        if main:
            replace_file(self.output_dir / "config.yaml", to_yaml(arguments))
            self._cut_metrics()
        started, begun = time.time(), self.step
        total = arguments.max_steps
        with tqdm(
            total=total,
            initial=begun,
            unit="step",
            desc=str(self.output_dir)[-24:],
            position=arguments.progress_position,
            disable=arguments.disable_tqdm or not main,
            dynamic_ncols=True,
            mininterval=0.5,
        ) as bar:
            while self.step < total:
                loss, metrics, count, tokens = self._optimize()
                self.window.add(loss, metrics, count, tokens)
                self.tokens += tokens
                self.step += 1
                bar.update(1)
                bar.set_postfix(loss=f"{loss / count:.4g}", tok_s=f"{self.window.tokens_per_second():,.0f}")
                self._write_down()
        self._check_weights()
        seconds = time.time() - started
        final = {f"eval_{name}": value for name, value in self._evaluate().items()}
        self._log(final)
        self.results = {**final, "steps": self.step, "tokens": self.tokens, "train_seconds": round(seconds, 3), "steps_this_run": self.step - begun}
        self._finish()
        return self.results

    def _write_down(self) -> None:
        """What is due after this step: a line of metrics, an evaluation, a checkpoint."""
        arguments = self.arguments
        if self.step % arguments.logging_steps == 0 or self.step == arguments.max_steps:
            self._log({**self.window.summary(), "learning_rate": self.optimizer.param_groups[-1]["lr"], "tokens": self.tokens})
            self.window = _Window()
        if arguments.eval_steps and self.step % arguments.eval_steps == 0 and self.step < arguments.max_steps:
            self._log({f"eval_{name}": value for name, value in self._evaluate().items()})
        if arguments.save_steps and self.step % arguments.save_steps == 0:
            self._check_weights()
            self._save()

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
        sums: Tensor | None = None
        names: list[str] = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.module):
                objective, loss, metrics = self._objective(batch, counts[number])
                # DDP averages gradients over processes, so each adds its share of the global mean times their number.
                accelerator.backward(objective * (accelerator.num_processes / total).to(loss.dtype))
            names = ["loss", *metrics]
            values = torch.stack([loss.detach().double(), *(metric.detach().double() for metric in metrics.values())])
            sums = values if sums is None else sums + values
        assert sums is not None
        tokens = torch.tensor(sum(_tokens(batch) for batch in batches), dtype=torch.float64, device=accelerator.device)
        reduced = accelerator.reduce(torch.cat([sums, tokens.view(1)]), "sum").tolist()
        norm = accelerator.clip_grad_norm_(self.module.parameters(), arguments.max_grad_norm or math.inf)
        # A gradient scaler (fp16) leaves out steps whose gradient overflows, so there that is no failure.
        if not math.isfinite(reduced[0]) or not (accelerator.scaler or math.isfinite(norm)):
            raise _diverged(f"loss {reduced[0]} and gradient norm {float(norm)} in step {self.step + 1}")
        factor = learning_rate_factor(self.step, arguments)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
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
        self.module.eval()
        with torch.no_grad():
            metrics = self.task.evaluate()
        self.accelerator.wait_for_everyone()
        if not all(math.isfinite(value) for value in metrics.values()):
            raise _diverged(f"{metrics} on held-out text after step {self.step}")
        return metrics

    def _check_weights(self) -> None:
        """Before weights are written: the last step may have ruined them."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.module.parameters()):
            raise _diverged(f"weights that are not finite after step {self.step}")

    def _log(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            path = self.output_dir / "metrics.jsonl"
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": self.step, **values}) + "\n")
            except OSError as error:
                raise CheckpointError("write the metrics", subject=path, got=reason(error), hint="Free some space and go on by --resume.") from error

    def _cut_metrics(self) -> None:
        """After a resume the lines of steps that will run again are dropped, so that the file is one curve."""
        path = self.output_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.step]
        if self.step >= self.arguments.max_steps:  # a finished run is evaluated again
            kept = [line for line in kept if _step_of(line) < self.step or "eval_" not in line]
        replace_file(path, "".join(line + "\n" for line in kept))

    def _save(self) -> None:
        """A complete checkpoint of model, optimizer and every process' random state."""
        states = self._gather_random_states()
        if self.accelerator.is_main_process:
            info = {"step": self.step, "tokens": self.tokens, "arguments": dataclasses.asdict(self.arguments)}

            def fill(folder: Path) -> None:
                self._save_model(folder)
                torch.save({"optimizer": self.optimizer.state_dict(), "random": states, "window": self.window.state()}, folder / "training_state.pt")

            write_folder(self.output_dir / f"checkpoint-{self.step}", fill, info)
            drop_old(self.output_dir, self.arguments.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _gather_random_states(self) -> list[Tensor]:
        from accelerate.utils import gather_object

        return gather_object([torch.get_rng_state()])

    def _load(self, checkpoint: Path) -> None:
        try:
            state = torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.tokens = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["tokens"]
            self.window.sums, self.window.count = state["window"]
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                "go on from the checkpoint", subject=checkpoint, got=reason(error), hint="Delete that folder to go on from the checkpoint before it."
            ) from error
        if len(state["random"]) == self.accelerator.num_processes:
            torch.set_rng_state(state["random"][self.accelerator.process_index])

    def _save_model(self, folder: Path) -> None:
        self.task.model.save_pretrained(folder)  # type: ignore[operator]
        self.task.tokenizer.save_pretrained(folder)

    def _save_final(self, folder: Path) -> None:
        card = self.output_dir / "model" / "README.md"
        if card.is_file():  # of a run that is finished a second time: somebody may have written into it
            shutil.copyfile(card, folder / card.name)
        save_pretrained(self.task.model, folder, tokenizer=self.task.tokenizer, base_model=self.task.base)

    def _finish(self) -> None:
        if self.accelerator.is_main_process:
            write_folder(self.output_dir / "model", self._save_final)
            replace_file(self.output_dir / _RESULTS, json.dumps(self.results, indent=2))
        self.accelerator.wait_for_everyone()


def start_run(arguments: LoopArguments) -> tuple[int, Path | None, Any]:
    """(first step, checkpoint to go on from, accelerator) of a run whose settings are good; see `prepare_output` and `make_accelerator`."""
    from accelerate.utils import set_seed

    start, checkpoint = prepare_output(arguments)
    accelerator = make_accelerator()
    set_seed(arguments.seed)
    quiet_transformers()
    return start, checkpoint, accelerator


def prepare_output(arguments: LoopArguments) -> tuple[int, Path | None]:
    """(first step, checkpoint to go on from) for an output folder.

    Raises:
        ConfigError: no output_dir, or one that holds another run while `resume` is off.
        CheckpointError: the folder cannot be written.
    """
    if not arguments.output_dir:
        raise ConfigError("start training", got="no output_dir", hint="Give a folder: --output_dir runs/mine.")
    folder = Path(arguments.output_dir)
    check_writable(folder)
    checkpoints = complete_checkpoints(folder)
    if arguments.resume:
        return checkpoints[-1] if checkpoints else (0, None)
    if checkpoints or (folder / _RESULTS).exists():
        raise ConfigError(
            "start training",
            subject=f"output_dir={folder}",
            got="a folder that holds another run",
            hint="Go on with it by --resume, or choose another output_dir.",
        )
    return 0, None


class _Window:
    """Means since the last line of metrics."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count, self.tokens, self.started = 0.0, 0, time.time()

    def add(self, loss: float, metrics: dict[str, float], count: float, tokens: int) -> None:
        for name, value in {"loss": loss, **metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count, self.tokens = self.count + count, self.tokens + tokens

    def state(self) -> tuple[dict[str, float], float]:
        """What a checkpoint keeps, so that the next line is the same after a resume; the speed is measured anew."""
        return self.sums, self.count

    def tokens_per_second(self) -> float:
        return self.tokens / max(time.time() - self.started, 1e-9)

    def summary(self) -> dict[str, float]:
        return {**{name: value / self.count for name, value in self.sums.items()}, "tokens_per_second": round(self.tokens_per_second(), 1)}


def _diverged(got: str) -> TrainingDiverged:
    return TrainingDiverged("go on training", got=got, hint="Lower the learning rate; the checkpoints before this step stand.")


def _tokens(batch: dict[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else next(iter(batch.values())).numel()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return 1 << 62  # a line cut by a crash
