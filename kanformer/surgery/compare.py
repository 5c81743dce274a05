"""KAN against the MLP that was there: parameters, bytes and FLOPs per token, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from kanformer.bases.bspline import BSpline
from kanformer.conversion.widths import mlp_parameters
from kanformer.errors import SurgeryError
from kanformer.layers import KANExperts, KANFeedForward
from kanformer.layers.base_functions import has_parameters
from kanformer.layers.edge_functions import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear
from kanformer.surgery.assemble import blocks_of
from kanformer.surgery.record import PatchRecord, SiteRecord, get_records
from kanformer.surgery.tables import table


@dataclass(frozen=True)
class BlockCosts:
    """One block now and before. Bytes are of parameters and buffers; FLOPs are per token, forward, a multiply-add counts two.

    The experts of a mixture are one block, whose FLOPs are those of one expert: a token costs as many times that as the router gives it experts.
    """

    path: str
    mlp_hidden: int
    kan_hidden: int
    mlp_parameters: int
    kan_parameters: int
    kan_trainable: int
    mlp_bytes: int
    kan_bytes: int
    mlp_flops: int
    kan_flops: int

    @property
    def parameter_ratio(self) -> float:
        return self.kan_parameters / self.mlp_parameters


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `print(comparison)` shows a table, `to_dict()` gives plain values."""

    model_class: str
    blocks: tuple[BlockCosts, ...]
    model_parameters: int
    model_trainable: int
    model_bytes: int
    other_parameters: int
    other_bytes: int

    def total(self, name: str) -> int:
        """Sum of one number over all blocks."""
        return sum(getattr(block, name) for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `blocks`, `feed_forward` (totals and ratios) and `model`."""
        names = ("mlp_parameters", "kan_parameters", "kan_trainable", "mlp_bytes", "kan_bytes", "mlp_flops", "kan_flops")
        totals: dict[str, Any] = {name: self.total(name) for name in names}
        totals["kan_frozen"] = totals["kan_parameters"] - totals["kan_trainable"]
        totals |= {f"{what}_ratio": totals[f"kan_{what}"] / totals[f"mlp_{what}"] for what in ("parameters", "bytes", "flops")}
        before = self.other_parameters + totals["mlp_parameters"]
        model = {
            "class": self.model_class,
            "parameters": self.model_parameters,
            "trainable": self.model_trainable,
            "frozen": self.model_parameters - self.model_trainable,
            "bytes": self.model_bytes,
            "parameters_before": before,
            "bytes_before": self.other_bytes + totals["mlp_bytes"],
            "parameters_ratio": self.model_parameters / before,
        }
        return {"blocks": [asdict(block) | {"parameter_ratio": block.parameter_ratio} for block in self.blocks], "feed_forward": totals, "model": model}

    def __str__(self) -> str:
        rows = [
            _row(b.path, f"{b.mlp_hidden}>{b.kan_hidden}", b.mlp_parameters, b.kan_parameters, b.mlp_bytes, b.kan_bytes, b.mlp_flops, b.kan_flops)
            for b in self.blocks
        ]
        totals = self.to_dict()
        ffn, model = totals["feed_forward"], totals["model"]
        keys = ("mlp_parameters", "kan_parameters", "mlp_bytes", "kan_bytes", "mlp_flops", "kan_flops")
        rows.append(_row("all blocks", "", *(ffn[key] for key in keys)))
        header = ("block", "h", "MLP params", "KAN params", "ratio", "MLP MB", "KAN MB", "MLP kFLOP/token", "KAN kFLOP/token", "ratio")
        foot = (
            f"whole model: {model['parameters']:,} parameters (before {model['parameters_before']:,}, ratio {model['parameters_ratio']:.3f}), "
            f"{model['trainable']:,} trainable, {model['frozen']:,} frozen, {model['bytes'] / 1e6:.1f} MB (before {model['bytes_before'] / 1e6:.1f})"
        )
        trainable = f"feed-forward: {ffn['kan_trainable']:,} trainable, {ffn['kan_frozen']:,} frozen"
        return f"{self.model_class}\n{table(header, rows, right=range(1, 10))}\n{trainable}\n{foot}"


def compare(model: nn.Module) -> Comparison:
    """Counts a patched model against the MLPs that were there.

    Raises:
        SurgeryError: the model is not patched.
    """
    entries = {module: entry for holder, record in get_records(model, "compare") for module, entry in _entries(holder, record)}
    found = {path: module for path, module in model.named_modules() if isinstance(module, KANFeedForward | KANExperts)}
    inside = {expert for module in found.values() if isinstance(module, KANExperts) for expert in module.kan_experts}
    blocks = {path: module for path, module in found.items() if module not in inside}
    costs = tuple(_costs(path, block, entries.get(block)) for path, block in blocks.items())
    parameters = list(model.parameters())
    buffers = list(model.buffers())
    counted = {id(tensor) for block in blocks.values() for tensor in (*block.parameters(), *block.buffers())}
    return Comparison(
        model_class=type(model).__name__,
        blocks=costs,
        model_parameters=sum(p.numel() for p in parameters),
        model_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        model_bytes=sum(t.nbytes for t in (*parameters, *buffers)),
        other_parameters=sum(p.numel() for p in parameters if id(p) not in counted),
        other_bytes=sum(t.nbytes for t in (*parameters, *buffers) if id(t) not in counted),
    )


def _row(path: str, hidden: str, mlp: int, kan: int, mlp_bytes: int, kan_bytes: int, mlp_flops: int, kan_flops: int) -> tuple[str, ...]:
    return (
        path,
        hidden,
        f"{mlp:,}",
        f"{kan:,}",
        f"{kan / mlp:.3f}",
        f"{mlp_bytes / 1e6:.2f}",
        f"{kan_bytes / 1e6:.2f}",
        f"{mlp_flops / 1e3:,.0f}",
        f"{kan_flops / 1e3:,.0f}",
        f"{kan_flops / mlp_flops:.3f}",
    )


def _entries(holder: nn.Module, record: PatchRecord) -> Iterator[tuple[nn.Module, SiteRecord]]:
    """The blocks of a patched model with what its record says of them."""
    for path, module in holder.named_modules():
        entry = next((site for site in record.sites if path == site.path or path.endswith("." + site.path)), None)
        if entry is not None and isinstance(module, KANFeedForward | KANExperts):
            yield module, entry


def _costs(path: str, module: KANFeedForward | KANExperts, entry: SiteRecord | None) -> BlockCosts:
    blocks = blocks_of(module)
    block, count = blocks[0], len(blocks)
    if entry is None:
        raise SurgeryError("compare", subject=path, got="a KAN-FFN that patch_model did not put there", hint="Compare the model that was patched.")
    up_bias = any("bias" in name for name, _ in block.kan_up.named_parameters())
    norm = [] if isinstance(module, KANFeedForward) or module.expert_norm is None else list(module.expert_norm.parameters())
    parameters = [*(p for each in blocks for p in each.parameters()), *norm]
    mlp = mlp_parameters(block.in_features, entry.mlp_hidden, gated=block.gated, up_bias=up_bias, down_bias=entry.mlp_down_bias)
    mlp = count * (mlp + _carried(block)) + sum(p.numel() for p in norm)
    return BlockCosts(
        path=path,
        mlp_hidden=entry.mlp_hidden,
        kan_hidden=block.hidden_features,
        mlp_parameters=mlp,
        kan_parameters=sum(p.numel() for p in parameters),
        kan_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        mlp_bytes=mlp * parameters[0].element_size(),
        kan_bytes=sum(t.nbytes for t in (*parameters, *module.buffers())),
        mlp_flops=_linear_flops(block.in_features, entry.mlp_hidden, block.gated) + entry.mlp_hidden * (2 if block.gated else 1),
        kan_flops=_kan_flops(block),
    )


def _carried(block: KANFeedForward) -> int:
    """Trained numbers of the activation and the norms, which the MLP had too."""
    activation = next((each.base for _, each in block.spline_modules() if has_parameters(each.base)), block.kan_functions)
    activation = nn.Identity() if isinstance(activation, EdgeFunctions) else activation
    return sum(p.numel() for each in (activation, block.input_norm, block.hidden_norm) if each is not None for p in each.parameters())


def _linear_flops(d: int, h: int, gated: bool) -> int:
    return 2 * d * h * (3 if gated else 2)


def _kan_flops(block: KANFeedForward) -> int:
    """GEMMs, one FLOP per activation and product, and the learned functions by the arithmetic of their members."""
    d, h = block.in_features, block.hidden_features
    flops = _linear_flops(d, h, block.gated) + h * (2 if block.gated else 1)
    for _, module in block.spline_modules():
        basis = module.basis
        if isinstance(module, EdgeFunctions):
            splines = 3 + 2 * basis.spline_order  # cell and position, then one polynomial
            flops += module.channels * (1 + (splines if isinstance(basis, BSpline) else basis.member_flops + 2 * basis.n_basis))
        elif isinstance(module, KANLinear):
            flops += module.in_features * basis.member_flops + 2 * module.in_features * module.out_features * basis.n_basis
    return flops
