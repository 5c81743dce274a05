"""How much a model's final hidden state depends on each block: one block at a time gives its mean instead of its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.batches import run_batches, select_tokens
from kanformer.conversion.processes import reduced, together
from kanformer.errors import DataError
from kanformer.surgery.finding.sites import Site

Batches = Sequence[Mapping[str, Any]]
_ACTION = "measure the importance of blocks"


def measure_importance(
    model: nn.Module, sites: Sequence[Site], batches: Batches, known: Mapping[str, float | None], found: Callable[[str, float | None], None]
) -> dict[str, float | None]:
    """Relative change |H' - H| / |H| of the final hidden state (norms over all unmasked tokens) by the path of the block whose output is its mean.

    H is the base model's last_hidden_state (of an encoder-decoder the decoder's), or the first floating-point output of a model that has none. The
    mean is that of the unmasked tokens of these batches. Experts of a mixture in one module count as one block, after the router's weighted sum.

    Args:
        batches: run once, and once more for every block.
        known: what was measured already. found: called after each block.

    Returns:
        By `Site.path`; None where no token came in these batches.

    Raises:
        DataError: the model has no floating-point output.
    """
    means = _Means(sites)
    with means.watching():
        before = together(_ACTION, lambda: _final_states(model, batches))
    means.all_reduce()
    norm = float(reduced(_squares(before)))

    def change(site: Site) -> Tensor:
        mean = means.of(site)
        if mean is None:
            return torch.tensor(torch.nan, dtype=torch.float64)
        with _replaced(site, mean):
            return _squares([new - old for new, old in zip(_final_states(model, batches), before, strict=True)])

    def changes() -> Tensor:
        squares = []
        for site in sites:
            squares.append(change(site))
            found(site.path, _relative(float(squares[-1]), norm))
        return torch.stack(squares)

    sites = [site for site in sites if site.path not in known]
    measured = reduced(together(_ACTION, changes)).tolist() if sites else []
    return {**known, **{site.path: _relative(square, norm) for site, square in zip(sites, measured, strict=True)}}


def _relative(square: float, norm: float) -> float | None:
    return None if math.isnan(square) else math.sqrt(square / norm) if norm > 0 else 0.0


class _Means:
    """Sums of what the blocks put out."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.sums = {site.path: torch.zeros(site.dense().down_weight.shape[0] + 1, dtype=torch.float64) for site in sites}
        self.batch: dict[str, Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [_output(site).register_forward_hook(self._adder(site)) for site in self.sites]
        handles.append(self.sites[0].model.register_forward_pre_hook(self._begin, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def all_reduce(self) -> None:
        self.sums = {path: reduced(total) for path, total in self.sums.items()}

    def of(self, site: Site) -> Tensor | None:
        total = self.sums[site.path]
        return total[1:] / total[0] if total[0] > 0 else None

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.batch = kwargs

    def _adder(self, site: Site) -> Callable:
        def add(module: nn.Module, args: tuple, output: Any) -> None:
            rows = select_tokens(_channels_last(site, output), self.batch, site.path)
            total = rows.double().sum(0).cpu()
            self.sums[site.path] += torch.cat([total.new_tensor([rows.shape[0]]), total])

        return add


@contextmanager
def _replaced(site: Site, mean: Tensor) -> Iterator[None]:
    """The block puts out `mean` for every token."""

    def replace(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        value = mean.to(output.device, output.dtype)
        return (value.view(-1, *[1] * (output.dim() - 2)) if site.dense().channels_first else value).expand_as(output).contiguous()

    handle = _output(site).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _output(site: Site) -> nn.Module:
    """The module whose output is the block's."""
    return site.owner if site.spec.experts else site.down


def _channels_last(site: Site, output: Tensor) -> Tensor:
    return output.movedim(1, -1) if site.dense().channels_first else output


def _final_states(model: nn.Module, batches: Batches) -> list[Tensor]:
    """For each batch the unmasked rows of the final hidden state, in float32 on the CPU."""
    states: list[Tensor] = []
    base: nn.Module = getattr(model, "base_model", model)
    last: dict[str, Tensor] = {}
    batch: dict[str, Any] = {}

    def keep_base(module: nn.Module, args: tuple, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if isinstance(state, Tensor):
            last["state"] = state

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        keep_base(module, args, output)
        state = last.pop("state", None)
        state = _first_floating(output) if state is None else state
        states.append(select_tokens(state, batch, "decoder").float().cpu())

    handles = [base.register_forward_hook(keep_base), model.register_forward_hook(keep)]
    try:
        run_batches(model, batches, batch)
    finally:
        for handle in handles:
            handle.remove()
    return states


def _first_floating(output: Any) -> Tensor:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return value
    raise DataError(_ACTION, got=type(output).__name__, expected="a model output with a tensor of floating-point numbers")


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        total += tensor.double().square().sum()
    return total
