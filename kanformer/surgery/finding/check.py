"""Whether a block computes what its description says, found by running it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion import DenseFFN
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.modules import bare

_SIZES = (4.0, 60.0)  # largest values before the activation: where activations differ from one another, and beyond the bounds that families put there
_TOLERANCES = {torch.float64: 2e-5, torch.float32: 2e-5}  # GELU and its tanh form are told apart; other dtypes: 5e-2


def disagreement(site: Site) -> str | None:
    """What the block computes besides its parts, found by running it on random tokens of unit size and on large ones; None if nothing.

    Of a split block only the first half is run. Blocks on the meta device and inline blocks are taken at their word. Hooks do not run.
    """
    weight = next(iter(site.weights.values()))
    if weight.is_meta or site.spec.structure == "inline":
        return None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            owner = bare(site.owner)
            if site.spec.activation.startswith("=") and weight.dtype not in _TOLERANCES:
                owner = copy.deepcopy(owner).float()  # which function it is, half precision cannot tell
            alone = Site(owner, "", site.spec)
            denses = alone.denses()
            x = _tokens(alone, denses)
            largest = float(denses[0].preactivation(x).abs().max())
            scales = [1.0, *(size / largest for size in _SIZES if largest > 0)]
            return next((found for scale in scales if (found := _difference(alone, denses, x * scale)) is not None), None)
    except Exception as error:
        return f"its forward could not be run on hidden states alone ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def _tokens(site: Site, denses: list[DenseFFN]) -> Tensor:
    """Random inputs (1, tokens, d); one token per expert for experts that get theirs sorted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, len(denses) if site.spec.experts == "sorted" else 4, denses[0].in_features, generator=generator)
    return x.to(device=denses[0].up_weight.device, dtype=denses[0].up_weight.dtype)


def _difference(site: Site, denses: list[DenseFFN], x: Tensor) -> str | None:
    split = site.spec.structure == "split"
    if site.spec.experts:
        actual, expected = _run_experts(site, denses, x)
    else:
        dense = denses[0]
        expected = dense.hidden(x) if split else dense.output(x)
        run = site.part(site.spec.slot) if split else site.owner
        actual = _run(run, x, dense.channels_first, x.flip(1) if site.spec.residual else None)
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return "its forward does not return one tensor of the input's shape"
    tolerance = 5e-3 if expected.is_cuda and torch.backends.cuda.matmul.allow_tf32 else _TOLERANCES.get(expected.dtype, 5e-2)
    scale = expected.abs().max().clamp(min=1e-6)
    if not bool(((actual - expected).abs().max() <= tolerance * scale) | (~torch.isfinite(expected)).any()):
        off = float((actual - expected).abs().max() / scale)
        what = "act(up(x))" if split else "the weighted sum of its experts" if site.spec.experts else "down(act(up(x)))"
        return f"its forward does more than {what}: outputs differ by {off:.1e} of their size"
    return None


def _run(module: Any, x: Tensor, channels_first: bool, residual: Tensor | None) -> Any:
    if not channels_first:
        return module(x) if residual is None else module(x, residual) - residual
    turned = x.movedim(-1, 1)
    for shape in (turned.unsqueeze(-1), turned):  # images (1, d, tokens, 1), or sequences (1, d, tokens)
        try:
            return module(shape).reshape(1, -1, x.shape[1]).movedim(1, -1)
        except RuntimeError:
            continue
    return None


def _run_experts(site: Site, denses: list[DenseFFN], x: Tensor) -> tuple[Any, Tensor]:
    """(what the module returns, what it should) for tokens that are spread over the experts."""
    count, call = len(denses), site.spec.experts
    norm = site.part(site.spec.expert_norm) if site.spec.expert_norm else nn.Identity()
    flat = x[0]
    if call == "sorted":
        return site.owner(flat), torch.cat([dense.output(flat[i : i + 1]) for i, dense in enumerate(denses)])
    if call == "weighted":
        weights = torch.linspace(0.2, 0.8, flat.shape[0] * count, device=x.device).view(-1, count).to(x.dtype)
        return site.owner(flat, weights), sum((dense.output(flat) * weights[:, i, None] for i, dense in enumerate(denses)), torch.zeros_like(flat))
    chosen = min(2, count)
    tokens = torch.arange(flat.shape[0], device=x.device)
    index = torch.stack([(tokens * chosen + i) % count for i in range(chosen)], 1)
    if call == "identities":
        index[0, 0] = count  # beyond the last
    weights = torch.linspace(0.2, 0.8, index.numel(), device=x.device).view_as(index).to(x.dtype)
    rows = [
        sum(
            (weights[t, i] * (norm(denses[e].output(flat[t : t + 1])) if e < count else flat[t : t + 1]) for i, e in enumerate(some)),
            torch.zeros_like(flat[:1]),
        )
        for t, some in enumerate(index.tolist())
    ]
    return site.owner(flat, index, weights).view_as(flat), torch.cat(rows)
