"""Distillation by hidden states: what is compared, what is trained, what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from kanformer.errors import ConfigError
from kanformer.training.data import Order
from training_cases import checkpoint, metrics, run_distill, same_weights, weights, write_text

_PRUNE = {"kan": {"init": "prune", "param_ratio": 0.6}}


def test_the_free_running_student_comes_closer_to_the_teacher(tmp_path):
    teacher, text = checkpoint(tmp_path / "teacher", "llama"), write_text(tmp_path / "text.txt", 60)
    results = run_distill(teacher, text, tmp_path / "run", hidden_weight=1.0, local_weight=0.0, max_steps=30, new_module_learning_rate=1e-2, **_PRUNE)
    lines = [line["hidden"] for line in metrics(tmp_path / "run") if "hidden" in line]
    assert sum(lines[-5:]) < 0.7 * sum(lines[:5])
    assert results["steps"] == 30


@pytest.mark.parametrize(("rest", "moves"), [("none", ()), ("norms", ("LayerNorm",)), ("all", ("LayerNorm", "attention"))])
def test_only_what_was_asked_for_is_trained(rest, moves, tmp_path):
    teacher, text = checkpoint(tmp_path / "teacher", "bert"), write_text(tmp_path / "text.txt")
    run_distill(teacher, text, tmp_path / "run", hidden_weight=1.0, train_rest=rest, learning_rate=1e-3, max_steps=2, **_PRUNE)
    before, after = load_file(tmp_path / "teacher" / "model.safetensors"), weights(tmp_path / "run")
    # The key's bias has no influence on attention, so it may stay where it was.
    others = [name for name in before if name in after and before[name].shape == after[name].shape and "key.bias" not in name]
    changed = {name for name in others if not torch.equal(before[name], after[name])}
    assert changed == {name for name in others if "encoder" in name or "embeddings.LayerNorm" in name if any(part in name for part in moves)}


def test_what_cannot_be_learned_is_refused(tmp_path):
    teacher, text = checkpoint(tmp_path / "teacher", "bert"), write_text(tmp_path / "text.txt")
    with pytest.raises(ConfigError, match="hidden_weight"):
        run_distill(teacher, text, tmp_path / "run", local_weight=0.0, hidden_weight=0.0)
    with pytest.raises(ConfigError, match="train_rest"):
        run_distill(teacher, text, tmp_path / "run", train_rest="norms")


def test_the_same_seed_gives_the_same_model_and_another_does_not(tmp_path):
    teacher, text = checkpoint(tmp_path / "teacher", "bert"), write_text(tmp_path / "text.txt")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_distill(teacher, text, tmp_path / name, hidden_weight=1.0, seed=seed, max_steps=3, **_PRUNE)
    assert same_weights(tmp_path / "a", tmp_path / "b") and not same_weights(tmp_path / "a", tmp_path / "c")


def test_grouping_by_length_keeps_every_text_and_saves_padding():
    lengths = [5 + (index * 37) % 60 for index in range(103)]
    order = Order(103, seed=4, lengths=lengths, group=4)
    for epoch in range(2):
        assert sorted(order[epoch * 103 + index] for index in range(103)) == list(range(103))
    plain = Order(103, seed=4)

    def padding(stream: Order) -> int:
        groups = [[lengths[stream[start + i]] for i in range(4)] for start in range(0, 100, 4)]
        return sum(max(group) * 4 - sum(group) for group in groups)

    assert padding(order) < 0.4 * padding(plain)
    again = Order(103, seed=4, lengths=lengths, group=4)
    assert [again[position] for position in (150, 3, 101)] == [order[position] for position in (150, 3, 101)]
