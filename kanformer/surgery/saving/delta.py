"""Only the KAN part of a model, to be put on top of the base checkpoint that it was made from."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.errors import CheckpointError, ConfigError, SurgeryError
from kanformer.layers import KANExperts, KANFeedForward
from kanformer.surgery.folders import MARKER, write_folder
from kanformer.surgery.modules import join
from kanformer.surgery.record import PatchRecord, get_records
from kanformer.surgery.saving.base_model import fingerprint, load_base, plain_config, same_bits, transformers_class
from kanformer.surgery.saving.card import base_name
from kanformer.surgery.saving.delta_info import INFO, VERSION, DeltaInfo
from kanformer.surgery.saving.persist import empty_blocks, put_in, rebuild
from kanformer.surgery.saving.verify import check_files, short, some
from kanformer.surgery.snapped import check_changes

_WEIGHTS = "kan_delta.safetensors"
_OWN = {INFO, _WEIGHTS, MARKER, "config.json", "README.md"}


def save_delta(model: nn.Module, folder: str | os.PathLike, base_model: str | nn.Module | None = None, *, include_changed: bool = False) -> None:
    """Saves the KAN-FFNs of a patched model, and which base checkpoint they belong to. `load_delta` gives the model back, bit for bit.

    The base is read once more, to compare it with the model and to take a SHA-256 of its tensors.

    Args:
        folder: new, or a delta's, which is replaced when the new one is complete.
        base_model: folder or hub id of the model that was patched, or that model; None: where `model` was loaded from.
        include_changed: save other tensors too where they differ from the base (training changed them, or a head is new).

    Raises:
        SurgeryError: the model is not patched, or something else differs from the base (the message names some of it).
        CheckpointError: the base cannot be read or is another model, the folder holds other files, or it cannot be written.
    """
    action = "save the KAN part"
    (holder, record), *more = get_records(model, action)
    if holder is not model or more:
        raise SurgeryError(action, subject=type(model).__name__, got="a model of which a part was patched by itself", hint="Save that part, or the whole.")
    folder = Path(folder)
    _check_folder(folder)
    source = base_model or base_name(model)
    if source is None:
        raise SurgeryError(action, got="no base_model", hint="Name the checkpoint that was patched: base_model='gpt2', a folder, or the model itself.")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in _skeleton(type(model), model.config, record).state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != shapes:
        raise SurgeryError(action, subject=type(model).__name__, got="a model that was changed in more than its blocks", hint="Save the whole model.")
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    base = load_base(source, type(model), plain_config(model.config), dtype)
    blocks = _below_blocks(model)
    changed = [name for name, tensor in state.items() if not name.startswith(blocks) and not same_bits(tensor, base.tensors.get(name))]
    alien = [
        name for name in changed if name in base.tensors and (base.tensors[name].shape, base.tensors[name].dtype) != (state[name].shape, state[name].dtype)
    ]
    if alien or (changed and not include_changed):
        named = some(alien or changed)
        raise SurgeryError(
            action,
            subject=type(model).__name__,
            got=f"{len(changed)} other tensors that are not those of the base ({named})",
            hint="Save the whole model by kanformer.save_pretrained." + ("" if alien else " Or add them: include_changed=True."),
        )
    tensors = {name: tensor.cpu().clone().contiguous() for name, tensor in state.items() if name.startswith(blocks) or name in changed}
    name = base.name if isinstance(source, nn.Module) else str(source)
    info = DeltaInfo(VERSION, name or None, fingerprint(base.tensors), type(model).__name__, str(dtype).removeprefix("torch."))
    write_folder(folder, lambda aside: _fill(aside, folder, model, tensors, info))


def load_delta(folder: str | os.PathLike, base_model: str | nn.Module | None = None, **kwargs: Any) -> nn.Module:
    """Puts the KAN part of `save_delta` on top of its base.

    Args:
        folder: of the delta, or its hub id.
        base_model: folder or hub id of the base, or the base itself, which is patched in place; None: the one that the delta names.
        kwargs: for `from_pretrained` of the base (revision, device_map, attn_implementation, ...); not with a model.

    Returns:
        The patched model, as `save_delta` was given it; in eval mode unless `base_model` is a model.

    Raises:
        CheckpointError: files that are missing, damaged or of another version, or a base whose tensors are not those that the delta was made on.
        A base that was given is then as it was.
    """
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file

    action, name = "load the KAN delta", os.fspath(folder)
    try:
        paths = [cached_file(name, file) for file in (INFO, "config.json", _WEIGHTS)]
        if None in paths:  # what cached_file answers for a config.json that is not there
            raise FileNotFoundError("no config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(action, subject=name, got=short(error), expected=f"a folder with {INFO}, config.json and {_WEIGHTS}") from error
    info = DeltaInfo.read(str(paths[0]))
    check_files([str(paths[2])])
    try:
        config = AutoConfig.from_pretrained(Path(str(paths[1])).parent)
    except Exception as error:
        raise CheckpointError(action, subject=paths[1], got=short(error)) from error
    record = PatchRecord.from_dict(dict(getattr(config, "quantization_config", None) or {}))
    cls, source = transformers_class(info.model_class), base_model if base_model is not None else info.base_model
    if source is None:
        raise CheckpointError(action, subject=name, got="no base_model, and the delta names none", hint="Pass the folder, hub id or model that was patched.")
    if isinstance(source, nn.Module) and kwargs:
        raise ConfigError(action, got=f"a model as base_model, with {', '.join(sorted(kwargs))}", hint="They are for from_pretrained of a base that is named.")
    tensors = _read(str(paths[2]), _skeleton(cls, config, record))
    base = load_base(source, cls, plain_config(config), getattr(torch, info.dtype), **kwargs)
    found = fingerprint(base.tensors)
    if found != info.base_sha256:
        raise CheckpointError(
            action,
            subject=name,
            got=f"a base ({base.name or type(base.model).__name__}) with other tensors (SHA-256 {found[:12]}...)",
            expected=f"that of {info.base_model or 'the model that was patched'} ({info.base_sha256[:12]}...)",
            hint="Pass the very checkpoint as base_model.",
        )
    _put_on(base.model, tensors, record)
    return base.model


def _put_on(model: nn.Module, tensors: dict[str, Tensor], record: PatchRecord) -> None:
    """Swaps filled blocks in and copies the other tensors; everything that can fail comes first."""
    pairs = empty_blocks(model, record)
    for site, block in pairs:
        prefix, device = f"{site.path}.", next(block.parameters()).device
        # A copy, as what lies unaligned in a mapped file can round otherwise.
        own = {name.removeprefix(prefix): tensor.to(device, copy=True) for name, tensor in tensors.items() if name.startswith(prefix)}
        block.load_state_dict(own, assign=True)
        check_changes(block)
        block.train(model.training)
    put_in(model, pairs, record)
    state, blocks = model.state_dict(), _below_blocks(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not name.startswith(blocks):
                state[name].copy_(tensor)


def _read(path: str, skeleton: nn.Module) -> dict[str, Tensor]:
    """The tensors of the file, if they are all those of the skeleton's blocks and otherwise fit it."""
    from safetensors.torch import load_file

    tensors, state, blocks = load_file(path), skeleton.state_dict(), _below_blocks(skeleton)
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            expected = f"shape {tuple(state[name].shape)}" if name in state else "only tensors of the model"
            raise CheckpointError("load the KAN delta", subject=path, got=f"{name} of shape {tuple(tensor.shape)}", expected=expected)
    missing = sorted(name for name in state if name.startswith(blocks) and name not in tensors)
    if missing:
        raise CheckpointError("load the KAN delta", subject=path, got=f"no tensors for {', '.join(missing[:3])}", hint="The file is not whole.")
    return tensors


def _skeleton(cls: Any, config: Any, record: PatchRecord) -> nn.Module:
    """The patched model without numbers."""
    try:
        with torch.device("meta"):
            model = cls(plain_config(config))
    except Exception as error:
        raise CheckpointError("build the model of the KAN delta", subject=cls.__name__, got=short(error), hint="config.json is damaged.") from error
    rebuild(model, copy.copy(record))
    return model


def _below_blocks(model: nn.Module) -> tuple[str, ...]:
    return tuple(join(path, "") + "." for path, module in model.named_modules() if isinstance(module, KANFeedForward | KANExperts))


def _check_folder(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name} if folder.exists() else set()
    others = sorted(names - _OWN if INFO in names else names - {"README.md"})
    if others:
        raise CheckpointError("save the KAN part", subject=folder, got=f"a folder with other files ({', '.join(others[:3])})", hint="Choose a new folder.")


def _fill(aside: Path, folder: Path, model: nn.Module, tensors: dict[str, Tensor], info: DeltaInfo) -> None:
    from safetensors.torch import save_file

    save_file(tensors, aside / _WEIGHTS, metadata={"format": "pt"})
    config: Any = copy.deepcopy(model.config)
    config.architectures, config.dtype = [info.model_class], info.dtype
    config.save_pretrained(aside)
    info.write(aside / INFO)
    if (folder / "README.md").is_file():
        shutil.copyfile(folder / "README.md", aside / "README.md")
