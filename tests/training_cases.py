"""Tiny checkpoints with a tokenizer, text for them, and runs of the training scripts in this process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from kanformer.surgery.replacing.apply import patch_model
from kanformer.training.distill import distill
from kanformer.training.finetune import finetune
from kanformer.training.settings import DistillArguments, FinetuneArguments
from model_cases import BY_NAME

ROOT = Path(__file__).resolve().parents[1]
WORDS = [a + b for a in ("ba", "ku", "mi", "no", "re", "sa") for b in ("d", "f", "lo", "mur", "p", "st")]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "eos_token": "[EOS]"}
_QUIET = {"disable_tqdm": True, "max_length": 16, "per_device_train_batch_size": 4, "warmup_steps": 0, "logging_steps": 1}


def texts(count: int, seed: int = 0) -> list[str]:
    """Lines of 5 to 12 words."""
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(5, 12))) for _ in range(count)]


def write_text(path: Path, count: int = 40, seed: int = 0) -> str:
    """A text file of such lines; returns its path."""
    path.write_text("\n".join(texts(count, seed)) + "\n", encoding="utf-8")
    return str(path)


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)


def checkpoint(folder: Path, name: str = "bert", patch: dict | None = None, auto_class: str | None = None, **changes: Any) -> str:
    """Saves a family's tiny model and a tokenizer; returns the folder. `patch` holds KANConfig values, `auto_class` names another head, or none."""
    case = BY_NAME[name]
    torch.manual_seed(0)
    model = getattr(tf, auto_class or case.auto_class).from_config(case.config(**{**case.values, **changes}))
    if patch is not None:
        patch_model(model, **patch)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def run_finetune(model: str, text: str, out: Path, **settings: Any) -> dict[str, Any]:
    """`kanformer finetune` in this process, 8 steps of 4 examples."""
    values = {**_QUIET, "max_steps": 8, "kan": {"init": "exact"}, **settings}
    return finetune(FinetuneArguments(model_name_or_path=model, train_file=text, output_dir=str(out), **values))


def run_distill(teacher: str, text: str, out: Path, **settings: Any) -> dict[str, Any]:
    """`kanformer distill` in this process, 8 steps of 4 examples."""
    return distill(DistillArguments(teacher_name_or_path=teacher, train_file=text, output_dir=str(out), **{**_QUIET, "max_steps": 8, **settings}))


def weights(out: Path) -> dict[str, Tensor]:
    """The tensors of a run's final model."""
    return load_file(out / "model" / "model.safetensors")


def same_weights(left: Path, right: Path) -> bool:
    """Whether two runs ended with the same bits."""
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(out: Path) -> list[dict[str, Any]]:
    """The same without what depends on the clock."""
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in metrics(out)]


def python(*words: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """A fresh Python in the repository's root, on one thread and without network."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
