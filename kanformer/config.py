"""What a KAN-FFN is made of and how it starts: one frozen dataclass with strict keys and a schema version."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from kanformer.errors import ConfigError, did_you_mean
from kanformer.selection import EXPERTS, LAYERS_EXPECTED, TOWERS, layers_are_good, read_layers

SCHEMA_VERSION = 2  # 1 had no layers_pattern, towers and experts; it is still read
MAX_ORDER = 32
EDGES = ("shared", "full", "mlp")
INITS = ("exact", "prune", "random")


@dataclass(frozen=True)
class KANConfig:
    """Settings of `kanformer.patch_model`, saved with the model.

    The settings from `target_modules` to `experts` say which blocks it is for: those that fit all of them. Each entry of a list must fit a block, so
    that nothing is left out in silence; an entry that fits none is an error.

    Attributes:
        basis: family of the edge functions, one of `kanformer.bases.available()`.
        edges: "shared" (one learned function per group of hidden channels), "full" (one per edge) or
            "mlp" (none: the control, the same block with its fixed activation).
        groups: number of functions with shared edges; None means one per hidden channel.
        grid_size: G, intervals inside the grid range.
        spline_order: k, degree of the splines, at most 32.
        grid_range: (lo, hi) of every grid until it is calibrated, in the units of the function's input.
        knots: "uniform", or "free" for B-splines whose knots a grid update may set anywhere (slower).
        extrapolation: beyond the grid range, "zero" (splines fade to 0, the base function carries on) or "linear" (the tangent at the end).
        init: "exact" (computes what the MLP computed), "prune" (keeps the best hidden channels and refits the
            down map, needs `param_ratio` and calibration data) or "random" (training from scratch).
        param_ratio: parameters of the KAN-FFN over the MLP's, in (0, 1]; only with init="prune".
        width: hidden width: None (the MLP's, or from `param_ratio`), "match" (the largest whose parameters do
            not exceed the MLP's) or a number; the last two only with init="random".
        ridge: relative ridge of the closed-form refit, >= 0, in units of the Gram matrix's mean diagonal.
        target_modules: paths of the blocks to patch: a regular expression for the whole path (str), or globs and endings such as "mlp" and
            "layers.0.fc1" (list); None means all.
        exclude_modules: the same for blocks to leave alone.
        layers_to_transform: a layer number, a range as text (`"0-5"` with both ends, `"4-"`, or several: `"0-2,5"`), or a list of them; None means all.
            Negative numbers count from the end of each list of layers (-1: the last of the encoder and the last of the decoder).
        layers_pattern: name of the list whose numbers are meant ("blocks"), or several, where a path has more than one; None means the first number in it.
        towers: parts of the model, any of "encoder", "decoder", "text", "vision" and "audio" (see `kanformer.surgery.planning.towers`); None means all.
        experts: "include" (default), "only" or "exclude" the experts of mixtures; experts that every token passes (shared_expert) do not count as such.
        keep_original: keep the MLPs beside the model, so that `unpatch_model` can put them back. If False and init="exact", the linear maps are the
            model's own tensors, so that it is patched in the memory that it has (not the stacked weights of experts that lie turned or interleaved).
    """

    basis: str = "bspline"
    edges: str = "shared"
    groups: int | None = None
    grid_size: int = 8
    spline_order: int = 3
    grid_range: tuple[float, float] = (-4.0, 4.0)
    knots: str = "uniform"
    extrapolation: str = "zero"
    init: str = "exact"
    param_ratio: float | None = None
    width: int | str | None = None
    ridge: float = 1e-5
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int | str, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    towers: tuple[str, ...] | None = None
    experts: str = "include"
    keep_original: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers_to_transform", read_layers(self.layers_to_transform))
        for name in ("target_modules", "exclude_modules", "layers_pattern", "towers", "grid_range"):
            value = getattr(self, name)
            if isinstance(value, list | set):
                object.__setattr__(self, name, tuple(value))
            elif isinstance(value, str) and name in ("layers_pattern", "towers"):
                object.__setattr__(self, name, (value,))
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    def _fail(self, name: str, expected: str, hint: str | None = None) -> None:
        raise ConfigError("use this configuration", subject=f"{name}={getattr(self, name)!r}", expected=expected, hint=hint)

    def _check_choices(self) -> None:
        from kanformer import bases

        choices = {"basis": bases.available(), "edges": EDGES, "init": INITS, "knots": ("uniform", "free"), "extrapolation": ("zero", "linear")}
        choices["experts"] = EXPERTS
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                self._fail(name, f"one of {', '.join(known)}", did_you_mean(str(value), known))
        for name in ("target_modules", "exclude_modules", "layers_pattern", "towers"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(v, str) for v in value))):
                self._fail(name, "None, a regular expression or a list of globs" if "modules" in name else "None, a name or a list of names")
        for tower in self.towers or ():
            if tower not in TOWERS:
                self._fail("towers", f"any of {', '.join(TOWERS)}", did_you_mean(tower, TOWERS))
        if not layers_are_good(self.layers_to_transform):
            self._fail("layers_to_transform", LAYERS_EXPECTED)
        if not isinstance(self.keep_original, bool):
            self._fail("keep_original", "True or False")

    def _check_numbers(self) -> None:
        for name, low in (("grid_size", 1), ("spline_order", 0)):
            value = getattr(self, name)
            if not _is_int(value) or value < low:
                self._fail(name, f"an integer >= {low}")
        if self.spline_order > MAX_ORDER:
            self._fail("spline_order", f"at most {MAX_ORDER}", "Splines of a high degree are polynomials that float32 cannot evaluate; 3 is usual.")
        if self.groups is not None and (not _is_int(self.groups) or self.groups < 1):
            self._fail("groups", "None or an integer >= 1")
        pair = self.grid_range
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(_is_number(v) for v in pair) and pair[0] < pair[1]):
            self._fail("grid_range", "two finite numbers lo < hi")
        if not _is_number(self.ridge) or self.ridge < 0:
            self._fail("ridge", "a finite number >= 0")
        if not (self.width is None or self.width == "match" or (_is_int(self.width) and self.width >= 1)):  # type: ignore[operator]
            self._fail("width", 'None, "match" or an integer >= 1')

    def _check_combinations(self) -> None:
        ratio = self.param_ratio
        if self.init == "prune" and ratio is None:
            self._fail("param_ratio", "a number in (0, 1] with init='prune'", "Say how much to keep, for example param_ratio=0.5.")
        if ratio is not None:
            if not _is_number(ratio) or not 0 < ratio <= 1:
                self._fail("param_ratio", "a number in (0, 1]")
            if self.init != "prune":
                self._fail("param_ratio", f"None with init={self.init!r}", "Use init='prune' to shrink a pretrained block.")
        if self.width is not None and self.init != "random":
            self._fail("width", f"None with init={self.init!r}", "Use init='random' for a width of your own, or init='prune' with param_ratio.")
        if self.groups is not None and self.edges != "shared":
            self._fail("groups", f"None with edges={self.edges!r}", "Groups exist with edges='shared' only.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KANConfig:
        """Builds a config from plain values, for example parsed JSON or YAML.

        Raises:
            ConfigError: an unknown key, a schema newer than this library, or a value out of range.
        """
        values = dict(values)
        version = values.pop("schema_version", SCHEMA_VERSION)
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise ConfigError(
                "read a KAN configuration",
                subject=f"schema_version={version!r}",
                expected=str(SCHEMA_VERSION),
                hint="It was written by another kanformer; install that version or a newer one.",
            )
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError("read a KAN configuration", got=f"unknown key {key!r}", hint=did_you_mean(key, known))
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError("read a KAN configuration", got=str(error), hint="A value has the wrong type.") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the schema version."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}
        return {"schema_version": SCHEMA_VERSION, **values}

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> KANConfig:
        """Reads what `to_json` wrote."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError("read a KAN configuration", got=f"invalid JSON ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError("read a KAN configuration", got=type(values).__name__, expected="a JSON object")
        return cls.from_dict(values)

    def replace(self, **changes: Any) -> KANConfig:
        """A copy with some values changed; unknown names are an error."""
        return type(self).from_dict({**self.to_dict(), **changes})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
