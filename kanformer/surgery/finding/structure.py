"""Specs for blocks whose class no file describes: read off a module's parts and its source, and checked like any other before anything is touched."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import itertools
import re

import torch
from torch import nn

from kanformer.layers.base_functions import base_function
from kanformer.surgery.finding.candidates import NAMED, best_spec, experts_spec
from kanformer.surgery.finding.check import disagreement
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.finding.source import calls_of, chains_of
from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.modules import bare, find_path, get_path, is_conv1d, is_linear, linear_tensors

_GATED = (  # gate (which the activation reads), up, down
    ("gate_proj", "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
    ("w_in.w_0", "w_in.w_1", "w_out"),
    ("proj_up_gate", "proj_up", "proj_down"),
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
    ("layers.0", "layers.1"),
    ("conv1.convolution", "conv2.convolution"),
    ("layer_1", "layer_2"),
)
_FUSED = (("gate_up_proj", "down_proj"), ("Wi", "Wo"), ("input_linear", "output_linear"), ("fc1", "fc2"), ("fc1.proj", "fc2"))  # gate and up in one, down
_HALVES = (("intermediate", "output"), ("intermediate_query", "output_query"))
_LIKELY = re.compile(r"mlp|ffn|feed_?forward|^ff$", re.IGNORECASE)


def structural_specs(path: str, module: nn.Module) -> list[FFNSpec]:
    """What the module at `path` would be as a feed-forward block: one spec as a rule, none if it does not look like one."""
    found = [_split(module, first, second, name) for first, second in _HALVES for name in ("dense", "conv1d")]
    specs = [spec for spec in found if spec is not None]
    if specs:
        return specs
    spec = _sequence(path, module) or _module(module) or experts_spec(module) or _inline(module)
    return [] if spec is None else [spec]


def _split(module: nn.Module, first: str, second: str, name: str) -> FFNSpec | None:
    up, down = f"{first}.{name}", f"{second}.{name}"
    if not _maps(module, up, down):
        return None
    inner = get_path(module, first)
    activation = next((f"{first}.{each}" for each in ("intermediate_act_fn", "activation", "act") if callable(find_path(module, f"{first}.{each}"))), None)
    activation = activation or _named_activation(inner, name)
    if activation is None:
        return None
    if get_path(inner, name).weight.is_meta and len(list(inner.parameters())) != len(list(get_path(inner, name).parameters())):
        return None  # more than a map, and nothing to run it on
    spec = FFNSpec(name=f"{first}-{second}", owner=_own(module), up=up, activation=activation, down=down, slot=first, identities=(down,))
    if activation.startswith("=") or not disagreement(Site(module, "", spec)):
        return spec
    # A norm before the map, say: the block goes in the map's own place where its activation is a part that can be taken out.
    alone = dataclasses.replace(spec, slot=up, identities=(activation, down))
    return alone if (name, activation.removeprefix(f"{first}.")) in (step for chain in chains_of(type(inner)) for step in itertools.pairwise(chain)) else spec


def _named_activation(inner: nn.Module, name: str) -> str | None:
    """Which function a module applies after its map, found by running it."""
    weight = get_path(inner, name).weight
    if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.dim() > 2:
        return None
    inner = copy.deepcopy(bare(inner)).float()  # which function it is, half precision cannot tell
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    with torch.no_grad():
        try:
            x = x * (4 / get_path(inner, name)(x).abs().max().clamp(min=1e-6))  # where activations differ from one another
            actual, before = inner(x), get_path(inner, name)(x)  # type: ignore[operator]
            off = {each: float((actual - base_function(each[1:])(before)).abs().max()) for each in NAMED}
        except Exception:
            return None
        best = min(off, key=off.__getitem__)
        return best if off[best] <= 2e-5 * float(actual.abs().max()) else None


def _sequence(path: str, module: nn.Module) -> FFNSpec | None:
    """An nn.Sequential of map, activation, perhaps dropout, map, that is called a feed-forward block by whoever holds it; or an nn.ModuleDict of
    map, activation, map, whose children its holder calls one after the other (BridgeTower)."""
    if not _LIKELY.search(path.rpartition(".")[2]):
        return None
    if type(module) is nn.ModuleDict and len(module) == 3:
        up, activation, down = module
        good = _maps(module, up, down) and _is_activation(module, activation)
        return FFNSpec(name="dict", owner="ModuleDict", up=up, activation=activation, down=down, slot=up, identities=(activation, down)) if good else None
    if type(module) is not nn.Sequential or not 3 <= len(module) <= 5:
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


def _module(module: nn.Module) -> FFNSpec | None:
    for gate, up, down in (*_GATED, *((None, up, down) for up, down in _PLAIN)):
        if _maps(module, up, down) and (not gate or _maps(module, gate, down)):
            return _of_its_own(module, [FFNSpec(name=f"{up}-{down}", owner=_own(module), gate=gate, up=up, activation="", down=down)])
    for up, down in _FUSED:
        if _maps(module, up, down, halves=2):
            spec = FFNSpec(name=f"{up}-{down}", owner=_own(module), up=up, activation="", down=down)
            # Which half the activation reads differs from family to family: the block itself tells.
            return _of_its_own(module, [dataclasses.replace(spec, fused=order) for order in ("gate_first", "up_first")])
    return None


def _of_its_own(module: nn.Module, specs: list[FFNSpec]) -> FFNSpec | None:
    """The first spec that the block agrees with, with its dropouts; None where the module holds more than the block (a layer with attention, say)."""
    spec = specs[0]
    linears = {get_path(module, name) for name in (spec.gate, spec.up, spec.down) if name}
    others = [(name, child) for name, child in module.named_modules() if child is not module and child not in linears]
    if any(isinstance(child, nn.Linear) or is_conv1d(child) for _, child in others):
        return None
    hidden, output = _dropouts(module, spec.up, spec.down)
    spec = dataclasses.replace(spec, hidden_dropout=hidden, output_dropout=output)
    width, inputs = linear_tensors(get_path(module, spec.down))[0].shape[::-1]
    norms = [{}, *({place: name} for place, channels in (("hidden_norm", width), ("input_norm", inputs)) for name in _norms(others, channels))]
    specs = [dataclasses.replace(spec, fused=each.fused, **norm) for each in specs for norm in norms]
    found, agrees = best_spec(module, specs)
    if agrees:
        return found
    # A residual or a norm around the block, say: it goes in the place of its first map where its forward hands values straight on.
    inline = _inline(module)
    return inline or (found if found is None or not found.activation.startswith("=") else None)


def _norms(parts: list[tuple[str, nn.Module]], channels: int) -> list[str]:
    """The names of the parts with one number per channel."""
    return [name for name, part in parts if any(parameter.numel() == channels for parameter in part.parameters(recurse=False))]


def _inline(module: nn.Module) -> FFNSpec | None:
    """A layer whose methods hand a value from up to activation, perhaps to dropout, perhaps to a norm, and to down, with nothing in between."""
    times = collections.Counter(name for calls in calls_of(type(module)) for name in calls)
    chains = collections.Counter(parts for chain in chains_of(type(module)) if (parts := _inline_parts(module, list(chain))) is not None)
    for parts, number in chains.items():
        up, activation, dropout, norm, down = parts
        functional = dropout is not None and dropout.startswith("p=")
        after = dropout is not None and any(chain[-2:] == (down, dropout) for chain in chains_of(type(module)))
        # A part that is called elsewhere too must not become an identity, nor a probability 0 that is read elsewhere too. A dropout may serve twice,
        # between the maps and right after them.
        if any(times[name] != number * (2 if name == dropout and after else 1) for name in parts if name):
            continue
        return FFNSpec(
            name=f"{up}-{down}",
            owner=_own(module),
            up=str(up),
            activation=str(activation),
            down=str(down),
            slot=str(up),
            identities=tuple(name for name in (activation, None if functional else dropout, norm, down) if name),
            hidden_dropout=dropout.removeprefix("p=") if dropout else None,
            output_dropout=dropout.removeprefix("p=") if dropout and after else None,
            hidden_norm=norm,
        )
    return None


def _inline_parts(module: nn.Module, steps: list[str]) -> tuple[str | None, ...] | None:
    """(up, activation, dropout, norm, down) by name if the chain ends as a feed-forward block."""
    down = steps.pop()
    norm = steps.pop() if len(steps) > 2 and _is_norm(module, steps[-1]) else None
    dropout = steps.pop() if len(steps) > 2 and (_is_dropout(module, steps[-1]) or _is_idle(module, steps[-1])) else None
    if len(steps) < 2 or not _maps(module, steps[-2], down) or not _is_activation(module, steps[-1]):
        return None
    return steps[-2], steps[-1], None if dropout is None or _is_idle(module, dropout) else dropout, norm, down


def _is_idle(module: nn.Module, name: str) -> bool:
    """A dropout, or a random depth, with probability 0."""
    part = find_path(module, name.removeprefix("p="))
    if isinstance(part, nn.Module) and type(part).__name__.endswith("DropPath"):
        part = getattr(part, "drop_prob", 1.0) or 0.0
    return (part.p if isinstance(part, nn.Dropout) else part) == 0


def _own(module: nn.Module) -> str:
    return re.escape(type(module).__name__)


def _maps(module: nn.Module, up: str, down: str, halves: int = 1) -> bool:
    """Whether these are linear maps d -> h -> d, the first with so many times h outputs."""
    first, second = find_path(module, up), find_path(module, down)
    if not is_linear(first, module) or not is_linear(second, module):
        return False
    outputs, inputs = linear_tensors(second)[0].shape
    return linear_tensors(first)[0].shape == (halves * inputs, outputs)


def _is_activation(module: nn.Module, name: str) -> bool:
    part = find_path(module, name)
    if isinstance(part, nn.Module):
        return all(parameter.numel() == 1 for parameter in part.parameters()) and not isinstance(part, nn.Dropout | nn.Identity)
    return callable(part) and not inspect.ismethod(part)


def _is_norm(module: nn.Module, name: str) -> bool:
    """A module with parameters that is no map: whatever it does, it is carried along."""
    part = find_path(module, name)
    return isinstance(part, nn.Module) and not is_linear(part, module) and next(part.parameters(), None) is not None


def _is_dropout(module: nn.Module, name: str) -> bool:
    part = find_path(module, name.removeprefix("p="))
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
    weight = get_path(module, up).weight
    inputs = linear_tensors(get_path(module, up))[0].shape[1]
    shape = (1, 1, inputs) if weight.dim() == 2 else (1, inputs, *(1 for _ in weight.shape[2:]))
    flags = [(child, child.training) for child in module.modules()]
    try:
        with torch.no_grad():
            module.eval()
            module(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
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
