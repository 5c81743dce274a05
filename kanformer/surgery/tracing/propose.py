"""From a traced block to the description of it: every way in which its parts can be read, and the first that computes what ran."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kanformer.errors import KanformerError
from kanformer.surgery.finding.check import disagreement
from kanformer.surgery.finding.products import possible_products
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.finding.spec import FFNSpec, spec_name
from kanformer.surgery.modules import get_path, join
from kanformer.surgery.tracing.blocks import TracedBlock
from kanformer.surgery.tracing.parts import (
    Dropout,
    activations,
    below,
    dropouts_after,
    hidden_dropouts,
    hidden_norms,
    input_norm,
    operations_of,
    owner_of,
)
from kanformer.surgery.tracing.trace import Trace
from kanformer.surgery.tracing.values import base


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a block would be called: `spec` for the module at `owner_path`, or the reason why there is none."""

    owner_path: str
    spec: FFNSpec | None
    reason: str = ""


class Proposer:
    """Looks for a description of one traced block."""

    def __init__(self, model: nn.Module, trace: Trace, block: TracedBlock) -> None:
        self.model, self.trace, self.block = model, trace, block
        maps = [value.map for value in (*block.ups, block.down) if value.map]
        self.paths = [each.module for each in maps]
        self.names = [each.name for each in maps]
        self.owner = owner_of(model, self.paths)
        self.norm, self.entry = input_norm(model, trace, block, self.owner)
        self.between = hidden_dropouts(model, trace, block)
        self.norms = hidden_norms(model, trace, block)

    def propose(self) -> Proposal:
        """The first description that fits what ran, what the parts allow and, on random tokens of all sizes, the block itself."""
        for path, name in zip(self.paths, self.names, strict=True):
            if name != "weight":
                holder = type(get_path(self.model, path)).__name__
                reason = f"its weight {name} is a parameter of {holder} itself; a spec needs maps that are modules: nn.Linear, Conv1D or a 1x1 convolution"
                return Proposal(self.owner, None, reason)
        reasons: list[str] = []
        for owner, spec in self._candidates():
            reason = self._problem(Site(self.model, owner, spec))
            if reason is None:
                return Proposal(owner, spec)
            if reason:
                reasons.append(reason)
        # Candidates that compute something else say nothing about the block; those that were near say why they are no good.
        return Proposal(self.owner, None, reasons[0] if reasons else self._nothing_fits())

    def _problem(self, site: Site) -> str | None:
        """What speaks against a description; "" if it is not this block's at all."""
        reason = site.problem()
        if reason is not None:
            return reason
        if not self._computes(site):
            return ""
        if site.spec.structure == "inline":
            done = operations_of(site.activation, self.block)
            rest = [name for name in self.block.operations if name not in done]
            if rest and not site.spec.hidden_norm:
                return f"between its maps there is more than its activation: {', '.join(dict.fromkeys(rest))}"
        return disagreement(site)

    @torch.no_grad()
    def _computes(self, site: Site) -> bool:
        """Whether the description gives the numbers that went through the model."""
        first, last = self.block.ups[0].map, self.block.down.map
        assert first and last
        try:
            dense = dataclasses.replace(site.dense(), input_norm=None)
            hidden = dense.hidden(first.x)
            return _close(hidden, last.x) and _close(dense.output(first.x), last.y)
        except (KanformerError, RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False

    def _candidates(self) -> Iterator[tuple[str, FFNSpec]]:
        for activation in activations(self.model, self.trace, self.block):
            owner = self.owner if activation.startswith("=") else owner_of(self.model, [*self.paths, activation])
            inner = [str(below(path, owner)) for path in self.paths]
            name = activation if activation.startswith("=") else below(activation, owner)
            for maps in self._roles(inner):
                for norm in (*self.norms, None):
                    spec = FFNSpec(
                        name=spec_name(type(get_path(self.model, owner)).__name__),
                        owner=re.escape(type(get_path(self.model, owner)).__name__),
                        activation=str(name),
                        hidden_norm=below(norm, owner) if norm else None,
                        **maps,
                    )
                    yield from ((owner, each) for each in self._structures(owner, spec))

    def _roles(self, paths: list[str]) -> Iterator[dict[str, Any]]:
        ups, down = paths[:-1], paths[-1]
        if len(ups) == 2:
            yield from ({"gate": gate, "up": up, "down": down} for gate, up in (ups, ups[::-1]))
        elif self.block.fused:
            yield from ({"up": ups[0], "down": down, "fused": order} for order in ("gate_first", "up_first", "interleaved"))
        else:
            yield {"up": ups[0], "down": down}

    def _structures(self, owner: str, spec: FFNSpec) -> Iterator[FFNSpec]:
        yield from self._as_module(owner, spec)
        if not self.block.gated:
            yield from self._as_split(owner, spec)
            if not spec.activation.startswith("="):
                yield from self._inline(owner, spec)

    def _as_module(self, owner: str, spec: FFNSpec) -> Iterator[FFNSpec]:
        for call in self.trace.calls:
            if call.path != owner or not call.inputs or not call.outputs or base(call.inputs[0]) not in (self.entry, self.block.x):
                continue
            end, residual = base(call.outputs[0]), None
            given = [base(each) for each in call.inputs]
            if end is not self.block.down and end.op == "add" and len(given) > 1:
                sides = [base(each) for each in end.inputs]
                if self.block.down in sides and given[1] in sides:
                    end, residual = self.block.down, "yes"
            if end is not self.block.down:
                continue
            norm = below(self.norm, owner) if self.norm and base(call.inputs[0]) is self.entry else None
            after = dropouts_after(self.model, self.trace, self.block, None if residual else call.outputs[0])
            hidden, output = self._inside(owner, self.between), self._inside(owner, after)
            spec = dataclasses.replace(spec, residual=residual, input_norm=norm, hidden_dropout=hidden, output_dropout=output)
            activation = None if spec.activation.startswith("=") else get_path(self.model, join(owner, spec.activation))
            products = possible_products(get_path(self.model, owner), activation) if self.block.gated else [None]
            yield from (dataclasses.replace(spec, product=product) for product in products)
            return

    def _inside(self, owner: str, dropouts: list[Dropout]) -> str | None:
        return next((below(each.path, owner) for each in dropouts if each.path and below(each.path, owner)), None)

    def _as_split(self, owner: str, spec: FFNSpec) -> Iterator[FFNSpec]:
        for call in self.trace.calls:
            slot = below(call.path, owner)
            holds = [below(path, call.path) is not None for path in self.paths]
            if not slot or holds != [True, False] or not call.inputs or not call.outputs or base(call.inputs[0]) is not self.block.x:
                continue
            if base(call.outputs[0]) is not base(self.block.read):
                continue
            dropout, output, identities = self._taken_out(owner)
            if all(below(path, call.path) is None for path in identities):
                identities = [str(below(path, owner)) for path in identities]
                yield dataclasses.replace(spec, slot=slot, identities=(*identities, spec.down), hidden_dropout=dropout, output_dropout=output)
            return

    def _inline(self, owner: str, spec: FFNSpec) -> Iterator[FFNSpec]:
        dropout, output, identities = self._taken_out(owner)
        parts = [spec.activation, *(str(below(path, owner)) for path in identities), spec.hidden_norm, spec.down]
        yield dataclasses.replace(spec, slot=spec.up, identities=tuple(part for part in parts if part), hidden_dropout=dropout, output_dropout=output)

    def _taken_out(self, owner: str) -> tuple[str | None, str | None, list[str]]:
        """(hidden dropout, the same where it serves after the down map too, paths of dropout modules that become identities)."""
        dropout = next((each for each in self.between if each.path and below(each.path, owner)), None)
        if dropout is None:
            return None, None, []
        path = str(below(dropout.path, owner))
        after = [each for each in dropouts_after(self.model, self.trace, self.block) if each.path == dropout.path]
        if dropout.times > 1 + len(after):  # something else reads it: taking it out would take it from there
            return None, None, []
        return path, path if after else None, [dropout.path] if dropout.is_module else []

    def _nothing_fits(self) -> str:
        up, down = (str(below(self.paths[index], self.owner)) for index in (0, -1))
        operations = ", ".join(dict.fromkeys(self.block.operations))
        holder = type(get_path(self.model, self.owner)).__name__
        if self.block.gated:
            return f"{holder} does more than down(act(gate(x)) * up(x)) around {up} and {down} ({operations}): put that alone into a module of its own"
        return f"{holder} itself computes {operations} between {up} and {down}: make that a module or a function of its own, such as self.act = nn.GELU()"


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6))
