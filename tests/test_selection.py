"""Choosing blocks: every way of naming them, what is said where a choice fits nothing, and a plan that fits a terminal."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

import kanformer
from kanformer import KANConfig
from kanformer.errors import ConfigError, NoFeedForwardError
from kanformer.surgery.finding.discover import find_sites
from kanformer.surgery.folding import fold_paths
from kanformer.surgery.planning.plan import SurgeryPlan
from kanformer.surgery.planning.towers import towers_of
from model_cases import _BART, _SMALL, BY_NAME, blocks, same_state, snapshot

_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 4], "num_heads": [2, 4], "window_size": 4}
_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "vocab_size": 99, "num_layers": 2, "num_decoder_layers": 2}
_VISION = {**_TINY, "image_size": 32, "patch_size": 8}
_EDGE = 10_000  # a width that no path of these models reaches


def _clip():
    return tf.CLIPConfig(text_config={**_TINY, "vocab_size": 99}, vision_config=_VISION, projection_dim=16)


def _pair():
    encoder, decoder = tf.ViTConfig(**_VISION), tf.BertConfig(**_SMALL)
    return tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)


_CONFIGS = {
    "bart": lambda: tf.BartConfig(**{**_BART, "encoder_layers": 4}),
    "bert": lambda: tf.BertConfig(**_SMALL),
    "bert decoder": lambda: tf.BertConfig(**_SMALL, is_decoder=True),
    "distilbert": lambda: tf.DistilBertConfig(vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "gpt2": lambda: tf.GPT2Config(**BY_NAME["gpt2"].values),
    "llama": lambda: tf.LlamaConfig(**BY_NAME["llama"].values),
    "clip": _clip,
    "pair": _pair,
    "swin": lambda: tf.SwinConfig(**_SWIN),
    "switch": lambda: tf.SwitchTransformersConfig(**_T5, num_experts=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    "whisper": lambda: tf.WhisperConfig(
        pad_token_id=0,
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    ),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**_SMALL, num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=3),
}


@functools.cache
def _model(name: str):
    """On the meta device: choosing needs no weights."""
    with torch.device("meta"):
        config = _CONFIGS[name]()
        return tf.VisionEncoderDecoderModel(config) if name == "pair" else tf.AutoModel.from_config(config)


def _plan(name: str, *configs: KANConfig, **settings) -> SurgeryPlan:
    return kanformer.plan_surgery(_model(name), list(configs) or None, **settings)


def _chosen(name: str, **settings) -> list[str]:
    plan = _plan(name, **settings)
    return [path for path, _ in fold_paths([*(block.path for block in plan.blocks), *(refusal.path for refusal in plan.refusals)])]


BART = ("encoder.layers.{}.fc1", "decoder.layers.{}.fc1")


@pytest.mark.parametrize(
    ("name", "settings", "paths"),
    [
        ("bart", {"layers_to_transform": 1}, [path.format(1) for path in BART]),
        ("bart", {"layers_to_transform": [0, "1-1"]}, [path.format("{0,1}") for path in BART]),
        ("bart", {"layers_to_transform": range(2)}, [path.format("{0,1}") for path in BART]),
        ("bart", {"layers_to_transform": "0-3"}, [BART[0].format("{0..3}"), BART[1].format("{0,1}")]),
        ("bart", {"layers_to_transform": "2-"}, [BART[0].format("{2,3}")]),
        ("bart", {"layers_to_transform": "0,2"}, [BART[0].format("{0,2}"), BART[1].format("0")]),
        ("bart", {"layers_to_transform": -1}, [BART[0].format(3), BART[1].format(1)]),
        ("bart", {"layers_to_transform": "-2-"}, [BART[0].format("{2,3}"), BART[1].format("{0,1}")]),
        ("bart", {"layers_to_transform": "-2--2", "towers": "encoder"}, [BART[0].format(2)]),
        ("bart", {"layers_to_transform": "1--1", "towers": ["decoder"]}, [BART[1].format(1)]),
        ("bart", {"target_modules": ["fc1"], "exclude_modules": r"decoder\..*"}, [BART[0].format("{0..3}")]),
        ("bart", {"target_modules": ["layers.0.fc1", "decoder.*.1.fc1"]}, [BART[0].format(0), BART[1].format("{0,1}")]),
        ("bart", {"target_modules": r"encoder.*[12]\.fc1"}, [BART[0].format("{1,2}")]),
        ("bart", {"where": lambda block: block.mlp_hidden == 40 and block.layer == 1 and block.owner == "BartDecoderLayer"}, [BART[1].format(1)]),
        ("swin", {"layers_to_transform": 1}, ["encoder.layers.1.blocks.{0..3}.mlp"]),
        ("swin", {"layers_to_transform": -1, "layers_pattern": "blocks"}, ["encoder.layers.0.blocks.1.mlp", "encoder.layers.1.blocks.3.mlp"]),
        ("swin", {"layers_pattern": ["layers", "blocks"], "layers_to_transform": [0]}, ["encoder.layers.0.blocks.{0,1}.mlp"]),
        ("clip", {"towers": "vision"}, ["vision_model.encoder.layers.{0,1}.mlp"]),
        ("clip", {"towers": ["text"], "layers_to_transform": 0}, ["text_model.encoder.layers.0.mlp"]),
        ("pair", {"towers": ["decoder"]}, ["decoder.bert.encoder.layer.{0,1}.intermediate"]),
        ("switch", {"experts": "only", "towers": "encoder"}, ["encoder.block.1.layer.1.mlp.experts.expert_{0..2}"]),
        ("switch", {"experts": "exclude"}, ["encoder.block.0.layer.1.mlp", "decoder.block.0.layer.2.mlp"]),
        ("qwen2_moe", {"experts": "exclude"}, ["layers.{0,1}.mlp.shared_expert"]),
        ("qwen2_moe", {"experts": "only"}, ["layers.{0,1}.mlp.experts"]),
        ("qwen2_moe", {"where": lambda block: not block.expert}, ["layers.{0,1}.mlp.shared_expert"]),
    ],
    ids=lambda value: "where" if isinstance(value, dict) and "where" in value else str(value),
)
def test_a_choice_takes_these_blocks(name, settings, paths):
    assert _chosen(name, **settings) == paths


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "bart",
            {"layers_to_transform": [0, 7]},
            r"layers_to_transform=7, which fits no block. The layers are encoder.layers \(0 to 3\), decoder.layers \(0 to 1\)",
        ),
        ("bart", {"layers_to_transform": range(5)}, "=4, which fits no block"),
        ("bart", {"layers_to_transform": "0-4"}, "'0-4', which goes beyond what there is"),
        ("bart", {"layers_to_transform": -5}, "-5, which fits no block"),
        ("bart", {"layers_to_transform": "0-3", "towers": "decoder"}, "'0-3', which with towers selects nothing, or not all"),
        ("bart", {"layers_to_transform": 2, "towers": "decoder"}, "no block in common"),
        ("bart", {"layers_to_transform": ()}, "an empty list"),
        ("bart", {"towers": "vision"}, r"towers='vision', which fits no block. There are encoder \(4 blocks\), text \(6 blocks\), decoder \(2 blocks\)"),
        ("bart", {"target_modules": "fc1"}, r"write a list: \['fc1'\]"),
        ("bart", {"target_modules": ["fc1", "mlp"]}, r"'mlp', which fits no block. The blocks are encoder.layers.\{0..3\}.fc1"),
        ("bart", {"target_modules": ["encoder.layer.0.fc1"]}, "Did you mean 'encoder.layers.0.fc1'"),
        ("bart", {"target_modules": ["fc2"]}, "encoder.layers.0.fc2 is a part of the block encoder.layers.0.fc1: name the block"),
        ("bart", {"target_modules": ["*.0.fc1", "*.3.fc1"], "layers_to_transform": 0}, r"'\*.3.fc1', which with layers_to_transform selects nothing"),
        ("bart", {"exclude_modules": ["fc1"]}, "nothing left after exclude_modules"),
        ("bart", {"exclude_modules": ["fc3"]}, "exclude_modules='fc3', which fits no block. Did you mean 'fc1'"),
        ("bart", {"where": lambda block: block.mlp_hidden > _EDGE}, "where=.*fits no block"),
        ("bart", {"experts": "only"}, "no experts"),
        ("swin", {"layers_to_transform": 0, "layers_pattern": "block"}, r"=0, which fits no block. The layers are encoder.layers \(0 to 1\)"),
        ("swin", {"layers_pattern": "block"}, "layers_pattern='block', which fits no block"),
        ("qwen2_moe", {"target_modules": ["gate_up_proj"]}, "is a part of the block layers.0.mlp.experts"),
    ],
    ids=lambda value: "where" if isinstance(value, dict) and "where" in value else str(value),
)
def test_a_choice_that_fits_nothing_or_only_in_part_says_what_there_is(name, settings, message):
    with pytest.raises(NoFeedForwardError, match=message) as caught:
        _plan(name, **settings)
    assert "\n" not in str(caught.value)


def test_a_wrong_expression_or_a_choice_of_nothing_leaves_the_model_alone():
    model = BY_NAME["bart"].build()
    state = snapshot(model)
    with pytest.raises(ConfigError, match=r"regular expression"):
        kanformer.patch_model(model, target_modules="fc(1")
    with pytest.raises(NoFeedForwardError):
        kanformer.patch_model(model, [KANConfig(layers_to_transform=0), KANConfig(layers_to_transform=9)])
    assert same_state(snapshot(model), state) and not blocks(model)


def test_an_error_in_the_function_is_the_users():
    with pytest.raises(AttributeError, match="no_such"):
        _plan("bart", where=lambda block: block.no_such)


def test_a_choice_is_patched_as_planned_and_comes_back(tmp_path):
    case = BY_NAME["bart"]
    model, settings = case.build(), {"towers": "decoder", "layers_to_transform": "-1", "where": lambda block: "text" in block.towers}
    kanformer.patch_model(model, **settings)
    assert list(blocks(model)) == ["model.decoder.layers.1.fc1"]
    model.save_pretrained(tmp_path)
    assert torch.equal(case.logits(tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()), case.logits(model))


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("bert", {"encoder text"}),
        ("bert decoder", {"decoder text"}),
        ("distilbert", {"encoder text"}),
        ("gpt2", {"decoder text"}),
        ("llama", {"decoder text"}),
        ("swin", {"encoder vision"}),
        ("clip", {"encoder text", "encoder vision"}),
        ("pair", {"encoder vision", "decoder text"}),
        ("whisper", {"encoder audio", "decoder text"}),
    ],
)
def test_the_tower_of_a_block_is_read_off_its_path_and_the_model_that_holds_it(name, towers):
    model = _model(name)
    assert {" ".join(towers_of(model, site.owner_path)) for site in find_sites(model)} == towers


class TestPlan:
    def test_like_blocks_are_one_row_and_everything_is_in_the_list(self):
        plan = _plan("bart", KANConfig(edges="mlp", towers="decoder"), KANConfig(layers_to_transform="1-"))
        text = plan.text(100)
        assert len(plan.blocks) == 5 and plan.left == ("encoder.layers.0.fc1",)
        assert "encoder.layers.{1..3}.fc1  3       1" in text and "decoder.layers.{0,1}.fc1   2       0" in text
        assert "config 0: mlp edges" in text and "not selected, 1 in all: encoder.layers.0.fc1" in text
        assert f"{sum(block.kan_parameters for block in plan.blocks):,}" in text.splitlines()[-2]

    @pytest.mark.parametrize("width", [80, 100, 160])
    def test_it_fits_the_terminal_and_the_paths_go_last(self, width, monkeypatch):
        monkeypatch.setenv("COLUMNS", str(width))
        with torch.device("meta"):
            long = torch.nn.ModuleDict({"a_name_that_is_far_longer_than_any_" * 3: _model("switch"), "b": _model("clip")})
        for plan in (*map(_plan, _CONFIGS), kanformer.plan_surgery(long)):
            assert all(len(line) <= width for line in str(plan).splitlines()), str(plan)
        assert "..." in str(plan) or width == 160
        assert "KAN params" in str(plan)

    def test_like_refusals_are_one_line_with_a_count(self):
        model = BY_NAME["llama"].build()
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.PReLU(layer.mlp.up_proj.out_features)
        plan = kanformer.plan_surgery(model)
        lines = [line for line in plan.text(2000).splitlines() if line.startswith("refused")]
        assert len(plan.refusals) == 2 and len(lines) == 1 and "model.layers.{0,1}.mlp (2 x LlamaMLP): its activation PReLU" in lines[0]
        with pytest.raises(NoFeedForwardError, match=r"any of the 2 .*model.layers.\{0,1\}.mlp \(2 x LlamaMLP\)"):
            kanformer.patch_model(model)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.sampled_from(["mlp", "fc1", "e_7"]), st.integers(0, 2)), max_size=30))
def test_folded_paths_stand_for_the_paths_and_no_others(parts):
    paths = {f"{first}.{number}.{kind}.{last}" for first, number, kind, last in parts}
    folded = fold_paths(sorted(paths))
    assert sum(count for _, count in folded) == len(paths)
    unfolded = [path for text, count in folded for path in _unfolded(text)]
    assert len(unfolded) == len(paths) and set(unfolded) == paths


def _unfolded(text: str) -> list[str]:
    head, brace, rest = text.partition("{")
    if not brace:
        return [text]
    inside, _, tail = rest.partition("}")
    runs = [run.split("..") for run in inside.split(",")]
    numbers = [number for run in runs for number in range(int(run[0]), int(run[-1]) + 1)]
    return [f"{head}{number}{end}" for number in numbers for end in _unfolded(tail)]
