"""What a model does with its values in one forward: which operation made each, out of which, and which parameters were multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from kanformer.conversion.batches import run_batches
from kanformer.surgery.tracing.operations import TURNS, VIEWS, operation
from kanformer.surgery.tracing.values import Call, MapUse, Value, rows

_PRODUCTS = {"linear", "addmm", "matmul", "mm", "rmatmul", "conv1d", "conv2d"}


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
            run_batches(model, [batch])
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _values(trace: Trace, tree: Any) -> tuple[Value, ...]:
    found: Iterable[Tensor] = tensors(tree)
    return tuple(trace.value(tensor) for tensor in found)
