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
        activation: elementwise module without parameters of its own.
        hidden_dropout, output_dropout: probabilities.
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

    @property
    def gated(self) -> bool:
        return self.gate_weight is not None

    @property
    def in_features(self) -> int:
        return self.up_weight.shape[1]

    @property
    def hidden_features(self) -> int:
        return self.up_weight.shape[0]

    def preactivation(self, x: Tensor) -> Tensor:
        """What the activation reads, (..., h)."""
        if self.gate_weight is not None:
            return F.linear(x, self.gate_weight, self.gate_bias)
        return F.linear(x, self.up_weight, self.up_bias)

    def hidden(self, x: Tensor, preactivation: Tensor | None = None) -> Tensor:
        """What the down map reads, (..., h)."""
        activated = self.activation(self.preactivation(x) if preactivation is None else preactivation)
        return activated * F.linear(x, self.up_weight, self.up_bias) if self.gated else activated

    def output(self, x: Tensor) -> Tensor:
        """The block's output without dropout, (..., d)."""
        return F.linear(self.hidden(x), self.down_weight, self.down_bias)
