"""Hidden states of the teacher on disk: the same training as with the teacher at hand, and clear errors for files that do not fit."""

from __future__ import annotations

import pytest
import torch

from kanformer.errors import CheckpointError, ConfigError
from kanformer.training.teacher_states import TeacherStates, remove_teacher_states, write_teacher_states
from training_cases import checkpoint, metrics, run_distill, same_weights, write_text

_HIDDEN = {"hidden_weight": 1.0, "local_weight": 0.0, "kan": {"init": "prune", "param_ratio": 0.6}}
EXAMPLES = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


def states_of(examples, path):
    """A file in which the state of a token is its number, in layer 1 its negative."""

    def states(batch):
        ids = batch["input_ids"].float().unsqueeze(-1).expand(-1, -1, 4)
        return [ids, -ids]

    write_teacher_states(path, states, torch.nn.Linear(1, 1), examples, pad_id=0)
    return path


def test_the_states_of_a_text_come_back_without_padding_in_the_order_of_its_tokens(tmp_path):
    stored = TeacherStates(states_of(EXAMPLES, tmp_path / "states.bin"), EXAMPLES)
    got = stored.of([3, 0, 2])
    assert got.shape == (9, 2, 4) and got.dtype == torch.bfloat16
    assert got[:, 0, 2].tolist() == [7, 8, 9, 10, 1, 2, 3, 5, 6] and got[:, 1, 0].tolist() == [-7, -8, -9, -10, -1, -2, -3, -5, -6]


def test_training_on_stored_states_is_training_beside_the_teacher(tmp_path):
    teacher, text = checkpoint(tmp_path / "teacher", "bert", initializer_range=0.5), write_text(tmp_path / "text.txt")
    run_distill(teacher, text, tmp_path / "beside", **_HIDDEN)
    for name in ("stored", "again"):  # the second run finds the file that the first one made
        run_distill(teacher, text, tmp_path / name, teacher_states=str(tmp_path / "states.bin"), **_HIDDEN)
    assert same_weights(tmp_path / "stored", tmp_path / "again")
    for one, other in zip(metrics(tmp_path / "beside"), metrics(tmp_path / "stored"), strict=True):
        for key in ("hidden", "eval_fvu"):
            assert (key in one) == (key in other)
            assert key not in one or one[key] == pytest.approx(other[key], rel=0.01)  # stored in bfloat16


@pytest.mark.parametrize("damage", ["cut", "other texts", "no facts", "facts cut"])
def test_a_file_that_does_not_fit_is_refused(damage, tmp_path):
    path, examples = states_of(EXAMPLES, tmp_path / "states.bin"), EXAMPLES
    facts = path.with_name("states.bin.json")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "other texts":
        examples = [*EXAMPLES[:-1], [7, 8, 9, 11]]
    elif damage == "no facts":
        facts.unlink()
    else:
        facts.write_text(facts.read_text()[:20])
    with pytest.raises(CheckpointError, match="use the teacher's states"):
        TeacherStates(path, examples)


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    def fails(batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_teacher_states(tmp_path / "states.bin", fails, torch.nn.Linear(1, 1), EXAMPLES, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="write the teacher's states"):
        write_teacher_states(tmp_path / "file" / "states.bin", fails, torch.nn.Linear(1, 1), EXAMPLES, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_both_files_go_together(tmp_path):
    path = states_of(EXAMPLES, tmp_path / "states.bin")
    remove_teacher_states(path)
    remove_teacher_states(path)
    assert not list(tmp_path.iterdir())


def test_stored_states_cannot_teach_block_by_block(tmp_path):
    teacher, text = checkpoint(tmp_path / "teacher", "bert"), write_text(tmp_path / "text.txt")
    with pytest.raises(ConfigError, match="set local_weight to 0"):
        run_distill(teacher, text, tmp_path / "run", teacher_states=str(tmp_path / "states.bin"), hidden_weight=1.0)
    assert not (tmp_path / "states.bin").exists() and not (tmp_path / "run").exists()
