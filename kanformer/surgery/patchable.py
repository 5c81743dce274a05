"""What keeps a whole model from being patched, or is good to know before: said before anything is looked at."""

from __future__ import annotations

from torch import nn

from kanformer.errors import SurgeryError
from kanformer.layers import KANFeedForward


def check_patchable(model: nn.Module) -> None:
    """Raises SurgeryError if the model is no module, patched already or quantized."""
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
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", type(quantization).__name__)
        raise SurgeryError(
            "patch the model",
            subject=type(model).__name__,
            got=f"a model quantized by {method}",
            expected="an unquantized one",
            hint="Load it without quantization_config.",
        )
