"""Linear maps that cannot be read: adapted, quantized, partitioned, offloaded. Each with the reason and what to do."""

from __future__ import annotations

from torch import Tensor, nn

from kanformer.surgery.modules import is_linear

_PLAIN_TENSORS = (Tensor, nn.Parameter)


def map_problem(path: str, module: nn.Module, owner: nn.Module) -> str | None:
    """Why this map of a block cannot be replaced, or None."""
    return _problem_of_class(path, module, owner) or tensor_problem(f"{path}.weight", module.weight, module)


def tensor_problem(path: str, weight: object, holder: nn.Module) -> str | None:
    """Why this tensor, a parameter of `holder`, cannot be read, or None."""
    return _problem_of_weight(path, weight) or _problem_of_hook(path.removesuffix(".weight"), weight, holder)


def base_map(module: nn.Module) -> nn.Module | None:
    """The linear map under an adapter or a quantizer's class, for its shape only; None for anything else, and for a plain map."""
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return base
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    return None


def _problem_of_class(path: str, module: nn.Module, owner: nn.Module) -> str | None:
    if is_linear(module, owner):
        return None
    name = f"{type(module).__module__}.{type(module).__name__}"
    if hasattr(module, "base_layer"):
        return f"{path} carries an adapter ({name}); merge it first (merge_and_unload), or patch the model before the adapter is added"
    if hasattr(module, "parametrizations"):
        return f"{path} is parametrized ({type(module).__name__}); call torch.nn.utils.parametrize.remove_parametrizations first"
    if name.startswith("bitsandbytes."):
        return f"{path} is quantized ({name}); load the model without quantization"
    return f"{path} is {name}, not nn.Linear, Conv1D or a 1x1 convolution"


def _problem_of_weight(name: str, weight: object) -> str | None:
    if not isinstance(weight, Tensor):
        return f"{name} is {type(weight).__name__}, not a tensor"
    if hasattr(weight, "ds_id"):
        return f"{name} is partitioned by DeepSpeed; patch the model before deepspeed.initialize and outside of deepspeed.zero.Init"
    if type(weight) not in _PLAIN_TENSORS or type(weight.data) is not Tensor:
        kind = type(weight.data if type(weight) is nn.Parameter else weight).__name__
        sharded = kind == "DTensor"
        return f"{name} is {'sharded over processes' if sharded else 'quantized or of another kind'} ({kind}); patch the model before that"
    if not weight.is_floating_point():
        return f"{name} is quantized ({str(weight.dtype).removeprefix('torch.')}); load the model without quantization"
    return None


def _problem_of_hook(path: str, weight: object, holder: nn.Module) -> str | None:
    hook = getattr(holder, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    offloaded = any(getattr(each, "offload", False) for each in hooks) or (hook is not None and isinstance(weight, Tensor) and weight.is_meta)
    return f"{path} is offloaded by accelerate; load the model without offloading, patch it, then offload it" if offloaded else None
