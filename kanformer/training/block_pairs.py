"""What the original's blocks read and gave in one pass, and how near other blocks come to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from kanformer.conversion.batches import select_tokens
from kanformer.conversion.moments import Moments
from kanformer.surgery.finding.sites import Site


@contextlib.contextmanager
def watched_blocks(sites: Sequence[Site], batch: dict[str, Tensor]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within the block, a pass of the sites' model over `batch` fills the mapping: number of the site -> (input, output), each (tokens, d).

    Padding is left out. A block that runs several times in a pass (ALBERT's) shows its last.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    inputs: dict[int, Tensor] = {}

    def watch(number: int, site: Site) -> list[Any]:
        def before(module: nn.Module, args: tuple) -> None:
            inputs[number] = select_tokens(args[0], batch, site.path)

        def after(module: nn.Module, args: tuple, output: Tensor) -> None:
            seen[number] = (inputs.pop(number), select_tokens(output, batch, site.path))

        first = site.part(site.spec.input_norm) if site.spec.input_norm else site.up
        return [first.register_forward_pre_hook(before), site.down.register_forward_hook(after)]

    handles = [handle for number, site in enumerate(sites) for handle in watch(number, site)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Unexplained:
    """Streams the fraction of variance unexplained (FVU): the mean squared error over the variance of what was to be explained.

    Both are means over all tokens and channels, the variance about each channel's own mean: FVU = sum_c E[(y_c - t_c)^2] / sum_c Var[t_c].
    1 - FVU is the explained variance. Sums are in float64.
    Source: EleutherAI's sparsify, `fvu`: squared error over total variance.
    """

    def __init__(self) -> None:
        self.error = 0.0
        self.targets: Moments | None = None

    def add(self, output: Tensor, target: Tensor) -> None:
        """Takes in rows (tokens, d)."""
        if self.targets is None:
            self.targets = Moments(target.shape[-1])
        self.error += float((output.double() - target.double()).square().mean(-1).sum())
        self.targets.add(target)

    @property
    def variance(self) -> float:
        """Of the targets, a mean over the channels."""
        return float("nan") if self.targets is None else max(float(self.targets.variance.mean()), 1e-12)

    @property
    def fvu(self) -> float:
        return float("nan") if self.targets is None else self.error / self.targets.count / self.variance
