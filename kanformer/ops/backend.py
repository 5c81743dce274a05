"""Which path computes an operator, and the compiled functions of the fast one."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import types
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from kanformer.bases.base import Basis
from kanformer.errors import ConfigError, did_you_mean

BACKENDS = ("auto", "eager", "compile", "triton")
VARIABLE = "KANFORMER_BACKEND"

# A compiler costs seconds, once per process and basis: small inputs and passes without gradients never wait for it.
_LARGE = 2**18  # numbers of an input worth a compiled kernel

_chosen: ContextVar[str | None] = ContextVar("kanformer_backend", default=None)
_broken: list[str] = []


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, operators run by `name`: "auto", "eager" (no compiler), "compile" (whatever the size) or "triton".

    "triton" is for GPUs: kernels of our own for B-splines on uniform knots and rational functions; other bases are compiled.

    Outside, the environment variable KANFORMER_BACKEND says it; without it, "auto": inputs of a quarter of a million numbers
    and more are compiled where gradients are recorded. The choice depends on nothing else, so that a run that is resumed, or a
    model that is loaded in another process, repeats itself bit for bit. Where no compiler works: eager, and one warning.

    Raises:
        ConfigError: an unknown name.
    """
    token = _chosen.set(_checked(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> str:
    """The backend that was asked for."""
    return _chosen.get() or _checked(os.environ.get(VARIABLE) or "auto")


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ConfigError("choose a backend", got=repr(name), hint=did_you_mean(str(name), BACKENDS))
    return name


def wants_compiled(x: Tensor, training: bool) -> bool:
    """Whether this call goes to the compiled path.

    Args:
        training: whether gradients are recorded.
    """
    backend = current_backend()
    if backend == "eager" or _broken or x.numel() == 0 or x.dtype == torch.float64:
        return False
    return backend in ("compile", "triton") or (training and x.numel() >= _LARGE)


# One pass over the data whatever the formulas' length: what a member is made of is computed again rather than kept.
_OPTIONS: dict[str, str | int | bool | Callable] = {"realize_opcount_threshold": 10_000, "realize_reads_threshold": 1_000, "realize_acc_reads_threshold": 1_000}


def triton_kernels(x: Tensor, basis: Basis) -> Any:
    """The package of Triton kernels if they were asked for and know this basis, or None.

    Raises:
        ConfigError: they were asked for where they cannot run.
    """
    if current_backend() != "triton":
        return None
    try:
        from kanformer.ops import triton_kernels as kernels
    except ImportError as error:
        raise ConfigError("use the triton backend", got=str(error), hint="pip install triton, or choose another backend.") from error
    if x.device.type != "cuda" and not kernels.INTERPRETED:
        raise ConfigError("use the triton backend", got=f"a tensor on {x.device}", expected="one on a GPU", hint="Choose auto, eager or compile for the CPU.")
    return kernels if kernels.supports(basis) else None


_numbers = itertools.count()


@functools.cache
def _compiled(function: Callable, signature: tuple, *settings: Any) -> Callable:
    """A compiled `function(*tensors, *settings)` for tensors of one kind; sizes are symbolic, so that one kernel serves all."""

    def call(*tensors):
        return function(*tensors, *settings)

    # Dynamo counts recompilations per code object and gives up after a few: every kind needs one of its own.
    own = call.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    compiled = torch.compile(types.FunctionType(own, call.__globals__, own.co_name, None, call.__closure__), dynamic=True, options=_OPTIONS)
    made = False

    def first(*tensors):
        nonlocal made
        if made:
            return compiled(*tensors)
        from torch.fx.experimental import _config as shapes

        # The basis' own numbers are no sizes, they say which kernel it is; sizes that are alike today need not be so tomorrow.
        with torch._dynamo.config.patch(specialize_int=True, specialize_float=True), shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            found = compiled(*tensors)
        made = True
        return found

    return first


def _kind(tensor: Tensor | None) -> tuple | None:
    """What a kernel is made for; compilers treat sizes of 0 and 1 as cases of their own."""
    return None if tensor is None else (tensor.dtype, tensor.device, *(min(size, 2) for size in tensor.shape))


def run(function: Callable, tensors: tuple, settings: tuple, compiled: bool) -> Any:
    """`function(*tensors, *settings)`, compiled if asked. Where no compiler works it runs eagerly, now and from then on, and says so once."""
    if not compiled or _broken:
        return function(*tensors, *settings)
    # Whether a tensor is a leaf or an activation must not count as another case to compile.
    tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    try:
        return _compiled(function, tuple(map(_kind, tensors)), *settings)(*tensors)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        _broken.append(reason)
        warnings.warn(
            f"kanformer runs without compiled kernels, several times slower: torch.compile failed ({reason.strip()[:160]}). "
            "Install a C++ compiler (Debian, Ubuntu: apt install g++), or set KANFORMER_BACKEND=eager to say that this is meant.",
            UserWarning,
            stacklevel=2,
        )
        return function(*tensors, *settings)
