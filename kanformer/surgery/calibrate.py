"""Running calibration batches through a model and gathering what its blocks see."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kanformer.conversion import FFNStatistics
from kanformer.conversion.batches import run_batches, select_tokens
from kanformer.conversion.processes import several, together
from kanformer.errors import ConfigError, DataError
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
        for site in sites:
            seen = self.statistics.get(site.path)
            if seen is None or seen.hidden.total.numel() != site.dense().hidden_features:
                raise ConfigError(
                    "use the calibration", subject=site.path, got="no statistics of this block", hint="Calibrate the model that you patch, or a copy of it."
                )
        return {site.path: self.statistics[site.path] for site in sites}


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, gram: bool = True, specs: Sequence[FFNSpec] | None = None) -> Calibration:
    """Gathers, in one streaming pass, what `patch_model(model, calibration=...)` needs to know of the data.

    Under torch.distributed all processes must call it, each with its own share of the data: each gets the statistics of all of it.

    Args:
        model: an unpatched model; it is left as it was.
        batches: dicts of model inputs; padding (attention_mask 0) is ignored.
        gram: whether to gather Gram matrices of the hidden channels, (h, h) float64 per block, which pruning needs.
        specs: descriptions of the blocks, for model classes that kanformer does not know.

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
        Statistics by the site's path.

    Raises:
        DataError: no batch, no unmasked token, or an input that is not finite.
    """
    statistics = {site.path: FFNStatistics(site.path, site.path in gram) for site in sites}
    batch: dict[str, Any] = {}

    def watch(site: Site):
        dense = site.dense()

        def hook(module: nn.Module, args: tuple) -> None:
            tokens = select_tokens(args[0], batch, site.path)
            statistics[site.path].update(dense, tokens)

        return site.up.register_forward_pre_hook(hook)

    handles = [watch(site) for site in sites]
    try:
        together("calibrate", lambda: run_batches(model, batches, batch))
    finally:
        for handle in handles:
            handle.remove()
    if several():
        for site in sites:
            statistics[site.path].all_reduce(site.dense())
    empty = [path for path, gathered in statistics.items() if gathered.tokens == 0]
    if empty:
        raise DataError("calibrate", subject=", ".join(empty[:4]), got="no tokens", hint="The batches are empty, fully masked, or never reach these blocks.")
    return statistics
