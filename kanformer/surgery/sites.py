"""A feed-forward block in a real model: its parts, checked."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kanformer.conversion import DenseFFN
from kanformer.errors import SurgeryError
from kanformer.layers.base_functions import base_function
from kanformer.surgery.modules import get_path, is_linear, join, linear_tensors
from kanformer.surgery.spec import FFNSpec


@dataclass(frozen=True)
class Site:
    """One block of one model.

    Attributes:
        owner_path: path of the module that holds the parts.
        spec: where the parts are.
    """

    model: nn.Module
    owner_path: str
    spec: FFNSpec

    @property
    def path(self) -> str:
        """Path of the slot that the KAN-FFN takes."""
        return join(self.owner_path, self.spec.slot)

    @property
    def owner(self) -> nn.Module:
        return get_path(self.model, self.owner_path)

    def part(self, path: str) -> Any:
        return get_path(self.owner, path)

    @property
    def up(self) -> nn.Module:
        return self.part(self.spec.up)

    @property
    def down(self) -> nn.Module:
        return self.part(self.spec.down)

    @property
    def gate(self) -> nn.Module | None:
        return self.part(self.spec.gate) if self.spec.gate else None

    @property
    def activation(self) -> Any:
        """The block's activation, a module or function."""
        name = self.spec.activation
        return base_function(name[1:]) if name.startswith("=") else self.part(name)

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The linear maps by path from the owner."""
        return {path: self.part(path) for path in (self.spec.gate, self.spec.up, self.spec.down) if path}

    def dense(self) -> DenseFFN:
        """The block as plain tensors, which share memory with the model's."""
        up_weight, up_bias = linear_tensors(self.up)
        down_weight, down_bias = linear_tensors(self.down)
        gate_weight, gate_bias = linear_tensors(self.gate) if self.gate is not None else (None, None)
        if self.spec.fused:
            halves = list(zip(up_weight.chunk(2), (None, None) if up_bias is None else up_bias.chunk(2), strict=True))
            (gate_weight, gate_bias), (up_weight, up_bias) = halves if self.spec.fused == "gate_first" else halves[::-1]
        return DenseFFN(
            up_weight,
            up_bias,
            down_weight,
            down_bias,
            base_function(copy.deepcopy(self.activation)),  # a module of its own, with no hook of the owner's
            gate_weight,
            gate_bias,
            hidden_dropout=_probability(self, self.spec.hidden_dropout),
            output_dropout=_probability(self, self.spec.output_dropout),
        )

    def problem(self) -> str | None:
        """Why this block cannot be replaced, or None."""
        for path in self.spec.parts:
            try:
                part = self.part(path)
            except AttributeError:
                return f"has no {path}"
            if isinstance(part, nn.Parameter):
                return f"{path} holds the weights of all experts in one tensor {tuple(part.shape)}; fused experts are not replaced yet"
        return self._problem_of_linears() or self._problem_of_activation()

    def _problem_of_linears(self) -> str | None:
        for path, module in self.linears.items():
            if not is_linear(module, self.owner):
                return f"{path} is {type(module).__module__}.{type(module).__name__}, not nn.Linear or Conv1D"
            weight = module.weight
            if not isinstance(weight, Tensor) or not weight.is_floating_point() or hasattr(weight, "ds_id") or is_traceable_wrapper_subclass(weight):
                return f"{path}.weight is quantized or partitioned"
            hook = getattr(module, "_hf_hook", None)
            if hook is not None and (getattr(hook, "offload", False) or weight.is_meta):
                return f"{path} is offloaded by accelerate; load the model without offloading"
        up, down = linear_tensors(self.up)[0], linear_tensors(self.down)[0]
        if self.spec.fused and up.shape[0] == 2 * down.shape[1]:
            up = up[: down.shape[1]]
        if up.shape != down.t().shape:
            return f"maps {tuple(up.shape)} and {tuple(down.shape)} are not d -> h -> d"
        if self.gate is not None and linear_tensors(self.gate)[0].shape != up.shape:
            return "gate and up maps differ in shape"
        if len({(part.weight.dtype, part.weight.device) for part in self.linears.values()}) > 1:  # type: ignore[union-attr]
            return "its linear maps differ in dtype or device"
        return None

    def _problem_of_activation(self) -> str | None:
        activation = self.activation
        if not callable(activation):
            return f"{self.spec.activation} is not callable"
        if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
            return f"its activation {type(activation).__name__} has parameters of its own"
        return None

    def disagreement(self) -> str | None:
        """What the block computes besides its parts, found by running it on three random tokens; None if nothing.

        Of a split block only the first half is run. Blocks on the meta device, inline blocks and blocks with hooks are taken at their word.
        """
        weight = linear_tensors(self.up)[0]
        if weight.is_meta or self.spec.structure == "inline" or _has_hooks(self.owner):
            return None
        split = self.spec.structure == "split"
        generator = torch.Generator().manual_seed(0)
        x, residual = torch.randn(2, 1, 3, weight.shape[1], generator=generator).to(device=weight.device, dtype=weight.dtype)
        flags = {module: module.training for module in self.owner.modules()}
        try:
            self.owner.eval()
            with torch.no_grad():
                expected = self.dense().hidden(x) if split else self.dense().output(x)
                run = self.part(self.spec.slot) if split else self.owner
                actual = run(x, residual) - residual if self.spec.residual else run(x)
        except Exception as error:
            return f"its forward could not be run on hidden states alone ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        finally:
            for module, training in flags.items():
                module.training = training
        if not isinstance(actual, Tensor) or actual.shape != expected.shape:
            return "its forward does not return one tensor of the input's shape"
        tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
        scale = expected.abs().max().clamp(min=1e-6)
        if not bool(((actual - expected).abs().max() <= tolerance * scale) | (~torch.isfinite(expected)).any()):
            off = float((actual - expected).abs().max() / scale)
            return f"its forward does more than {'act(up(x))' if split else 'down(act(up(x)))'}: outputs differ by {off:.1e} of their size"
        return None


def _probability(site: Site, path: str | None) -> float:
    if path is None:
        return 0.0
    part = site.part(path)
    probability = part.p if isinstance(part, nn.Dropout) else part
    if not isinstance(probability, int | float):
        raise SurgeryError("read a dropout probability", subject=join(site.owner_path, path), got=type(part).__name__, expected="nn.Dropout or a number")
    return float(probability)


def _has_hooks(module: nn.Module) -> bool:
    return any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
