"""What `collect` leaves of a model: plain tensors by block and map."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from kanformer.conversion.histogram import ChannelStats
from kanformer.errors import ConfigError, did_you_mean
from kanformer.interpret.collecting.contexts import Contexts
from kanformer.interpret.scoring.table import Scores, Table, top_of

if TYPE_CHECKING:
    from kanformer.interpret.logits import LogitEffect
    from kanformer.interpret.truth.header import Faithfulness


@dataclass(frozen=True)
class OutputStats:
    """Of one map's outputs. Tensors are float64 on the CPU.

    Attributes:
        count: tokens. mean, variance: (outputs,).
        gradient_rms: (outputs,) root mean square over tokens of the gradient of the summed loss; of the curvature's probe where the loss has
            no gradient (an encoder's movement); None where no gradient was asked for.
    """

    count: int
    mean: Tensor
    variance: Tensor
    gradient_rms: Tensor | None = None


@dataclass(frozen=True)
class HiddenStats:
    """Of what the down map of shared edges reads: h_i = psi(x_i), gated psi(gate_i) * up_i. All (hidden_features,) in float64 on the CPU.

    Attributes:
        absolute: mean of |h_i|.
    """

    mean: Tensor
    variance: Tensor
    minimum: Tensor
    maximum: Tensor
    absolute: Tensor


@dataclass(frozen=True)
class LayerStats:
    """What was seen in one KAN-FFN.

    Attributes:
        path: where the block is in the model; `also_at`: further paths of the same block.
        edges: "shared", "full" or "mlp".
        maps: statistics per map with learned functions; empty with edges="mlp".
        hidden_variance: (hidden_features,) variance of what the down map reads, with shared edges; else None.
        hidden: all of its moments, where edge scores were asked for.
        outputs: per map with edges: "kan_up", "kan_gate", "kan_down" (full), "kan_down" (shared).
        moments: per map with learned functions, (channels, n_basis + 3, n_basis + 3) float64: E u u^T of u = (1, x, b(x), B[0](x), ...).
        contexts: per map with learned functions.
        scores: per map with edges, (outputs, inputs) per score. functions: of whole functions, (groups,) per score; with shared edges only.
        notes: what could not be had, and why.
    """

    path: str
    edges: str
    maps: dict[str, ChannelStats] = field(default_factory=dict)
    hidden_variance: Tensor | None = None
    also_at: tuple[str, ...] = ()
    hidden: HiddenStats | None = None
    outputs: dict[str, OutputStats] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    contexts: dict[str, Contexts] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    functions: dict[str, Scores] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that reached the block's learned functions."""
        return max((stats.count for stats in self.maps.values()), default=0)

    def top(self, n: int = 20, by: str | None = None, map: str | None = None, functions: bool = False) -> Table:
        """The first n edges of all maps of the block, see `Scores.top`; of `map` only; with `functions` whole functions of shared edges."""
        found = self.functions if functions else self.scores
        if map is not None and map not in found:
            raise ConfigError("rank edges", subject=self.path, got=f"map={map!r}", hint=did_you_mean(map, found) if found else "No scores were collected.")
        return top_of(list(found.values()) if map is None else [found[map]], n, by)


@dataclass
class DataUsed:
    """On what statistics rest.

    Attributes:
        name: what the user calls the data. tokens: that count. sequences, batches: numbers of them, of all processes together.
        skip_first_token: whether each sequence's first token was left out.
        loss_name: what was differentiated, "" where nothing was. loss: its mean over `scored` predictions or tokens; None likewise.
    """

    name: str = ""
    tokens: int = 0
    sequences: int = 0
    batches: int = 0
    skip_first_token: bool = False
    loss_name: str = ""
    loss: float | None = None
    scored: float = 0.0


class ModelStats(dict[str, LayerStats]):
    """`LayerStats` per block, keyed and ordered as in `model.named_modules()`.

    Attributes:
        data: what they rest on.
        logits: direct effect of each residual channel on the vocabulary, or None with the reason in `logits_note`.
        model: class of the model.
        header: how much of the original the model is, None until it is put there: `stats.header = faithfulness(model, batches, stats=stats)`.
    """

    def __init__(self, layers=(), *, data: DataUsed | None = None, model: str = "") -> None:
        super().__init__(layers)
        self.data, self.model = data or DataUsed(), model
        self.logits: LogitEffect | None = None
        self.logits_note = ""
        self.header: Faithfulness | None = None

    def layer(self, layer: str | int) -> LayerStats:
        """A block by path or number; negative numbers count from the end.

        Raises:
            ConfigError: there is none.
        """
        from kanformer.interpret.blocks import pick_layer

        return self[pick_layer(self, layer)]

    def top(self, n: int = 20, by: str | None = None, functions: bool = False) -> Table:
        """The first n edges of the whole model, see `Scores.top`, under the header."""
        found = [one for layer in self.values() for one in (layer.functions if functions else layer.scores).values()]
        return replace(top_of(found, n, by), header=self.header)

    def save(self, folder: str | Path) -> None:
        """Writes statistics, contexts and scores as safetensors and JSON, whole or not at all; `load_stats(folder)` gives them back to the bit."""
        from kanformer.interpret.collecting.files import save_stats

        save_stats(self, folder)
