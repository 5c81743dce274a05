"""What a step of each arm takes over a step of its baseline: measured in turns, so that all see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kanformer.ops import use_backend
from kanformer.pretraining.arms import ARMS, Arm, make_model
from kanformer.pretraining.settings import PretrainArguments
from kanformer.pretraining.task import PretrainTask
from kanformer.pretraining.text import Corpus, load_data
from kanformer.training.optimizer import make_optimizer

_WARM_UP = 3


def measure_times(arguments: PretrainArguments, data: Path, widths: dict[str, int]) -> dict[str, dict[str, float]]:
    """Times whole optimizer steps of the arms in `widths` (name -> hidden width), of one host, its baseline among them.

    Returns:
        name -> {"ms": median milliseconds of a step, "ratio": median over the rounds of its time over the baseline's in the same round}.
    """
    corpus, clock = load_data(data), step_clock(arguments.threads)
    arms = [ARMS[name] for name in widths]
    steps = {arm.name: _step(arm, arguments, widths[arm.name], corpus) for arm in arms}
    times: dict[str, list[float]] = {name: [] for name in steps}
    with use_backend(arguments.backend):
        for turn in range(arguments.time_rounds + _WARM_UP):
            for name in steps if turn % 2 else reversed(steps):
                started = clock()
                steps[name]()
                if turn >= _WARM_UP:
                    times[name].append(1e3 * (clock() - started))
    return ratios(times, arms[0].baseline)


def step_clock(threads: int) -> Callable[[], float]:
    """What steps are timed by: the wall clock; with one thread on a CPU the process' own time, which is the time on a free core on a busy machine too."""
    return time.process_time if threads == 1 and not torch.cuda.is_available() else time.perf_counter


def ratios(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Medians of each arm's milliseconds, and of what they are over the baseline's of the same round."""
    return {
        name: {"ms": statistics.median(found), "ratio": statistics.median(own / base for own, base in zip(found, times[baseline], strict=True))}
        for name, found in times.items()
    }


def _step(arm: Arm, arguments: PretrainArguments, width: int, corpus: Corpus) -> Callable[[], None]:
    """A call that does one optimizer step on the same blocks every time."""
    torch.manual_seed(arguments.first_seed)
    model = make_model(arm, arguments, width, len(corpus.tokenizer))
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    task = PretrainTask(model, corpus, arguments.max_length, 1, 1)
    optimizer = make_optimizer(task.module, learning_rate=1e-3, new_module_learning_rate=1e-3, weight_decay=arguments.weight_decay)
    indices = [index % task.examples for index in range(arguments.per_device_train_batch_size)]

    def step() -> None:
        batch = {key: value.to(next(model.parameters()).device) for key, value in task.batch(indices).items()}
        loss, _ = task.module(batch)
        (loss / batch["labels"].numel()).backward()
        torch.nn.utils.clip_grad_norm_(task.module.parameters(), arguments.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step
