"""Several descriptions that a block's parts allow, and the one that it agrees with when it is run."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Hashable, Iterable

from torch import nn

from kanformer.layers.base_functions import NAMES
from kanformer.surgery.finding.check import disagreement
from kanformer.surgery.finding.products import possible_products
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.modules import find_path

NAMED = tuple(f"={name}" for name in NAMES if name not in ("identity", "zero"))
_ACTIVATIONS = (
    *("act_fn", "act", "activation_fn", "activation", "intermediate_act_fn", "w_in.act", "nonlinearity", "activation_function", "gelu_impl"),
    "conv1.activation",
)
_STACKED = ((None, "gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj"), (None, "up_proj", "down_proj"), ("mlp.w1", "mlp.v1", "mlp.w2"))

_chosen: dict[Hashable, tuple[FFNSpec, bool]] = {}
_checked: dict[Hashable, str | None] = {}


def best_spec(module: nn.Module, specs: Iterable[FFNSpec]) -> tuple[FFNSpec | None, bool]:
    """(the first description that the module agrees with, True), or (the first that fits its parts, False).

    The activation is filled in where it is "", and the product of a gated block where its attributes leave a choice. On the meta device,
    where nothing can be run, the source must speak.
    """
    specs = [filled for spec in specs for filled in _filled(module, spec)]
    if not specs:
        return None, False
    key = (type(module), tuple(specs), _likeness(module, specs[0]))
    if key not in _chosen:
        _chosen[key] = _choose(module, specs)
    return _chosen[key]


def forget() -> None:
    """Starts anew with another model, whose blocks may differ in what `_likeness` does not see (its config, say)."""
    _chosen.clear()
    _checked.clear()


def checked_disagreement(site: Site) -> str | None:
    """`disagreement(site)`, found once for all blocks that are alike."""
    key = (type(site.owner), site.spec, _likeness(site.owner, site.spec))
    if key not in _checked:
        _checked[key] = disagreement(site)
    return _checked[key]


def experts_spec(module: nn.Module) -> FFNSpec | None:
    """A module whose parameters hold the weights of all experts."""
    for gate, up, down in _STACKED:
        if all(isinstance(find_path(module, name), nn.Parameter) for name in (gate, up, down) if name):
            break
    else:
        return None
    if find_path(module, down).dim() != (2 if "." in down else 3):  # type: ignore[union-attr]
        return None
    base = FFNSpec(name="experts", owner=re.escape(type(module).__name__), gate=gate, up=up, activation="", down=down)
    orders = (None,) if gate or up == "up_proj" else ("gate_first", "interleaved", "up_first")
    if getattr(module, "is_concatenated", True) is False:
        orders = ("interleaved",)
    norm = "post_expert_norm" if isinstance(find_path(module, "post_expert_norm"), nn.Module) else None
    turned = getattr(module, "is_transposed", None)
    layouts = {True: ("yes",), False: (None,), None: ("down",) if "." in down else (None, "yes")}[turned]
    calls = ("routed",) if turned is not None else _calls(module)
    choices = itertools.product(calls, layouts, orders)
    specs = [dataclasses.replace(base, experts=call, transposed=layout, fused=order, expert_norm=norm) for call, layout, order in choices]
    return best_spec(module, specs)[0] or dataclasses.replace(base, activation="=silu", experts=calls[0])


def _calls(module: nn.Module) -> tuple[str, ...]:
    """How experts that say nothing about themselves can be called, by the number of arguments of their forward."""
    arguments = len(inspect.signature(module.forward).parameters)
    return {1: ("sorted",), 2: ("weighted",)}.get(arguments, ("identities", "routed") if hasattr(module, "identity_expert") else ("routed",))


def _filled(module: nn.Module, spec: FFNSpec) -> list[FFNSpec]:
    activation = next((name for name in _ACTIVATIONS if callable(find_path(module, name))), None)
    names = (activation,) if activation else NAMED
    specs = [dataclasses.replace(spec, activation=spec.activation or name) for name in names]
    if not (spec.gate or spec.fused):
        return specs
    found = []
    for each in specs:
        found += [dataclasses.replace(each, product=name) for name in possible_products(module, Site(module, "", each).activation)]
    return found


def _choose(module: nn.Module, specs: list[FFNSpec]) -> tuple[FFNSpec, bool]:
    fitting = [spec for spec in specs if Site(module, "", spec).problem() is None]
    if not fitting:
        return specs[0], False
    if next(iter(Site(module, "", fitting[0]).weights.values())).is_meta:
        return _by_source(module, fitting)
    for spec in fitting:
        if disagreement(Site(module, "", spec)) is None:
            return spec, True
    return fitting[0], False


def _by_source(module: nn.Module, specs: list[FFNSpec]) -> tuple[FFNSpec, bool]:
    """The description whose bounds the source of the class speaks of; no agreement where the activation is unnamed and several would do."""
    try:
        source = inspect.getsource(type(module))
    except (OSError, TypeError):
        source = ""
    signs = {"soft_capped": "SoftcappedSwiGLU", "clamped_plus_one": r"\+ 1", "clamped_after": r"act_fn\([^\n]*\)\.clamp\(", "clamped": r"\.clamp\("}
    for product, sign in signs.items():
        if re.search(sign, source):
            specs = [spec for spec in specs if spec.product == product] or specs
            break
    else:
        specs = [spec for spec in specs if spec.product is None] or specs
    return specs[0], not specs[0].activation.startswith("=") or specs[0].product is not None


def _likeness(module: nn.Module, spec: FFNSpec) -> Hashable:
    """What two modules of a class must share for one of them to speak for the other: shapes, dtype, all plain numbers, texts and functions."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | None) and name != "training"}
    functions = tuple((name, getattr(value, "__code__", repr(value))) for name, value in vars(module).items() if callable(value))
    tensors = tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in (*module.named_parameters(), *module.named_buffers()))
    children = tuple((name, type(child)) for name, child in module.named_modules())
    return tuple(sorted((name, str(value)) for name, value in plain.items())), functions, tensors, children, str(find_path(module, spec.activation))
