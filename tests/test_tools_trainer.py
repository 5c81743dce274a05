"""transformers' Trainer on a patched model: training, evaluation, checkpoints, going on from one, the best model at the end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as tf

from model_cases import BY_NAME, same_state, snapshot
from tool_cases import largest_difference, reload, trained

CASES = {name: dataclasses.replace(BY_NAME[name], values={**BY_NAME[name].values, "num_hidden_layers": 1}) for name in ("llama", "bert")}


def fresh(name: str):
    return trained(CASES[name].build())


def run(model, folder, resume=None, **options):
    """Six steps with an evaluation and a checkpoint after every second one, dropout on."""
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 99, (16, 9), generator=generator)]
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = tf.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module", params=CASES)
def straight(request, tmp_path_factory):
    """(family, trainer, folder, state before) of an undisturbed run."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("straight")
    model = fresh(request.param)
    before = snapshot(model)
    return request.param, run(model, folder), folder, before


def test_training_moves_every_part_of_the_blocks_and_lowers_the_loss(straight):
    _, trainer, _, before = straight
    after = snapshot(trainer.model)
    parts = [name for name in before if "kan_" in name and "kan_grid" not in name]
    assert parts and not any(torch.equal(before[name], after[name]) for name in parts)
    assert all(torch.equal(before[name], after[name]) for name in before if "kan_grid" in name)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_its_checkpoints_are_ordinary_patched_checkpoints(straight):
    name, trainer, folder, _ = straight
    loaded = getattr(tf, CASES[name].auto_class).from_pretrained(folder / "checkpoint-6").eval()
    assert same_state(snapshot(loaded), snapshot(trainer.model))
    assert torch.equal(CASES[name].logits(loaded), CASES[name].logits(trainer.model.eval()))


def test_a_resumed_run_ends_where_the_straight_one_did(straight, tmp_path):
    name, trainer, folder, _ = straight
    resumed = run(fresh(name), tmp_path, resume=str(folder / "checkpoint-2"))
    assert largest_difference(snapshot(resumed.model), snapshot(trainer.model)) == 0.0


def test_a_loaded_model_trains_as_the_one_that_was_saved(straight, tmp_path):
    name, trainer, _, _ = straight
    loaded = reload(fresh(name), tmp_path / "model", getattr(tf, CASES[name].auto_class))
    again = run(loaded, tmp_path / "run")
    assert largest_difference(snapshot(again.model), snapshot(trainer.model)) == 0.0
    resumed = run(reload(fresh(name), tmp_path / "model"), tmp_path / "more", resume=str(tmp_path / "run" / "checkpoint-4"))
    assert largest_difference(snapshot(resumed.model), snapshot(trainer.model)) == 0.0


def test_the_best_model_is_loaded_at_the_end(straight, tmp_path):
    name = straight[0]
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}  # here the first is "best"
    trainer = run(fresh(name), tmp_path, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = getattr(tf, CASES[name].auto_class).from_pretrained(tmp_path / "checkpoint-2")
    assert same_state(snapshot(best), snapshot(trainer.model)) and not same_state(snapshot(best), snapshot(straight[1].model))


def test_activation_checkpointing_in_the_trainer_changes_nothing(straight, tmp_path):
    name, trainer, _, _ = straight
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    again = run(fresh(name), tmp_path, **options)
    assert largest_difference(snapshot(again.model), snapshot(trainer.model)) == 0.0
