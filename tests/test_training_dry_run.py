"""Dry runs: the numbers are those of the model and the data, and nothing is trained or written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kanformer
from data_cases import ROWS, image_folder, own_cache, table  # noqa: F401
from kanformer.cli import main
from kanformer.surgery.saving.loading import load_model
from kanformer.training.dry_run import data_line, groups_table, memory_line
from kanformer.training.optimizer import make_optimizer
from model_cases import blocks
from test_training_tasks import vision
from training_cases import checkpoint, run_distill, run_finetune, texts, write_text

pytestmark = pytest.mark.usefixtures("own_cache")


def files(folder: Path) -> set[Path]:
    """All that is there."""
    return {path for path in folder.rglob("*") if "cache" not in path.parts}


def test_fine_tuning_says_what_it_would_train_and_writes_nothing(tmp_path, capsys):
    patched = checkpoint(tmp_path / "bert", patch={"init": "exact"})
    text, model = write_text(tmp_path / "text.txt", 40), load_model(patched)
    before = files(tmp_path)
    found = run_finetune(patched, text, tmp_path / "out", task="masked_lm", dry_run=True, weight_decay=0.1, gradient_accumulation_steps=2, max_steps=19)
    said = capsys.readouterr().out
    assert files(tmp_path) == before and not (tmp_path / "out").exists()
    optimizer = make_optimizer(model, weight_decay=0.1)
    assert [(g["learning_rate"], g["weight_decay"], g["parameters"]) for g in found["groups"]] == [
        (g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in optimizer.param_groups
    ]
    assert {g["group"] for g in found["groups"]} == {"rest", "kan", "spline"}
    assert found["data"] == {"examples": 38, "examples_per_step": 8, "tokens_per_step": found["data"]["tokens_per_step"], "max_steps": 19, "epochs": 4.0}
    words = [min(len(line.split()), 16) for line in texts(40)[:38]]
    assert found["data"]["tokens_per_step"] == round(sum(words) / 38 * 8)
    assert found["layers"] == kanformer.compare(model).to_dict()
    trained = sum(parameter.nbytes for parameter in model.parameters())
    assert found["memory"] == {
        "weights": trained + sum(buffer.nbytes for buffer in model.buffers()),
        "gradients": trained,
        "optimizer states": 2 * trained,
    }
    for line in (*str(kanformer.compare(model)).splitlines(), groups_table(found["groups"]), data_line(found["data"], 1), memory_line(found["memory"])):
        assert line in said
    assert "38 training examples; 8 examples of about" in said and "19 steps, 4.00 epochs" in said and "nothing was trained" in said


def test_the_optimizers_states_take_what_was_said(tmp_path):
    patched = checkpoint(tmp_path / "bert", patch={"init": "exact"})
    found = run_finetune(patched, write_text(tmp_path / "text.txt"), tmp_path / "out", task="masked_lm", dry_run=True)
    model = load_model(patched)
    optimizer = make_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert found["memory"]["optimizer states"] == sum(state.nbytes for state in states)
    assert found["memory"]["gradients"] == sum(parameter.grad.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["patching", "frozen", "stream", "images"])
def test_other_kinds_of_fine_tuning(tmp_path, kind, capsys):
    settings = {"task": "masked_lm", "dry_run": True}
    model, text = checkpoint(tmp_path / "bert"), table(tmp_path / "t.jsonl", ROWS)
    if kind == "images":
        model, settings, text = vision(tmp_path / "vit"), {**settings, "task": "image_classification", "train_dir": image_folder(tmp_path / "i", 4)}, None
    settings |= {"patching": {"kan": {"init": "prune", "param_ratio": 0.5}}, "frozen": {"train_rest": False}}.get(kind, {})
    settings |= {"streaming": True, "validation_samples": 4, "max_steps": 5} if kind == "stream" else {"num_train_epochs": 3.0}
    before = files(tmp_path)
    found = run_finetune(model, text, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert files(tmp_path) == before and len(found["layers"]["blocks"]) == 2
    ratio = found["layers"]["feed_forward"]["parameters_ratio"]
    assert 0.4 < ratio <= 0.5 if kind == "patching" else ratio > 1
    assert {group["group"] for group in found["groups"]} == ({"kan", "spline"} if kind == "frozen" else {"kan", "rest", "spline"})
    data = found["data"]
    if kind == "stream":
        assert (data["examples"], data["epochs"], data["max_steps"]) == (None, None, 5) and "data: a stream" in capsys.readouterr().out
    else:
        assert data["max_steps"] * 4 >= 3 * data["examples"] > (data["max_steps"] - 1) * 4
    assert (data["tokens_per_step"] is None) == (kind == "images")


def test_distillation_counts_the_teacher_and_trains_the_blocks_alone(tmp_path, capsys):
    teacher, text = checkpoint(tmp_path / "bert"), write_text(tmp_path / "text.txt")
    before, settings = files(tmp_path), {"kan": {"init": "prune", "param_ratio": 0.5}, "hidden_weight": 1.0}
    found = run_distill(teacher, text, tmp_path / "out", dry_run=True, teacher_states=str(tmp_path / "states"), local_weight=0.0, **settings)
    assert files(tmp_path) == before and "teacher" in capsys.readouterr().out
    original = load_model(teacher)
    assert found["memory"]["teacher"] == sum(tensor.nbytes for tensor in (*original.parameters(), *original.buffers()))
    run_distill(teacher, text, tmp_path / "out", max_steps=1, **settings)
    student = load_model(str(tmp_path / "out" / "model"))
    assert sum(group["parameters"] for group in found["groups"]) == sum(p.numel() for block in blocks(student).values() for p in block.parameters())


def test_calibration_says_what_it_would_gather(tmp_path, capsys):
    model, text = checkpoint(tmp_path / "bert", intermediate_size=512), write_text(tmp_path / "text.txt", 40)
    before = files(tmp_path)
    words = ["calibrate", model, "--text", text, "--out", str(tmp_path / "out"), "--max_length", "16", "--batch_size", "16", "--importance_batches", "2"]
    main([*words, "--dry_run"])
    said = capsys.readouterr().out
    assert files(tmp_path) == before
    assert "40 texts in 3 batches; 3 runs of the model, and 4 more for the importance of 2 blocks" in said and "MLP params" in said
    main(words)
    grams = [load_file(path)["gram"].nbytes for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(grams) == 2 and float(re.findall(r"Gram matrices ([\d.]+) MB", said)[0]) == pytest.approx(2 * sum(grams) / 1e6, rel=0.02)


def test_a_dry_run_fails_where_the_run_would(tmp_path, capsys):
    model = checkpoint(tmp_path / "bert")
    for words, message in (
        (["finetune", "--model_name_or_path", model, "--task", "masked_lm", "--train_file", "none.txt", "--output_dir", "x"], "No such file"),
        (["distill", "--teacher_name_or_path", model, "--train_file", "none.txt", "--output_dir", "x"], "No such file"),
        (["calibrate", model, "--text", str(tmp_path / "none.txt"), "--out", "x"], "No such file"),
    ):
        with pytest.raises(SystemExit) as leaving:
            main([*words, "--dry_run"])
        assert leaving.value.code == 2 and re.search(message, capsys.readouterr().err)
