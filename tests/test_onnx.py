"""Layers and a whole model exported to ONNX compute what PyTorch computes, for any number of texts and tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from kanformer.layers import SharedKANLinear
from kanformer.surgery.replacing.apply import patch_model
from layer_cases import BASES, D, feed_forward, trained
from model_cases import BY_NAME, disturb

pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs the package onnxscript, which the extra [test] installs")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime, which the extra [test] installs")

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # torch's own, while it exports

TOLERANCE = 1e-5  # of the largest output, in float32
FREE = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
LAYERS = {
    "shared plain": lambda: feed_forward("shared", False),
    "shared gated": lambda: feed_forward("shared", True),
    "full plain": lambda: feed_forward("full", False),
    "full gated": lambda: feed_forward("full", True),
    "mlp gated": lambda: feed_forward("mlp", True),
    "one map, in groups": lambda: SharedKANLinear(D, 5, groups=2),
    **{name: (lambda options: lambda: Pair(options))(basis) for name, basis in BASES.items()},
}


class Pair(nn.Module):
    """Both kinds of edges of a basis in one graph: an export has a cost of its own."""

    def __init__(self, basis: dict) -> None:
        super().__init__()
        self.shared, self.full = feed_forward("shared", True, **basis), feed_forward("full", False, **basis)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.shared(x), self.full(x)


def session(module: nn.Module, inputs: dict[str, Tensor]):
    """What onnxruntime makes of the exported module; the first two dimensions of every input are free."""
    program = torch.onnx.export(module, kwargs=inputs, dynamo=True, dynamic_shapes=dict.fromkeys(inputs, FREE), verbose=False)
    assert program is not None
    model = program.model_proto
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}, "an operator that onnxruntime does not have by itself"
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@torch.no_grad()
def error(running, module: nn.Module, inputs: dict[str, Tensor]) -> float:
    """The largest difference over all outputs, each in units of its largest value."""
    wanted = module(**inputs)
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    found = [torch.from_numpy(value) for value in running.run(None, {name: value.numpy() for name, value in inputs.items()})]
    assert [value.shape for value in found] == [value.shape for value in wanted]
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_in_onnxruntime(make):
    module = trained(make()).eval()
    running = session(module, {"x": torch.randn(2, 5, D)})
    for shape in ((2, 5), (1, 1), (3, 70)):
        assert error(running, module, {"x": 3 * torch.randn(*shape, D)}) <= TOLERANCE  # beyond the grids too


class Logits(nn.Module):
    """A language model as a function of tensors to a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.mark.parametrize(("family", "edges"), [("bert", "shared"), ("llama", "full")])
def test_a_whole_model_in_onnxruntime(family, edges):
    case = BY_NAME[family]
    case = dataclasses.replace(case, values={**case.values, "num_hidden_layers": 1})
    model = Logits(disturb(patch_model(case.build(), edges=edges))).eval()
    inputs = case.inputs()
    running = session(model, inputs)
    longer = {name: torch.cat([value, value[:, :4]], 1)[[0, 1, 1]] for name, value in inputs.items()}
    for each in (inputs, longer):
        assert error(running, model, each) <= TOLERANCE
