"""An MLP as plain tensors: what the conversion reads, whatever module it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DenseFFN:
    """down(act(up(x))), or gated down(act(gate(x)) * up(x)).

    Attributes:
        up_weight, gate_weight: (h, d); gate_weight is None for a plain block.
        down_weight: (d, h).
        up_bias, gate_bias: (h,) or None. down_bias: (d,) or None.
        activation: elementwise module.
        hidden_dropout, output_dropout: probabilities.
        up_function: elementwise module for the factor without activation, or None.
        input_norm, hidden_norm: modules before the first maps, and between the hidden channels and the down map, or None.
        channels_first: whether the block's inputs are (batch, d, ...); here they are always (..., d).
    """

    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    activation: nn.Module
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    up_function: nn.Module | None = None
    input_norm: nn.Module | None = None
    hidden_norm: nn.Module | None = None
    channels_first: bool = False

    @property
    def gated(self) -> bool:
        return self.gate_weight is not None

    @property
    def expanding_bias(self) -> bool:
        """Whether the maps to the hidden channels have a bias, or one of the two has."""
        return self.up_bias is not None or self.gate_bias is not None

    @property
    def other_parameters(self) -> int:
        """Trained numbers of the activation and the norms."""
        return sum(
            parameter.numel() for module in (self.activation, self.input_norm, self.hidden_norm) if module is not None for parameter in module.parameters()
        )

    @property
    def in_features(self) -> int:
        return self.up_weight.shape[1]

    @property
    def hidden_features(self) -> int:
        return self.up_weight.shape[0]

    def normed(self, x: Tensor) -> Tensor:
        """What the first maps read, (..., d)."""
        return x if self.input_norm is None else self.input_norm(x)

    def preactivation(self, x: Tensor) -> Tensor:
        """What the activation reads, (..., h)."""
        x = self.normed(x)
        if self.gate_weight is not None:
            return F.linear(x, self.gate_weight, self.gate_bias)
        return F.linear(x, self.up_weight, self.up_bias)

    def hidden(self, x: Tensor, preactivation: Tensor | None = None) -> Tensor:
        """What the down map reads, (..., h)."""
        hidden = self.activation(self.preactivation(x) if preactivation is None else preactivation)
        if self.gated:
            up = F.linear(self.normed(x), self.up_weight, self.up_bias)
            hidden = hidden * (up if self.up_function is None else self.up_function(up))
        return hidden if self.hidden_norm is None else self.hidden_norm(hidden)

    def output(self, x: Tensor) -> Tensor:
        """The block's output without dropout, (..., d)."""
        return F.linear(self.hidden(x), self.down_weight, self.down_bias)
