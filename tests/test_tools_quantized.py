"""Quantizers beside patched models: combined where they touch other parts, refused with the reason where they do not go together."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

import kanformer
from kanformer.errors import NoFeedForwardError, SurgeryError
from model_cases import BY_NAME, blocks, same_state
from tool_cases import kan_state, trained

CASE = BY_NAME["llama"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore::DeprecationWarning:torchao")


def of(part: str):
    return lambda module, path: isinstance(module, nn.Linear) and part in path


def quantize(model: nn.Module, part: str) -> nn.Module:
    """Eight-bit weights in the linear maps of one part."""
    torchao = pytest.importorskip("torchao.quantization", reason="needs the package torchao, which no extra installs: pip install -c constraints.txt torchao")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=of(part))
    return model


def linears(model: nn.Module, part: str) -> set[bool]:
    """Whether the weights of the linear maps there are plain tensors."""
    return {type(module.weight) is nn.Parameter for path, module in model.named_modules() if isinstance(module, nn.Linear) and part in path}


def test_torchao_on_the_attention_of_a_patched_model():
    model = trained(CASE.build())
    want = CASE.logits(model)
    quantize(model, "self_attn")
    assert linears(model, "self_attn") == {False} and linears(model, "kan_") == {True}
    assert 0 < float((CASE.logits(model) - want).norm() / want.norm()) < 0.02
    other = kanformer.patch_model(CASE.build())
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(CASE.logits(other), CASE.logits(model))


def test_patching_a_model_whose_attention_torchao_quantized():
    model = quantize(CASE.build(), "self_attn")
    before = CASE.logits(model)
    assert torch.equal(CASE.logits(kanformer.patch_model(model)), before) and len(blocks(model)) == 2


def test_torchao_on_the_linear_maps_of_the_blocks():
    model = trained(CASE.build())
    want = CASE.logits(model)
    quantize(model, "kan_")
    assert 0 < float((CASE.logits(model) - want).norm() / want.norm()) < 0.02
    assert all(block.kan_functions.kan_coef.dtype == torch.float32 for block in blocks(model).values())


def test_blocks_that_torchao_quantized_are_refused():
    model = quantize(CASE.build(), "mlp")
    before = CASE.logits(model)
    with pytest.raises(NoFeedForwardError, match="quantized or of another kind"):
        kanformer.patch_model(model)
    assert not blocks(model) and torch.equal(CASE.logits(model), before)


OTHERS = {
    "bitsandbytes": lambda: tf.BitsAndBytesConfig(load_in_8bit=True),
    "quanto": lambda: tf.QuantoConfig(weights="int8"),
    "a dict": lambda: {"quant_method": "hqq"},
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_loading_a_patched_checkpoint_with_another_quantizer_is_refused(settings, tmp_path):
    trained(CASE.build()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantized with KANQuantizationConfig but you are passing a \w+ config"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings())


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes"])
def test_a_model_that_was_loaded_quantized_is_refused(method, tmp_path):
    pytest.importorskip(method, reason=f"needs the package {method}")
    CASE.build().save_pretrained(tmp_path)
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = tf.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        settings = tf.BitsAndBytesConfig(load_in_8bit=True)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    modules = [type(module) for module in model.modules()]
    with pytest.raises(SurgeryError, match=f"a model quantized by {method}"):
        kanformer.patch_model(model)
    assert [type(module) for module in model.modules()] == modules


def test_a_bitsandbytes_map_in_the_attention_of_a_patched_model(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes, which no extra installs: pip install bitsandbytes")
    model = trained(CASE.build())
    want, state = CASE.logits(model), kan_state(model)
    for layer in model.model.layers:
        old = layer.self_attn.q_proj
        new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        layer.self_attn.q_proj = new.to("cpu")
    assert 0 < float((CASE.logits(model) - want).norm() / want.norm()) < 0.02
    assert same_state(kan_state(model), state)
