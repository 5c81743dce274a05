"""Small patched models in float64, texts for them, and plain computations of what the scores are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kanformer
from kanformer.layers import EdgeFunctions
from kanformer.layers.kan_linear import KANLinear

_SIZES: dict[str, Any] = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}


def tiny(kind: str = "gpt2", dtype: torch.dtype = torch.float64, seed: int = 0, **kan) -> nn.Module:
    """gpt2, llama, bert (no head), bert-mlm or mixtral, of width 8 and 12 hidden channels, with functions away from their start."""
    import transformers as tf

    torch.manual_seed(seed)
    wide = {"hidden_size": 8, "intermediate_size": 12}
    builders = {
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=40, n_embd=8, n_inner=12, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1)
        ),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES, **wide, num_key_value_heads=2)),
        "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, **wide, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)),
        "bert": lambda: tf.BertModel(tf.BertConfig(**_SIZES, **wide)),
        "bert-mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**_SIZES, **wide)),
    }
    model = builders[kind]()
    with torch.no_grad():  # far enough from a uniform prediction that edges matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    kanformer.patch_model(model, **kan)
    for module in model.modules():
        if isinstance(module, EdgeFunctions | KANLinear):
            nn.init.normal_(module.kan_coef, std=0.2)
    return model.to(dtype).eval()


def texts(count: int = 3, sequences: int = 4, length: int = 12, seed: int = 0, padded: bool = True) -> list[dict[str, Tensor]]:
    """Batches of random ids; with `padded` each sequence ends somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(2, 40, (sequences, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            for row, end in enumerate(torch.randint(4, length + 1, (sequences,), generator=generator).tolist()):
                mask[row, end:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def contributions(block: nn.Module, name: str, x: Tensor) -> Tensor:
    """What every edge of a map adds, (tokens, out, in), from what the map reads (tokens, in), plainly."""
    module = getattr(block, name)
    if isinstance(module, KANLinear):
        members = module.basis.evaluate(x, module.kan_grid.to(x.dtype), module.kan_inner)
        return module.kan_base_weight * module.base(x).unsqueeze(1) + torch.einsum("tic,oci->toi", members, module.kan_coef)
    return module.weight * x.unsqueeze(1)


def watch(block: nn.Module, names: list[str]) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]], list]:
    """What the maps read and give while hooked, padding included, the outputs in the graph."""
    inputs, outputs = {name: [] for name in names}, {name: [] for name in names}

    def keep(name):
        def hook(module, args, output):
            inputs[name].append(args[0].detach())
            output.retain_grad()
            outputs[name].append(output)

        return hook

    return inputs, outputs, [getattr(block, name).register_forward_hook(keep(name)) for name in names]


def mean_loss(model: nn.Module, batches) -> Tensor:
    """Mean cross-entropy of the next tokens, in the graph."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = model(**batch).logits[:, :-1]
        total = total + nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        count += int((labels != -100).sum())
    return total / count
