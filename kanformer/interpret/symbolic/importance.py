"""What a function is worth to the loss, where `collect` gathered it: which ones are fitted first, and what an error in one may cost."""

from __future__ import annotations

import torch
from torch import Tensor

from kanformer.errors import ConfigError
from kanformer.interpret.collecting.stats import LayerStats
from kanformer.interpret.scoring.table import Scores, first_places
from kanformer.interpret.symbolic.functions import Chosen

RANKS = ("effect", "sens")


def loss_scores(seen: LayerStats, name: str) -> tuple[str, Scores] | None:
    """(name of the score, scores) of a map's functions: `effect`, else `sens`, else None. With shared edges those of whole functions."""
    found = seen.functions.get(name) if name in seen.functions else seen.scores.get(name)
    by = next((by for by in RANKS if found is not None and by in found.values), None)
    return None if found is None or by is None else (by, found)


def first_by_loss(seen: LayerStats, name: str, count: int) -> Chosen | None:
    """The first `count` functions of a map by `loss_scores`, or None without scores.

    Raises:
        ConfigError: the statistics keep fewer than that.
    """
    scored = loss_scores(seen, name)
    if scored is None:
        return None
    by, found = scored
    if len(found) < min(count, found.total):
        got = f"{count} of statistics that keep the first {len(found)} edges"
        raise ConfigError("choose edges", subject=f"{seen.path}, {name}", got=got, hint=f"collect(..., top={count}), or without top.")
    ends = found.at(first_places(found.values[by].flatten(), count))
    return Chosen(ends["input"], ends["output"])


def scores_of(seen: LayerStats, name: str, chosen: Chosen) -> tuple[str, Tensor | None]:
    """(name of the score, (n,) in float64) of the chosen functions; NaN for those that the statistics do not keep; ("", None) without scores."""
    scored = loss_scores(seen, name)
    if scored is None:
        return "", None
    by, found = scored
    values = found.values[by].double()
    if found.kind == "function":
        return by, values[chosen.input]
    if found.index is None:
        return by, values[chosen.output, chosen.input]
    width = 1 + int(torch.cat([found.index[:, 1], chosen.input]).max())
    kept, order = (found.index[:, 0] * width + found.index[:, 1]).sort()
    wanted = chosen.output * width + chosen.input
    place = torch.searchsorted(kept, wanted).clamp(max=len(kept) - 1)
    return by, torch.where(kept[place] == wanted, values[order[place]], torch.nan)
