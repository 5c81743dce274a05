"""Undoing the surgery, bit for bit."""

from __future__ import annotations

from torch import nn

from kanformer.errors import SurgeryError
from kanformer.layers import KANExperts, KANFeedForward
from kanformer.surgery.modules import get_path, join
from kanformer.surgery.record import PatchRecord, get_records, set_record
from kanformer.surgery.replacing.apply import Model, revert
from kanformer.surgery.replacing.state import give_back


def unpatch_model(model: Model) -> Model:
    """Puts the original MLPs back, in place; what the KAN-FFNs learned is dropped.

    The originals have the weights and requires_grad that they had; device, dtype and training mode follow what was done to the model since, and so do
    the hooks of whole blocks.

    Raises:
        SurgeryError: the model is not patched, or its originals were not kept (`keep_original=False`, or it was loaded
            from a patched checkpoint).
    """
    records = get_records(model, "restore the original blocks")
    if not all(record.undo for _, record in records):
        raise SurgeryError(
            "restore the original blocks",
            subject=type(model).__name__,
            got="no originals",
            expected="a model patched with keep_original=True",
            hint="Load the original checkpoint.",
        )
    for holder, record in records:
        _check_slots(holder, record)
    for holder, record in records:
        _restore(holder, record)
    set_record(model, None)  # a composed model's config may say that its parts are patched
    return model


def _check_slots(holder: nn.Module, record: PatchRecord) -> None:
    """Every KAN-FFN must still be where it was put."""
    put_in = {(parent, name) for parent, name, original in record.undo if not isinstance(get_path(holder, parent)._modules[name], nn.Identity)}
    for parent, name in sorted(put_in):
        current = get_path(holder, parent)._modules[name]
        if not isinstance(current, KANFeedForward | KANExperts):
            kind = type(current)
            raise SurgeryError(
                "restore the original blocks",
                subject=join(parent, name),
                got=f"a {kind.__module__}.{kind.__name__}",
                expected="the KAN-FFN that was put there",
                hint="Take off what was put around it first; for peft: model.merge_and_unload().",
            )


def _restore(holder: nn.Module, record: PatchRecord) -> None:
    block: nn.Module | None = None
    for parent, name, original in record.undo:
        current = get_path(holder, parent)._modules[name]
        block = current if isinstance(current, KANFeedForward | KANExperts) else block
        assert current is not None and block is not None  # the slot is always swapped before the rest of its site
        give_back(block, current, original)
    revert(holder, record.undo, record.attributes)
    set_record(holder, None)
