"""A feed-forward block in a real model: its parts, checked."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kanformer.conversion import DenseFFN
from kanformer.errors import SurgeryError
from kanformer.layers.base_functions import base_function
from kanformer.surgery.finding import fused
from kanformer.surgery.finding.maps import map_problem, tensor_problem
from kanformer.surgery.finding.products import factors
from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.modules import get_path, is_pointwise_convolution, join, linear_tensors


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
        """The linear maps by path from the owner; none of a module with all experts' weights in one tensor."""
        if self.spec.experts:
            return {}
        return {path: self.part(path) for path in (self.spec.gate, self.spec.up, self.spec.down) if path}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights of the linear maps, or the tensors with those of all experts, by path from the owner."""
        if self.spec.experts:
            return {path: self.part(path) for path in (self.spec.gate, self.spec.up, self.spec.down) if path}
        return {f"{path}.weight": module.weight for path, module in self.linears.items()}  # type: ignore[misc]

    @property
    def own_modules(self) -> list[nn.Module]:
        """The modules whose parameters the KAN-FFN takes over, by value."""
        parts = [self.activation, *(self.part(path) for path in (self.spec.input_norm, self.spec.hidden_norm, self.spec.expert_norm) if path)]
        found = [*self.linears.values(), *(part for part in parts if isinstance(part, nn.Module))]
        return [*found, self.owner] if self.spec.experts else found

    def dense(self) -> DenseFFN:
        """The block, or the first of its experts, as plain tensors, which share memory with the model's."""
        return self.denses()[0]

    def denses(self) -> list[DenseFFN]:
        """The block's experts, see `dense`; one for a block without."""
        spec = self.spec
        activation = base_function(copy.deepcopy(self.activation))  # a module of its own, with no hook of the owner's
        activation, up_function = factors(spec.product, self.owner, activation)
        rest: dict[str, Any] = {
            "hidden_dropout": _probability(self, spec.hidden_dropout),
            "output_dropout": _probability(self, spec.output_dropout),
            "input_norm": copy.deepcopy(self.part(spec.input_norm)) if spec.input_norm else None,
            "hidden_norm": copy.deepcopy(self.part(spec.hidden_norm)) if spec.hidden_norm else None,
            "up_function": up_function,
        }
        if spec.experts:
            return [DenseFFN(activation=activation, **maps, **rest) for maps in fused.expert_maps(self.owner, spec)]  # type: ignore[arg-type]
        up_weight, up_bias = linear_tensors(self.up)
        down_weight, down_bias = linear_tensors(self.down)
        gate = linear_tensors(self.gate) if self.gate is not None else (None, None)
        if spec.fused:
            (up_weight, up_bias), gate = fused.halves(up_weight, up_bias, spec.fused)
        rest["channels_first"] = is_pointwise_convolution(self.up)
        return [DenseFFN(up_weight, up_bias, down_weight, down_bias, activation, *gate, **rest)]

    def problem(self) -> str | None:
        """Why this block cannot be replaced, or None."""
        for path in self.spec.parts:
            try:
                self.part(path)
            except AttributeError:
                return f"has no {path}"
        return self._problem_of_weights() or self._problem_of_maps() or self._problem_of_activation()

    def _problem_of_weights(self) -> str | None:
        for path, module in self.linears.items():
            reason = map_problem(path, module, self.owner)
            if reason is not None:
                return reason
        for path in self.weights if self.spec.experts else ():
            reason = tensor_problem(path, self.part(path), self.part(path.rpartition(".")[0]))
            if reason is not None:
                return reason
        if len({(weight.dtype, weight.device) for weight in self.weights.values()}) > 1:
            return "its linear maps differ in dtype or device"
        return None

    def _problem_of_maps(self) -> str | None:
        if self.spec.experts:
            return fused.problem_of_experts(self.owner, self.spec)
        up, down = linear_tensors(self.up)[0], linear_tensors(self.down)[0]
        if self.spec.fused and up.shape[0] == 2 * down.shape[1]:
            up = up[: down.shape[1]]
        if up.shape != down.t().shape:
            return f"maps {tuple(up.shape)} and {tuple(down.shape)} are not d -> h -> d"
        if self.gate is not None and linear_tensors(self.gate)[0].shape != up.shape:
            return "gate and up maps differ in shape"
        if len({is_pointwise_convolution(module) for module in self.linears.values()}) > 1:
            return "its maps are partly linear and partly convolutions"
        return None

    def _problem_of_activation(self) -> str | None:
        activation = self.activation
        if not callable(activation):
            return f"{self.spec.activation} is not callable"
        if isinstance(activation, nn.Module) and any(parameter.numel() > 1 for parameter in activation.parameters()):
            return f"its activation {type(activation).__name__} has parameters per channel"
        return None


def _probability(site: Site, path: str | None) -> float:
    if path is None:
        return 0.0
    part = site.part(path)
    probability = part.p if isinstance(part, nn.Dropout) else part
    if not isinstance(probability, int | float):
        raise SurgeryError("read a dropout probability", subject=join(site.owner_path, path), got=type(part).__name__, expected="nn.Dropout or a number")
    return float(probability)
