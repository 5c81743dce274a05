"""How a run starts: an output folder that may be used, and accelerate's `Accelerator`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from kanformer.errors import ConfigError
from kanformer.surgery.folders import check_writable
from kanformer.surgery.saving.loading import quiet_transformers
from kanformer.training.checkpoint import RESULTS, complete_checkpoints
from kanformer.training.distribution import check_distribution
from kanformer.training.settings import LoopArguments
from kanformer.training.steps import with_steps
from kanformer.training.trackers import wanted_trackers


def start_run(arguments: LoopArguments) -> tuple[int, Path | None, Any]:
    """(first step, checkpoint to go on from, accelerator) of a run whose settings are good; see `prepare_output` and `make_accelerator`."""
    from accelerate.utils import set_seed

    check_evaluations(arguments)
    if arguments.num_train_epochs and getattr(arguments, "streaming", False):
        with_steps(arguments, None, 1)  # refuses: a stream has no length
    start, checkpoint = prepare_output(arguments)
    accelerator = make_accelerator(arguments)
    check_distribution(accelerator, arguments)
    set_seed(arguments.seed)
    quiet_transformers()
    return start, checkpoint, accelerator


def make_accelerator(arguments: LoopArguments | None = None) -> Any:
    """accelerate's `Accelerator` with the mixed precision and trackers that the settings name, else those of `accelerate launch`.

    Processes without a GPU each join over gloo, which accelerate does only when told to.

    Raises:
        ConfigError: several processes were started, but they do not know each other; a precision that this machine does not have,
            or a tracker that is not installed.
    """
    from accelerate import Accelerator

    arguments = arguments or LoopArguments()
    if arguments.bf16 and arguments.fp16:
        raise ConfigError("start training", got="bf16 and fp16", expected="at most one of them")
    options: dict[str, Any] = {"mixed_precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else None}
    trackers = wanted_trackers(arguments.report_to)
    if trackers:
        options.update(log_with=trackers, project_dir=arguments.output_dir)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.accelerator.is_available():
        options["cpu"] = True
    try:
        accelerator = Accelerator(**options)
    except (ValueError, ImportError) as error:  # ImportError: DeepSpeed is wanted and not installed
        raise ConfigError("start training", got=" ".join(str(error).split())) from error
    if accelerator.num_processes < world:
        raise ConfigError("start training", got=f"{world} processes, of which accelerate joined {accelerator.num_processes}", hint="Start one process.")
    return accelerator


def check_evaluations(arguments: LoopArguments) -> None:
    """Refuses settings that compare evaluations where there are none to compare.

    Raises:
        ConfigError: early stopping or the best model without `eval_steps`.
    """
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(arguments, name) and not arguments.eval_steps:
            raise ConfigError("start training", subject=name, got="no evaluations on the way", hint="Set --eval_steps.")


def prepare_output(arguments: LoopArguments) -> tuple[int, Path | None]:
    """(first step, checkpoint to go on from) for an output folder.

    Raises:
        ConfigError: no output_dir, or one that holds another run while `resume` is off.
        CheckpointError: the folder cannot be written.
    """
    if not arguments.output_dir:
        raise ConfigError("start training", got="no output_dir", hint="Give a folder: --output_dir runs/mine.")
    folder = Path(arguments.output_dir)
    check_writable(folder)  # made later: bad input leaves nothing behind
    checkpoints = complete_checkpoints(folder)
    if arguments.resume:
        return checkpoints[-1] if checkpoints else (0, None)
    if checkpoints or (folder / RESULTS).exists():
        raise ConfigError(
            "start training",
            subject=f"output_dir={folder}",
            got="a folder that holds another run",
            hint="Go on with it by --resume, or choose another output_dir.",
        )
    return 0, None
