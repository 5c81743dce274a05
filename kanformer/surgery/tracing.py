"""What a model does with its values in one forward: which operation made each, out of which, and which parameters were multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from kanformer.conversion.batches import run_batches

TURNS = {"t", "T", "mT", "transpose", "permute", "swapaxes", "swapdims", "movedim", "adjoint"}
VIEWS = TURNS | set(
    "view reshape flatten unflatten contiguous clone to type type_as float half bfloat16 double squeeze unsqueeze detach alias view_as reshape_as data "
    "expand expand_as rearrange".split()
)
_PRODUCTS = {"linear", "addmm", "matmul", "mm", "rmatmul", "conv1d", "conv2d"}
_ROWS = 8


@dataclass(frozen=True)
class MapUse:
    """One product of a value with a parameter.

    Attributes:
        module, name: path of the module that holds the parameter, and the parameter's name in it.
        in_features, out_features: the widths of the map.
        x, y: rows of what went in and what came out, (rows, width).
    """

    module: str
    name: str
    in_features: int
    out_features: int
    x: Tensor
    y: Tensor


@dataclass(eq=False)
class Value:
    """A tensor of the forward, without its numbers.

    Attributes:
        op: the operation that made it; "input" where none was seen, "constant" for parameters, buffers, single numbers and what is made of them.
        where: path of the innermost module at work. number: a count of operations.
        parameter: (module path, name, whether it is transposed) of a parameter or a view of one.
        map: for the product of a value with a parameter; `inputs` is then that value.
        probability: of a dropout, the very object that was passed.
    """

    op: str
    inputs: tuple[Value, ...]
    shape: torch.Size
    where: str = ""
    number: int = 0
    parameter: tuple[str, str, bool] | None = None
    map: MapUse | None = None
    probability: Any = None
    users: list[Value] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True)
class Call:
    """One call of a module: the tensors that it was given, in order, and those that it returned."""

    path: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


class Trace:
    """All values and module calls of one forward."""

    def __init__(self, model: nn.Module) -> None:
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.stack: list[tuple[str, tuple[Value, ...]]] = []
        self._known = WeakTensorKeyDictionary()
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter not in self._known:
                    self._known[parameter] = Value("constant", (), parameter.shape, parameter=(path, name, False))
            for buffer in module._buffers.values():
                if buffer is not None:
                    self._known[buffer] = Value("constant", (), buffer.shape)

    @property
    def maps(self) -> list[Value]:
        return [value for value in self.values if value.map is not None]

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor."""
        if tensor not in self._known:
            self._known[tensor] = Value("input" if tensor.dim() else "constant", (), tensor.shape, self._where)
        return self._known[tensor]

    @property
    def _where(self) -> str:
        return self.stack[-1][0] if self.stack else ""

    def record(self, function: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        op = operation(function, kwargs)
        inputs = tuple(self.value(tensor) for tensor in tensors((args, list(kwargs.values()))))
        if op == "setitem":
            result = args[0]
        for tensor in tensors(result):
            value = self._made(op, args, kwargs, inputs, tensor)
            self._known[tensor] = value
            self.values.append(value)
            for each in dict.fromkeys(value.inputs):
                each.users.append(value)

    def _made(self, op: str, args: tuple, kwargs: dict[str, Any], inputs: tuple[Value, ...], result: Tensor) -> Value:
        value = Value(op, inputs, result.shape, self._where, len(self.values))
        if all(each.op == "constant" for each in inputs) if inputs else not result.dim():
            value.op = "constant"
            if len(inputs) == 1 and inputs[0].parameter is not None and op in VIEWS | {"getitem", "select"}:
                path, name, turned = inputs[0].parameter
                value.parameter = (path, name, turned != (op in TURNS))
        elif op in _PRODUCTS:
            self._multiplied(value, op, args, kwargs, result)
        elif op == "add" and len(inputs) == 2:
            self._with_bias(value, result)
        elif op == "dropout":
            value.probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        return value

    def _multiplied(self, value: Value, op: str, args: tuple, kwargs: dict[str, Any], result: Tensor) -> None:
        given = (*args, *(kwargs[name] for name in ("input", "mat1", "weight", "mat2", "other") if name in kwargs))
        place = 1 if op == "addmm" else 0
        x, weight = given[place : place + 2]
        known = self.value(weight)
        convolution = op.startswith("conv")
        if known.parameter is None or (convolution and (set(weight.shape[2:]) != {1} or weight.shape[1] != x.shape[1] or x.shape[2:] != result.shape[2:])):
            return
        path, name, _ = known.parameter
        channel = 1 if convolution else -1
        value.inputs = (self.value(x),)
        value.map = MapUse(path, name, x.shape[channel], result.shape[channel], rows(x, channel), rows(result, channel))

    def _with_bias(self, value: Value, result: Tensor) -> None:
        """A product to which its module's bias is added is that module's map."""
        for product, bias in (value.inputs, value.inputs[::-1]):
            if product.map and bias.parameter and bias.parameter[0] == product.map.module and bias.shape == (product.map.out_features,):
                value.inputs = product.inputs
                old = product.map
                value.map = MapUse(old.module, old.name, old.in_features, old.out_features, old.x, rows(result, -1))


def operation(function: Callable, kwargs: Mapping[str, Any]) -> str:
    """The plain name of a torch function: "add" for x + y, torch.add, x.add_(y) and x += y."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", name)
    name = name.strip("_")
    if name.startswith(("i", "r")) and name[1:] in ("add", "mul", "sub", "truediv", "div", "pow"):
        name = name[1:]
    if name == "gelu" and kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    return {"truediv": "div", "feature_dropout": "dropout", "multiply": "mul"}.get(name, name)


def rows(tensor: Tensor, channel: int) -> Tensor:
    """Some rows (rows, width) of a tensor whose channels are this dimension."""
    flat = tensor.detach().movedim(channel, -1).flatten(0, -2) if tensor.dim() > 1 else tensor.detach()[None]
    return flat[torch.linspace(0, max(flat.shape[0] - 1, 0), min(_ROWS, flat.shape[0])).long().to(flat.device)].clone()


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | tuple | list):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors(value)


class Recorder(TorchFunctionMode):
    """Tells a trace of every torch function that is called."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.trace.record(func, args, kwargs, result)
        return result


def trace_model(model: nn.Module, batch: Mapping[str, Any]) -> Trace:
    """Runs the model once, in eval mode without gradients; the model is afterwards as before.

    Raises:
        DataError: the model does not take this batch.
    """
    trace = Trace(model)

    def enter(path: str) -> Callable:
        return lambda module, args, kwargs: trace.stack.append((path, _values(trace, (args, list(kwargs.values())))))

    def leave(module: nn.Module, args: tuple, result: Any) -> None:
        path, inputs = trace.stack.pop()
        trace.calls.append(Call(path, inputs, _values(trace, result)))

    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        with Recorder(trace):
            run_batches(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _values(trace: Trace, tree: Any) -> tuple[Value, ...]:
    found: Iterable[Tensor] = tensors(tree)
    return tuple(trace.value(tensor) for tensor in found)
