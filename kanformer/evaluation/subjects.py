"""The models of an evaluation, checked: the patched one, the original, and the pairs of their blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kanformer.errors import ConfigError, SurgeryError
from kanformer.evaluation.settings import EvaluateArguments
from kanformer.layers import KANFeedForward
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.record import PatchRecord, get_record, get_records
from kanformer.surgery.replacing.apply import relative_path
from kanformer.surgery.saving.loading import load_model, load_tokenizer
from kanformer.training.models import AUTO_CLASSES, check_causal, check_length, check_mask_token, head_of, is_expert, is_patched, teacher_sites


@dataclass
class Subjects:
    """What is evaluated.

    Attributes:
        task: causal_lm, masked_lm or encoder.
        sites, blocks: the original's blocks and the KAN-FFNs in their places, of which the explained variance is measured; empty without a teacher.
        notes: what was left out, and why.
    """

    patched: nn.Module
    teacher: nn.Module | None
    tokenizer: Any
    task: str
    device: torch.device
    sites: list[Site] = field(default_factory=list)
    blocks: list[KANFeedForward] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_subjects(arguments: EvaluateArguments, model: nn.Module | None = None) -> Subjects:
    """Loads and checks what the settings name.

    Args:
        model: a patched model at hand, in the place of the checkpoint `model_name_or_path`.

    Raises:
        ConfigError: a model that does not fit the task, the texts or the device. SurgeryError: a model that is not patched, a teacher that is, or of
            which the model was not made. CheckpointError: files that cannot be read.
    """
    device = _device(arguments.device)
    names = (arguments.tokenizer_name, arguments.teacher_name_or_path, arguments.model_name_or_path)
    tokenizer = load_tokenizer(next(name for name in names if name))
    patched, task = _load(arguments.model_name_or_path, arguments, arguments.task, model)
    if not is_patched(patched):
        raise SurgeryError("evaluate", subject=arguments.model_name_or_path, got="a model that is not patched", hint="Patch it first (kanformer patch).")
    get_record(patched, "evaluate")  # of one model, not of parts that were patched by themselves
    teacher = None
    if arguments.teacher_name_or_path:
        teacher, _ = _load(arguments.teacher_name_or_path, arguments, task)
        if is_patched(teacher):
            raise SurgeryError("evaluate", subject=arguments.teacher_name_or_path, got="a teacher that is patched", expected="the original model")
    elif task == "encoder":
        raise ConfigError(
            "evaluate", subject=arguments.model_name_or_path, got="an encoder without a teacher", hint="Name the original: --teacher_name_or_path FOLDER_OR_ID."
        )
    if task == "masked_lm":
        check_mask_token(tokenizer, "evaluate")
    for model, name in ((patched, arguments.model_name_or_path), (teacher, arguments.teacher_name_or_path)):
        if model is not None:
            model.to(device).requires_grad_(False)
            check_length(model, arguments.max_length)
            if task == "causal_lm":
                check_causal(model, str(name), "evaluate")
    found = Subjects(patched, teacher, tokenizer, task, device)
    if not getattr(tokenizer, "is_fast", False) and task != "encoder":
        found.notes.append("no bits per byte: the tokenizer does not say which characters a token stands for")
    if teacher is not None:
        _pair(found)
    return found


def _load(name: str, arguments: EvaluateArguments, task: str | None, model: nn.Module | None = None) -> tuple[nn.Module, str]:
    """The model in the task's class, and the task, which without one is what the model's own class is for."""
    model = model or load_model(name, AUTO_CLASSES.get(task or ""), attn_implementation=arguments.attn_implementation)
    config: Any = model.config
    own = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError("evaluate", subject=name, got="an encoder-decoder model", expected="a language model or an encoder")
    if task in AUTO_CLASSES and own not in (config.architectures or ()):
        raise ConfigError(
            "evaluate",
            subject=f"task={task}, {name}",
            got=f"a checkpoint of {', '.join(config.architectures or ['no class'])}, to which the task's head would be new",
            hint="Use task=encoder, or a checkpoint with that head.",
        )
    return model, task or head_of(model) or "encoder"


def _pair(found: Subjects) -> None:
    """Finds the original of each block; experts, which see different tokens in the two models, are left out."""
    assert found.teacher is not None
    ((holder, record),) = get_records(found.patched, "evaluate")
    plain = tuple(entry for entry in record.sites if not is_expert(entry))
    if len(plain) < len(record.sites):
        found.notes.append(f"no explained variance of {len(record.sites) - len(plain)} blocks of experts: the two models' routers send them different tokens")
    if plain:
        found.sites = teacher_sites(found.teacher, found.patched, PatchRecord(plain))
        blocks = {relative_path(holder, path): module for path, module in holder.named_modules() if isinstance(module, KANFeedForward)}
        found.blocks = [blocks[entry.path] for entry in plain]


def _device(wanted: str | None) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("evaluate", subject="device=cuda", got="a machine on which torch finds no GPU", hint="Leave device out, or set it to cpu.")
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
