"""The loop: accumulation, resume, divergence, what is written when."""

from __future__ import annotations

import json
import math

import pytest
import torch

from kanformer.errors import CheckpointError, ConfigError, TrainingDiverged
from kanformer.training import journal, loop, start
from kanformer.training.checkpoint import complete_checkpoints
from kanformer.training.settings import LoopArguments
from training_cases import checkpoint, curve, metrics, run_distill, run_finetune, same_weights, weights, write_text


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def bert(tmp_path):
    return checkpoint(tmp_path / "bert")


@pytest.fixture
def llama(tmp_path):
    return checkpoint(tmp_path / "llama", "llama")


def stop_at(monkeypatch, step: int) -> None:
    """The next run fails before this step."""
    real = loop.Trainer._optimize

    def optimize(self):
        if self.step == step:
            raise InterruptedError("pulled the plug")
        return real(self)

    monkeypatch.setattr(loop.Trainer, "_optimize", optimize)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_gives_the_step_of_the_large_batch(tmp_path, text, llama, batch, accumulation):
    settings = {"max_steps": 3, "max_grad_norm": 0.5, "learning_rate": 1e-3}
    run_finetune(llama, text, tmp_path / "one", **settings)
    run_finetune(llama, text, tmp_path / "many", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **settings)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    start = run_finetune(llama, text, tmp_path / "other", seed=1, **settings) and weights(tmp_path / "other")
    assert max(float((one[name] - many[name]).abs().max()) for name in one) < 1e-6 < max(float((one[name] - start[name]).abs().max()) for name in one)
    assert [line["loss"] for line in metrics(tmp_path / "many")[:3]] == pytest.approx([line["loss"] for line in metrics(tmp_path / "one")[:3]], rel=1e-5)


def test_accumulation_weighs_tokens_and_not_batches(tmp_path, bert):
    (tmp_path / "uneven.txt").write_text("\n".join(["bad", "bad kuf milo nomur rep sast bad kuf milo nomur"] * 10) + "\n", encoding="utf-8")
    for name, batch in (("one", 4), ("many", 1)):
        run_distill(bert, str(tmp_path / "uneven.txt"), tmp_path / name, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch, max_steps=3)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert max(float((one[name] - many[name]).abs().max()) for name in one) < 1e-6


@pytest.mark.parametrize("task", ["masked_lm", "distill"])
def test_a_run_that_was_interrupted_ends_with_the_same_bits_and_the_same_curve(tmp_path, text, bert, task, monkeypatch):
    settings = {"save_steps": 4, "logging_steps": 3, "eval_steps": 2, "max_steps": 10}
    run, settings = (run_distill, settings) if task == "distill" else (run_finetune, {**settings, "task": task})
    run(bert, text, tmp_path / "straight", **settings)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        stop_at(patch, 7)
        run(bert, text, tmp_path / "broken", **settings)
    torch.rand(17)  # another random state than in the straight run
    with open(tmp_path / "broken" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')  # a line that the crash cut
    results = run(bert, text, tmp_path / "broken", resume=True, **settings)
    assert results["steps_this_run"] == 6 and results["steps"] == 10
    assert same_weights(tmp_path / "broken", tmp_path / "straight")
    assert curve(tmp_path / "broken") == curve(tmp_path / "straight")


def test_resume_skips_incomplete_checkpoints_and_starts_anew_without_any(tmp_path, text, llama):
    run_finetune(llama, text, tmp_path / "out", save_steps=4)
    (tmp_path / "out" / "checkpoint-8" / "complete.json").unlink()
    assert run_finetune(llama, text, tmp_path / "out", save_steps=4, resume=True)["steps_this_run"] == 4
    assert run_finetune(llama, text, tmp_path / "new", resume=True)["steps_this_run"] == 8
    assert same_weights(tmp_path / "out", tmp_path / "new")


def test_resuming_a_finished_run_changes_nothing(tmp_path, text, llama):
    run_finetune(llama, text, tmp_path / "out", save_steps=4)
    before, lines = weights(tmp_path / "out"), curve(tmp_path / "out")
    assert run_finetune(llama, text, tmp_path / "out", save_steps=4, resume=True)["steps_this_run"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "out").items()) and curve(tmp_path / "out") == lines


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_a_damaged_checkpoint_is_named(tmp_path, text, llama, damage):
    run_finetune(llama, text, tmp_path / "out", save_steps=4)
    state = tmp_path / "out" / "checkpoint-8" / "training_state.pt"
    if damage == "missing":
        state.unlink()
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:1000])
    else:
        torch.save({"optimizer": {"state": {}, "param_groups": []}, "random": []}, state)
    with pytest.raises(CheckpointError, match=r"go on from the checkpoint \(.*checkpoint-8\).*Delete that folder") as caught:
        run_finetune(llama, text, tmp_path / "out", save_steps=4, resume=True)
    assert "\n" not in str(caught.value)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, text, bert):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run_finetune(bert, text, tmp_path / name, task="masked_lm", seed=seed)
    assert curve(tmp_path / "a") == curve(tmp_path / "b") and same_weights(tmp_path / "a", tmp_path / "b")
    assert [line.get("loss") for line in curve(tmp_path / "a")] != [line.get("loss") for line in curve(tmp_path / "c")]


def test_metrics_and_results_say_how_it_went(tmp_path, text, llama):
    results = run_finetune(llama, text, tmp_path / "out", max_steps=5, logging_steps=2, eval_steps=4, warmup_steps=1, lr_scheduler_type="linear")
    lines = metrics(tmp_path / "out")
    assert [(line["step"], "loss" in line) for line in lines] == [(2, True), (4, True), (4, False), (5, True), (5, False)]
    assert all(line["tokens_per_second"] > 0 and math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[3]["tokens"] == results["tokens"] == 5 * 4 * 16 and lines[3]["learning_rate"] == pytest.approx(1e-3 * 0.25)
    assert lines[-1]["eval_loss"] == results["eval_loss"] and results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8")) == results
    assert "max_steps: 5" in (tmp_path / "out" / "config.yaml").read_text(encoding="utf-8")


def test_only_the_newest_checkpoints_stay(tmp_path, text, llama):
    run_finetune(llama, text, tmp_path / "out", save_steps=1, save_total_limit=3)
    assert [step for step, _ in complete_checkpoints(tmp_path / "out")] == [6, 7, 8]


@pytest.mark.parametrize("where", ["loss", "gradient", "weights", "evaluation"])
def test_a_run_that_diverges_stops_before_it_writes_ruined_weights(tmp_path, text, llama, where, monkeypatch):
    real = loop.Trainer._optimize

    def optimize(self):
        weight = next(parameter for parameter in self.module.parameters() if parameter.dim() >= 2)
        if self.step == 5 and where == "loss":
            weight.data[:] = math.nan
        if self.step == 5 and where == "gradient":
            weight.register_hook(lambda gradient: gradient * math.inf)
        found = real(self)
        if self.step == 5 and where == "weights":
            weight.data[0, 0] = math.inf
        return found

    monkeypatch.setattr(loop.Trainer, "_optimize", optimize)
    if where == "evaluation":
        monkeypatch.setattr("kanformer.training.finetune_task.FinetuneTask.evaluate", lambda self: {"loss": math.nan})
    with pytest.raises(TrainingDiverged, match="Lower the learning rate"):
        run_finetune(llama, text, tmp_path / "out", save_steps=2, max_steps=6, max_grad_norm=0, save_total_limit=None)
    steps = [2, 4, 6] if where == "evaluation" else [2, 4]
    assert [step for step, _ in complete_checkpoints(tmp_path / "out")] == steps and not (tmp_path / "out" / "model").exists()
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")


def test_output_dir_of_another_run_is_refused_before_anything_is_loaded(tmp_path, text, llama):
    run_finetune(llama, text, tmp_path / "out", max_steps=1)
    before = curve(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds another run.*--resume"):
        run_finetune(str(tmp_path / "nowhere"), "nothing.txt", tmp_path / "out", max_steps=1)
    assert curve(tmp_path / "out") == before


def test_output_dir_must_be_given_and_possible(tmp_path):
    with pytest.raises(ConfigError, match="no output_dir"):
        start.prepare_output(LoopArguments())
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"use the output folder \(.*file"):
        start.prepare_output(LoopArguments(output_dir=str(tmp_path / "file")))


def test_metrics_that_cannot_be_written_are_a_checkpoint_error(tmp_path, text, llama, monkeypatch):
    monkeypatch.setattr(journal.Journal, "cut", lambda self, step, finished: self.path.mkdir())
    with pytest.raises(CheckpointError, match=r"write the metrics \(.*metrics.jsonl\): got Is a directory"):
        run_finetune(llama, text, tmp_path / "out")
