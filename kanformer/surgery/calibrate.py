"""Running calibration batches through a model and gathering what its blocks see."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion import FFNStatistics
from kanformer.conversion.batches import run_batches, select_tokens, token_mask
from kanformer.conversion.processes import several, together
from kanformer.errors import ConfigError, DataError
from kanformer.surgery.assemble import block_paths
from kanformer.surgery.discover import find_sites
from kanformer.surgery.sites import Site
from kanformer.surgery.spec import FFNSpec


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` saw, by the block's path: good for any number of patches of copies of the same model."""

    statistics: dict[str, FFNStatistics]
    gram: bool

    def of(self, sites: Sequence[Site], *, gram: Collection[str]) -> dict[str, FFNStatistics]:
        """The statistics of these blocks; `gram` are the paths of those that need Gram matrices.

        Raises:
            ConfigError: a block was not seen, has another width, or its Gram matrix was not gathered.
        """
        if gram and not self.gram:
            raise ConfigError("prune", got="a calibration without Gram matrices", hint="Calibrate with gram=True.")
        paths = {path: site for site in sites for path in block_paths(site)}
        for path, site in paths.items():
            seen = self.statistics.get(path)
            if seen is None or (seen.tokens and seen.hidden.total.numel() != site.dense().hidden_features):
                raise ConfigError(
                    "use the calibration", subject=path, got="no statistics of this block", hint="Calibrate the model that you patch, or a copy of it."
                )
        return {path: self.statistics[path] for path in paths}


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, gram: bool = True, specs: Sequence[FFNSpec] | None = None) -> Calibration:
    """Gathers, in one streaming pass, what `patch_model(model, calibration=...)` needs to know of the data.

    Under torch.distributed all processes must call it, each with its own share of the data: each gets the statistics of all of it.

    Args:
        model: an unpatched model; it is left as it was.
        batches: dicts of model inputs; padding (attention_mask 0) is ignored.
        gram: whether to gather Gram matrices of the hidden channels, (h, h) float64 per block, which pruning needs.
        specs: descriptions of blocks that kanformer does not know; they come first, and what it knows applies to the rest.

    Raises:
        NoFeedForwardError: no block found. DataError: no tokens, or inputs that are not finite.
    """
    sites = [site for site in find_sites(model, specs) if site.problem() is None]
    return Calibration(collect_statistics(model, sites, batches, gram=[site.path for site in sites] if gram else ()), gram)


def collect_statistics(model: nn.Module, sites: Sequence[Site], batches: Iterable[Mapping[str, Any]], *, gram: Collection[str]) -> dict[str, FFNStatistics]:
    """One streaming pass, in eval mode and without gradients; the model is afterwards as before.

    Under torch.distributed all processes must call it, each with its own share of the data: each gets the statistics of all of it.

    Args:
        batches: dicts of model inputs; padding (attention_mask 0) is ignored.
        gram: paths of the blocks whose Gram matrices of the hidden channels, (h, h) float64, are gathered.

    Returns:
        Statistics by `block_paths` of the sites. An expert that no token reached has none: its grids stay as configured, and a warning says so.

    Raises:
        DataError: no batch, no unmasked token, or an input that is not finite.
    """
    names = {site: block_paths(site) for site in sites}
    statistics = {path: FFNStatistics(path, site.path in gram) for site, paths in names.items() for path in paths}
    batch: dict[str, Any] = {}
    handles = [_watch(site, [statistics[path] for path in paths], batch) for site, paths in names.items()]
    try:
        together("calibrate", lambda: run_batches(model, batches, batch))
    finally:
        for handle in handles:
            handle.remove()
    if several():
        for site, paths in names.items():
            for path, dense in zip(paths, site.denses(), strict=True):
                statistics[path].all_reduce(dense)
    empty = [site.path for site, paths in names.items() if not any(statistics[path].tokens for path in paths)]
    if empty:
        raise DataError("calibrate", subject=", ".join(empty[:4]), got="no tokens", hint="The batches are empty, fully masked, or never reach these blocks.")
    idle = [path for path, gathered in statistics.items() if gathered.tokens == 0]
    if idle:
        warnings.warn(f"no calibration token reached {len(idle)} of {len(statistics)} blocks: experts such as {idle[0]}. Use more data.", stacklevel=3)
    return statistics


def _watch(site: Site, statistics: list[FFNStatistics], batch: dict[str, Any]) -> Any:
    """Registers a hook that adds what arrives at the block, or at each of its experts."""
    denses = site.denses()

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0].movedim(1, -1) if denses[0].channels_first else args[0]
        if not site.spec.experts:
            statistics[0].update(denses[0], select_tokens(x, batch, site.path))
            return
        mask = token_mask(x, batch, site.path)
        for gathered, dense, rows in zip(statistics, denses, _shares(site, (*args[1:], *kwargs.values()), x, len(denses)), strict=True):
            gathered.update(dense, x.reshape(-1, x.shape[-1])[rows if mask is None or site.spec.experts == "sorted" else rows & mask])

    return (site.owner if site.spec.experts else site.up).register_forward_pre_hook(look, with_kwargs=True)


def _shares(site: Site, routing: tuple, x: Tensor, experts: int) -> Iterator[Tensor]:
    """For every expert which tokens it gets, (tokens,) booleans."""
    tokens = x.numel() // x.shape[-1]
    everyone = torch.ones(tokens, dtype=torch.bool, device=x.device)
    for number in range(experts):
        if site.spec.experts == "weighted":
            yield everyone
        elif site.spec.experts == "sorted":
            yield torch.arange(tokens, device=x.device) // (tokens // experts) == number
        else:
            yield (routing[0] == number).any(-1)
