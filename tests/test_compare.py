"""The comparison's numbers against counting by hand."""

from __future__ import annotations

import json

import pytest
import torch

import kanformer
from kanformer.errors import SurgeryError
from model_cases import BY_NAME, blocks


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_before_and_after(name, dtype):
    model = BY_NAME[name].build(dtype)
    before = sum(parameter.numel() for parameter in model.parameters())
    before_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    found = kanformer.compare(kanformer.patch_model(model)).to_dict()
    assert found["model"]["parameters_before"] == before and found["model"]["bytes_before"] == before_bytes
    assert found["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    functions = sum(block.hidden_features * 11 for block in blocks(model).values())
    assert found["feed_forward"]["kan_parameters"] - found["feed_forward"]["mlp_parameters"] == functions
    assert found["feed_forward"]["kan_parameters"] == sum(p.numel() for block in blocks(model).values() for p in block.parameters())
    json.dumps(found)


def test_frozen_parameters_and_flops():
    model = kanformer.patch_model(BY_NAME["llama"].build())
    for block in blocks(model).values():
        block.kan_up.requires_grad_(False)
    found = kanformer.compare(model).to_dict()
    assert found["feed_forward"]["kan_frozen"] == 2 * 32 * 48
    assert found["feed_forward"]["mlp_flops"] == 2 * (2 * 3 * 32 * 48 + 2 * 48)
    assert found["feed_forward"]["kan_flops"] == found["feed_forward"]["mlp_flops"] + 2 * 48 * (2 * 3 + 4)


def test_full_edges_cost_their_basis():
    model = kanformer.patch_model(BY_NAME["bert"].build(), edges="full", grid_size=5)
    found = kanformer.compare(model).to_dict()["feed_forward"]
    assert found["kan_parameters"] == found["mlp_parameters"] + 2 * 2 * 32 * 48 * 8
    assert found["flops_ratio"] > 8


def test_the_table_shows_every_block_and_the_totals():
    comparison = kanformer.compare(kanformer.patch_model(BY_NAME["bart"].build()))
    text = str(comparison)
    for block in comparison.blocks:
        assert block.path in text
    assert f"{comparison.total('kan_parameters'):,}" in text and "trainable" in text and "frozen" in text


def test_pruned_models_are_compared_with_what_was_there():
    batches = [{"input_ids": torch.randint(3, 99, (4, 12))} for _ in range(3)]
    model = kanformer.patch_model(BY_NAME["bert"].build(), init="prune", param_ratio=0.5, calibration=batches)
    row = kanformer.compare(model).blocks[0]
    assert row.mlp_hidden == 48 and row.kan_hidden < 24 and row.parameter_ratio <= 0.5


def test_an_unpatched_model_is_an_error():
    with pytest.raises(SurgeryError, match="not patched"):
        kanformer.compare(BY_NAME["bert"].build())
