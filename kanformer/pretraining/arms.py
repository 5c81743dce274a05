"""The feed-forward blocks that are compared, each in the class of transformers that hosts its structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kanformer.errors import ConfigError, did_you_mean
from kanformer.pretraining.settings import ModelArguments
from kanformer.surgery.replacing.apply import patch_model

BASELINES = {"llama": "swiglu", "gpt2": "mlp"}  # the stock block of each host
END = 0  # number of the end-of-text token in our vocabularies


@dataclass(frozen=True)
class Arm:
    """One kind of block.

    Attributes:
        name: in folders and tables.
        host: "llama" (gated blocks) or "gpt2" (plain ones).
        kan: values of `KANConfig`; None for the host's stock block.
    """

    name: str
    host: str
    kan: dict[str, Any] | None = None

    @property
    def baseline(self) -> str:
        return BASELINES[self.host]

    @property
    def is_baseline(self) -> bool:
        return self.kan is None


ARMS = {
    arm.name: arm
    for arm in (
        Arm("swiglu", "llama"),
        Arm("gated_kan_bspline", "llama", {"basis": "bspline"}),
        Arm("gated_kan_rational", "llama", {"basis": "rational"}),
        Arm("mlp", "gpt2"),
        Arm("kan_bspline", "gpt2", {"basis": "bspline"}),
        Arm("kan_rational", "gpt2", {"basis": "rational"}),
        Arm("kan_full", "gpt2", {"edges": "full"}),
    )
}


def chosen_arms(names: Sequence[str]) -> list[Arm]:
    """The named arms (none: all) in the order of `ARMS`, with the baselines that they are compared with.

    Raises:
        ConfigError: an unknown name.
    """
    for name in names:
        if name not in ARMS:
            raise ConfigError("choose the arms", got=repr(name), hint=did_you_mean(str(name), ARMS))
    wanted = set(names or ARMS)
    wanted |= {ARMS[name].baseline for name in wanted}
    return [arm for arm in ARMS.values() if arm.name in wanted]


def kan_settings(arm: Arm, shape: ModelArguments) -> dict[str, Any]:
    """The arm's values of `KANConfig` with the grid of the settings."""
    if arm.kan is None:
        return {"edges": "mlp"}
    full = arm.kan.get("edges") == "full"
    return {**arm.kan, "grid_size": shape.full_grid_size if full else shape.grid_size, "init": shape.full_init if full else "exact"}


def make_host(host: str, shape: ModelArguments, width: int, vocab_size: int) -> nn.Module:
    """A fresh stock model from its config, with tied embeddings and without dropout."""
    if shape.hidden_size % shape.num_attention_heads:
        raise ConfigError("make the model", subject="num_attention_heads", got=shape.num_attention_heads, expected=f"a divisor of {shape.hidden_size}")
    common = {"vocab_size": vocab_size, "bos_token_id": END, "eos_token_id": END, "use_cache": False, "tie_word_embeddings": True}
    if host == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = shape.num_attention_heads
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=shape.hidden_size,
                intermediate_size=width,
                num_hidden_layers=shape.num_hidden_layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=shape.max_length,
                **common,
            )
        )
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=shape.hidden_size,
            n_inner=width,
            n_layer=shape.num_hidden_layers,
            n_head=shape.num_attention_heads,
            n_positions=shape.max_length,
            activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, by one kernel: the baseline's time is an honest one
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    )


def make_model(arm: Arm, shape: ModelArguments, width: int, vocab_size: int) -> nn.Module:
    """A fresh model with the arm's blocks; stock where the arm is a baseline.

    Shared edges start exactly at the stock block with fresh weights (functions at zero), full edges as `full_init` says.
    """
    model = make_host(arm.host, shape, width, vocab_size)
    if not arm.is_baseline:
        patch_model(model, keep_original=False, **kan_settings(arm, shape))
    return model


def make_counted(arm: Arm, shape: ModelArguments, width: int, vocab_size: int) -> nn.Module:
    """The same without numbers and patched in any case (a baseline by its like), so that `compare` can count it."""
    with torch.device("meta"):
        model = make_host(arm.host, shape, width, vocab_size)
    return patch_model(model, keep_original=False, **kan_settings(arm, shape))
