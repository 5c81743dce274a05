"""Distillation: the teacher is left alone, only the KAN blocks change, and they come closer to the original's."""

from __future__ import annotations

import csv

import pytest
import torch

from kanformer.errors import ConfigError, SurgeryError
from kanformer.surgery.saving.loading import load_model
from kanformer.training import models
from model_cases import same_state, snapshot
from training_cases import checkpoint, metrics, run_distill, weights, write_text

LAYER = "bert.encoder.layer.1.intermediate"
PRUNED = {"kan": {"init": "prune", "param_ratio": 0.5}}


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def lively():
    """Random weights large enough for blocks that are no linear maps."""
    return {"initializer_range": 0.3}


@pytest.mark.parametrize(
    ("name", "kan", "share"),
    [("bert", {"init": "random"}, 0.5), ("gpt2", {"init": "random"}, 0.5), ("llama", {"init": "random"}, 0.8), ("bert", PRUNED["kan"], 0.95)],
)
def test_fvu_falls_on_held_out_text(tmp_path, lively, name, kan, share):
    text = write_text(tmp_path / "many.txt", 300)
    teacher = checkpoint(tmp_path / "teacher", name, **lively)
    results = run_distill(teacher, text, tmp_path / "out", max_steps=60, per_device_train_batch_size=8, new_module_learning_rate=1e-2, kan=kan)
    assert 0 < results["eval_fvu"] < share * results["start_fvu"]
    assert results["eval_fvu"] == pytest.approx(sum(results["layers"]) / 2) and results["eval_fvu_worst"] == max(results["layers"])
    lines = [line["loss"] for line in metrics(tmp_path / "out") if "loss" in line]
    assert sum(lines[-10:]) < sum(lines[:10])
    with open(tmp_path / "out" / "layers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["fvu"]) for row in rows] == pytest.approx(results["layers"], abs=1e-6) and len({row["layer"] for row in rows}) == 2


@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_only_kan_blocks_change_and_the_teacher_does_not(tmp_path, text, lively, hidden_weight, monkeypatch):
    teacher_folder = checkpoint(tmp_path / "teacher", "bert", **lively)
    seen = []
    real = models.load_patched

    def spy(*words):
        found = real(*words)
        seen.append((*found, snapshot(found[0]), snapshot(found[1])))
        return found

    monkeypatch.setattr("kanformer.training.distill.load_patched", spy)
    run_distill(teacher_folder, text, tmp_path / "out", hidden_weight=hidden_weight, weight_decay=0.1, **PRUNED)
    student, teacher, _, student_before, teacher_before = seen[0]
    assert same_state(teacher_before, snapshot(teacher)) and not any(parameter.requires_grad for parameter in teacher.parameters())
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, student_before[name])}
    trained = {name for name, _ in student.named_parameters() if "kan_" in name}
    assert changed == trained and len(changed) == 10
    assert all(torch.equal(tensor, weights(tmp_path / "out")[name]) for name, tensor in student.state_dict().items() if name in changed)


def test_the_students_own_course_comes_closer_with_hidden_weight(tmp_path, text, lively):
    teacher_folder = checkpoint(tmp_path / "teacher", "bert", **lively)
    settings = {"max_steps": 40, "new_module_learning_rate": 1e-2, **PRUNED}
    run_distill(teacher_folder, text, tmp_path / "out", hidden_weight=1.0, local_weight=0.0, **settings)
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    assert sum(line["hidden"] for line in lines[-8:]) < 0.9 * sum(line["hidden"] for line in lines[:8])
    assert all(line["loss"] == pytest.approx(line["hidden"]) and "local" not in line for line in lines)


def test_the_model_that_was_measured_is_the_one_that_was_saved(tmp_path, text, lively):
    teacher_folder = checkpoint(tmp_path / "teacher", "bert", **lively)
    results = run_distill(teacher_folder, text, tmp_path / "out", **PRUNED)
    again = run_distill(teacher_folder, text, tmp_path / "again", model_name_or_path=str(tmp_path / "out" / "model"), max_steps=1, new_module_learning_rate=0.0)
    assert again["start_fvu"] == results["eval_fvu"] == again["eval_fvu"]


def test_a_patched_checkpoint_is_trained_further(tmp_path, text, lively):
    teacher = checkpoint(tmp_path / "teacher", "bert", **lively)
    patched = checkpoint(tmp_path / "patched", "bert", {"edges": "full", "init": "exact"}, **lively)
    results = run_distill(teacher, text, tmp_path / "out", model_name_or_path=patched, new_module_learning_rate=0.0)
    assert results["start_fvu"] < 1e-10 and results["eval_fvu"] == results["start_fvu"]
    assert load_model(str(tmp_path / "out" / "model")).get_submodule(LAYER).edges == "full"


def test_texts_longer_than_the_model_are_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="BertForMaskedLM with 64 positions. Set --max_length 64 or less"):
        run_distill(checkpoint(tmp_path / "bert"), text, tmp_path / "out", max_length=65)
    with pytest.raises(ConfigError, match="with 62 positions"):
        run_distill(checkpoint(tmp_path / "roberta", "roberta", pad_token_id=1), text, tmp_path / "out", max_length=63)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"teacher_name_or_path": ""}, ConfigError, "no teacher_name_or_path"),
        ({"teacher_name_or_path": "patched"}, SurgeryError, "a teacher that is patched"),
        ({"model_name_or_path": "teacher"}, SurgeryError, "not patched.*kanformer patch"),
        ({"teacher_name_or_path": "wide", "model_name_or_path": "patched"}, SurgeryError, "no such block in the teacher, expected an MLP of width 48"),
        ({"local_weight": 0.0}, ConfigError, "local_weight=0 and hidden_weight=0"),
        ({"kan": {"init": "prune", "param_ratio": 2}}, ConfigError, "param_ratio"),
        ({"kan": {"inti": "prune"}}, ConfigError, "unknown key 'inti'.*Did you mean 'init'"),
    ],
)
def test_wrong_settings_are_refused_and_leave_nothing(tmp_path, text, settings, error, message):
    folders = {
        "teacher": checkpoint(tmp_path / "teacher"),
        "patched": checkpoint(tmp_path / "patched", patch={}),
        "wide": checkpoint(tmp_path / "wide", intermediate_size=40),
    }
    settings = {key: folders.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(error, match=message):
        run_distill(settings.pop("teacher_name_or_path", folders["teacher"]), text, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
