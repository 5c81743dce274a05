"""The measured change of the loss when an edge, or a function, is held at its mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion import processes
from kanformer.conversion.batches import run_batches
from kanformer.errors import DataError
from kanformer.interpret.collect import collect
from kanformer.interpret.collecting.losses import Measured, Objective, UserLoss
from kanformer.interpret.collecting.stats import ModelStats
from kanformer.interpret.truth.hold import Positions, Target, held_at_means, read_targets
from kanformer.ops import use_backend


@dataclass(frozen=True)
class Ablations:
    """Measured mean ablations, one at a time. All tensors are float64 (n,).

    Attributes:
        targets: what was held.
        change: loss with the target at its mean minus loss without, per predicted token (or what the loss is a mean over).
        error: standard error of `change`, from its differences sequence by sequence (batch by batch where the loss is known of batches only); NaN with
            fewer than two of them. It tells what other text would change, not the rounding of a low precision: measure small edges in float64.
        loss, loss_name: of the model as it is. units: number of sequences or batches. scored: what the loss is a mean over.
    """

    targets: tuple[Target, ...]
    change: Tensor
    error: Tensor
    loss: float
    loss_name: str
    units: int
    scored: float


def ablate(
    model: nn.Module,
    batches: Iterable[Mapping],
    targets: Iterable[Any],
    *,
    stats: ModelStats | None = None,
    loss: UserLoss | None = None,
    skip_first_token: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Ablations:
    """Runs the model once as it is and once per target on every batch, which are the same tokens: the differences are paired.

    Args:
        model: a patched model; afterwards it is as it was.
        batches: kept as a list.
        targets: `Target`s, rows of `stats.top(20)`, or tuples (layer, map, output, input), see `Target`.
        stats: where the means come from: what `collect` returned with any score; None gathers them from these batches.
        loss: see `Objective`. An encoder's movement is away from what it gives unchanged.
        skip_first_token: as in `collect`; the first token of a sequence keeps what the target gives there. Ignored with `stats`, which know.
        progress: called with a line of text per batch.

    Raises:
        ConfigError: an unknown layer, edge or function. DataError: no batches, no loss to be made of them.
    """
    batches = [batches] if isinstance(batches, Mapping) else list(batches)
    if stats is None:
        stats = collect(model, batches, 2**62, scores=("std",), skip_first_token=skip_first_token)
    chosen = read_targets(model, stats, targets)
    meter = Meter(model, loss, Positions(stats.data.skip_first_token))
    holders = [_holder(model, stats, [target], meter.positions) for target in chosen]
    with use_backend("eager"):
        processes.together("ablate", lambda: meter.run(batches, holders, progress))
    change, error = meter.result()
    return Ablations(tuple(chosen), change, error, meter.loss, meter.objective.name, meter.units, meter.scored)


def _holder(model: nn.Module, stats: ModelStats, targets: Sequence[Target], positions: Positions) -> Callable:
    return lambda: held_at_means(model, stats, targets, positions)


class Meter:
    """Losses of a model under several changes, against its own loss on the same batches."""

    def __init__(self, model: nn.Module, loss: UserLoss | None, positions: Positions) -> None:
        self.model, self.objective, self.positions = model, Objective(model, loss), positions
        self.loss, self.scored, self.units = 0.0, 0.0, 0

    def run(self, batches: Sequence[Mapping], changes: Sequence[Callable], progress: Callable[[str], None] | None = None) -> None:
        """Measures every change (each gives a context manager) on all batches."""
        self.sums = torch.zeros(3, len(changes), dtype=torch.float64)  # of differences, of their squares, of differences times counts
        self.own = torch.zeros(4, dtype=torch.float64)  # of losses, counts, squared counts, units
        for number, batch in enumerate(batches, 1):
            found: dict[str, Any] = {}
            run_batches(self.model, [batch], look=lambda outputs, inputs, found=found: found.update(outputs=_kept(outputs), inputs=inputs))
            reference, inputs = found["outputs"], found["inputs"]
            self.positions.start(inputs)
            with torch.no_grad():
                base, counts = _units(self.objective(reference, inputs))
                self.own += torch.stack([base.sum(), counts.sum(), counts.square().sum(), torch.tensor(float(len(base)))])
                for column, change in enumerate(changes):
                    with change():
                        run_batches(self.model, [inputs], look=lambda outputs, _, found=found: found.update(changed=outputs))
                    moved = _units(self.objective(found.pop("changed"), inputs, reference))[0] - base
                    self.sums[:, column] += torch.stack([moved.sum(), moved.square().sum(), (moved * counts).sum()])
            if progress is not None:
                progress(f"ablation: batch {number} of {len(batches)}, {len(changes)} changes each")

    def result(self) -> tuple[Tensor, Tensor]:
        """(change, standard error), (changes,) each, over all processes; a ratio estimate, since sequences differ in length."""
        sums = processes.reduced(self.sums)
        loss, total, squares, units = processes.reduced(self.own).tolist()
        if not total:
            raise DataError("measure the loss", got="nothing to predict", expected="batches with sequences of two tokens or more, or labels")
        self.loss, self.scored, self.units = loss / total, total, int(units)
        change = sums[0] / total
        spread = (sums[1] - 2 * change * sums[2] + change.square() * squares).clamp(min=0)
        error = (spread * units / (units - 1)).sqrt() / total if units > 1 else torch.full_like(change, torch.nan)
        return change, error


def _units(measured: Measured) -> tuple[Tensor, Tensor]:
    """Summed losses and counts, (units,) each in float64 on the CPU."""
    if measured.sequences is not None and measured.counts is not None:
        return measured.sequences.cpu(), measured.counts.cpu()
    return measured.total.detach().double().cpu().view(1), torch.tensor([measured.count], dtype=torch.float64)


def _kept(outputs: Any) -> Any:
    return outputs.detach() if isinstance(outputs, Tensor) else outputs
