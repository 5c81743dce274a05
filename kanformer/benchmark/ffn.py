"""Whole KAN-FFNs over the MLP that was there: forward and backward."""

from __future__ import annotations

import torch
from torch import nn

from kanformer.benchmark.race import Row, Runner, backend, check, race, step
from kanformer.config import KANConfig
from kanformer.conversion.widths import mlp_parameters, width_within
from kanformer.layers import KANFeedForward

SHAPES = ((256, 1024, 1024), (384, 1536, 2048), (768, 3072, 512))  # d, h, tokens
FULL = "full edges, MLP's parameters"
VARIANTS = {
    "shared spline": {"edges": "shared"},
    "shared rational": {"edges": "shared", "basis": "rational"},
    FULL: {"edges": "full", "grid_size": 5},
}


def make(d: int, h: int, settings: dict, dtype: torch.dtype, device: str) -> KANFeedForward:
    """A block with trained-looking functions; full edges at the width that has the MLP's parameters."""
    config = KANConfig(**settings)
    form = {"gated": False, "up_bias": True, "down_bias": True}
    width = width_within(mlp_parameters(d, h, **form), d, config, **form) if config.edges == "full" else h
    block = KANFeedForward(d, width, activation="gelu", config=config)
    block.reset_parameters()
    for parameter in block.spline_parameters():
        nn.init.normal_(parameter, std=0.05)
    return block.to(device, dtype)


def measure_ffn(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int, paths: tuple[str, ...], device: str = "cpu") -> list[Row]:
    """The MLP first, then each variant by each path."""
    d, h, tokens = shape
    x, grad = torch.randn(tokens, d, device=device).to(dtype).requires_grad_(), torch.randn(tokens, d, device=device).to(dtype)
    runners = [Runner("MLP", "-", step(make(d, h, {"edges": "mlp"}, dtype, device), x, grad))]
    for name, settings in VARIANTS.items():
        block = make(d, h, settings, dtype, device)
        for path in paths:
            call = step(block, x, grad)
            with backend(path):
                check(name, block, x, grad, call())
            runners.append(Runner(name, path, call))
    return race("ffn", f"{d} x {h} x {tokens}", dtype, runners, rounds)
