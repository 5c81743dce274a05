"""A tiny random model of each family that the five structures name, with inputs for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from kanformer.layers import KANFeedForward

_SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
_BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "activation_dropout": 0.1,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """How to build one model."""

    name: str
    structure: str
    auto_class: str
    config: Any
    values: dict
    conv1d: bool = False

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        config = self.config(**self.values)
        return getattr(tf, self.auto_class).from_config(config, dtype=dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.config is tf.ViTConfig:
            return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).to(dtype)}
        ids = torch.randint(3, 99, (2, 11), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 8:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        return {**inputs, "decoder_input_ids": ids[:, :7]} if self.values is _BART else inputs

    @torch.no_grad()
    def logits(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return model(**self.inputs(dtype)).logits


def _lm(name: str, structure: str, config: Any, values: dict | None = None, auto_class: str = "AutoModelForCausalLM", **options: Any) -> Case:
    return Case(name, structure, auto_class, config, _SMALL if values is None else values, **options)


_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}
CASES = [
    _lm("bert", "split", tf.BertConfig, auto_class="AutoModelForMaskedLM"),
    _lm("roberta", "split", tf.RobertaConfig, auto_class="AutoModelForMaskedLM"),
    _lm("electra", "split", tf.ElectraConfig, {**_SMALL, "embedding_size": 32}, auto_class="AutoModelForMaskedLM"),
    _lm("opt", "inline", tf.OPTConfig, {**{k: v for k, v in _SMALL.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    _lm("bart", "inline", tf.BartConfig, _BART, auto_class="AutoModelForSeq2SeqLM"),
    _lm("mbart", "inline", tf.MBartConfig, _BART, auto_class="AutoModelForSeq2SeqLM"),
    _lm("pegasus", "inline", tf.PegasusConfig, _BART, auto_class="AutoModelForSeq2SeqLM"),
    _lm("marian", "inline", tf.MarianConfig, _BART, auto_class="AutoModelForSeq2SeqLM"),
    _lm("gpt2", "module", tf.GPT2Config, {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, conv1d=True),
    _lm("gpt_neox", "module", tf.GPTNeoXConfig),
    _lm("phi", "module", tf.PhiConfig),
    Case(
        "vit",
        "module",
        "AutoModelForImageClassification",
        tf.ViTConfig,
        {**{k: v for k, v in _SMALL.items() if k not in ("vocab_size", "max_position_embeddings")}, "image_size": 32, "patch_size": 8},
    ),
    _lm("llama", "module", tf.LlamaConfig, _GROUPED),
    _lm("qwen2", "module", tf.Qwen2Config, {**_SMALL, "num_key_value_heads": 2}),
    _lm("qwen3", "module", tf.Qwen3Config, _GROUPED),
    _lm("mistral", "module", tf.MistralConfig, _GROUPED),
    _lm("gemma", "module", tf.GemmaConfig, _GROUPED),
    _lm("gemma2", "module", tf.Gemma2Config, _GROUPED),
]
BY_NAME = {case.name: case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
ONE_OF_EACH = [BY_NAME[name] for name in ("bert", "opt", "bart", "gpt2", "vit", "llama")]
one_case_of_each = pytest.mark.parametrize("case", ONE_OF_EACH, ids=[case.name for case in ONE_OF_EACH])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def blocks(model: nn.Module) -> dict[str, KANFeedForward]:
    """The KAN-FFNs by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, KANFeedForward)}


def disturb(model: nn.Module) -> nn.Module:
    """Gives every learned function a shape of its own, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in blocks(model).values():
            for parameter in block.spline_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Same names in the same order, same dtypes, same bits."""
    return list(left) == list(right) and all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)
