"""Running calibration batches through a model and gathering what its blocks see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from kanformer.conversion import FFNStatistics
from kanformer.conversion.batches import run_batches, select_tokens
from kanformer.errors import DataError
from kanformer.surgery.sites import Site


def collect_statistics(model: nn.Module, sites: Sequence[Site], batches: Iterable[Mapping[str, Any]], *, gram: bool) -> dict[str, FFNStatistics]:
    """One streaming pass, in eval mode and without gradients; the model is afterwards as before.

    Args:
        batches: dicts of model inputs; padding (attention_mask 0) is ignored.
        gram: whether to gather Gram matrices of the hidden channels, (h, h) float64 per block.

    Returns:
        Statistics by the site's path.

    Raises:
        DataError: no batch, no unmasked token, or an input that is not finite.
    """
    statistics = {site.path: FFNStatistics(site.path, gram) for site in sites}
    batch: dict[str, Any] = {}

    def watch(site: Site):
        dense = site.dense()

        def hook(module: nn.Module, args: tuple) -> None:
            tokens = select_tokens(args[0], batch, site.path)
            statistics[site.path].update(dense, tokens)

        return site.up.register_forward_pre_hook(hook)

    handles = [watch(site) for site in sites]
    try:
        run_batches(model, batches, batch)
    finally:
        for handle in handles:
            handle.remove()
    empty = [path for path, gathered in statistics.items() if gathered.tokens == 0]
    if empty:
        raise DataError("calibrate", subject=", ".join(empty[:4]), got="no tokens", hint="The batches are empty, fully masked, or never reach these blocks.")
    return statistics


