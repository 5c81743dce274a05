"""Patched models inside other models: composed by transformers, or held by a wrapper; outputs, saving, loading, restoring."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import kanformer
from kanformer.errors import SurgeryError
from kanformer.surgery.saving.loading import load_model
from model_cases import BY_NAME, blocks, disturb, same_state, snapshot
from tool_cases import SIZES, VISION, decoder, encoder, reload, trained, vision

IDS = torch.randint(5, 98, (2, 7), generator=torch.Generator().manual_seed(3))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
COMPOSITIONS = {
    "text": (tf.EncoderDecoderModel, encoder, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}),
    "vision": (tf.VisionEncoderDecoderModel, vision, {"pixel_values": PIXELS, "decoder_input_ids": IDS[:, :5]}),
}
each_composition = pytest.mark.parametrize(("kind", "first", "inputs"), COMPOSITIONS.values(), ids=COMPOSITIONS)


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


@each_composition
def test_patched_parts_compute_together_what_the_plain_ones_did(kind, first, inputs):
    want = logits(kind(encoder=first(), decoder=decoder()), inputs)
    model = kind(encoder=kanformer.patch_model(first()), decoder=kanformer.patch_model(decoder()))
    assert torch.equal(logits(model, inputs), want)
    assert not torch.equal(logits(disturb(model), inputs), want)


@each_composition
def test_a_composed_model_comes_back_with_both_parts(kind, first, inputs, tmp_path):
    model = kind(encoder=trained(first()), decoder=trained(decoder(), edges="full", grid_size=3))
    want = logits(model, inputs)
    loaded = reload(model, tmp_path / "a")
    assert loaded.config.quantization_config == {"quant_method": "kan"}, "not one part's"
    assert torch.equal(logits(loaded, inputs), want) and same_state(snapshot(loaded), snapshot(model))
    again = reload(loaded, tmp_path / "b", tf.AutoModelForSeq2SeqLM if kind is tf.EncoderDecoderModel else None)
    assert torch.equal(logits(again, inputs), want) and list(blocks(again)) == list(blocks(model))


def test_parts_that_are_saved_by_themselves_compose(tmp_path):
    kind, first, inputs = COMPOSITIONS["text"]
    model = kind(encoder=trained(first()), decoder=trained(decoder()))
    model.encoder.save_pretrained(tmp_path / "e")
    model.decoder.save_pretrained(tmp_path / "d")
    loaded = kind.from_encoder_decoder_pretrained(tmp_path / "e", tmp_path / "d")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_a_composed_model_that_is_patched_as_a_whole_comes_back(tmp_path):
    kind, first, inputs = COMPOSITIONS["text"]
    model = trained(kind(encoder=first(), decoder=decoder()))
    assert torch.equal(logits(reload(model, tmp_path), inputs), logits(model, inputs)) and len(blocks(model)) == 4


@each_composition
def test_with_only_the_first_part_patched_stock_loading_fails_loudly_and_asking_for_kan_loads_it(kind, first, inputs, tmp_path):
    model = kind(encoder=trained(first()), decoder=decoder())
    want = logits(model, inputs)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        kind.from_pretrained(tmp_path / "a")
    loaded = reload(model, tmp_path / "a", quantization_config={"quant_method": "kan"})
    assert torch.equal(logits(loaded, inputs), want)
    assert torch.equal(logits(load_model(str(tmp_path / "a")), inputs), want)
    assert torch.equal(logits(reload(loaded, tmp_path / "b"), inputs), want), "from now on it must load by itself"


def test_asking_for_kan_where_nothing_is_patched_is_an_error(tmp_path):
    encoder().save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match=r"call kanformer.patch_model"):
        tf.BertModel.from_pretrained(tmp_path, quantization_config={"quant_method": "kan"})


def chat_model() -> nn.Module:
    torch.manual_seed(0)
    text = tf.LlamaConfig(**SIZES, num_key_value_heads=2)
    pictures = tf.CLIPVisionConfig(**VISION)
    config = tf.LlavaConfig(text_config=text, vision_config=pictures, image_token_index=98, vision_feature_layer=-1)
    return tf.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("part", "options"), [("language_model", {}), ("vision_tower", {"quantization_config": {"quant_method": "kan"}})])
def test_one_part_of_a_chat_model(part, options, tmp_path):
    model = chat_model()
    trained(model.model.get_submodule(part))
    ids = torch.cat([torch.full((2, 4), 98), IDS], 1)
    inputs = {"input_ids": ids, "pixel_values": PIXELS}
    plain = logits(chat_model(), inputs)
    loaded = reload(model, tmp_path / "a", **options)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs)) and not torch.equal(plain, logits(model, inputs))
    assert list(blocks(loaded)) == list(blocks(model)) != []
    assert torch.equal(logits(reload(loaded, tmp_path / "b"), inputs), logits(model, inputs))


def test_what_is_asked_of_a_composed_model_covers_all_its_parts(tmp_path):
    kind, first, inputs = COMPOSITIONS["text"]
    plain = kind(encoder=first(), decoder=decoder())
    model = kind(encoder=kanformer.patch_model(first()), decoder=kanformer.patch_model(decoder()))
    report = kanformer.compare(model)
    assert [block.mlp_hidden for block in report.blocks] == [48, 48, 40, 40]
    kanformer.refine_grids(model, 16)
    assert torch.equal(logits(reload(model, tmp_path / "refined"), inputs), logits(model, inputs))
    with pytest.raises(SurgeryError, match="patched already"):
        kanformer.patch_model(model)
    kanformer.unpatch_model(model)
    assert not blocks(model) and same_state(snapshot(model), snapshot(plain))
    assert torch.equal(logits(reload(model, tmp_path / "plain"), inputs), logits(plain, inputs))


class Wrapper(nn.Module):
    """A model of one's own around one of transformers'."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize("name", ["bert", "opt", "llama"])
def test_a_model_that_is_patched_through_its_wrapper_is_saved_as_the_model_that_it_is(name, tmp_path):
    case = BY_NAME[name]
    outer = kanformer.patch_model(Wrapper(case.build()))
    model = outer.inner
    assert torch.equal(case.logits(model), case.logits(case.build()))
    assert all(path.startswith("inner.") for path in blocks(outer))
    assert torch.equal(case.logits(reload(disturb(model), tmp_path)), case.logits(model))
    kanformer.unpatch_model(outer)
    assert same_state(snapshot(model), snapshot(case.build())) and getattr(model.config, "quantization_config", None) is None


def test_two_models_in_one_wrapper_are_saved_one_by_one_and_patched_both_or_none(tmp_path, monkeypatch):
    from kanformer.surgery.replacing import apply

    pair = nn.ModuleDict({"bert": BY_NAME["bert"].build(), "opt": BY_NAME["opt"].build()})
    state, swap = snapshot(pair), apply.swap
    monkeypatch.setattr(apply, "swap", lambda holder, *rest: swap(holder, *rest) if holder is pair["bert"] else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kanformer.patch_model(pair)
    assert not blocks(pair) and same_state(snapshot(pair), state)
    monkeypatch.undo()
    trained(pair)
    for name, model in pair.items():
        assert torch.equal(BY_NAME[name].logits(reload(model, tmp_path / name)), BY_NAME[name].logits(model))


def test_a_config_taken_from_a_patched_model_makes_a_plain_model_that_can_be_patched(tmp_path):
    case = BY_NAME["llama"]
    config = kanformer.patch_model(case.build()).config
    with pytest.raises(SurgeryError, match="del config.quantization_config"):
        kanformer.patch_model(tf.AutoModelForCausalLM.from_config(config))
    config = copy.deepcopy(config)
    del config.quantization_config
    model = trained(tf.AutoModelForCausalLM.from_config(config).eval(), grid_size=5)
    assert torch.equal(case.logits(reload(model, tmp_path)), case.logits(model))


def test_what_a_part_s_config_says_of_another_model_s_surgery_is_dropped(tmp_path):
    kind, first, inputs = COMPOSITIONS["text"]
    foreign = kanformer.patch_model(decoder()).config
    model = trained(kind(encoder=first(), decoder=tf.BertLMHeadModel(foreign)))
    assert torch.equal(logits(reload(model, tmp_path), inputs), logits(model, inputs))


def test_restoring_the_parts_leaves_nothing_behind(tmp_path):
    kind, first, inputs = COMPOSITIONS["text"]
    model = kind(encoder=trained(first()), decoder=decoder())
    model.save_pretrained(tmp_path / "a")
    config = kind.from_pretrained(tmp_path / "a", quantization_config={"quant_method": "kan"}).config
    del config.encoder.quantization_config
    again = kind(config=config)
    kanformer.patch_model(again.encoder)
    kanformer.unpatch_model(again)
    assert torch.equal(logits(reload(again, tmp_path / "b"), inputs), logits(again, inputs))
