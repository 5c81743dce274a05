"""Other people's KAN layers as FFNs of the same widths, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import nn

from kanformer.benchmark.ffn import make
from kanformer.benchmark.race import Row, Runner, race, step


def _efficient_kan(module, d: int, h: int) -> nn.Module:
    return module.KAN([d, h, d])


def _fast_kan(module, d: int, h: int) -> nn.Module:
    return module.FastKAN([d, h, d])


def _pykan(module, d: int, h: int) -> nn.Module:
    return module.KAN(width=[d, h, d], auto_save=False, symbolic_enabled=False, save_act=False)


class _RationalFFN(nn.Module):
    def __init__(self, module, d: int, h: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, d)
        self.function = module.KAT_Group(mode="gelu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.function(self.up(x).unsqueeze(0)).squeeze(0))


PEERS: dict[str, tuple[str, Callable]] = {  # name -> (module to import, maker of a d -> h -> d block)
    "efficient-kan": ("efficient_kan", _efficient_kan),
    "fast-kan": ("fastkan", _fast_kan),
    "pykan": ("kan", _pykan),
    "rational_kat": ("kat_rational", _RationalFFN),
}


def measure_peers(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int, say: Callable[[str], None], device: str = "cpu") -> list[Row]:
    """The MLP and every peer that can be imported; `say` gets a line for each that cannot, or that fails."""
    d, h, tokens = shape
    x, grad = torch.randn(tokens, d, device=device).to(dtype).requires_grad_(), torch.randn(tokens, d, device=device).to(dtype)
    runners = [Runner("MLP", "-", step(make(d, h, {"edges": "mlp"}, dtype, device), x, grad))]
    for name, (module, maker) in PEERS.items():
        try:
            imported = importlib.import_module(module)
        except ImportError:
            say(f"peer {name}: skipped, no module {module!r} here")
            continue
        try:
            call = step(maker(imported, d, h).to(device, dtype), x, grad)
            call()
        except Exception as error:  # whatever another library raises
            say(f"peer {name}: skipped, it failed on {dtype} ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
            continue
        runners.append(Runner(name, "-", call))
    return race("peers", f"{d} x {h} x {tokens}", dtype, runners, rounds) if len(runners) > 1 else []
