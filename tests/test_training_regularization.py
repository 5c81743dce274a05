"""The penalty in training: logged, averaged as the loss is over micro-batches and processes, absent when its weights are 0."""

from __future__ import annotations

import socket

import pytest

from kanformer.errors import KanformerError
from kanformer.training import loop
from training_cases import ROOT, checkpoint, metrics, python, run_distill, run_finetune, same_weights, weights, write_text

ON = {"kan_l1": 1e-3, "kan_smoothness": 1e-5}


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def bert(tmp_path):
    return checkpoint(tmp_path / "bert")


def distance(left, right) -> float:
    one, other = weights(left), weights(right)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("edges", ["shared", "full"])
def test_the_penalty_is_logged_and_falls(tmp_path, text, bert, edges):
    settings = {"kan": {"init": "exact", "edges": edges}, "task": "masked_lm", "max_steps": 12, "learning_rate": 0.0, "new_module_learning_rate": 1e-2}
    for name, extra in (("on", {"kan_l1": 0.1, "kan_entropy": 1e-3, "kan_smoothness": 1e-4}), ("off", {})):
        run_finetune(bert, text, tmp_path / name, **settings, **extra)
    lines = [line for line in metrics(tmp_path / "on") if "loss" in line]
    assert all(line["kan_entropy"] > 0 and line["kan_smoothness"] >= 0 for line in lines)
    assert lines[-1]["kan_l1"] < 0.8 * lines[0]["kan_l1"]
    plain = [line for line in metrics(tmp_path / "off") if "loss" in line]
    assert not any(key.startswith("kan_") for line in plain for key in line)
    assert lines[0]["loss"] == plain[0]["loss"]  # the loss of the task, without the penalty


@pytest.mark.parametrize("task", ["masked_lm", "distill"])
def test_without_weights_nothing_is_watched(tmp_path, text, bert, task, monkeypatch):
    monkeypatch.setattr(loop, "regularize", None)
    if task == "distill":
        run_distill(bert, text, tmp_path / "out", max_steps=2)
    else:
        run_finetune(bert, text, tmp_path / "out", max_steps=2, task=task)


def test_accumulation_averages_the_penalty_as_the_loss(tmp_path, text, bert):
    for name, batch in (("one", 4), ("many", 2)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 3, "hidden_weight": 1.0}
        run_distill(bert, text, tmp_path / name, **settings, **ON)
    run_distill(bert, text, tmp_path / "without", max_steps=3, hidden_weight=1.0)
    assert distance(tmp_path / "one", tmp_path / "many") < 1e-5 < distance(tmp_path / "one", tmp_path / "without")
    for mine, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        assert mine.get("kan_l1", 0.0) == pytest.approx(theirs.get("kan_l1", 0.0), rel=1e-4)


def test_two_processes_take_the_step_of_one(tmp_path, text, bert):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--teacher_name_or_path", bert, "--train_file", text, "--output_dir", str(tmp_path / "two"), "--disable_tqdm", "--max_length", "16"]
    words += ["--per_device_train_batch_size", "2", "--warmup_steps", "0", "--logging_steps", "1", "--max_steps", "4", "--hidden_weight", "1"]
    words += [part for name, value in ON.items() for part in (f"--{name}", str(value))]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/ddp.yaml"), "--num_processes", "2"]
    two = python(*launch, "--main_process_port", port, str(ROOT / "scripts/distill.py"), *words)
    assert two.returncode == 0, two.stderr
    run_distill(bert, text, tmp_path / "one", max_steps=4, hidden_weight=1.0, **ON)
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5
    for mine, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert mine.get("kan_l1", 0.0) == pytest.approx(theirs.get("kan_l1", 0.0), rel=1e-4)


def test_the_control_without_functions_says_that_there_is_nothing_to_regularise(tmp_path, text, bert):
    with pytest.raises(KanformerError, match="no learned functions"):
        run_finetune(bert, text, tmp_path / "out", task="masked_lm", kan={"edges": "mlp"}, kan_l1=1.0)


def test_a_run_with_a_penalty_repeats_itself_bit_for_bit(tmp_path, text, bert):
    for name in ("one", "two"):
        run_finetune(bert, text, tmp_path / name, task="masked_lm", max_steps=3, kan={"init": "exact", "edges": "full"}, kan_entropy=1e-3, **ON)
    assert same_weights(tmp_path / "one", tmp_path / "two")
