"""What calibrating a model finds out, by block: good for any number of patches of copies of the same model, and for looking at."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kanformer.conversion import DenseFFN, FFNStatistics
from kanformer.conversion.error_curve import ErrorCurve
from kanformer.conversion.widths import mlp_parameters
from kanformer.errors import ConfigError
from kanformer.surgery.assemble import dense_blocks, site_path
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.tables import table

_HEADER = ("block", "x", "d/h", "tokens", "linear share", "importance", "parameters")


@dataclass(frozen=True)
class BlockForm:
    """Widths and form of one MLP; `other_parameters` are those of its activation and norms."""

    in_features: int
    hidden_features: int
    gated: bool
    up_bias: bool
    down_bias: bool
    other_parameters: int

    @classmethod
    def of(cls, dense: DenseFFN) -> BlockForm:
        biases = (dense.up_bias is not None, dense.down_bias is not None)
        return cls(dense.in_features, dense.hidden_features, dense.gated, *biases, dense.other_parameters)

    @property
    def parameters(self) -> int:
        """What the MLP costs."""
        form = {"gated": self.gated, "up_bias": self.up_bias, "down_bias": self.down_bias}
        return mlp_parameters(self.in_features, self.hidden_features, **form) + self.other_parameters


@dataclass(frozen=True)
class BlockNumbers:
    """One block (an expert of a mixture is one) in numbers.

    Attributes:
        site: path of the module that is replaced: its own, or that of all experts together.
        linear_share: R^2 of the best affine map from its input to its output, None if it was not asked for or no token came here.
        importance: relative change |H' - H| / |H| of the final hidden state when the output at `site` is replaced by its mean; None if not measured.
        parameters: of the MLP.
    """

    path: str
    site: str
    in_features: int
    hidden_features: int
    tokens: int
    linear_share: float | None
    importance: float | None
    parameters: int


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` saw. `print(calibration)` shows its numbers, a line per block.

    Attributes:
        statistics, forms: by `block_paths`. gram: whether Gram matrices were gathered.
        importance: by the path of the site. curves: by `block_paths`; both empty unless asked for.
        model_class, base_model: of the model that was calibrated; base_model is its folder or hub id, "" if it has none.
    """

    statistics: dict[str, FFNStatistics]
    gram: bool
    forms: dict[str, BlockForm] = field(default_factory=dict)
    importance: dict[str, float | None] = field(default_factory=dict)
    curves: dict[str, ErrorCurve] = field(default_factory=dict)
    model_class: str = ""
    base_model: str = ""

    def of(self, sites: Sequence[Site], *, gram: Collection[str]) -> dict[str, FFNStatistics]:
        """The statistics of these blocks, on their devices; `gram` are the paths of those that need Gram matrices.

        Raises:
            ConfigError: a block was not seen, has another width, or its Gram matrix was not gathered.
        """
        if gram and not self.gram:
            raise ConfigError("prune", got="a calibration without Gram matrices", hint="Calibrate with gram=True.")
        found: dict[str, FFNStatistics] = {}
        for site in sites:
            for path, dense in dense_blocks(site).items():
                seen = self.statistics.get(path)
                widths = (dense.in_features, dense.hidden_features)
                if seen is None or (seen.tokens and (seen.inputs.total.numel(), seen.hidden.total.numel()) != widths):
                    raise ConfigError(
                        "use the calibration", subject=path, got="no statistics of this block", hint="Calibrate the model that you patch, or a copy of it."
                    )
                found[path] = seen.to(dense.up_weight.device)
        return found

    def blocks(self) -> tuple[BlockNumbers, ...]:
        """The numbers of every block, in the order of the model."""
        found = []
        for path, seen in self.statistics.items():
            form, site = self.forms[path], site_path(path)
            share = seen.linear_share() if seen.tokens else None
            found.append(BlockNumbers(path, site, form.in_features, form.hidden_features, seen.tokens, share, self.importance.get(site), form.parameters))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain JSON values."""
        return {"model_class": self.model_class, "base_model": self.base_model, "blocks": [dataclasses.asdict(block) for block in self.blocks()]}

    def save(self, path: str | Path) -> None:
        """Writes a folder, complete or not there, that `kanformer.load_calibration` reads: a JSON file, and a safetensors file per block.

        A block's file takes 8 bytes times h (h + 1) / 2 for its Gram matrix, 8 (d + 1) (2 d + 1) for the moments of the linear share and at most
        1 KiB times (d + 2 h) for samples of the rows: 15 MiB for MiniLM's blocks (d=384, h=1536). By this formula it is 52 MiB for GPT-2's and
        1.0 GiB for Llama-3-8B's.

        Raises:
            CheckpointError: it cannot be written; what was there before is untouched.
        """
        from kanformer.surgery.calibrating.files import write_calibration

        write_calibration(self, Path(path))

    def __str__(self) -> str:
        by_site: dict[str, list[BlockNumbers]] = {}
        for block in self.blocks():
            by_site.setdefault(block.site, []).append(block)
        return f"{self.model_class}\n" + table(_HEADER, [_row(site, blocks) for site, blocks in by_site.items()], right=range(1, len(_HEADER)))


def _row(site: str, blocks: list[BlockNumbers]) -> tuple[str, ...]:
    """One line; the linear share of several experts is their mean, weighted by tokens."""
    first, tokens = blocks[0], sum(block.tokens for block in blocks)
    shares = [(block.linear_share, block.tokens) for block in blocks if block.linear_share is not None]
    share = _mean(shares)
    return (
        site,
        str(len(blocks)),
        f"{first.in_features}/{first.hidden_features}",
        f"{tokens:,}",
        "-" if share is None else f"{share:.4f}",
        "-" if first.importance is None else f"{first.importance:.4f}",
        f"{sum(block.parameters for block in blocks):,}",
    )


def _mean(values: Iterable[tuple[float, int]]) -> float | None:
    pairs = list(values)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs) if pairs else None
