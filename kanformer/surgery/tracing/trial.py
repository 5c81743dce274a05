"""Patching a model for a trial: what that does to its outputs, with everything put back afterwards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.batches import untouched
from kanformer.layers import KANExperts, KANFeedForward
from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.replacing.restore import unpatch_model
from kanformer.surgery.tracing.trace import tensors

_FLAG = "_is_hf_initialized"


class Trial:
    """Tries specs on a model with one batch."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self.model = model
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        self.before = self._outputs()
        self.noise = _difference(self._outputs(), self.before)  # of a model that is not the same twice

    def problem(self, specs: Sequence[FFNSpec], paths: Collection[str]) -> str | None:
        """Why the blocks at these paths must not be replaced as the specs say, or None."""
        try:
            difference = self.difference(specs, paths)
        except Exception as error:
            return f"the model does not run with it ({type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''})"
        if difference is None:
            return "the model runs past the KAN-FFN in its place: something else reads its parts"
        if not difference <= max(self._tolerance, 2 * self.noise):
            return f"with it the model's outputs change by {difference:.1e} of their size: something else reads its parts, or it does more in some place"
        return None

    def difference(self, specs: Sequence[FFNSpec], paths: Collection[str]) -> float | None:
        """How far the outputs are off, relative to the largest number of each, with the blocks at these paths patched; None if one did not run.

        Raises:
            KanformerError: they cannot be patched. Whatever the model raises then.
        """
        with kept(self.model):
            patch_model(self.model, specs=specs, where=lambda block: block.path in paths)
            blocks = [module for module in self.model.modules() if isinstance(module, KANFeedForward | KANExperts)]
            outer = [block for block in blocks if not any(block is not other and block in list(other.modules()) for other in blocks)]
            ran: set[nn.Module] = set()
            handles = [block.register_forward_hook(lambda module, args, result: ran.add(module)) for block in outer]
            try:
                after = self._outputs()
            finally:
                for handle in handles:
                    handle.remove()
                unpatch_model(self.model)
        return _difference(after, self.before) if ran else None

    @property
    def _tolerance(self) -> float:
        exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in self.model.parameters() if parameter.is_floating_point())
        return 1e-4 if exact else 5e-2

    def _outputs(self) -> list[Tensor]:
        """Every floating tensor that the model returns."""
        with untouched(self.model):
            return [tensor.detach().clone() for tensor in tensors(self.model(**self.batch)) if tensor.is_floating_point()]


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Puts back what patching and unpatching leave behind: marks on modules, entries of the config, random numbers drawn."""
    marks = [(module, module.__dict__.get(_FLAG)) for module in model.modules()]
    config = getattr(model, "config", None)
    entries = dict(vars(config)) if config is not None and hasattr(config, "__dict__") else None
    flags = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, mark in marks:
            if mark is None:
                module.__dict__.pop(_FLAG, None)
            else:
                module.__dict__[_FLAG] = mark
        for module, training in flags:
            module.training = training
        if entries is not None:
            vars(config).clear()
            vars(config).update(entries)


def _difference(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    if [tensor.shape for tensor in after] != [tensor.shape for tensor in before]:
        return math.inf
    worst = 0.0
    for actual, expected in zip(after, before, strict=True):
        finite = torch.isfinite(expected)
        if not torch.equal(finite, torch.isfinite(actual)):
            return math.inf
        if bool(finite.any()):
            off = (actual.double() - expected.double())[finite].abs().max() / expected[finite].abs().max().double().clamp(min=1e-12)
            worst = max(worst, float(off))
    return worst
