"""The KAN-FFN: the one module that stands where a transformer's MLP stood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kanformer.layers.base_functions import BaseFunction, base_function, second_moment
from kanformer.layers.edge_functions import EdgeFunctions
from kanformer.layers.grids import check_input, check_sizes
from kanformer.layers.initialization import preserve_variance_
from kanformer.layers.kan_linear import KANLinear

if TYPE_CHECKING:
    from kanformer.config import KANConfig


class KANFeedForward(nn.Module):
    """Two KAN maps d -> h -> d, plain or gated.

    With shared edges: down(psi(up(x))), gated down(psi(gate(x)) * up(x)), psi a learned function per group of
    hidden channels. With full edges every map is a `KANLinear`, and the activation is the base of the down map
    (plain) or stays fixed between the maps (gated). With edges="mlp" nothing is learned but the linear maps: the
    control of every comparison.

    Args:
        in_features: d, the width of the model.
        hidden_features: h.
        activation: the old block's activation, the base of psi, see `base_function`.
        gated: whether a second linear map multiplies the hidden channels.
        up_bias, down_bias: biases of the gate and up maps, and of the down map.
        config: the edges, basis and grid; None means `KANConfig()`.
        hidden_dropout, output_dropout: probabilities, after the hidden channels and after the down map.

        up_function: fixed function of the factor that carries no activation (gpt-oss clamps it and adds one); gated blocks only.
        input_norm: module before the first maps (conformers put their norm inside the block).
        hidden_norm: module between the hidden channels and the down map (BitNet, Kosmos-2), with parameters of its own or not.
        channels_first: whether the channels are dimension 1 of the input, as in blocks of 1x1 convolutions.

    Shapes: input and output (..., in_features), or (batch, in_features, ...) with `channels_first`. With `takes_residual` set,
        forward takes a second tensor and adds it to the output (some families' blocks do that).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        activation: BaseFunction = "silu",
        gated: bool = False,
        up_bias: bool = True,
        down_bias: bool = True,
        config: KANConfig | None = None,
        hidden_dropout: float = 0.0,
        output_dropout: float = 0.0,
        up_function: nn.Module | None = None,
        input_norm: nn.Module | None = None,
        hidden_norm: nn.Module | None = None,
        channels_first: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if config is None:
            from kanformer.config import KANConfig

            config = KANConfig()
        check_sizes(self, in_features=in_features, hidden_features=hidden_features)
        self.in_features, self.hidden_features = in_features, hidden_features
        self.gated, self.edges = gated, config.edges
        self.takes_residual, self.channels_first = False, channels_first
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        names = ("basis", "grid_size", "spline_order", "grid_range", "knots", "extrapolation")
        full: dict[str, Any] = {name: getattr(config, name) for name in names}

        def expand(base: BaseFunction = "identity") -> nn.Module:
            if config.edges == "full":
                return KANLinear(in_features, hidden_features, bias=up_bias, base=base, **full, **factory)
            return nn.Linear(in_features, hidden_features, bias=up_bias, **factory)

        self.kan_gate = expand() if gated else None
        self.kan_up = expand()
        activation = base_function(activation)
        # Plain full edges carry the activation as the base of the down map, which then reads what the activation did.
        self.activation_in_down = config.edges == "full" and not gated and hidden_norm is None
        if config.edges == "shared":
            self.kan_functions: nn.Module = EdgeFunctions(hidden_features, config.groups, base=activation, **full, **factory)
        else:
            self.kan_functions = nn.Identity() if self.activation_in_down else activation
        self.input_norm, self.up_function, self.hidden_norm = input_norm, up_function, hidden_norm
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        if config.edges == "full":
            base = activation if self.activation_in_down else "identity"
            self.kan_down: nn.Module = KANLinear(hidden_features, in_features, bias=down_bias, base=base, **full, **factory)
        else:
            self.kan_down = nn.Linear(hidden_features, in_features, bias=down_bias, **factory)
        self.output_dropout = nn.Dropout(output_dropout)

    def reset_parameters(self) -> None:
        """Starts from random weights, as for training from scratch; functions start at the activation."""
        activation = self.kan_functions.base if isinstance(self.kan_functions, EdgeFunctions) else self.kan_functions
        gate = second_moment(activation) if self.gated else 1.0  # of the product that the down map reads then
        for module in (self.kan_gate, self.kan_up, self.kan_functions, self.kan_down):
            if isinstance(module, nn.Linear):
                down = module is self.kan_down
                preserve_variance_(module.weight, activation if down and not self.gated else nn.Identity(), 1 / gate if down else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, EdgeFunctions | KANLinear):
                module.reset_parameters()
                if module is self.kan_down and isinstance(module, KANLinear):
                    with torch.no_grad():
                        module.kan_base_weight.mul_(gate**-0.5)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.channels_first:
            x = x.movedim(1, -1)
        check_input(self, x, self.in_features)
        if residual is not None and not self.takes_residual:
            raise TypeError(f"{type(self).__name__} was given a second argument, which the block in whose place it stands did not take when it was patched")
        hidden = self.hidden_dropout(self.hidden(x))
        y = self.output_dropout(self.kan_down(hidden if self.hidden_norm is None else self.hidden_norm(hidden)))
        if self.channels_first:
            y = y.movedim(-1, 1)
        return y if residual is None else residual + y

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden channels before the norm that a block may have, (..., hidden_features); x has its channels last."""
        if self.input_norm is not None:
            x = self.input_norm(x)
        if self.kan_gate is None:
            return self.kan_functions(self.kan_up(x))
        up = self.kan_up(x)
        return self.kan_functions(self.kan_gate(x)) * (up if self.up_function is None else self.up_function(up))

    def spline_modules(self) -> Iterator[tuple[str, EdgeFunctions | KANLinear]]:
        """(name, module) of the children that carry learned functions."""
        for name, module in self.named_children():
            if isinstance(module, EdgeFunctions | KANLinear):
                yield name, module

    def spline_parameters(self) -> Iterator[nn.Parameter]:
        """The numbers of the learned functions: to be trained without weight decay."""
        for _, module in self.spline_modules():
            yield module.kan_coef
            if module.kan_inner is not None:
                yield module.kan_inner
            if module.kan_formulas is not None:
                yield from module.kan_formulas.parameters()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, hidden_features={self.hidden_features}, gated={self.gated}, edges={self.edges}"


@torch.no_grad()
def copy_linear(target: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Puts an (out, in) weight and a bias into a linear map, or into the base of a `KANLinear` whose splines become zero."""
    if isinstance(target, KANLinear):
        target.kan_base_weight.copy_(weight)
        target.kan_coef.zero_()
        target_bias: Tensor | None = target.kan_bias
    else:
        assert isinstance(target, nn.Linear)
        target.weight.copy_(weight)
        target_bias = target.bias
    if target_bias is not None:
        target_bias.zero_() if bias is None else target_bias.copy_(bias)
