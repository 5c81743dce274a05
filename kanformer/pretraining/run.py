"""One run of the grid: a fresh model of one arm, trained by the loop of the training scripts."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import kanformer
from kanformer.ops import use_backend
from kanformer.pretraining.arms import ARMS, make_model
from kanformer.pretraining.memory import peak_bytes, reset_peak
from kanformer.pretraining.settings import RunArguments
from kanformer.pretraining.task import PretrainTask
from kanformer.pretraining.text import load_data
from kanformer.surgery.folders import replace_file
from kanformer.surgery.saving.loading import load_model
from kanformer.training.checkpoint import RESULTS
from kanformer.training.loop import Trainer
from kanformer.training.start import start_run


def pretrain_run(arguments: RunArguments) -> dict[str, Any]:
    """Trains as the settings say, from the newest checkpoint if there is one and `resume` is set.

    Returns:
        The results, which all_results.json in `output_dir` gets too: those of the loop, `peak_memory_bytes` and the versions.

    Raises:
        TrainingDiverged: the loss or the weights are not finite.
    """
    reset_peak()
    start, checkpoint, accelerator = start_run(arguments)
    corpus = load_data(Path(arguments.data_dir))
    # The seed was set just now, so that the first weights depend on nothing but it and the arm.
    model = (
        load_model(str(checkpoint), "AutoModelForCausalLM")
        if checkpoint
        else make_model(ARMS[arguments.arm], arguments, arguments.width, len(corpus.tokenizer))
    )
    task = PretrainTask(model, corpus, arguments.max_length, arguments.eval_blocks, arguments.per_device_eval_batch_size)
    with use_backend(arguments.backend):
        results = Trainer(task, arguments, accelerator, start, checkpoint).train()
    versions = {"kanformer": kanformer.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    results |= {"peak_memory_bytes": peak_bytes(), "versions": versions}
    replace_file(Path(arguments.output_dir) / RESULTS, json.dumps(results, indent=2))
    return results
