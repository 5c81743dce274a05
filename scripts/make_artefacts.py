"""python scripts/make_artefacts.py: writes tests/artefacts/v<version>/, tiny checkpoints that every later kanformer must load to the same outputs.

Run it once per released version. A folder that is there is never written again: what it holds was made by the code of its time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KANFORMER_BACKEND", "eager")

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor

import kanformer
from kanformer.layers import KANFeedForward

ROOT = Path(__file__).resolve().parents[1] / "tests" / "artefacts"
_SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,  # so large that the blocks matter to the logits
}
_LLAMA = {**_SMALL, "num_key_value_heads": 1}
_TOKENS = {**_LLAMA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MIXTURE = {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
_OPT = {
    **{name: value for name, value in _SMALL.items() if name not in ("intermediate_size", "initializer_range")},
    "init_std": 0.3,
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
}
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 32,
    "activation_dropout": 0.1,
    "pad_token_id": 1,
    "init_std": 0.3,
}
_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def _calibrated(model: Any, **settings: Any) -> None:
    kanformer.patch_model(model, calibration=[_inputs(seed=seed) for seed in (7, 8)], **settings)


def _refined(model: Any) -> None:
    kanformer.patch_model(model, edges="full", grid_size=2, target_modules=["*.1.mlp"], keep_original=False)
    kanformer.refine_grids(model, 4)


# name: (class, config class, its values, how it is patched, dtype, whether the model has a decoder of its own)
_ARTEFACTS: dict[str, tuple[Any, Any, dict, Callable[[Any], Any], torch.dtype, bool]] = {
    "bert-shared": (tf.BertForMaskedLM, tf.BertConfig, _SMALL, lambda model: kanformer.patch_model(model), torch.float32, False),
    "llama-gated-bf16": (tf.LlamaForCausalLM, tf.LlamaConfig, _LLAMA, lambda model: kanformer.patch_model(model), torch.bfloat16, False),
    "gpt2-full": (tf.GPT2LMHeadModel, tf.GPT2Config, _GPT2, lambda model: kanformer.patch_model(model, edges="full", grid_size=3), torch.float32, False),
    "opt-inline-groups": (
        tf.OPTForCausalLM,
        tf.OPTConfig,
        _OPT,
        lambda model: kanformer.patch_model(model, groups=4, basis="chebyshev", extrapolation="linear"),
        torch.float32,
        False,
    ),
    "bart-inline-free-knots": (
        tf.BartForConditionalGeneration,
        tf.BartConfig,
        _BART,
        lambda model: kanformer.patch_model(model, knots="free", init="random", width="match"),
        torch.float32,
        True,
    ),
    "t5-gated-rbf": (tf.T5ForConditionalGeneration, tf.T5Config, _T5, lambda model: kanformer.patch_model(model, basis="rbf"), torch.float32, True),
    "bert-pruned-rational": (
        tf.BertForSequenceClassification,
        tf.BertConfig,
        _SMALL,
        lambda model: _calibrated(model, basis="rational", init="prune", param_ratio=0.7),
        torch.float32,
        False,
    ),
    "llama-one-layer-refined": (tf.LlamaForCausalLM, tf.LlamaConfig, _LLAMA, _refined, torch.float32, False),
    "gpt2-control": (tf.GPT2LMHeadModel, tf.GPT2Config, _GPT2, lambda model: kanformer.patch_model(model, edges="mlp"), torch.float32, False),
    "bert-fourier-calibrated": (tf.BertForMaskedLM, tf.BertConfig, _SMALL, lambda model: _calibrated(model, basis="fourier"), torch.float32, False),
    # since 0.2
    "mixtral-experts-bf16": (tf.MixtralForCausalLM, tf.MixtralConfig, _MIXTURE, lambda model: kanformer.patch_model(model), torch.bfloat16, False),
    "gpt-oss-experts-full": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig,
        {**_MIXTURE, "head_dim": 8},
        lambda model: kanformer.patch_model(model, edges="full", grid_size=2),
        torch.float32,
        False,
    ),
    "bitnet-norm": (tf.BitNetForCausalLM, tf.BitNetConfig, _TOKENS, lambda model: kanformer.patch_model(model, basis="rational"), torch.float32, False),
    "apertus-trained-activation": (tf.ApertusForCausalLM, tf.ApertusConfig, _TOKENS, lambda model: kanformer.patch_model(model), torch.float32, False),
    "bert-two-configs": (
        tf.BertForMaskedLM,
        tf.BertConfig,
        _SMALL,
        lambda model: kanformer.patch_model(model, [kanformer.KANConfig(edges="full", grid_size=3, layers_to_transform=(-1,)), kanformer.KANConfig(groups=6)]),
        torch.float32,
        False,
    ),
}


def main() -> None:
    folder = ROOT / f"v{'.'.join(kanformer.__version__.split('.')[:2])}"
    for name in _ARTEFACTS:
        if (folder / name).exists():
            print(f"left as it is: {folder / name}")
            continue
        _write(folder / name, *_ARTEFACTS[name])
        print(f"wrote {folder / name}, {sum(path.stat().st_size for path in (folder / name).iterdir()):,} bytes")


def _write(folder: Path, model_class: Any, config_class: Any, values: dict, patch: Callable[[Any], Any], dtype: torch.dtype, decoder: bool) -> None:
    """A checkpoint, and beside it reference.safetensors: inputs ("in.*") and the float32 logits of the checkpoint loaded in float32."""
    torch.manual_seed(0)
    model = model_class(config_class(**values)).to(dtype).eval()
    patch(model)
    _disturb(model)
    model.save_pretrained(folder)
    inputs = _inputs(seed=1)
    if decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5].clone()
    with torch.no_grad():
        logits = model_class.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).logits
    save_file({**{f"in.{key}": value for key, value in inputs.items()}, "logits": logits.contiguous()}, folder / "reference.safetensors")
    for path in folder.glob("generation_config.json"):
        path.unlink()


def _inputs(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def _disturb(model: Any) -> None:
    """Gives every learned function a shape of its own, as training would."""
    generator = torch.Generator().manual_seed(2)
    for block in model.modules():
        if isinstance(block, KANFeedForward):
            for parameter in block.spline_parameters():
                if parameter.numel():
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)


if __name__ == "__main__":
    main()
