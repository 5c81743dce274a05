"""Blocks of classes that no file describes: found by their parts, patched exactly, with their dropouts in the right places, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import kanformer
from kanformer import KANFeedForward
from kanformer.layers import KANExperts
from kanformer.surgery.finding.structure import structural_specs

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
TEXT, BOTH, PIXELS = {"input_ids": IDS}, {"input_ids": IDS, "decoder_input_ids": IDS}, {"pixel_values": torch.randn(1, 3, 32, 32)}
SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
T5 = {"vocab_size": 100, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}
LED = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
FFN = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "activation_dropout": 0.3}

MODELS = {  # config, inputs, (dropout between the maps, dropout at the end), whether it is bit-equal
    "t5": (tf.T5Config(**T5), BOTH, (0.1, 0.0), True),
    "t5, gated": (tf.T5Config(**T5, feed_forward_proj="gated-gelu"), BOTH, (0.1, 0.0), True),
    "distilbert": (tf.DistilBertConfig(vocab_size=100, dim=32, hidden_dim=48, n_layers=2, n_heads=4), TEXT, (0.0, 0.1), True),
    "albert": (tf.AlbertConfig(embedding_size=16, **SMALL), TEXT, (0.0, 0.0), True),
    "falcon": (tf.FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), TEXT, (0.0, 0.0), True),
    "bloom": (tf.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.2), TEXT, (0.0, 0.2), True),
    "mpt": (tf.MptConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2), TEXT, (0.0, 0.0), True),
    "deberta": (tf.DebertaV2Config(**SMALL), TEXT, (0.0, 0.0), True),
    "nemotron": (tf.NemotronConfig(head_dim=8, **GROUPED), TEXT, (0.0, 0.0), True),
    "glm4": (tf.Glm4Config(head_dim=8, **GROUPED), TEXT, (0.0, 0.0), False),
    "phi3": (tf.Phi3Config(**GROUPED), TEXT, (0.0, 0.0), False),
    "modernbert": (tf.ModernBertConfig(**SMALL, **TOKENS, mlp_dropout=0.15), TEXT, (0.15, 0.0), False),
    "xlm": (tf.XLMConfig(vocab_size=100, emb_dim=32, n_layers=2, n_heads=4), TEXT, (0.0, 0.1), True),
    "led": (tf.LEDConfig(vocab_size=100, attention_window=4, **LED, **FFN), BOTH, (0.3, 0.0), True),
    "xglm": (tf.XGLMConfig(vocab_size=100, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, activation_dropout=0.2), TEXT, (0.2, 0.0), True),
    "ctrl": (tf.CTRLConfig(vocab_size=100, n_embd=32, dff=48, n_layer=2, n_head=4), TEXT, (0.0, 0.0), True),
    "esm": (tf.EsmConfig(**SMALL, pad_token_id=1, mask_token_id=4, emb_layer_norm_before=False), TEXT, (0.0, 0.0), False),
    "lfm2": (tf.Lfm2Config(**GROUPED, layer_types=["full_attention", "conv"]), TEXT, (0.0, 0.0), True),
    "swin": (tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4), PIXELS, (0.0, 0.0), True),
    "convnext": (tf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), PIXELS, (0.0, 0.0), True),
}
each_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    torch.manual_seed(0)
    return tf.AutoModel.from_config(copy.deepcopy(MODELS[name][0])).eval()


@torch.no_grad()
def outputs(model, name):
    return model(**MODELS[name][1])[0]


@each_model
def test_it_is_patched_exactly_and_undone(name):
    model = build(name)
    before = outputs(model, name)
    kanformer.patch_model(model)
    after = outputs(model, name)
    if MODELS[name][3]:
        assert torch.equal(after, before)
    else:  # two halves of a fused map are two products, which may round otherwise
        assert (after - before).abs().max() <= 1e-6 * before.abs().max()
    block = next(module for module in model.modules() if isinstance(module, KANFeedForward))
    assert (block.hidden_dropout.p, block.output_dropout.p) == MODELS[name][2]
    kanformer.unpatch_model(model)
    assert torch.equal(outputs(model, name), before) and not any(isinstance(module, KANFeedForward) for module in model.modules())


@each_model
def test_it_is_loaded_as_it_was_saved(name, tmp_path):
    model = kanformer.patch_model(build(name))
    for module in model.modules():
        if isinstance(module, KANFeedForward):
            for parameter in module.spline_parameters():
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = tf.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, name), outputs(model, name))


@each_model
def test_every_block_learns_and_the_gradients_are_those_of_the_original(name):
    model, patched = build(name), kanformer.patch_model(build(name))
    for each in (model, patched):
        each(**MODELS[name][1])[0].square().mean().backward()
    kept = dict(patched.named_parameters())
    for path, old in model.named_parameters():
        if path in kept and old.grad is not None:
            torch.testing.assert_close(kept[path].grad, old.grad, rtol=1e-3, atol=1e-6)
    blocks = [module for module in patched.modules() if isinstance(module, KANFeedForward)]
    assert blocks and all(parameter.grad is not None for block in blocks for parameter in block.spline_parameters())


def test_a_second_argument_that_the_block_did_not_take_is_not_swallowed():
    block = kanformer.patch_model(build("t5")).encoder.block[0].layer[1].DenseReluDense
    with pytest.raises(TypeError, match="second argument"):
        block(torch.randn(1, 2, 32), torch.randn(1, 2, 32))


def test_a_frozen_fused_map_stays_frozen():
    model = build("phi3")
    model.layers[0].mlp.gate_up_proj.weight.requires_grad_(False)
    kanformer.patch_model(model)
    first, second = (layer.mlp for layer in model.layers)
    assert not first.kan_gate.weight.requires_grad and not first.kan_up.weight.requires_grad and second.kan_up.weight.requires_grad


def test_experts_are_patched_beside_their_router_or_left_out():
    model = tf.AutoModel.from_config(tf.Qwen2MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0])).eval()
    before, router = model(**TEXT)[0], model.layers[1].mlp.gate
    kanformer.patch_model(model, exclude_modules=["*.experts"])
    assert torch.equal(model(**TEXT)[0], before) and type(model.layers[1].mlp.experts).__name__ == "Qwen2MoeExperts"
    kanformer.patch_model(kanformer.unpatch_model(model))
    assert (model(**TEXT)[0] - before).abs().max() <= 1e-6 * before.abs().max()
    assert isinstance(model.layers[1].mlp.experts, KANExperts) and model.layers[1].mlp.gate is router
    assert torch.equal(kanformer.unpatch_model(model)(**TEXT)[0], before)


def test_sequences_that_are_called_feed_forward():
    model = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 8), nn.Dropout(0.3))}).eval()
    model["head"] = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    x = torch.randn(3, 8)
    before = model["ffn"](x)
    kanformer.patch_model(model)
    assert torch.equal(model["ffn"](x), before) and (model["ffn"].hidden_dropout.p, model["ffn"].output_dropout.p) == (0.2, 0.3)
    assert isinstance(model["head"], nn.Sequential)


class Layer(nn.Module):
    """A layer that calls the parts of its block one by one."""

    def __init__(self, between=None):
        super().__init__()
        self.attend, self.grow, self.shrink, self.norm = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(12)
        self.bend, self.drop, self.between = nn.SiLU(), nn.Dropout(0.4), between

    def forward(self, x):
        x = x + self.attend(x)
        h = self.bend(self.grow(x))
        h = self.drop(h)
        return x + self.shrink(h)


class Scaled(Layer):
    def forward(self, x):
        return x + self.shrink(2 * self.bend(self.grow(x)))


class Annotated(Layer):
    def forward(self, x):
        h = self.bend(self.grow(x))
        h: torch.Tensor = 2 * h
        return x + self.shrink(h)


class LayerWithNorm(Layer):
    def forward(self, x):
        return x + self.shrink(self.norm(self.bend(self.grow(x))))


class Twice(Layer):
    def forward(self, x):
        return self.bend(self.shrink(self.bend(self.grow(x))))


def test_a_users_own_layer_is_read_off_its_source():
    model = nn.Sequential(Layer(), Layer()).eval()
    x = torch.randn(3, 8)
    before = model(x)
    kanformer.patch_model(model)
    assert torch.equal(model(x), before) and model[0].grow.hidden_dropout.p == 0.4 and isinstance(model[0].shrink, nn.Identity)
    assert structural_specs("0", LayerWithNorm())[0].hidden_norm == "norm"
    assert structural_specs("0", Scaled()) == structural_specs("0", Annotated()) == structural_specs("0", Twice()) == []
