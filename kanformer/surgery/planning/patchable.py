"""What keeps a whole model from being patched, or is good to know before: said before anything is looked at."""

from __future__ import annotations

from torch import nn

from kanformer.errors import SurgeryError
from kanformer.layers import KANFeedForward
from kanformer.surgery.record import QUANT_METHOD

_WRAPPERS = {
    "OptimizedModule": "compiled by torch.compile",
    "DistributedDataParallel": "wrapped in DistributedDataParallel",
    "DataParallel": "wrapped in DataParallel",
    "FullyShardedDataParallel": "wrapped in FSDP",
    "FSDPModule": "sharded by fully_shard (FSDP2)",
    "DeepSpeedEngine": "wrapped by DeepSpeed",
    "PeftModel": "wrapped by peft",  # its path would be in the saved record, and it saves adapters only
}


def check_patchable(model: nn.Module) -> None:
    """Raises SurgeryError if the model is no module, patched already, quantized, compiled, wrapped or partitioned."""
    if not isinstance(model, nn.Module):
        raise SurgeryError("plan surgery", got=type(model).__name__, expected="a torch.nn.Module, for example from AutoModel.from_pretrained(...)")
    patched = next((path for path, module in model.named_modules() if isinstance(module, KANFeedForward)), None)
    if patched is not None:
        raise SurgeryError(
            "patch the model",
            subject=type(model).__name__,
            got=f"a model that is patched already (at {patched})",
            hint="Call kanformer.unpatch_model(model) first, or load the original.",
        )
    _check_unwrapped(model)
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", type(quantization).__name__)
        raise SurgeryError(
            "patch the model",
            subject=type(model).__name__,
            got=f"a model quantized by {getattr(method, 'value', method)}",
            expected="an unquantized one",
            hint="Its config comes from a patched model: give it a copy without that entry (copy.deepcopy(config); del config.quantization_config)."
            if method == QUANT_METHOD
            else "Load it without quantization_config.",
        )


def _check_unwrapped(model: nn.Module) -> None:
    for path, module in model.named_modules():
        state = next((_WRAPPERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
        if state is None and any(hasattr(parameter, "ds_id") for parameter in module._parameters.values()):
            state = "partitioned by DeepSpeed (ZeRO 3)"
        if state is not None:
            raise SurgeryError(
                "patch the model",
                subject=type(model).__name__,
                got=f"a model that is {state}" + (f" (at {path})" if path else ""),
                expected="the plain model",
                hint="Patch what is inside: patch_model(model.get_base_model())."
                if state.endswith("peft")
                else "Patch it first; compile, wrap, shard and make the optimizer afterwards.",
            )
