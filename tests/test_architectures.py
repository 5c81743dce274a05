"""Model types of every structure: each block is replaced with the output unchanged, or refused by name with a reason; never silently wrong, never a crash.

The whole sweep is `python scripts/sweep_architectures.py`; its table: docs/architectures.md.
"""

from __future__ import annotations

import pytest

import kanformer
from architecture_check import CRASH, DIFFERS, EQUAL, NOT_FOUND, REFUSED, Result, check
from architecture_factory import NotBuildable, difference, model_types, outputs, tiny_model
from architecture_scan import feed_forward_like
from architecture_sweep import read, report, sweep

# By structure: plain, gated, fused, split, inline, experts, norms and bounds within, residual argument, convolution, encoder-decoder, vision, sound.
REPRESENTATIVE = (
    *("gpt2", "gpt_neox", "falcon", "distilbert", "vit", "convnext"),
    *("llama", "gemma2", "phi3", "t5", "modernbert", "diffllama", "cpmant"),
    *("bert", "albert", "bart", "opt", "whisper", "wav2vec2", "deberta-v2", "pegasus_x"),
    *("mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "dbrx", "phimoe", "inkling_text", "longcat_flash"),
    *("bitnet", "apertus", "kosmos_2_text_model", "deepseek_v4", "roberta-prelayernorm", "rf_detr", "bloom"),
    *("convnextv2", "poolformer", "bridgetower_vision_model", "groupvit_vision_model", "d_fine"),
)
REFUSED_BY_NAME = ("segformer", "glpn")
WITHOUT_BLOCKS = ("mamba", "resnet", "rwkv")


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_every_block_is_patched_equal(model_type):
    result = check(model_type)
    assert result.status == EQUAL and not result.refused, result
    assert result.unpatched == 0 and result.run == result.patched > 0 and result.reload == "equal", result


@pytest.mark.parametrize("model_type", REFUSED_BY_NAME)
def test_a_block_that_does_more_is_refused_by_name(model_type):
    result = check(model_type)
    assert result.status == REFUSED and not result.patched and all(reason.partition(": ")[2] for reason in result.refused), result


@pytest.mark.parametrize("model_type", WITHOUT_BLOCKS)
def test_a_model_without_blocks_is_an_error_that_says_what_is_there(model_type):
    result = check(model_type)
    assert result.status == NOT_FOUND and "known block" in result.reason, result


@pytest.mark.parametrize("model_type", ["llama", "vit", "bart"])
def test_the_factory_makes_the_same_model_twice(model_type):
    (first, inputs), (second, again) = tiny_model(model_type), tiny_model(model_type)
    assert not first.training and sum(parameter.numel() for parameter in first.parameters()) < 1e6
    assert inputs.keys() == again.keys()
    assert difference(outputs(first, inputs), outputs(second, again)) == 0


def test_the_factory_says_why_it_cannot():
    with pytest.raises(NotBuildable, match="no model class"):
        tiny_model("edgetam_mask_decoder")
    assert len(model_types()) > 500


def test_a_wrong_block_is_seen(monkeypatch):
    """The comparison is no formality: one weight of one block off by a thousandth is a difference."""
    right = kanformer.patch_model

    def wrong(model, **settings):
        block = next(module for module in right(model, **settings).modules() if isinstance(module, kanformer.KANFeedForward))
        block.kan_down.weight.data[0, 0] += 1e-3
        return model

    monkeypatch.setattr(kanformer, "patch_model", wrong)
    result = check("llama")
    assert result.status == DIFFERS and result.difference > 0 and not result.fine


def test_shapes_alone_find_the_blocks_that_kanformer_finds():
    for model_type in ("llama", "bert", "bart", "mixtral"):
        model, _ = tiny_model(model_type)
        assert len(feed_forward_like(model)) == (4 if model_type == "bart" else 2)


def test_the_sweep_goes_on_where_it_was(tmp_path, capsys):
    cache = tmp_path / "cache.jsonl"
    results = sweep(["gpt2", "edgetam_mask_decoder"], cache, workers=1)
    assert [result.status for result in results] == [EQUAL, "not buildable"] and len(cache.read_text().splitlines()) == 2
    capsys.readouterr()
    assert sweep(["gpt2"], cache) == results[:1] and not capsys.readouterr().out
    cache.write_text(cache.read_text().replace('"sources": "', '"sources": "older '))
    assert read(cache) == {}
    page = report([*results, Result("broken", CRASH, "ValueError: a | b")])
    assert "| gpt2 | GPT2Model | 2 | " in page and "- edgetam_mask_decoder: " in page and "crash: ValueError: a / b" in page
