"""Undoing the surgery, bit for bit."""

from __future__ import annotations

from torch import nn

from kanformer.errors import SurgeryError
from kanformer.layers import KANExperts, KANFeedForward
from kanformer.surgery.apply import Model, revert
from kanformer.surgery.modules import get_path
from kanformer.surgery.record import get_record, set_record
from kanformer.surgery.state import give_back


def unpatch_model(model: Model) -> Model:
    """Puts the original MLPs back, in place; what the KAN-FFNs learned is dropped.

    The originals have the weights and requires_grad that they had; device, dtype and training mode follow what was done to the model since, and so do
    the hooks of whole blocks.

    Raises:
        SurgeryError: the model is not patched, or its originals were not kept (`keep_original=False`, or it was loaded
            from a patched checkpoint).
    """
    record = get_record(model, "restore the original blocks")
    holder = next(module for module in model.modules() if module.__dict__.get("_kanformer_record") is record)
    if not record.undo:
        raise SurgeryError(
            "restore the original blocks",
            subject=type(model).__name__,
            got="no originals",
            expected="a model patched with keep_original=True",
            hint="Load the original checkpoint.",
        )
    block: nn.Module | None = None
    for parent, name, original in record.undo:
        current = get_path(holder, parent)._modules[name]
        block = current if isinstance(current, KANFeedForward | KANExperts) else block
        assert current is not None and block is not None  # the slot is always swapped before the rest of its site
        give_back(block, current, original)
    revert(holder, record.undo, record.attributes)
    set_record(holder, None)
    return model
