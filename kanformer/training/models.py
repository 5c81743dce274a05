"""Student and teacher of the training scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kanformer.configs import configs_from
from kanformer.errors import ConfigError, SurgeryError
from kanformer.layers import KANFeedForward
from kanformer.surgery.finding.discover import find_sites
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.record import PatchRecord, SiteRecord
from kanformer.surgery.replacing.apply import patch_model, relative_path
from kanformer.surgery.saving.loading import load_model, load_tokenizer
from kanformer.training.data import pad, pad_token, tokenize
from kanformer.training.settings import DistillArguments
from kanformer.training.sharing import copy_sharing

_HEADS = {"causal_lm": ("ForCausalLM", "LMHeadModel"), "masked_lm": ("ForMaskedLM",)}
AUTO_CLASSES = {"causal_lm": "AutoModelForCausalLM", "masked_lm": "AutoModelForMaskedLM", "classification": "AutoModelForSequenceClassification"}


def calibration_batches(tokenizer: Any, texts: Sequence[str], count: int, max_length: int, batch_size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
    """The first `count` texts as padded batches of model inputs."""
    examples = tokenize(tokenizer, texts[:count], max_length)
    for start in range(0, len(examples), batch_size):
        yield pad(examples[start : start + batch_size], pad_token(tokenizer))


def load_patched(source: str | None, teacher_name: str, arguments: DistillArguments, texts: Sequence[str]) -> tuple[nn.Module, nn.Module, Any]:
    """(student, teacher, tokenizer). Without a source the student is the teacher patched with `arguments.kan`, and shares its parameters until `share`.

    Raises:
        SurgeryError: the source is not patched, or the teacher is.
    """
    tokenizer = load_tokenizer(arguments.tokenizer_name or teacher_name)
    attention = arguments.attn_implementation
    teacher = load_model(teacher_name, attn_implementation=attention).requires_grad_(False)
    if is_patched(teacher):
        raise SurgeryError("distil", subject=teacher_name, got="a teacher that is patched", expected="the original model")
    check_length(teacher, arguments.max_length)
    if source is None:
        student = copy_sharing(teacher)
        config = configs_from(arguments.kan, keep_original=False)
        batches = calibration_batches(tokenizer, texts, arguments.calibration_samples, arguments.max_length)
        patch_model(student, config, calibration=batches)
        return student, teacher, tokenizer
    student = load_model(source, attn_implementation=attention)
    if not is_patched(student):
        raise SurgeryError(
            "distil", subject=source, got="a model that is not patched", hint="Patch it first (kanformer patch), or leave model_name_or_path out and set `kan`."
        )
    return student, teacher, tokenizer


def teacher_sites(teacher: nn.Module, student: nn.Module, record: PatchRecord) -> list[Site]:
    """The teacher's blocks that the student replaced, in the student's order.

    Raises:
        SurgeryError: the teacher has no such block, or one of another width; or a block holds the experts of a mixture.
    """
    experts = next((entry.path for entry in record.sites if is_expert(entry)), None)
    if experts is not None:
        raise SurgeryError(
            "distil block by block",
            subject=experts,
            got="the experts of a mixture, which see different tokens in teacher and student",
            hint="Distil end to end (--stage global), or patch without them (experts='exclude').",
        )
    specs = list(dict.fromkeys(entry.spec for entry in record.sites))
    by_path = {relative_path(teacher, site.path): site for site in find_sites(teacher, specs)} if specs else {}
    sites = []
    for entry in record.sites:
        site = by_path.get(entry.path)
        if site is None or site.problem() or site.dense().hidden_features != entry.mlp_hidden:
            raise SurgeryError(
                "match teacher and student",
                subject=entry.path,
                got="no such block in the teacher",
                expected=f"an MLP of width {entry.mlp_hidden}",
                hint="Use the model that was patched as the teacher.",
            )
        sites.append(site)
    return sites


def is_expert(entry: SiteRecord) -> bool:
    """Whether a patched block holds experts of a mixture, or is one."""
    return entry.spec.experts is not None or "experts" in entry.path.split(".")


def head_of(model: nn.Module) -> str | None:
    """What the model's class predicts tokens for: "causal_lm", "masked_lm", or None."""
    return next((task for task, endings in _HEADS.items() if type(model).__name__.endswith(endings)), None)


def check_length(model: nn.Module, max_length: int) -> None:
    """Refuses texts that are longer than the model has positions.

    Raises:
        ConfigError: max_length is too large.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or max_length
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from its padding token on
    if max_length > positions:
        raise ConfigError(
            "use texts of this length",
            subject=f"max_length={max_length}",
            got=f"{type(model).__name__} with {positions} positions",
            hint=f"Set --max_length {positions} or less.",
        )


@torch.no_grad()
def check_causal(model: nn.Module, name: str, action: str) -> None:
    """Refuses an encoder with a language-modelling head, which sees the token that it shall predict: there is nothing to learn, nor to measure.

    Raises:
        ConfigError: the logits at a token depend on the token after it.
    """
    inputs = {"input_ids": torch.tensor([[0, 0], [0, 1]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    device = next(model.parameters()).device
    logits = model(**{key: value.to(device) for key, value in inputs.items()}).logits.float()
    first, second = (logits[0] - logits[1]).abs().amax(-1)
    if first > 1e-3 * second:
        raise ConfigError(action, subject=f"task=causal_lm, {name}", got="a model that looks ahead", hint="Use task=masked_lm, or a causal language model.")


def check_mask_token(tokenizer: Any, action: str) -> None:
    """Refuses masked language modelling with a tokenizer that cannot mask.

    Raises:
        ConfigError: it has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ConfigError(action, subject="task=masked_lm", got="a tokenizer without a mask token", hint="Use task=causal_lm, or a masked language model.")


def is_patched(model: nn.Module) -> bool:
    """Whether the model holds a KAN-FFN."""
    return any(isinstance(module, KANFeedForward) for module in model.modules())
