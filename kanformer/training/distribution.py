"""What `accelerate launch` was asked for against what it gives, said before anything is loaded."""

from __future__ import annotations

import os
import warnings
import zlib
from typing import Any

import torch
from torch import nn

from kanformer.conversion.processes import gathered
from kanformer.errors import ConfigError, DataError
from kanformer.layers.grids import GridModule
from kanformer.training.settings import LoopArguments
from kanformer.training.sharding import make_contiguous, no_split_modules

_ACTION = "start training"
_FSDP2 = "configs/accelerate/fsdp2.yaml is one that works."


def check_distribution(accelerator: Any, arguments: LoopArguments) -> None:
    """Refuses ways of sharding that cannot train a patched model, and warns where accelerate does not shard although it was told to.

    Raises:
        ConfigError: FSDP of version 1; weights that only one process has (`cpu_ram_efficient_loading`, `zero3_init_flag`), because every process
            patches; penalties on the functions; DeepSpeed together with checkpoints, which the loop writes for plain, DDP and FSDP2 models.
    """
    kind = _kind(accelerator)
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "false").lower() == "true" and kind != name and accelerator.is_main_process:
            shared = "one process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes, each with all weights"
            text = f"asked for {name}, got {kind}: accelerate shards nothing on this machine (it does on GPUs), training goes on in {shared}"
            warnings.warn(text, UserWarning, stacklevel=2)
    if kind in ("FSDP", "DEEPSPEED"):
        _check_penalties(kind, arguments)
    if kind == "FSDP":
        _check_fsdp(accelerator.state.fsdp_plugin)
    if kind == "DEEPSPEED":
        _check_deepspeed(accelerator.state.deepspeed_plugin, arguments)


def ready_to_wrap(accelerator: Any, module: nn.Module, model: nn.Module, arguments: LoopArguments) -> None:
    """Tells accelerate what it must know of the module that it is about to wrap: FSDP2's units, DeepSpeed's batch size.

    Args:
        module: what is trained. model: what is saved, as a rule inside of it.

    Raises:
        ConfigError: nothing to make units of; a list of classes without the blocks that need units of their own; DeepSpeed with a model that is
            not part of what is trained.
    """
    kind = _kind(accelerator)
    if kind == "FSDP":
        _prepare_units(accelerator.state.fsdp_plugin, module)
        make_contiguous(module)
    if kind == "DEEPSPEED":
        if not any(each is model for each in module.modules()):
            raise ConfigError(_ACTION, got="DeepSpeed, and blocks that are trained outside of their model", hint=f"Use FSDP2: {_FSDP2}")
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        if settings.get("train_micro_batch_size_per_gpu", "auto") == "auto":
            settings["train_micro_batch_size_per_gpu"] = arguments.per_device_train_batch_size


def check_same_start(module: nn.Module) -> None:
    """Compares a checksum of all grids and functions over the processes: DistributedDataParallel would take the first one's, FSDP2 mix them.

    Raises:
        DataError: they differ. Every process raises it.
    """
    checksum = 0
    for each in module.modules():
        if isinstance(each, GridModule):
            for tensor in (each.kan_grid, each.kan_coef):
                checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), checksum)
    found = gathered(torch.tensor(checksum, dtype=torch.int64)).tolist()
    if len(set(found)) > 1:
        others = [rank for rank, value in enumerate(found) if value != found[0]]
        raise DataError(
            _ACTION,
            got=f"other grids or functions in process {others[0]} than in process 0",
            hint="Calibrate with kanformer.patch_model(calibration=...) in all processes at once, or train a patched checkpoint.",
        )


def shards(accelerator: Any) -> bool:
    """Whether parameters are spread over processes: FSDP or DeepSpeed."""
    return _kind(accelerator) in ("FSDP", "DEEPSPEED")


def is_deepspeed(accelerator: Any) -> bool:
    """Whether DeepSpeed takes the steps, clips the gradients and keeps the optimizer's state."""
    return _kind(accelerator) == "DEEPSPEED"


def _kind(accelerator: Any) -> str:
    return getattr(accelerator.distributed_type, "value", str(accelerator.distributed_type))


def _check_penalties(kind: str, arguments: LoopArguments) -> None:
    for name in ("kan_l1", "kan_entropy", "kan_smoothness"):
        if getattr(arguments, name):
            got = f"a penalty under {kind}: it reads the functions outside of their layers, where they are spread over processes"
            raise ConfigError(_ACTION, subject=name, got=got, hint="Use configs/accelerate/ddp.yaml.")


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ConfigError(_ACTION, subject="fsdp_version", got=plugin.fsdp_version, expected="2", hint=_FSDP2)
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            _ACTION,
            subject="fsdp_cpu_ram_efficient_loading",
            got="true: only the first process would have the weights, and each of them patches",
            expected="false",
            hint=_FSDP2,
        )


def _check_deepspeed(plugin: Any, arguments: LoopArguments) -> None:
    if getattr(plugin, "zero3_init_flag", False):
        got = "true: weights would be partitioned while they are loaded, before the model is patched"
        raise ConfigError(_ACTION, subject="zero3_init_flag", got=got, expected="false", hint="configs/accelerate/zero3.yaml is one that works.")
    for name in ("save_steps", "load_best_model_at_end", "resume"):
        if getattr(arguments, name):
            raise ConfigError(
                _ACTION,
                subject=name,
                got=f"{getattr(arguments, name)} under DeepSpeed, whose optimizer states are not in the checkpoints",
                hint=f"Leave it out (the final model is saved), or use FSDP2: {_FSDP2}",
            )


def _prepare_units(plugin: Any, module: nn.Module) -> None:
    wanted = no_split_modules(module)
    if not wanted:
        raise ConfigError(_ACTION, subject=type(module).__name__, got="no layers that FSDP could make units of", hint="Set fsdp_transformer_layer_cls_to_wrap.")
    named = plugin.transformer_cls_names_to_wrap
    if named:
        missing = [name for name in wanted if name == "KANFeedForward" and name not in named]
        if missing:
            raise ConfigError(
                _ACTION,
                subject="fsdp_transformer_layer_cls_to_wrap",
                got=", ".join(named),
                expected="KANFeedForward among them: the blocks are run by themselves",
                hint="Leave it out; the classes are found.",
            )
    module._no_split_modules = wanted  # type: ignore[assignment]
