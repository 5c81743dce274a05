"""What the tests of the tools around a patched model share: a word tokenizer, models to compose, and saving and loading."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

import kanformer
from model_cases import blocks, disturb, snapshot

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 8}


def tokenizer(framed: bool = True) -> tf.PreTrainedTokenizerFast:
    """One token per word, "w0" to "w93"; `framed` puts [CLS] and [SEP] around a text."""
    words = SPECIAL + [f"w{number}" for number in range(94)]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if framed:
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, eos_token="[SEP]", **names)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return tf.BertModel(tf.BertConfig(**SIZES)).eval()


def decoder() -> nn.Module:
    torch.manual_seed(1)
    return tf.BertLMHeadModel(tf.BertConfig(**{**SIZES, "intermediate_size": 40}, is_decoder=True, add_cross_attention=True)).eval()


def vision() -> nn.Module:
    torch.manual_seed(2)
    return tf.ViTModel(tf.ViTConfig(**VISION)).eval()


def trained(model: nn.Module, **settings) -> nn.Module:
    """The model, patched, with learned functions of their own."""
    return disturb(kanformer.patch_model(model, **settings))


@torch.no_grad()
def loud(model: nn.Module) -> nn.Module:
    """The model with functions so large that they carry through small random weights to the tokens."""
    for block in blocks(model).values():
        for parameter in block.spline_parameters():
            parameter.mul_(100)
    return model


def reload(model, folder: Path, kind=None, **options) -> nn.Module:
    """The model after a stay on the disk; nothing may be missing, left over or of another shape."""
    model.save_pretrained(folder)
    loaded, info = (kind or type(model)).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return loaded.eval()


def kan_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what the KAN-FFNs have in the state dict, but for the sentinels."""
    return {name: tensor for name, tensor in snapshot(model).items() if "kan_" in name}


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert list(left) == list(right)
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
