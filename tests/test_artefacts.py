"""Checkpoints of earlier versions load forever, and compute what they computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import kanformer
from model_cases import blocks

ROOT = Path(__file__).resolve().parent / "artefacts"
FOLDERS = sorted(path.parent for path in ROOT.glob("v*/*/config.json"))
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=["/".join(folder.parts[-2:]) for folder in FOLDERS])


def model_class(folder: Path):
    return getattr(tf, json.loads((folder / "config.json").read_text())["architectures"][0])


def reference(folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    tensors = load_file(folder / "reference.safetensors")
    logits = tensors.pop("logits")
    return {name.removeprefix("in."): tensor for name, tensor in tensors.items()}, logits


@torch.no_grad()
def distance(model, folder: Path) -> float:
    """Largest difference to the recorded logits, over their largest."""
    inputs, expected = reference(folder)
    return float((model.eval()(**inputs).logits - expected).abs().max() / expected.abs().max())


def test_there_are_artefacts_of_version_0_1():
    assert {folder.name for folder in FOLDERS if folder.parent.name == "v0.1"} >= {
        "bert-shared",
        "llama-gated-bf16",
        "gpt2-full",
        "opt-inline-groups",
        "bart-inline-free-knots",
        "t5-gated-rbf",
        "bert-pruned-rational",
    }


@each_folder
def test_an_old_checkpoint_computes_what_it_computed(folder, tmp_path):
    model, info = model_class(folder).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert distance(model, folder) < 1e-5
    # Saved by this version it is the same model.
    model.save_pretrained(tmp_path)
    assert distance(model_class(folder).from_pretrained(tmp_path), folder) < 1e-5
    # And the logits above do depend on the learned functions.
    if any(block.edges != "mlp" for block in blocks(model).values()):
        with torch.no_grad():
            for block in blocks(model).values():
                for _, module in block.spline_modules():
                    module.kan_coef.zero_()
        assert distance(model, folder) > 1e-2


@each_folder
def test_an_old_checkpoint_keeps_its_dtype(folder):
    model = model_class(folder).from_pretrained(folder)
    expected = torch.bfloat16 if "bf16" in folder.name else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert kanformer.compare(model).total("kan_parameters") == sum(p.numel() for block in blocks(model).values() for p in block.parameters())
