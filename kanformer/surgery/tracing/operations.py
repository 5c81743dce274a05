"""Names of torch's operations, and what each kind does to the values that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _words(*lines: str) -> set[str]:
    return {word for line in lines for word in line.split()}


TURNS = _words("t T mT transpose permute swapaxes swapdims movedim adjoint")
VIEWS = TURNS | _words(
    "view reshape flatten unflatten contiguous clone to type type_as float half bfloat16 double squeeze unsqueeze detach alias",
    "view_as reshape_as data expand expand_as",
)
PIECES = _words("chunk split getitem narrow unbind select tensor_split split_with_sizes")
DROPOUTS = _words("dropout alpha_dropout")
NONLINEAR = _words(
    "gelu gelu_tanh silu relu relu6 leaky_relu prelu rrelu elu celu selu softplus mish hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink tanh",
    "sigmoid logsigmoid log_sigmoid softsign threshold erf exp expm1 log log1p pow square sqrt abs sin cos maximum minimum where sign heaviside glu",
)
ARITHMETIC = _words("mul div add sub rsub neg clamp clip clamp_min clamp_max addcmul lerp")
NORMS = _words("layer_norm rms_norm batch_norm group_norm instance_norm normalize")
MOMENTS = _words("mean var std rsqrt norm linalg_vector_norm vector_norm pow square")  # what norms are made of
REDUCED = _words("mean sum amax max getitem select index index_select gather narrow adaptive_avg_pool1d adaptive_avg_pool2d")
ADDED = _words("index_add scatter_add index_put setitem index_copy add sub addcmul baddbmm masked_scatter")
LIMITED = NONLINEAR - MOMENTS | _words("softmax log_softmax topk argmax cross_entropy")
QUIET = VIEWS | PIECES | DROPOUTS  # what leaves numbers as they are, in eval mode


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
