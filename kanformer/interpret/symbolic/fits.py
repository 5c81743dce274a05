"""What fitting formulas found: arrays per map, read as tables, sets and single formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kanformer.errors import ConfigError
from kanformer.surgery.tables import table

if TYPE_CHECKING:
    from kanformer.interpret.truth.header import Faithfulness

OUTCOMES = ("negligible", "linear", "unique", "ambiguous", "unsnappable")
NEGLIGIBLE, LINEAR, UNIQUE, AMBIGUOUS, UNSNAPPABLE = range(5)


@dataclass(frozen=True)
class Candidate:
    """One family's fit to one function.

    Attributes:
        numbers: a, t, c, e, d of c * f(a * (x - t)) + e * x + d, or None where they were not kept.
        score: of PySR: -log(error / error of the simpler one) / (difference in complexity); 0 for the first.
    """

    family: str
    complexity: float
    r2: float
    nrmse: float
    score: float
    numbers: tuple[float, ...] | None


@dataclass(frozen=True)
class MapFits:
    """Formulas for functions of one map; tensors on the CPU, (n,) unless said otherwise, sorted by input and output.

    Attributes:
        path, map, shared, base: which map, whether its edges share functions, and the name of its base function in `base_functions`, "" if it is none of them.
        families, complexities: of the columns of `table`.
        input, output: input channel or group; output channel, -1 with shared edges.
        outcome: number in `OUTCOMES`. family: number in `families` of the chosen one, of the nearest one where the outcome is unsnappable.
        numbers: (n, 5) a, t, c, e, d.
        r2: on the data's density. r2_uniform: evenly over the grid's range.
        nrmse: rms error over the standard deviation of the node: of the output with full edges, of the function itself (the hidden channel) with shared.
        weight: standard deviation of what the function adds over that of the node, or, with shared edges, of all the outputs together.
        max_error: largest error between the quantiles 0.1 % and 99.9 %, in the function's units. std: of the function on the data.
        condition: of the 2x2 Gram matrix of the Jacobian in (a, t); infinite: they cannot be told apart.
        low, high: range in which the formula is valid, quantiles 0.5 % and 99.5 % of the input.
        table: (n, families) R2, NaN where a family was not tried, or is not defined on the data. Families that were beaten by far are on the
            search's grid only, a lower bound. equivalent: (n, families) the accepted families within `tie` of the best.
        nodes: (inputs, 64) x at equal masses of data, by input. candidates: (n, families, 5) numbers of all families, or None for large maps.
        node_source: how the nodes' deviations were known: "measured", "given", or "independent" (edges taken to be uncorrelated).
        score, score_name: what the function is worth to the loss, "effect" or "sens" of the statistics; NaN: not kept; None and "": not collected.
        settings: tol_node, r2_min, tie, negligible.
    """

    path: str
    map: str
    shared: bool
    base: str
    families: tuple[str, ...]
    complexities: tuple[float, ...]
    input: Tensor
    output: Tensor
    outcome: Tensor
    family: Tensor
    numbers: Tensor
    r2: Tensor
    r2_uniform: Tensor
    nrmse: Tensor
    weight: Tensor
    max_error: Tensor
    std: Tensor
    condition: Tensor
    low: Tensor
    high: Tensor
    table: Tensor
    equivalent: Tensor
    nodes: Tensor
    candidates: Tensor | None
    tokens: int
    n_functions: int
    node_source: str
    settings: dict[str, float] = field(default_factory=dict)
    score: Tensor | None = None
    score_name: str = ""

    def __len__(self) -> int:
        return len(self.input)

    @property
    def accepted(self) -> Tensor:
        """(n,) which functions have a formula within the tolerances."""
        return self.outcome != UNSNAPPABLE

    @property
    def effect(self) -> Tensor:
        """(n,) rms error that the formula puts into the node (with shared edges: into all outputs together), over its standard deviation."""
        return self.weight * (1 - self.r2).clamp(min=0).sqrt()

    @property
    def loss_effect(self) -> Tensor | None:
        """(n,) what the formula's error may do to the loss, by size: |effect| (1 - R2), for a mean ablation's second order falls with the variance that is
        left, or sens sqrt(1 - R2). None where a score is missing."""
        if self.score is None or bool(self.score.isnan().any()):
            return None
        left = (1 - self.r2).clamp(min=0)
        return self.score.abs() * (left if self.score_name == "effect" else left.sqrt())

    def counts(self) -> dict[str, int]:
        """How many functions have each outcome."""
        return {name: int((self.outcome == number).sum()) for number, name in enumerate(OUTCOMES)}

    def family_counts(self) -> dict[str, int]:
        """How many accepted functions have each family, the most frequent first."""
        found = torch.bincount(self.family[self.accepted], minlength=len(self.families))
        order = found.argsort(descending=True, stable=True).tolist()
        return {self.families[i]: int(found[i]) for i in order if found[i]}

    def find(self, input: int, output: int | None = None) -> int:
        """The place of a function in these tensors.

        Raises:
            ConfigError: it was not fitted, or is not in the map.
        """
        where = (self.input == input) & (self.output == (-1 if self.shared else output if output is not None else -1))
        if not bool(where.any()):
            hint = "Name the group only: its edges share the function." if self.shared else "Name input and output."
            raise ConfigError("look at a formula", subject=f"{self.path}, {self.map}", got=f"input={input}, output={output}", hint=f"It was not fitted. {hint}")
        return int(where.nonzero()[0])

    def equivalence(self, place: int) -> list[str]:
        """The families that fit as well as the chosen one, the simplest first."""
        chosen = self.equivalent[place].nonzero().flatten().tolist()
        return [self.families[i] for i in sorted(chosen, key=lambda i: (self.complexities[i], -float(self.table[place, i])))]

    def pareto(self, place: int) -> list[Candidate]:
        """The families that no simpler one equals, by rising complexity."""
        scale = float(self.nrmse[place]) / max(float((1 - self.r2[place]).clamp(min=1e-30).sqrt()), 1e-30)
        found: list[Candidate] = []
        order = sorted(range(len(self.families)), key=lambda i: (self.complexities[i], -float(self.table[place, i].nan_to_num(-1))))
        for i in order:
            r2 = float(self.table[place, i])
            if math.isnan(r2) or (found and r2 <= found[-1].r2 + 1e-9):
                continue
            error, score = max(1 - r2, 1e-12), 0.0
            if found:
                steps = max(self.complexities[i] - found[-1].complexity, 1e-9)
                score = math.log(max(1 - found[-1].r2, 1e-12) / error) / steps
            numbers = None if self.candidates is None else tuple(self.candidates[place, i].tolist())
            found.append(Candidate(self.families[i], self.complexities[i], r2, scale * error**0.5, score, numbers))
        return found

    def pick(self, places: Tensor) -> MapFits:
        """These functions alone."""
        names = ("input", "output", "outcome", "family", "numbers", "r2", "r2_uniform", "nrmse", "weight", "max_error")
        names += ("std", "condition", "low", "high", "table", "equivalent")
        candidates = None if self.candidates is None else self.candidates[places]
        score = None if self.score is None else self.score[places]
        return replace(self, **{name: getattr(self, name)[places] for name in names}, candidates=candidates, score=score)

    def formula(self, place: int, *, nice: bool = False):
        """The chosen formula as a `Formula`; `nice`: with short constants where the tolerance allows."""
        from kanformer.interpret.symbolic.formula import formula_of

        return formula_of(self, place, nice)


class SymbolicFits(Mapping[str, dict[str, MapFits]]):
    """`MapFits` by the block's path and the map's name. `print(fits)` shows how many functions of each layer had each outcome.

    Attributes:
        header: how much of the original the model is, where the statistics knew; with `snapped=` where that was measured.
    """

    def __init__(self, maps: dict[str, dict[str, MapFits]], header: Faithfulness | None = None) -> None:
        self._maps, self.header = maps, header

    def __getitem__(self, path: str) -> dict[str, MapFits]:
        return self._maps[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def all_maps(self) -> Iterator[MapFits]:
        """Every map's fits."""
        for maps in self._maps.values():
            yield from maps.values()

    def summary(self) -> list[dict[str, Any]]:
        """A row per map: counts of the outcomes, how many were fitted, and the most frequent families."""
        return [
            {"layer": one.path, "map": one.map, "functions": one.n_functions, "fitted": len(one), **one.counts(), "families": one.family_counts()}
            for one in self.all_maps()
        ]

    def __str__(self) -> str:
        rows = []
        for row in self.summary():
            common = ", ".join(f"{name} {count:,}" for name, count in list(row["families"].items())[:4])
            rows.append((row["layer"], row["map"].removeprefix("kan_"), f"{row['fitted']:,}", *(f"{row[name]:,}" for name in OUTCOMES), common))
        return table(("layer", "map", "fitted", *OUTCOMES, "most frequent families"), rows, right=range(2, 8))
