"""Whole nodes, maps and stacks of maps as formulas and as code."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.histogram import ChannelRecorder
from kanformer.errors import ConfigError, DataError
from kanformer.interpret.symbolic.fit import fit_module
from kanformer.interpret.symbolic.fits import UNSNAPPABLE, MapFits
from kanformer.interpret.symbolic.targets import HEADERS, TARGETS, source
from kanformer.layers import EdgeFunctions, KANFeedForward
from kanformer.layers.kan_linear import KANLinear

_UNSNAPPED = ("error", "function")


def map_expressions(module: EdgeFunctions | KANLinear, fits: MapFits, inputs: Sequence[Any] | None = None, *, unsnapped: str = "error") -> list[Any]:
    """A sympy expression per output: y[o] = bias[o] + sum_i phi[o, i](x_i) with full edges, psi_g(x_i) per channel with shared ones.

    Each formula holds for its input in the validity range of its fit; `Formula.sympy(piecewise=True)` writes it into an edge.

    Args:
        inputs: an expression per input; None means the symbols x0, x1, ...
        unsnapped: "error", or "function": edges without a formula stand as undefined functions phi_o_i(x_i).

    Raises:
        ConfigError: functions that were not fitted, or have no formula.
    """
    if unsnapped not in _UNSNAPPED:
        raise ConfigError("write a map as formulas", got=f"unsnapped={unsnapped!r}", expected=f"one of {', '.join(_UNSNAPPED)}")
    xs = _symbols(module, inputs)
    if isinstance(module, EdgeFunctions):
        repeats = module.channels // module.groups
        return [_edge(fits, channel // repeats, -1, xs[channel], unsnapped) for channel in range(module.channels)]
    return [node_expression(module, fits, output, xs, unsnapped=unsnapped) for output in range(module.out_features)]


def node_expression(module: KANLinear | KANFeedForward, fits: MapFits, output: int, inputs: Sequence[Any] | None = None, *, unsnapped: str = "error") -> Any:
    """One output as a sympy expression.

    Args:
        module: a map with full edges, or a block with shared edges: then the output is the block's, in its hidden channels before the functions,
            sum_i W[o, i] * psi_g(i)(x_i) + bias (times up_i in gated blocks, written u0, u1, ...).
    """
    import sympy

    if isinstance(module, KANLinear):
        xs = _symbols(module, inputs)
        constant = 0.0 if module.kan_bias is None else float(module.kan_bias.detach()[output])
        return sympy.Add(sympy.Float(constant, 17), *(_edge(fits, i, output, x, unsnapped) for i, x in enumerate(xs)))
    functions, down = module.kan_functions, module.kan_down
    if not isinstance(functions, EdgeFunctions) or not isinstance(down, nn.Linear):
        raise ConfigError("write a node as a formula", got=f"a block with edges={module.edges!r}", expected="shared edges, or one map of a block")
    hidden = map_expressions(functions, fits, inputs, unsnapped=unsnapped)
    factors = [sympy.Symbol(f"u{i}", real=True) if module.gated else 1 for i in range(len(hidden))]
    weight, bias = down.weight.detach().double(), 0.0 if down.bias is None else float(down.bias.detach()[output])
    return sympy.Add(sympy.Float(bias, 17), *(float(weight[output, i]) * factors[i] * value for i, value in enumerate(hidden)))


def fit_stack(modules: Sequence[KANLinear] | nn.Sequential, samples: Tensor, **settings: Any) -> list[MapFits]:
    """Fits formulas to every map of a stand-alone network, on the inputs (tokens, in) that reach it; settings as in `fit_module`."""
    if samples.dim() != 2 or not samples.is_floating_point() or not bool(samples.isfinite().all()):
        raise DataError("fit formulas", got=f"samples {tuple(samples.shape)} of {samples.dtype}", expected="finite floating point (tokens, inputs)")
    found, x = [], samples
    with torch.no_grad():
        for module in _maps(modules):
            recorder = ChannelRecorder(module.in_features, module.in_features, *module.grid_bounds)
            recorder.add(x)
            found.append(fit_module(module, recorder.finish(), **settings))
            x = module(x)
    return found


def network_expressions(
    modules: Sequence[KANLinear] | nn.Sequential, fits: Sequence[MapFits], inputs: Sequence[Any] | None = None, *, unsnapped: str = "error"
) -> list[Any]:
    """The outputs of a stack of maps as sympy expressions of its inputs (symbols x0, x1, ... unless given)."""
    maps = _maps(modules)
    if len(fits) != len(maps):
        raise ConfigError("write a network as formulas", got=f"fits of {len(fits)} maps", expected=str(len(maps)))
    values = inputs
    for module, one in zip(maps, fits, strict=True):
        values = map_expressions(module, one, values, unsnapped=unsnapped)
    return list(values or ())


def map_code(module: EdgeFunctions | KANLinear, fits: MapFits, target: str = "numpy", name: str = "layer", *, outside: str = "warn") -> str:
    """Source of a function that computes a whole map, x (tokens, inputs) -> (tokens, outputs), all formulas of a family in one operation.

    Raises:
        ConfigError: functions that were not fitted or have no formula, or an unknown target.
    """
    if target not in TARGETS or not name.isidentifier() or outside not in ("warn", "raise", "ignore"):
        expected = f"one of {', '.join(TARGETS)}, an identifier, and warn, raise or ignore"
        raise ConfigError("write a map as code", got=f"target={target!r}, name={name!r}, outside={outside!r}", expected=expected)
    shared = isinstance(module, EdgeFunctions)
    inputs = module.channels if isinstance(module, EdgeFunctions) else module.in_features
    outputs = inputs if isinstance(module, EdgeFunctions) else module.out_features
    repeats = module.channels // module.groups if isinstance(module, EdgeFunctions) else 1
    total = outputs if shared else inputs * outputs
    edges: dict[str, list[tuple]] = {}
    low, high = [-float("inf")] * inputs, [float("inf")] * inputs
    for i in range(total):
        source_channel, target_channel = (i, i) if shared else divmod(i, outputs)
        formula = fits.formula(fits.find(source_channel // repeats, None if shared else target_channel))
        low[source_channel], high[source_channel] = formula.low, formula.high
        edges.setdefault(formula.function if formula.family not in ("const", "x") else "", []).append((source_channel, target_channel, formula))
    bias = module.kan_bias.detach().double().tolist() if isinstance(module, KANLinear) and module.kan_bias is not None else [0.0] * outputs
    return _map_source(edges, low, high, bias, outputs, target, name, outside)


def _map_source(edges: dict[str, list[tuple]], low: list, high: list, bias: list, outputs: int, target: str, name: str, outside: str) -> str:
    array = "np.array({})" if target == "numpy" else "torch.tensor({}, dtype=x.dtype, device=x.device)"
    places = "np.array({})" if target == "numpy" else "torch.tensor({}, device=x.device)"
    floats = [str(values).replace("inf", 'float("inf")') for values in (low, high)]
    lines = [
        f"def {name}(x):",
        f'    """A map of {len(low)} inputs and {outputs} outputs; each input is valid between quantiles 0.5 % and 99.5 % of its data."""',
    ]
    lines += ["    x = np.asarray(x, dtype=float)"] if target == "numpy" else []
    if outside != "ignore":
        message = f'"{name}: x outside its range"'
        act = f"raise ValueError({message})" if outside == "raise" else f"warnings.warn({message}, stacklevel=2)"
        lines += [f"    if ((x < {array.format(floats[0])}) | (x > {array.format(floats[1])})).any():", f"        {act}"]
    lines.append(f"    y = {array.format(bias)} + 0 * x[..., :1]")
    for function, members in edges.items():
        columns = {part: [getattr(formula, part) for _, _, formula in members] for part in ("a", "t", "c", "e", "d")}
        lines.append(f"    u = x[..., {places.format([member[0] for member in members])}]")
        lines.append(f"    v = {array.format(columns['e'])} * u + {array.format(columns['d'])}")
        if function:
            lines.append(f"    z = {array.format(columns['a'])} * (u - {array.format(columns['t'])})")
            lines.append(f"    v = v + {array.format(columns['c'])} * ({source(function, target)})")
        where = places.format([member[1] for member in members])
        lines.append(f"    np.add.at(y, (..., {where}), v)" if target == "numpy" else f"    y = y.index_add(-1, {where}, v)")
    return HEADERS[target] + "\n\n" + "\n".join([*lines, "    return y"]) + "\n"


def _symbols(module: EdgeFunctions | KANLinear, inputs: Sequence[Any] | None) -> list[Any]:
    import sympy

    count = module.channels if isinstance(module, EdgeFunctions) else module.in_features
    if inputs is None:
        return [sympy.Symbol(f"x{i}", real=True) for i in range(count)]
    if len(inputs) != count:
        raise ConfigError("write a map as formulas", got=f"{len(inputs)} inputs", expected=str(count))
    return list(inputs)


def _edge(fits: MapFits, source_channel: int, output: int, x: Any, unsnapped: str) -> Any:
    place = fits.find(source_channel, None if fits.shared else output)
    if unsnapped == "function" and int(fits.outcome[place]) == UNSNAPPABLE:
        import sympy

        return sympy.Function(f"psi_{source_channel}" if fits.shared else f"phi_{output}_{source_channel}")(x)
    return fits.formula(place).sympy(x)


def _maps(modules: Sequence[KANLinear] | nn.Sequential) -> list[KANLinear]:
    maps = [module for module in modules if isinstance(module, KANLinear)]
    wrong = next((type(module).__name__ for module in modules if not isinstance(module, KANLinear)), None)
    if wrong or not maps:
        raise ConfigError("write a network as formulas", got=wrong or "no map", expected="KANLinear modules, one after the other")
    for left, right in itertools.pairwise(maps):
        if left.out_features != right.in_features:
            raise ConfigError("write a network as formulas", got=f"{left.out_features} outputs before {right.in_features} inputs", expected="as many")
    return maps


def layer_expressions(block: KANFeedForward, fits: Mapping[str, MapFits], *, unsnapped: str = "error") -> dict[str, list[Any]]:
    """The expressions of every map of a block, by the map's name; see `map_expressions`."""
    return {name: map_expressions(module, fits[name], unsnapped=unsnapped) for name, module in block.spline_modules() if name in fits}
