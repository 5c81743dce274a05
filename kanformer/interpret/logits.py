"""What a residual channel says to the vocabulary by the direct path: block output, residual stream, final norm, head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from kanformer.conversion import processes
from kanformer.conversion.batches import run_batches, select_tokens
from kanformer.interpret.blocks import find_blocks
from kanformer.ops import use_backend

_CHUNK_NUMBERS = 2**24
_STEP = 0.25  # of a channel's standard deviation, for the trial that the path is direct


@dataclass(frozen=True)
class LogitEffect:
    """Per residual channel j the tokens whose logits rise and fall the most when a block adds 1 to it, by the direct path only.

    Where W is the head's weight, gamma the gain and s the scale of the final norm (standard deviation, or root mean square), it is for a LayerNorm
    (1/s) (gamma_j W[t, j] - mean_j' gamma_j' W[t, j']), for an RMSNorm (1/s) gamma_j W[t, j]; s is held at what it is for each token ("cached").
    An edge that writes to channel j moves token t's logit by this times (phi - its mean). Later blocks see the channel too: that is not in it.

    Attributes:
        top, bottom: (channels, n) token ids, the largest effect first; the smallest first. top_values, bottom_values: (channels, n) effects.
        scale: mean of 1/s over the tokens, by which the values are multiplied. norm: "layer" or "rms". tokens: of how many.
        factor: what the architecture multiplies a block's output with before it adds it.
    """

    top: Tensor
    top_values: Tensor
    bottom: Tensor
    bottom_values: Tensor
    scale: float
    norm: str
    tokens: int
    factor: float = 1.0


def logit_effect(model: nn.Module, batches: Iterable[Mapping], count: int = 10) -> tuple[LogitEffect | None, str]:
    """The effect and "", or None and why there is none: no head over a vocabulary, a head that is more than a norm and a linear map, blocks
    whose output does not go straight into the residual stream (post-norm encoders such as BERT, Gemma 2). This is tried out, not looked up.

    Args:
        model: a patched language model.
        batches: where 1/s is measured; the first batch is run twice more. Of an iterator that is used up nothing is left: pass a list.
        count: tokens to keep on either end, >= 1.

    With several processes 1/s is that of all.
    """
    head = _head(model)
    if head is None:
        return None, f"{type(model).__name__} has no head over a vocabulary"
    stream: Iterator[Any] = iter([batches] if isinstance(batches, Mapping) else batches)
    first = next(stream, None)
    if processes.several() and not bool(processes.reduced(torch.tensor(float(first is not None)), "min")):
        first = None
    if first is None:
        return None, "no batch left to measure the final norm's scale on (pass a list, not an iterator)"
    with use_backend("eager"):
        norm, reason = _final_norm(model, head, first)
        if norm is None:
            return None, reason
        kind, gain = _kind(norm)
        if kind is None:
            return None, f"the norm before the head ({type(norm).__name__}) is neither a LayerNorm nor an RMSNorm"
        tried = _direct(model, norm, first)
        each = processes.gathered(torch.tensor(float("nan") if tried is None else tried, dtype=torch.float64))
        factor = float(each[0])  # of the first process: rounding differs with the batch
        if bool(each.isnan().any()):
            return None, "the last block's output does not go straight into the residual stream before the head"
        inverse, tokens = _inverse_scale(model, norm, kind, chain([first], stream))
    weight = cast(Tensor, head.weight).detach().double() * gain
    if kind == "layer":
        weight = weight - weight.mean(1, keepdim=True)
    return _ends(weight * inverse * factor, count, inverse, kind, tokens, factor), ""


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) and isinstance(getattr(head, "weight", None), Tensor) else None


def _final_norm(model: nn.Module, head: nn.Module, batch: Mapping) -> tuple[nn.Module | None, str]:
    """The module whose output is what the head reads, unchanged."""
    outputs: dict[tuple, nn.Module] = {}
    found: list[nn.Module | None] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and len(list(module.children())) == 0 and "norm" in type(module).__name__.lower():
            outputs[(output.data_ptr(), output.shape)] = module

    def look(module: nn.Module, args: tuple) -> None:
        found.append(outputs.get((args[0].data_ptr(), args[0].shape)))

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_hook(keep).remove)
        hooks.callback(head.register_forward_pre_hook(look).remove)
        run_batches(model, [batch])
    if not found or found[0] is None:
        return None, "what the head reads is not the output of a norm (a transform, or only the last tokens, between them)"
    return found[0], ""


def _kind(norm: nn.Module) -> tuple[str | None, Tensor]:
    """("layer" or "rms", the gain in float64), found by trying: its output on two inputs."""
    weight = getattr(norm, "weight", None)
    size = weight.shape[-1] if isinstance(weight, Tensor) else 0
    if not size:
        return None, torch.empty(0)
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, size, generator=generator).to(weight)
    with torch.no_grad():
        bias = getattr(norm, "bias", None)
        y = (norm(x).double() - (0 if bias is None else bias.double())).cpu()
    wide = x.double().cpu()
    for kind, centred in (("layer", wide - wide.mean(1, keepdim=True)), ("rms", wide)):
        ratio = y * centred.square().mean(1, keepdim=True).sqrt() / centred
        gain = ratio.median(0).values
        if torch.allclose(y, gain * centred / centred.square().mean(1, keepdim=True).sqrt(), rtol=0.02, atol=0.02 * float(gain.abs().max())):
            exact = weight.detach().double().cpu()
            near = next((each for each in (exact, 1 + exact) if torch.allclose(each, gain, rtol=0.05, atol=0.05 * float(gain.abs().max()))), None)
            if near is not None:
                return kind, near.to(weight.device)
    return None, torch.empty(0)


def _direct(model: nn.Module, norm: nn.Module, batch: Mapping) -> float | None:
    """What the last block's output is multiplied by on its way into the final norm's input, or None where something else happens to it."""
    block = list(find_blocks(model).values())[-1].output_dropout
    before, step = _norm_inputs(model, norm, batch), {}

    def push(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(1)).to(output)
        step["size"] = _STEP * noise * output.std()
        return output + step["size"]

    handle = block.register_forward_hook(push)
    try:
        after = _norm_inputs(model, norm, batch)
    finally:
        handle.remove()
    if "size" not in step or before.shape != after.shape or before.shape[-1] != step["size"].shape[-1]:
        return None
    change, expected = (after - before).double().reshape(-1, before.shape[-1]), step["size"].double()
    factor = float((change.mean(0) * expected).sum() / expected.square().sum())
    tolerance = 0.05 * float(expected.abs().max()) + 4 * torch.finfo(before.dtype).eps * float(before.abs().max())
    return factor if abs(factor) > 1e-6 and torch.allclose(change, factor * expected.expand_as(change), rtol=0.02, atol=tolerance) else None


def _norm_inputs(model: nn.Module, norm: nn.Module, batch: Mapping) -> Tensor:
    found: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    try:
        run_batches(model, [batch])
    finally:
        handle.remove()
    return found[-1]


def _inverse_scale(model: nn.Module, norm: nn.Module, kind: str, batches: Iterable[Mapping]) -> tuple[float, int]:
    """(mean of 1/s, tokens)."""
    current: dict[str, Any] = {}
    sums = torch.zeros(2, dtype=torch.float64)
    epsilon = next((float(getattr(norm, name)) for name in ("eps", "variance_epsilon", "epsilon") if isinstance(getattr(norm, name, None), float)), 0.0)

    def look(module: nn.Module, args: tuple) -> None:
        rows = select_tokens(args[0].detach(), current).double()
        rows = rows - rows.mean(1, keepdim=True) if kind == "layer" else rows
        sums.add_(torch.stack([(rows.square().mean(1) + epsilon).rsqrt().sum(), torch.tensor(float(len(rows)))]).to(sums))

    handle = norm.register_forward_pre_hook(look)
    try:
        processes.together("measure the final norm", lambda: run_batches(model, batches, current))
    finally:
        handle.remove()
    total, tokens = processes.reduced(sums).tolist()
    return total / max(1.0, tokens), int(tokens)


def _ends(effects: Tensor, count: int, inverse: float, kind: str, tokens: int, factor: float) -> LogitEffect:
    """The tokens at both ends of every column of (vocabulary, channels)."""
    count = min(count, effects.shape[0])
    high, low = [], []
    for part in effects.t().split(max(1, _CHUNK_NUMBERS // effects.shape[0])):
        high.append(part.topk(count, 1))
        low.append(part.topk(count, 1, largest=False))
    top, bottom = (torch.cat([each.indices for each in ends]).cpu() for ends in (high, low))
    values = (torch.cat([each.values for each in ends]).float().cpu() for ends in (high, low))
    return LogitEffect(top, next(values), bottom, next(values), inverse, kind, tokens, factor)
