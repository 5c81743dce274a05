"""Regularisation of a whole model: what its learned functions see and give in a training step, as one penalty to add to the loss."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.batches import token_mask
from kanformer.errors import ConfigError, DataError, NoFeedForwardError
from kanformer.layers import EdgeFunctions, KANFeedForward, KANLinear, SharedKANLinear, regularization
from kanformer.layers.magnitudes import NODES, edge_magnitudes, function_magnitudes
from kanformer.ops.plain import without_autocast
from kanformer.ops.spread import is_sharded


@contextlib.contextmanager
def regularize(
    model: nn.Module, *, l1: float = 0.0, entropy: float = 0.0, smoothness: float = 0.0, nodes: int | None = NODES, through_inputs: bool = True
) -> Iterator[Penalty]:
    """Watches the model's learned functions within the block, and gives what to add to the loss:

        with kanformer.regularize(model, l1=1e-6, entropy=1e-3) as penalty:
            loss = model(**batch).loss
        (loss + penalty()).backward()

    The penalty is equation 2.20 of the KAN paper (arXiv 2404.19756) without its prediction loss: the sum over layers of
    l1 * |Phi|_1 + entropy * S(Phi), where |Phi|_1 is the sum over edges of the mean of |phi| over the tokens that are no padding;
    and `smoothness` times `layers.regularization.smoothness`. These are sums over millions of edges: the weights are small numbers.

    A layer is a `KANLinear`, or shared functions with the linear map that reads them: phi[o,i] = W[o,i] * psi[i]. Where something else
    reads them (in a gated block their product with the up map; functions that stand alone) they are a layer of their own, an edge
    per channel with weight 1. Linear maps without functions are not regularised.

    Args:
        model: any module with learned functions in it. The mask is the `attention_mask` that the model is called with.
        l1, entropy, smoothness: weights, >= 0.
        nodes: per input of full edges, see `edge_magnitudes`; shared functions are always exact.
        through_inputs: whether the gradient also reaches the layers before, through the functions' inputs, as in the paper.

    Raises:
        NoFeedForwardError: nothing in the model is learned. ConfigError: a weight that is negative or not finite, or parameters sharded by FSDP2.
    """
    weights = {"l1": l1, "entropy": entropy, "smoothness": smoothness}
    check_weights(weights, nodes)
    penalty = Penalty(model, weights, nodes, through_inputs)
    with contextlib.ExitStack() as hooks:
        if l1 or entropy:
            for handle in penalty._watch():
                hooks.callback(handle.remove)
        yield penalty


def check_weights(weights: Mapping[str, float], nodes: int | None) -> None:
    """Refuses weights and a number of nodes that `regularize` cannot use.

    Raises:
        ConfigError: a weight that is negative or not finite, fewer than one node.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError("regularise the model", subject=name, got=weight, expected="a finite number >= 0")
    if nodes is not None and nodes < 1:
        raise ConfigError("regularise the model", subject="nodes", got=nodes, expected="None or an integer >= 1")


class Penalty:
    """What `regularize` yields; calling it gives the weighted penalty, a scalar in float32.

    It covers all forward passes since the last call (their tokens together), and forgets them. With gradient accumulation call it once
    per micro-batch, before `backward`: the entropy is then that of the micro-batch.

    Attributes:
        values: of the last call, "l1", "entropy" and "smoothness" without their weights, where these are not 0.
    """

    def __init__(self, model: nn.Module, weights: dict[str, float], nodes: int | None, through_inputs: bool) -> None:
        self.model, self.weights, self.nodes, self.through_inputs = model, weights, nodes, through_inputs
        self.values: dict[str, Tensor] = {}
        self._layers = _find_layers(model)
        self._batch: dict[str, Any] = {}
        if not self._layers:
            raise NoFeedForwardError(
                "regularise the model", subject=type(model).__name__, got="no learned functions", hint="Patch it first: kanformer.patch_model(model)."
            )
        sharded = next((layer.path for module, layer in self._layers.items() if is_sharded(module.kan_coef)), None)
        if sharded is not None:
            raise ConfigError(
                "regularise the model",
                subject=sharded,
                got="functions sharded over processes (FSDP2), which are whole within their layer's forward pass only",
                hint="Train with whole weights in each process: accelerate launch --config_file configs/accelerate/ddp.yaml.",
            )

    def __call__(self) -> Tensor:
        """The penalty.

        Raises:
            DataError: no forward pass since the last call, within the `regularize` block.
        """
        device = next(iter(self._layers)).kan_coef.device
        with without_autocast(torch.empty(0, device=device)):
            self.values = self._measure()
        total = sum((self.weights[name] * value for name, value in self.values.items()), torch.zeros((), device=device))
        self.values = {name: value.detach() for name, value in self.values.items()}
        return total

    def seen(self) -> Iterator[tuple[str, KANLinear | EdgeFunctions, Tensor, Tensor]]:
        """(path, layer, inputs (tokens, in), outputs (tokens, out)) of every forward pass since the last call, without padding."""
        for module, layer in self._layers.items():
            for call in layer.calls:
                yield layer.path, module, call.rows(call.x), call.rows(call.y)

    def _measure(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.weights["l1"] or self.weights["entropy"]:
            layers = self._magnitudes()
            device = layers[0].device
            for name, measure in (("l1", torch.sum), ("entropy", regularization.entropy)):
                if self.weights[name]:
                    found[name] = torch.stack([measure(layer).to(device) for layer in layers]).sum()
        if self.weights["smoothness"]:
            found["smoothness"] = regularization.smoothness(self.model)
        return found

    def _magnitudes(self) -> list[Tensor]:
        """|phi|_1 of every layer that ran, (out, in) each."""
        if not any(layer.calls for layer in self._layers.values()):
            raise DataError(
                "regularise the model",
                got="no forward pass since the last penalty",
                hint="Run the model inside the `with kanformer.regularize(...)` block, then call the penalty once.",
            )
        try:
            return [self._layer_magnitudes(module, layer) for module, layer in self._layers.items() if layer.calls]
        finally:
            for layer in self._layers.values():
                layer.calls.clear()

    def _layer_magnitudes(self, module: KANLinear | EdgeFunctions, layer: _Layer) -> Tensor:
        found = [self._call_magnitudes(module, call) for call in layer.calls]
        total = max(1, sum(tokens for tokens, _ in found))
        means = torch.stack([part * (tokens / total) for tokens, part in found]).sum(0)
        weight = layer.weight()
        return means if weight is None else weight.to(means.dtype).abs() * means

    def _call_magnitudes(self, module: KANLinear | EdgeFunctions, call: _Call) -> tuple[int, Tensor]:
        """(tokens, the mean over them of |phi|: (out, in), or (1, channels) of shared functions)."""
        x = call.rows(call.x if self.through_inputs else call.x.detach())
        if isinstance(module, KANLinear):
            return x.shape[0], edge_magnitudes(module, x, self.nodes)
        # Activation checkpointing hides the functions from autograd in the first pass: then they are evaluated again.
        y = call.rows(call.y) if self.through_inputs and call.y.requires_grad else module.forward(x)
        return x.shape[0], function_magnitudes(y).unsqueeze(0)

    def _watch(self) -> Iterator[Any]:
        """Registers the hooks, which only keep references: statistics are computed outside of what is checkpointed."""

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._batch = _named_inputs(module, args, kwargs)

        yield self.model.register_forward_pre_hook(begin, with_kwargs=True)
        for module, layer in self._layers.items():
            yield module.register_forward_hook(self._keeper(layer))

    def _keeper(self, layer: _Layer) -> Callable:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            if torch._C._current_graph_task_id() != -1:  # type: ignore[attr-defined]
                return  # a checkpointed block runs again in the backward pass
            if not args[0].numel():
                return  # an expert that no token reached
            layer.calls.append(_Call(args[0], output, token_mask(args[0], self._batch, layer.path)))

        return keep


@dataclass
class _Call:
    """One forward pass: inputs (..., in), outputs (..., out), and which tokens are no padding."""

    x: Tensor
    y: Tensor
    mask: Tensor | None

    def rows(self, values: Tensor) -> Tensor:
        """The tokens that count, (tokens, channels)."""
        flat = values.reshape(-1, values.shape[-1])
        return flat if self.mask is None else flat[self.mask]


@dataclass
class _Layer:
    """Where a layer stands, the weights (out, in) of shared functions, and its forward passes."""

    path: str
    weight: Callable[[], Tensor | None]
    calls: list[_Call]


def _find_layers(model: nn.Module) -> dict[KANLinear | EdgeFunctions, _Layer]:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, KANLinear | EdgeFunctions)}
    owners = {}
    for module in model.modules():
        if isinstance(module, SharedKANLinear):
            owners[module.kan_functions] = lambda module=module: module.kan_weight
        elif isinstance(module, KANFeedForward) and not module.gated:
            owners[module.kan_functions] = lambda module=module: module.kan_down.weight
    return {module: _Layer(path, owners.get(module, lambda: None), []) for path, module in layers.items()}


def _named_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; those of a mapping among them, which is a batch, by theirs."""
    try:
        named = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        named = dict(kwargs)
    batches = [value for value in (*args, *named.values()) if isinstance(value, Mapping)]
    return {**named, **{key: value for batch in batches for key, value in batch.items()}}
