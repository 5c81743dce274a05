"""Only the KAN part on top of a base checkpoint: the same bits as the whole model, or an error that says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import kanformer
from kanformer.errors import CheckpointError, ConfigError, KanformerError, SurgeryError
from model_cases import BY_NAME, Case, blocks, disturb, each_dtype, one_case_of_each, same_state, snapshot

BERT = BY_NAME["bert"]
WEIGHTS, INFO = "kan_delta.safetensors", "kanformer.json"


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    tf.utils.logging.disable_progress_bar()
    yield
    tf.utils.logging.enable_progress_bar()


def base_of(case, folder: Path, dtype=torch.float32) -> Path:
    case.build(dtype).save_pretrained(folder)
    return folder


def patched(case, base: Path, **settings):
    return disturb(kanformer.patch_model(getattr(tf, case.auto_class).from_pretrained(base), **settings))


@pytest.fixture
def made(tmp_path):
    """(base folder, patched model, folder of its delta)."""
    base = base_of(BERT, tmp_path / "base")
    model = patched(BERT, base)
    kanformer.save_delta(model, tmp_path / "delta")
    return base, model, tmp_path / "delta"


@each_dtype
@one_case_of_each
def test_a_delta_on_its_base_is_the_whole_model_bit_for_bit(case, dtype, tmp_path):
    base = base_of(case, tmp_path / "base", dtype)
    model = patched(case, base)
    kanformer.save_delta(model, tmp_path / "delta")
    names = set(load_file(tmp_path / "delta" / WEIGHTS))
    assert names == {f"{path}.{name}" for path, block in blocks(model).items() for name in block.state_dict()}
    loaded = kanformer.load_delta(tmp_path / "delta")
    assert same_state(snapshot(loaded), snapshot(model)) and not loaded.training
    assert torch.equal(case.logits(loaded, dtype), case.logits(model, dtype))
    # It is a patched model like any other.
    loaded.save_pretrained(tmp_path / "whole")
    assert same_state(snapshot(getattr(tf, case.auto_class).from_pretrained(tmp_path / "whole")), snapshot(model))
    assert str(kanformer.compare(loaded)) == str(kanformer.compare(model))


@pytest.mark.parametrize("config", [tf.MixtralConfig, tf.GptOssConfig], ids=["mixtral", "gpt_oss"])
def test_experts_and_their_factors_come_back(config, tmp_path):
    case = Case("experts", "experts", "AutoModelForCausalLM", config, {**BY_NAME["llama"].values, "num_local_experts": 4, "num_experts_per_tok": 2})
    base = base_of(case, tmp_path / "base")
    model = patched(case, base)
    kanformer.save_delta(model, tmp_path / "delta")
    kanformer.save_pretrained(model, tmp_path / "whole")
    for loaded in (kanformer.load_delta(tmp_path / "delta"), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")):
        assert same_state(snapshot(loaded), snapshot(model)) and torch.equal(case.logits(loaded), case.logits(model))


def test_other_edges_other_places_and_a_base_that_moved(tmp_path):
    case = BY_NAME["llama"]
    base = base_of(case, tmp_path / "base")
    model = patched(case, base, edges="full", grid_size=3, basis="rbf", layers_to_transform=[1])
    kanformer.save_delta(model, tmp_path / "delta", base)
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="load the base model"):
        kanformer.load_delta(tmp_path / "delta")
    shutil.move(tmp_path / "delta", tmp_path / "elsewhere")
    assert same_state(snapshot(kanformer.load_delta(tmp_path / "elsewhere", str(tmp_path / "moved"))), snapshot(model))


def test_a_base_in_memory_is_patched_in_place_or_left_alone(made, tmp_path):
    base, model, delta = made
    again = tf.AutoModelForMaskedLM.from_pretrained(base).train()
    assert kanformer.load_delta(delta, again) is again and same_state(snapshot(again), snapshot(model))
    assert all(block.training for block in blocks(again).values())
    other = tf.AutoModelForMaskedLM.from_pretrained(base)
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=r"other tensors \(SHA-256 .*expected that of .*base"):
        kanformer.load_delta(delta, other)
    with pytest.raises(ConfigError, match="device_map"):
        kanformer.load_delta(delta, other, device_map="auto")
    assert same_state(snapshot(other), before) and not blocks(other)
    for wrong, message in ((model, "patched"), (other.half(), "float16"), (tf.BertModel(other.config), "BertModel")):
        with pytest.raises(CheckpointError, match=message):
            kanformer.load_delta(delta, wrong)
    with pytest.raises(CheckpointError, match="offloaded"):
        places = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "cpu", "cls": "cpu"}
        kanformer.load_delta(delta, device_map=places, offload_folder=tmp_path / "offload")
    kanformer.save_delta(model, tmp_path / "unnamed", BERT.build())
    with pytest.raises(CheckpointError, match="no base_model"):
        kanformer.load_delta(tmp_path / "unnamed")
    assert same_state(snapshot(kanformer.load_delta(tmp_path / "unnamed", BERT.build())), snapshot(model))


def test_a_wrong_base_is_refused(made, tmp_path):
    _, model, delta = made
    torch.manual_seed(1)
    tf.BertForMaskedLM(BERT.config(**BERT.values)).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="other tensors"):
        kanformer.load_delta(delta, str(tmp_path / "other"))
    tf.BertForMaskedLM(BERT.config(**{**BERT.values, "hidden_size": 16})).save_pretrained(tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="other tensors"):
        kanformer.load_delta(delta, str(tmp_path / "narrow"))
    model.save_pretrained(tmp_path / "patched")
    with pytest.raises(CheckpointError, match="a model that is patched"):
        kanformer.load_delta(delta, str(tmp_path / "patched"))
    with pytest.raises(CheckpointError, match="a model that is patched"):
        kanformer.save_delta(model, tmp_path / "new", str(tmp_path / "patched"))
    with pytest.raises(SurgeryError, match="not patched"):
        kanformer.save_delta(BERT.build(), tmp_path / "new")
    with pytest.raises(SurgeryError, match="no base_model"):
        kanformer.save_delta(kanformer.patch_model(BERT.build()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_base_of_pickles_is_not_read(made, monkeypatch):
    base, _, delta = made
    torch.save(BERT.build().state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(CheckpointError, match="model.safetensors"):
        kanformer.load_delta(delta)


def test_other_weights_that_changed_are_named_and_can_be_added(made, tmp_path):
    _, model, _ = made
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(2)
        model.bert.encoder.layer[1].output.LayerNorm.bias.add_(1)
    with pytest.raises(SurgeryError, match="3 other tensors that are not those of the base .*word_embeddings.weight.*include_changed=True"):
        kanformer.save_delta(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    kanformer.save_delta(model, tmp_path / "new", include_changed=True)
    loaded = kanformer.load_delta(tmp_path / "new")
    assert same_state(snapshot(loaded), snapshot(model))
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight  # still tied


def test_a_head_and_a_size_that_the_base_does_not_have(tmp_path):
    base = base_of(BERT, tmp_path / "base")
    model = disturb(kanformer.patch_model(tf.BertForSequenceClassification.from_pretrained(base, num_labels=5)))
    with pytest.raises(SurgeryError, match="classifier.bias"):
        kanformer.save_delta(model, tmp_path / "delta")
    kanformer.save_delta(model, tmp_path / "delta", include_changed=True)
    assert same_state(snapshot(kanformer.load_delta(tmp_path / "delta")), snapshot(model))
    wide = patched(BERT, base)
    wide.resize_token_embeddings(103)
    kanformer.save_delta(wide, tmp_path / "wide", include_changed=True)
    assert same_state(snapshot(kanformer.load_delta(tmp_path / "wide")), snapshot(wide))
    wide.extra = torch.nn.Linear(2, 2)
    with pytest.raises(SurgeryError, match="changed in more than its blocks"):
        kanformer.save_delta(wide, tmp_path / "wide", include_changed=True)


def test_a_folder_is_written_whole_or_not_at_all(made, tmp_path, monkeypatch):
    base, model, delta = made
    (delta / "README.md").write_text("mine")
    kept = {path.name: path.read_bytes() for path in delta.iterdir()}
    with torch.no_grad():
        next(iter(blocks(model).values())).kan_up.weight.add_(1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.config), "save_pretrained", full)
        with pytest.raises(CheckpointError, match="No space left"):
            kanformer.save_delta(model, delta)
    assert {path.name: path.read_bytes() for path in delta.iterdir()} == kept and {path.name for path in tmp_path.iterdir()} == {"base", "delta"}
    kanformer.save_delta(model, delta)
    assert same_state(snapshot(kanformer.load_delta(delta)), snapshot(model)) and (delta / "README.md").read_text() == "mine"
    for folder in (base, delta / WEIGHTS):
        with pytest.raises(CheckpointError, match="a folder with other files"):
            kanformer.save_delta(model, folder)


class TestDamage:
    @pytest.mark.parametrize("name", [WEIGHTS, INFO, "config.json"])
    def test_a_file_that_is_gone_or_cut(self, made, name):
        base, _, delta = made
        whole = (delta / name).read_bytes()
        for length in (0, len(whole) // 2, len(whole) - 3):
            (delta / name).write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=name):
                kanformer.load_delta(delta, str(base))
        (delta / name).unlink()
        with pytest.raises(CheckpointError, match="expected a folder with"):
            kanformer.load_delta(delta, str(base))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, "version 2, expected 1. Install a newer kanformer"),
            ({"version": "1"}, "expected version 1"),
            ({"surprise": 1}, "expected version 1"),
            ({"base_sha256": None}, "expected version 1"),
            ({"base_sha256": "0" * 64}, r"expected that of .*base \(000000000000"),
            ({"base_model": ["x"]}, "expected version 1"),
            ({"dtype": "load"}, "expected version 1"),
            ({"dtype": "float16"}, "other tensors"),
            ({"model_class": "os.system"}, "expected a model class of transformers"),
            ({"model_class": "AutoConfig"}, "expected a model class of transformers"),
            ({"model_class": "pipeline"}, "expected a model class of transformers"),
            ({"model_class": "GPT2LMHeadModel"}, "GPT2LMHeadModel"),
        ],
        ids=str,
    )
    def test_what_kanformer_json_says_is_checked(self, made, change, message):
        _, _, delta = made
        values = json.loads((delta / INFO).read_text())
        (delta / INFO).write_text(json.dumps({**values, **change}))
        with pytest.raises(KanformerError, match=message):
            kanformer.load_delta(delta)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, name: t.pop(name), "no tensors for .*kan_coef"),
            (lambda t, name: t.update({name + "2": t[name].clone()}), "kan_coef2 of shape .*expected only tensors of the model"),
            (lambda t, name: t.update({name: t[name][:, 1:].clone()}), r"kan_coef of shape \(48, 10\), expected shape \(48, 11\)"),
            (lambda t, name: t.update({name: t[name].int()}), "kan_coef in integers"),
        ],
        ids=["missing", "foreign", "shape", "integers"],
    )
    def test_tensors_that_do_not_fit(self, made, change, message):
        base, _, delta = made
        tensors = load_file(delta / WEIGHTS)
        change(tensors, "bert.encoder.layer.0.intermediate.kan_functions.kan_coef")
        save_file(tensors, delta / WEIGHTS)
        given = tf.AutoModelForMaskedLM.from_pretrained(base)
        with pytest.raises(CheckpointError, match=message):
            kanformer.load_delta(delta, given)
        assert not blocks(given)

    def test_huge_widths_allocate_nothing(self, made):
        _, _, delta = made
        config = json.loads((delta / "config.json").read_text())
        config["quantization_config"]["sites"][0]["hidden"] = 10**12
        (delta / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="expected shape"):
            kanformer.load_delta(delta)
