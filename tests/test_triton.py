"""The optional Triton kernels: `triton_cases.py` in a process of its own, on the interpreter and on the GPU; that they compile for a GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kanformer.bases import make_basis

HERE = Path(__file__).parent
VERSION = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2]) if importlib.util.find_spec("triton") else (0, 0)
needs_triton = pytest.mark.skipif(VERSION < (3, 5), reason="triton 3.5 or newer is not installed: pip install triton")


def run_cases(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    process = subprocess.run(command, cwd=HERE.parent, env={**os.environ, **environment}, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(VERSION < (3, 7), reason="the interpreter of triton before 3.7 fails with today's numpy")
def test_every_case_on_the_interpreter():
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_every_case_on_the_gpu():
    run_cases(TRITON_INTERPRET="0")


@pytest.mark.parametrize(("modules", "absent"), [("kanformer", "triton"), ("kanformer.ops, kanformer.layers", "kanformer.ops.triton_kernels")])
def test_the_kernels_are_loaded_by_nobody_who_does_not_use_them(modules, absent):
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert {absent!r} not in sys.modules"], check=True)


# Compiling needs no GPU: what every launch would compile is compiled for an H100, down to its machine code.


@pytest.fixture
def compiled(monkeypatch):
    """Launches compile instead of running; what they were compiled with, by kernel."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter was chosen: there is nothing to compile")
    pytest.importorskip("triton.backends.nvidia")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    seen: dict[object, list] = {}

    def launch(kernel, programs, x, *arguments, num_stages=3, **constants):
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: kind(value) for name, value in zip(names, (x, *arguments), strict=True)} | dict.fromkeys(constants, "constexpr")
        seen.setdefault(kernel, []).append(constants)
        if constants not in seen[kernel][:-1]:
            source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
            result = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": num_stages, "enable_fp_fusion": True})
            assert result.asm["cubin"] and result.metadata.shared <= 227 * 1024

    for name in ("shared_values", "shared_gradients", "narrow_values", "narrow_coef_gradients", "narrow_input_gradients", "planes"):
        monkeypatch.setattr(importlib.import_module(f"kanformer.ops.triton_kernels.{name}"), "launch", launch)
    return seen


def kind(value) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
    return f"*{names[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"


def numbers(basis, channels, rows):
    grid = basis.make_grid(-torch.ones(rows), torch.ones(rows))
    return grid, torch.zeros(rows, basis.n_inner) if basis.n_inner else None


@needs_triton
@pytest.mark.parametrize("basis", [make_basis("bspline", 8, 3), make_basis("rational")], ids=["cubic", "rational"])
def test_every_kernel_compiles_for_an_h100(basis, compiled):
    """In bf16; each kernel is the same for every number of tokens."""
    from kanformer.ops.triton_kernels import full_gradients, full_values, shared_gradients, shared_values

    for tokens in (1, 1000):
        for channels, groups in ((64, 1), (16, 16)):
            x, coef = torch.zeros(tokens, channels, dtype=torch.bfloat16), torch.zeros(groups, basis.n_basis)
            shared_values(x, x, coef, *numbers(basis, channels, groups), basis)
            shared_gradients(x, x, coef, *numbers(basis, channels, groups), basis, True, True)
        for outputs in (256, 272):
            x, coef = torch.zeros(tokens, 64, dtype=torch.bfloat16), torch.zeros(outputs, basis.n_basis, 64, dtype=torch.bfloat16)
            full_values(x, None, coef, *numbers(basis, 64, 64), basis)
            full_gradients(x, torch.zeros(tokens, outputs, dtype=torch.bfloat16), coef, *numbers(basis, 64, 64), basis, True, True)
    assert len(compiled) == 7
    for kernel, constants in compiled.items():
        assert constants[: len(constants) // 2] * 2 == constants
        assert {parameter.name for parameter in kernel.params if parameter.do_not_specialize} >= {"tokens"}
