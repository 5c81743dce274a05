"""Studies of tiny models, with runs in this process where the processes themselves are not what is tested."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from kanformer.errors import KanformerError, TrainingDiverged
from kanformer.study import run as study_run
from kanformer.study.one import run_one
from kanformer.study.run import study
from kanformer.study.settings import StudyArguments
from model_cases import BY_NAME
from training_cases import checkpoint, tokenizer, write_text

DISTILL = {"max_steps": 4, "per_device_train_batch_size": 4, "local_weight": 0.0, "hidden_weight": 1.0, "logging_steps": 1, "warmup_steps": 0, "bf16": False}


def teacher(folder: Path, name: str) -> str:
    """A tiny checkpoint whose blocks are worth something: an encoder without a head for "bert", a causal language model for "llama"."""
    if name != "bert":
        return checkpoint(folder, name, initializer_range=0.3)
    case = BY_NAME["bert"]
    torch.manual_seed(0)
    tf.BertModel(case.config(**{**case.values, "initializer_range": 0.3})).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def settings(folder: Path, name: str = "bert", **changes: Any) -> StudyArguments:
    """Of a study of two methods, one ratio and two seeds; the teacher and the texts are written into `folder`."""
    values: dict[str, Any] = {"output_dir": str(folder / "study"), "methods": ["kan", "mlp"], "ratios": [0.5], "seeds": 2, "max_length": 16}
    if "teacher_name_or_path" not in changes:
        values["teacher_name_or_path"] = teacher(folder / "teacher", name)
    for number, (part, count) in enumerate({"train": 60, "validation": 20, "second": 20}.items()):
        values[f"{part}_file"] = write_text(folder / f"{part}.txt", count, seed=number)
    return StudyArguments(**{**values, "kan": {"grid_size": 3}, "distill": DISTILL, **changes})


def run_in_process(monkeypatch: Any, before: Callable[[Path], None] = lambda folder: None) -> list[str]:
    """Lets studies run in this process; returns the names of the runs, which grow as they start. `before` may raise what ends a run."""
    started: list[str] = []

    def run_all(folders: Sequence[Path], workers: int, ended: Callable[[Path, int], None]) -> None:
        for folder in folders:
            started.append(folder.name)
            code = 0
            try:
                before(folder)
                run_one(folder)
            except KanformerError as error:
                (folder / "run.log").write_text(f"step 1\nerror: {error}\n", encoding="utf-8")
                code = 3 if isinstance(error, TrainingDiverged) else 2
            ended(folder, code)

    monkeypatch.setattr(study_run, "run_all", run_all)
    return started


def results(arguments: StudyArguments) -> dict[str, dict[str, Any]]:
    """What the finished runs wrote, by name."""
    folders = sorted((Path(arguments.output_dir) / "runs").iterdir())
    return {folder.name: json.loads((folder / "result.json").read_text()) for folder in folders if (folder / "result.json").is_file()}


def run_study(arguments: StudyArguments) -> dict[str, dict[str, Any]]:
    """`kanformer study` and its results."""
    study(arguments)
    return results(arguments)


def curve(arguments: StudyArguments, run: str) -> list[dict[str, Any]]:
    """A run's lines of metrics.jsonl, without what depends on the clock."""
    text = (Path(arguments.output_dir) / "runs" / run / "stage-0" / "metrics.jsonl").read_text()
    return [{key: value for key, value in json.loads(line).items() if key != "tokens_per_second"} for line in text.splitlines()]
