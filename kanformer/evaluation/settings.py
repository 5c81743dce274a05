"""The settings of the evaluation; what it shares with the training scripts has their names."""

from __future__ import annotations

from dataclasses import dataclass

from kanformer.training.arguments import option
from kanformer.training.settings import DataArguments

TASKS = ("causal_lm", "masked_lm", "encoder")


@dataclass
class EvaluateArguments(DataArguments):
    """Settings of `scripts/evaluate.py`."""

    model_name_or_path: str = option("", "patched checkpoint, a folder or hub id")
    teacher_name_or_path: str | None = option(None, "the original model; absent: only what needs none")
    tokenizer_name: str | None = option(None, "tokenizer, if not the teacher's, or the model's where there is no teacher")
    output_dir: str = option("", "folder for evaluation.json and layers.csv")
    task: str | None = option(None, "what the model is for; absent: what its class says", TASKS)
    second_file: str | None = option(None, "text of another kind, all of it (or max_eval_samples) is used")
    mlm_probability: float = option(0.15, "share of masked tokens (masked_lm)", gt=0, le=1)
    per_device_eval_batch_size: int = option(16, "texts per batch; the results do not depend on it", ge=1)
    speed_batches: int = option(10, "timed batches per model, after 2 to warm up; 0: no timing", ge=0)
    device: str | None = option(None, "where to run; absent: the GPU if there is one", ("cpu", "cuda"))
    seed: int = option(0, "of the masks (masked_lm)", ge=0, le=2**32 - 1)
    disable_tqdm: bool = option(False, "no progress bar")
