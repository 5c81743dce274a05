"""An original and a patched checkpoint of it, evaluated, and the same numbers token by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from kanformer.evaluation.corpus import CorpusResult, measure_corpus
from kanformer.evaluation.run import evaluate
from kanformer.evaluation.settings import EvaluateArguments
from kanformer.evaluation.subjects import Subjects, load_subjects
from kanformer.evaluation.texts import Reader
from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.saving.loading import load_model
from kanformer.training.data import pad
from kanformer.training.masking import IGNORED, mask_tokens
from model_cases import blocks, disturb
from training_cases import checkpoint, texts, tokenizer

LENGTH = 10  # of the texts' 5 to 12 tokens, so that some are cut
LINES = texts(21, seed=1)


def original(folder: Path, name: str) -> str:
    """A tiny checkpoint that has begun to learn LINES by heart, so that its blocks are worth something."""
    path = checkpoint(folder, name, initializer_range=0.1)
    model, words = load_model(path), tokenizer()
    batch = pad([ids[:LENGTH] for ids in words(LINES)["input_ids"]], words.pad_token_id)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        inputs, targets = (batch["input_ids"], labels) if name != "bert" else mask_tokens(words, batch["input_ids"], labels, 0.3)
        model(input_ids=inputs, attention_mask=batch["attention_mask"], labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return path


def patched(teacher: str, folder: Path, change: bool = True, **settings: Any) -> str:
    """The same, patched, with learned functions of all shapes if `change`."""
    model = patch_model(load_model(teacher), **settings)
    if change:
        for block in blocks(disturb(model)).values():
            for parameter in block.spline_parameters():
                parameter.data *= 10  # so far that predictions change
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def subjects(teacher: str | None, model: str, task: str | None = None) -> Subjects:
    return load_subjects(EvaluateArguments(model_name_or_path=model, teacher_name_or_path=teacher, max_length=LENGTH, task=task, device="cpu"))


def measured(found: Subjects, lines: list[str], batch_size: int = 16, seed: int = 0) -> CorpusResult:
    reader = Reader(found.tokenizer, found.task, LENGTH, batch_size, seed, 0.3)
    return measure_corpus(found, reader, lines, CorpusResult("corpus", "lines"))


def run_evaluate(model: str, out: Path, **settings: Any) -> dict[str, Any]:
    """`kanformer evaluate` in this process."""
    values = {"max_length": LENGTH, "device": "cpu", "speed_batches": 1, "disable_tqdm": True, **settings}
    return evaluate(EvaluateArguments(model_name_or_path=model, output_dir=str(out), **values))


class Constant(nn.Module):
    """Gives the same at every token."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.value.to(x).expand(*x.shape[:-1], -1)


def examples(task: str, lines: list[str], seed: int) -> list[tuple[Tensor, list[tuple[int, int]]]]:
    """(ids (1, length), [(position, token to be predicted there)]) of every text."""
    words, found = tokenizer(), []
    for number, line in enumerate(lines):
        ids = torch.tensor([words(line)["input_ids"][:LENGTH]])
        if task == "causal_lm":
            found.append((ids, [(place - 1, int(ids[0, place])) for place in range(1, ids.shape[1])]))
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        masked, labels = mask_tokens(words, ids[0], ids[0], 0.3, generator)
        found.append((masked.unsqueeze(0), [(place, int(token)) for place, token in enumerate(labels) if token != -100]))
    return found


@torch.no_grad()
def by_hand(model: nn.Module, teacher: nn.Module, rows: list[tuple[Tensor, list[tuple[int, int]]]]) -> dict[str, float]:
    """Cross-entropy, divergence and agreement, text by text and token by token, in float64."""
    nats = divergence = 0.0
    count = agreeing = 0
    for ids, predicted in rows:
        own, other = (each(input_ids=ids).logits[0].double().log_softmax(-1) for each in (model, teacher))
        for place, token in predicted:
            nats -= float(own[place, token])
            divergence += sum(math.exp(p) * (p - q) for p, q in zip(other[place].tolist(), own[place].tolist(), strict=True))
            agreeing += int(own[place].argmax() == other[place].argmax())
            count += 1
    return {"ce": nats / count, "perplexity": math.exp(nats / count), "kl": divergence / count, "top1_agreement": agreeing / count, "count": count}


def mixture(folder: Path) -> str:
    """A tiny mixture of experts."""
    torch.manual_seed(0)
    values = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**values, num_local_experts=3, initializer_range=0.2, max_position_embeddings=64))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
