"""Specs for blocks whose class no file describes: read off a module's parts and its source, and checked like any other before anything is touched."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import re

import torch
from torch import nn

from kanformer.layers.base_functions import base_function
from kanformer.surgery.modules import get_path, is_conv1d, is_linear, linear_tensors
from kanformer.surgery.sites import Site
from kanformer.surgery.source import calls_of, chains_of
from kanformer.surgery.spec import FFNSpec

_GATED = (  # gate (which the activation reads), up, down
    ("gate_proj", "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
    ("w_in.w_0", "w_in.w_1", "w_out"),
)
_PLAIN = (  # up, down
    ("fc1", "fc2"),
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("linear_fc1", "linear_fc2"),
    ("intermediate_dense", "output_dense"),
    ("wi", "wo"),
    ("fc_in", "fc_out"),
    ("in_proj", "out_proj"),
    ("proj_in", "proj_out"),
    ("dense1", "dense2"),
    ("layer1", "layer2"),
    ("linear_1", "linear_2"),
    ("ffw_layer_1", "ffw_layer_2"),
)
_FUSED = (("gate_up_proj", "down_proj"), ("Wi", "Wo"), ("input_linear", "output_linear"), ("fc1", "fc2"), ("fc1.proj", "fc2"))  # gate and up in one, down
_NAMED = ("=silu", "=gelu", "=gelu_tanh", "=relu")
_LIKELY = re.compile(r"mlp|ffn|feed_?forward|^ff$", re.IGNORECASE)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "intermediate_act_fn", "w_in.act", "nonlinearity", "activation_function", "gelu_impl")


def structural_specs(path: str, module: nn.Module) -> list[FFNSpec]:
    """What the module at `path` would be as a feed-forward block: one spec as a rule, none if it does not look like one."""
    found = [_split(module, "intermediate", "output"), _split(module, "intermediate_query", "output_query")]
    specs = [spec for spec in found if spec is not None]
    if specs:
        return specs
    spec = _sequence(path, module) or _module(module) or _experts(module) or _inline(module)
    return [] if spec is None else [spec]


def _split(module: nn.Module, first: str, second: str) -> FFNSpec | None:
    activation = next((f"{first}.{name}" for name in ("intermediate_act_fn", "activation") if callable(_get(module, f"{first}.{name}"))), None)
    if not _maps(module, f"{first}.dense", f"{second}.dense"):
        return None
    inner = get_path(module, first)
    activation = activation or _named_activation(inner)
    if activation is None:
        return None
    if inner.dense.weight.is_meta and len(list(inner.parameters())) != len(list(inner.dense.parameters())):
        return None  # more than a map, and nothing to run it on
    parts = {"up": f"{first}.dense", "activation": activation, "down": f"{second}.dense"}
    return FFNSpec(name=f"{first}-{second}", owner=_own(module), slot=first, identities=(f"{second}.dense",), **parts)


def _named_activation(inner: nn.Module) -> str | None:
    """Which function a module applies after its `dense`, found by running it."""
    weight = get_path(inner, "dense.weight")
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        return None
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        try:
            actual, before = inner(x), inner.dense(x)  # type: ignore[operator]
        except Exception:
            return None
        return next((name for name in _NAMED if torch.allclose(actual, base_function(name[1:])(before), rtol=1e-4, atol=1e-6)), None)


def _sequence(path: str, module: nn.Module) -> FFNSpec | None:
    """An nn.Sequential of map, activation, perhaps dropout, map, that is called a feed-forward block by whoever holds it."""
    if type(module) is not nn.Sequential or not _LIKELY.search(path.rpartition(".")[2]) or not 3 <= len(module) <= 5:
        return None
    dropouts = [str(i) for i, child in enumerate(module) if isinstance(child, nn.Dropout)]
    up, activation, *rest = [str(i) for i, child in enumerate(module) if not isinstance(child, nn.Dropout | nn.Identity)] + [""] * 2
    rest = [name for name in rest if name]
    if (up, activation) != ("0", "1") or len(rest) != 1 or not _maps(module, up, rest[0]) or not _is_activation(module, activation):
        return None
    between, after = ([name for name in dropouts if (name < rest[0]) == before] for before in (True, False))
    return FFNSpec(
        name="sequence",
        owner="Sequential",
        up=up,
        activation=activation,
        down=rest[0],
        hidden_dropout=next(iter(between), None),
        output_dropout=next(iter(after), None),
    )


def _experts(module: nn.Module) -> FFNSpec | None:
    """Fused experts, weights (experts, out, in): named in plans, so that nobody believes them replaced."""
    for up, down in (("gate_up_proj", "down_proj"), ("up_proj", "down_proj")):
        if all(isinstance(_get(module, name), nn.Parameter) and get_path(module, name).dim() == 3 for name in (up, down)):
            return FFNSpec(name="experts", owner=_own(module), up=up, activation="act_fn", down=down)
    return None


def _module(module: nn.Module) -> FFNSpec | None:
    activation = next((name for name in _ACTIVATIONS if callable(_get(module, name))), "=silu")
    for gate, up, down in (*_GATED, *((None, up, down) for up, down in _PLAIN)):
        if _maps(module, up, down) and (not gate or _maps(module, gate, down)):
            return _of_its_own(module, FFNSpec(name=f"{up}-{down}", owner=_own(module), gate=gate, up=up, activation=activation, down=down))
    for up, down in _FUSED:
        if _maps(module, up, down, halves=2):
            spec = FFNSpec(name=f"{up}-{down}", owner=_own(module), up=up, activation=activation, down=down, fused="gate_first")
            other = dataclasses.replace(spec, fused="up_first")
            # Which half the activation reads differs from family to family: the block itself tells.
            wrong = Site(module, "", spec).disagreement() and not Site(module, "", other).disagreement()
            return _of_its_own(module, other if wrong else spec)
    return None


def _of_its_own(module: nn.Module, spec: FFNSpec) -> FFNSpec | None:
    """The spec with its dropouts, or None where the module holds more than the block (a layer with attention, say)."""
    linears = {get_path(module, name) for name in (spec.gate, spec.up, spec.down) if name}
    if any(isinstance(child, nn.Linear) or is_conv1d(child) for child in module.modules() if child not in linears):
        return None
    if spec.activation.startswith("="):  # called as a function, which only running the block can tell
        tried = [dataclasses.replace(spec, activation=name) for name in _NAMED]
        right = next((each for each in tried if Site(module, "", each).problem() is None and not Site(module, "", each).disagreement()), None)
        if right is None or get_path(module, spec.up).weight.is_meta:
            return None
        spec = right
    hidden, output = _dropouts(module, spec.up, spec.down)
    return dataclasses.replace(spec, hidden_dropout=hidden, output_dropout=output)


def _inline(module: nn.Module) -> FFNSpec | None:
    """A layer whose methods hand a value from up to activation, perhaps to dropout, and to down, with nothing in between."""
    times = collections.Counter(name for calls in calls_of(type(module)) for name in calls)
    for chain in chains_of(type(module)):
        steps = list(chain)
        dropout = steps.pop(-2) if len(steps) > 3 and _is_dropout(module, steps[-2]) else None
        if len(steps) < 3:
            continue
        up, activation, down = steps[-3:]
        if not _maps(module, up, down) or not _is_activation(module, activation):
            continue
        if any(times[name] > 1 for name in (up, activation, down)):
            continue  # a part that is called elsewhere too must not become an identity
        return FFNSpec(
            name=f"{up}-{down}",
            owner=_own(module),
            up=up,
            activation=activation,
            down=down,
            slot=up,
            identities=(activation, down),
            hidden_dropout=dropout.removeprefix("p=") if dropout else None,
        )
    return None


def _own(module: nn.Module) -> str:
    return re.escape(type(module).__name__)


def _get(module: nn.Module, path: str):
    try:
        return get_path(module, path)
    except AttributeError:
        return None


def _maps(module: nn.Module, up: str, down: str, halves: int = 1) -> bool:
    """Whether these are linear maps d -> h -> d, the first with so many times h outputs."""
    first, second = _get(module, up), _get(module, down)
    if not is_linear(first, module) or not is_linear(second, module):
        return False
    outputs, inputs = linear_tensors(second)[0].shape
    return linear_tensors(first)[0].shape == (halves * inputs, outputs)


def _is_activation(module: nn.Module, name: str) -> bool:
    part = _get(module, name)
    if isinstance(part, nn.Module):
        return next(part.parameters(), None) is None and not isinstance(part, nn.Dropout | nn.Identity)
    return callable(part) and not inspect.ismethod(part)


def _is_dropout(module: nn.Module, name: str) -> bool:
    part = _get(module, name.removeprefix("p="))
    return isinstance(part, int | float) if name.startswith("p=") else isinstance(part, nn.Dropout)


def _dropouts(module: nn.Module, up: str, down: str) -> tuple[str | None, str | None]:
    """(the dropout between up and down, the dropout after down): functional ones by the source, modules by watching a pass over zeros."""
    for calls in calls_of(type(module)):
        if up in calls and down in calls and any(call.startswith("p=") for call in calls):
            between, after = calls[calls.index(up) : calls.index(down)], calls[calls.index(down) :]
            found = [next((call[2:] for call in part if call.startswith("p=") and _is_dropout(module, call)), None) for part in (between, after)]
            return found[0], found[1]
    order: list[str] = []
    names = {child: name for name, child in module.named_modules() if isinstance(child, nn.Dropout) or name in (up, down)}
    handles = [child.register_forward_hook(lambda child, args, out: order.append(names[child])) for child in names]
    weight = linear_tensors(get_path(module, up))[0]
    flags = [(child, child.training) for child in module.modules()]
    try:
        with torch.no_grad():
            module.eval()
            module(torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device))
    except Exception:
        return None, None  # what the block needs besides hidden states will be the reason of its refusal
    finally:
        for handle in handles:
            handle.remove()
        for child, training in flags:
            child.training = training
    if up not in order or down not in order:
        return None, None
    between, after = order[order.index(up) + 1 : order.index(down)], order[order.index(down) + 1 :]
    return next(iter(between), None), next(iter(after), None)
