"""Without the originals a patched model lives in the memory that the model had."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import kanformer
from kanformer.errors import SurgeryError
from kanformer.layers import KANExperts
from model_cases import BY_NAME, blocks, disturb

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "phi3": lambda: tf.Phi3Config(**SMALL, intermediate_size=48, pad_token_id=0),
    "mixtral": lambda: tf.MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=4),
    "gpt_oss": lambda: tf.GptOssConfig(**SMALL, intermediate_size=48, num_local_experts=4),
}
IDS = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(1))


def pointers(model):
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("edges", ["shared", "full", "mlp"])
@pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "llama"])
def test_the_maps_are_the_models_own_tensors(name, edges):
    case = BY_NAME[name]
    model = case.build()
    before, had = case.logits(model), pointers(model)
    kanformer.patch_model(model, edges=edges, keep_original=False)
    assert torch.equal(case.logits(model), before)
    for block in blocks(model).values():
        for part in (block.kan_up, block.kan_down):
            weight, bias = (part.kan_base_weight, part.kan_bias) if edges == "full" else (part.weight, part.bias)
            assert weight.untyped_storage().data_ptr() in had and (bias is None or bias.untyped_storage().data_ptr() in had)
    with pytest.raises(SurgeryError, match="no originals"):
        kanformer.unpatch_model(model)


def test_with_the_originals_nothing_is_shared():
    case = BY_NAME["llama"]
    model = case.build()
    had = pointers(model)
    kanformer.patch_model(model)
    assert not any(parameter.untyped_storage().data_ptr() in had for block in blocks(model).values() for parameter in block.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_maps_that_lay_together_train_and_come_back(name, tmp_path):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    before, had = model(IDS).logits, pointers(model)
    kanformer.patch_model(model, keep_original=False)
    shared = [weight.untyped_storage().data_ptr() in had for block in blocks(model).values() for weight in (block.kan_gate.weight, block.kan_up.weight)]
    assert all(shared) if name != "gpt_oss" else not any(shared)  # there they lie interleaved and turned
    assert (model(IDS).logits - before).abs().max() <= 1e-6 * before.abs().max()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = disturb(model.eval())(IDS).logits
        model.save_pretrained(tmp_path)
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(IDS).logits, after) and not torch.allclose(after, before, rtol=1e-2)
    for module in loaded.modules():
        if isinstance(module, KANExperts):
            assert all(tensor.data_ptr() % 64 == 0 for tensor in module.parameters())
            assert not any(parameter.requires_grad for path, parameter in module.named_parameters() if not path.startswith("kan_"))
