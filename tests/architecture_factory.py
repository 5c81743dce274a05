"""A tiny random model of any model type of transformers that can be built and run on a CPU, with inputs for it."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from architecture_inputs import guesses
from architecture_sizes import LEVELS, tiny_values

MAX_PARAMETERS = 100_000_000
_MAPPINGS = (
    "MODEL",
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_MULTIMODAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_PRETRAINING",
    "MODEL_FOR_TEXT_ENCODING",
    "MODEL_FOR_BACKBONE",
)
_CLASSES_TRIED = 3


class NotBuildable(Exception):
    """This model type has no tiny model that runs here; the text says why."""


def model_types() -> list[str]:
    """Every model type that transformers knows."""
    return sorted(CONFIG_MAPPING.keys())


def tiny_model(model_type: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model in eval mode with random float32 weights, about 64 wide and two layers deep, and inputs that its forward takes.

    Raises:
        NotBuildable: no model class, no valid config, too large, or no inputs that its forward takes.
    """
    config_class = _config_class(model_type)
    classes = _model_classes(model_type, config_class)
    if not classes:
        raise NotBuildable("transformers has no model class for it")
    reasons: list[str] = []
    for level in LEVELS:
        for model_class in classes[:_CLASSES_TRIED]:
            try:
                model = _build(model_class, config_class, level)
                return model, _inputs_that_run(model)
            except NotBuildable as error:
                reasons.append(f"{model_class.__name__}: {error}")
    raise NotBuildable(max(reasons, key=lambda reason: "no inputs fit" in reason))


def outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every floating tensor that a forward returns, by path; random numbers drawn on the way are the same in each call."""
    seed_everything()
    with torch.no_grad():
        result = model(**copy.deepcopy(inputs))
    return {path: tensor.detach().clone() for path, tensor in _tensors(result) if tensor.is_floating_point() or tensor.is_complex()}


def seed_everything() -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The class and the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:limit]}" if lines else type(error).__name__


def _config_class(model_type: str) -> Any:
    try:
        return CONFIG_MAPPING[model_type]
    except Exception as error:
        raise NotBuildable(f"its config cannot be imported ({first_line(error)})") from error


def _model_classes(model_type: str, config_class: Any) -> list[type[PreTrainedModel]]:
    """The classes that the Auto classes know for this type, bare models first; else those that its modeling file holds."""
    others = sorted(name.removesuffix("_MAPPING_NAMES") for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"))
    names: list[str] = []
    for mapping in dict.fromkeys((*_MAPPINGS, *others)):
        found = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES", {}).get(model_type, ())
        names += [found] if isinstance(found, str) else list(found)
    classes = [cls for name in dict.fromkeys(names) if inspect.isclass(cls := getattr(transformers, name, None))]
    return classes or _classes_in_file(config_class)


def _classes_in_file(config_class: Any) -> list[type[PreTrainedModel]]:
    module_name = config_class.__module__.replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(module_name)
    except Exception:
        return []
    found = [cls for cls in vars(module).values() if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module_name]
    return [cls for cls in found if getattr(cls, "config_class", None) is config_class and not cls.__name__.endswith("PreTrainedModel")]


def _build(model_class: type[PreTrainedModel], config_class: Any, level: int) -> PreTrainedModel:
    try:
        config = config_class(**tiny_values(config_class, level))
    except Exception as error:
        raise NotBuildable(f"no valid config ({first_line(error)})") from error
    parameters = _size(model_class, config)
    if parameters > MAX_PARAMETERS or (parameters < 0 and level > 2):
        raise NotBuildable(f"too large even when small ({parameters / 1e6:.0f} million parameters)" if parameters > 0 else "of unknown size")
    seed_everything()
    try:
        model = model_class(copy.deepcopy(config))
    except Exception as error:
        raise NotBuildable(f"cannot be constructed ({first_line(error)})") from error
    _disturb(model.float())
    return model.eval()


def _size(model_class: type[PreTrainedModel], config: Any) -> int:
    """Parameters as counted on the meta device; -1 where the class cannot be built there."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    except Exception:
        return -1


@torch.no_grad()
def _disturb(model: nn.Module) -> None:
    """Weights as a trained model has them: no map so weak that its output drowns in the residual, no zeros and ones, nothing left uninitialized."""
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in seen or not parameter.is_floating_point():
            continue
        seen.add(id(parameter))
        noise = torch.randn(parameter.shape, generator=generator)
        if not bool(torch.isfinite(parameter).all()) or float(parameter.abs().max() if parameter.numel() else 0) > 1e4:
            parameter.copy_(0.02 * noise)
        if parameter.ndim >= 2 and "embed" not in name and parameter.numel() > 1:
            fan = min(parameter.shape[-1], parameter.shape[-2]) if parameter.ndim < 4 else parameter[0].numel()
            if float(parameter.std()) < 0.7 / math.sqrt(fan):
                parameter.copy_(noise / math.sqrt(fan))
        elif parameter.ndim == 1 and parameter.numel() > 1 and float(parameter.std()) == 0:
            parameter.add_(0.1 * noise)


def _inputs_that_run(model: PreTrainedModel) -> dict[str, Any]:
    """The first guess that the forward takes and answers with finite numbers, twice the same."""
    reasons = []
    for name, inputs in guesses(model):
        try:
            first = outputs(model, inputs)
            second = outputs(model, inputs)
        except Exception as error:
            reasons.append(f"{name}: {first_line(error)}")
            continue
        if not first:
            reasons.append(f"{name}: no tensors come out")
        elif not any(bool(torch.isfinite(tensor).any()) for tensor in first.values()):
            reasons.append(f"{name}: nothing finite comes out")
        elif difference(first, second) != 0:
            reasons.append(f"{name}: two runs differ")
        else:
            return inputs
    raise NotBuildable(f"no inputs fit ({reasons[0] if reasons else 'none could be guessed'})")


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference relative to the largest number of its tensor; inf where names, shapes or places of NaN differ."""
    if left.keys() != right.keys():
        return math.inf
    worst = 0.0
    for path, expected in left.items():
        actual = right[path]
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return math.inf
        if torch.equal(actual, expected) or not expected.numel():
            continue
        finite = torch.isfinite(expected)
        if not torch.equal(finite, torch.isfinite(actual)):
            return math.inf
        if bool(finite.any()):
            worst = max(worst, float((actual - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=1e-12)))
    return worst


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}.{index}")
