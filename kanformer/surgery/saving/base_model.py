"""The checkpoint below a delta: read as it is, and recognised by its tensors."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import CheckpointError
from kanformer.layers import KANFeedForward
from kanformer.surgery.saving.verify import short


@dataclass(frozen=True)
class BaseModel:
    """A model that is not patched, where it came from, and the tensors that its checkpoint holds (not those that are made up on loading)."""

    model: nn.Module
    name: str
    tensors: dict[str, Tensor]


def load_base(source: str | nn.Module, cls: type, config: Any, dtype: torch.dtype, **kwargs: Any) -> BaseModel:
    """The base as a `cls`, by `from_pretrained` or as given.

    Raises:
        CheckpointError: it cannot be read, is patched, or of another class or dtype.
    """
    made_up: set[str] = set()
    if isinstance(source, nn.Module):
        model: Any = source
        if type(model).__name__ != cls.__name__ or model.dtype != dtype:
            raise _refusal(source, f"a {type(model).__name__} in {model.dtype}", f"a {cls.__name__} in {dtype}")
    else:
        options = {"config": config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        kwargs.setdefault("use_safetensors", True)  # the name may come from a file: no pickle unless the caller says so
        try:
            with _silent():  # a head that is new in the model is none of the reader's business
                model, info = cls.from_pretrained(source, **options, **kwargs)  # type: ignore[attr-defined]
        except Exception as error:
            raise _refusal(source, short(error), f"the checkpoint that was patched, as a {cls.__name__}") from error
        if any("kan_" in name for name in info["unexpected_keys"]):
            raise _refusal(source, "a model that is patched", "the original")
        made_up = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
    if any(isinstance(module, KANFeedForward) for module in model.modules()):
        raise _refusal(source, "a model that is patched", "the original")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if any(tensor.is_meta for tensor in state.values()):
        raise _refusal(source, "a model that is offloaded", "one whose weights are in memory")
    places = {state[name].data_ptr() for name in made_up if name in state} - {0}  # tied weights are under several names
    tensors = {name: tensor for name, tensor in state.items() if name not in made_up and tensor.data_ptr() not in places}
    return BaseModel(model, str(model.config.name_or_path or ""), tensors)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _refusal(source: str | nn.Module, got: str, expected: str) -> CheckpointError:
    return CheckpointError("load the base model", subject=source if isinstance(source, str) else type(source).__name__, got=got, expected=expected)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bits, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bits(tensor).cpu().numpy().data)
    return digest.hexdigest()


def same_bits(left: Tensor, right: Tensor | None) -> bool:
    """Whether both are there and equal, dtype, shape and every bit."""
    return right is not None and left.dtype == right.dtype and left.shape == right.shape and torch.equal(_bits(left), _bits(right.to(left.device)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def plain_config(config: Any) -> Any:
    """A copy of a model's config that says nothing of a patch."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def transformers_class(name: str) -> Any:
    """A model class of transformers by its name.

    Raises:
        CheckpointError: there is none.
    """
    import transformers

    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError("load the KAN delta", got=f"model_class {short(repr(name))}", expected="a model class of transformers")
    return found
