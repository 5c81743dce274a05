"""Where a family keeps its feed-forward block: a handful of attribute paths, checked against the real model."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from kanformer.errors import ConfigError, did_you_mean
from kanformer.surgery.finding.products import PRODUCTS

_CHOICES = {
    "fused": ("gate_first", "up_first", "interleaved"),
    "residual": ("yes",),
    "product": tuple(PRODUCTS),
    "experts": ("routed", "sorted", "weighted", "identities"),
    "transposed": ("yes", "down"),
}


@dataclass(frozen=True)
class FFNSpec:
    """One way of writing a feed-forward block, relative to the module that owns its parts.

    Attributes:
        name: for plans and messages.
        owner: regular expression that the whole class name of the owner must match.
        up, down: paths from the owner to the two linear maps (for a gated block `up` is the factor without activation).
        activation: path to the activation, a module or function; "=name" for one that the owner's forward calls by itself (see `base_function`).
        gate: path to the map that the activation reads, for a gated block.
        slot: path to the module whose place the KAN-FFN takes; "" is the owner itself.
        identities: paths of the other parts, which become `nn.Identity`.
        hidden_dropout: path to a dropout module or probability that the owner applies to the hidden channels.
        output_dropout: path to a dropout module or probability inside the replaced forward, after the down map.
        fused: for a gated block with one map for both halves, which lies at `up`: "gate_first" (the activation reads the first half of its outputs),
            "up_first" or "interleaved" (it reads every second, from the first on); `gate` is then None.
        residual: "yes" if the block's forward takes a second tensor and adds it to its output.
        product: for a gated block, how the factors are bounded before they are multiplied, a name in `finding.products`; None: act(gate) * up.
        input_norm, hidden_norm: paths to modules before the first maps, and between the hidden channels and the down map.
        experts: for a module whose parameters at `up` and `down` hold the weights of all experts, how it is called: "routed", "sorted" or "weighted", see
            `KANExperts`, or "identities" for routed with identities beyond the last expert.
        transposed: "yes" if those parameters are (experts, in, out) instead of (experts, out, in), "down" if the one at `down` alone is.
        expert_norm: path to a module that each expert's output goes through before it is weighted.
    """

    name: str
    owner: str
    up: str
    down: str
    activation: str
    gate: str | None = None
    slot: str = ""
    identities: tuple[str, ...] = ()
    hidden_dropout: str | None = None
    output_dropout: str | None = None
    fused: str | None = None
    residual: str | None = None
    product: str | None = None
    input_norm: str | None = None
    hidden_norm: str | None = None
    experts: str | None = None
    transposed: str | None = None
    expert_norm: str | None = None

    @property
    def structure(self) -> str:
        """ "module" (the block is a module of its own), "experts" (a module with all experts' weights in one tensor), "split" (over two modules)
        or "inline" (in the layer's forward)."""
        if self.experts:
            return "experts"
        if not self.slot:
            return "module"
        return "inline" if self.slot == (self.gate or self.up) else "split"

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths that must exist in the owner."""
        maps, dropouts = (self.gate, self.up, self.activation, self.down), (self.hidden_dropout, self.output_dropout)
        paths = (*maps, *dropouts, self.input_norm, self.hidden_norm, self.expert_norm)
        return tuple(path for path in paths if path and not path.startswith("="))

    @property
    def sentinel(self) -> str:
        """Path from the slot of the linear map whose name the sentinel tensor takes; "" when the slot is that map."""
        first = self.gate or self.up
        if not self.slot:
            return first
        return first.removeprefix(self.slot).removeprefix(".")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FFNSpec:
        """Reads what `to_dict` wrote; unknown or missing keys are an error."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError("read a feed-forward spec", got=f"unknown key {key!r}", hint=did_you_mean(key, known))
        plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        for key, value in plain.items():
            optional = known[key].default is None
            good = all(isinstance(item, str) for item in value) if key == "identities" and isinstance(value, tuple) else isinstance(value, str)
            if not (good or (optional and value is None)):
                raise ConfigError("read a feed-forward spec", subject=key, got=repr(value), expected="a list of texts" if key == "identities" else "a text")
        for key, choices in _CHOICES.items():
            if plain.get(key) not in (None, *choices):
                raise ConfigError("read a feed-forward spec", subject=key, got=repr(plain[key]), expected=f"None or one of {', '.join(choices)}")
        try:
            return cls(**plain)
        except TypeError as error:
            raise ConfigError("read a feed-forward spec", got=str(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}


def spec_name(cls: str) -> str:
    """A name for a spec from its owner's class: MyLittleMLP -> my-little-mlp."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls).lower().replace("_", "-")
