"""Folders that are complete or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from kanformer.errors import CheckpointError
from kanformer.surgery.folders import MARKER, replace_file, write_folder
from kanformer.training.checkpoint import complete_checkpoints, drop_old
from training_cases import python


def fill_with(text: str):
    def fill(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text(text, encoding="utf-8")

    return fill


def tree(folder) -> dict[str, str]:
    """Every file below, hidden ones too, with its content."""
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file()}


def test_a_written_folder_holds_what_was_filled_in_and_the_marker(tmp_path):
    write_folder(tmp_path / "deep" / "model", fill_with("1"), {"step": 4})
    assert tree(tmp_path) == {"deep/model/inner/weights": "1", f"deep/model/{MARKER}": json.dumps({"step": 4})}


def test_a_folder_in_its_place_is_replaced_whole(tmp_path):
    write_folder(tmp_path / "model", fill_with("1"))
    (tmp_path / "model" / "stray").write_text("x", encoding="utf-8")
    write_folder(tmp_path / "model", fill_with("2"))
    assert tree(tmp_path) == {"model/inner/weights": "2", f"model/{MARKER}": "{}"}


@pytest.mark.parametrize(
    ("problem", "raised"),
    [
        (OSError(28, "No space left on device"), CheckpointError),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), CheckpointError),
        (KeyError("a bug"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("old", [True, False], ids=["over-an-old-one", "new"])
def test_a_problem_in_the_middle_leaves_what_was_there(tmp_path, problem, raised, old):
    if old:
        write_folder(tmp_path / "model", fill_with("1"))
    before = tree(tmp_path)

    def fill(folder):
        fill_with("2")(folder)
        raise problem

    with pytest.raises(raised):
        write_folder(tmp_path / "model", fill)
    assert tree(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["model"] * old


def test_the_error_says_where_why_and_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint \(.*model\): got No space left on device\. Free some space") as caught:
        write_folder(tmp_path / "model", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "\n" not in str(caught.value)


def test_a_full_disk_in_the_middle_of_a_models_weights_is_such_an_error(tmp_path):
    code = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from kanformer.errors import CheckpointError
from kanformer.surgery.folders import write_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
large = {"a": torch.zeros(100_000)}
words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(number): number for number in range(20_000)}, unk_token="0")))
for save in (lambda folder: save_file(large, folder / "w.safetensors"), lambda folder: torch.save(large, folder / "w.pt"), words.save_pretrained):
    try:
        write_folder(Path(sys.argv[1]) / "model", save)
    except CheckpointError as error:
        print(error)
"""
    done = python("-c", code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("cannot write the checkpoint") for line in lines) and not list(tmp_path.iterdir())


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "model", fill_with("1"))
    real = os.rename

    def rename(source, target):
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_folder(tmp_path / "model", fill_with("2"))
    assert tree(tmp_path) == {"model/inner/weights": "1", f"model/{MARKER}": "{}"}


def test_an_old_folder_that_a_crash_left_aside_is_kept_until_the_new_one_stands(tmp_path):
    write_folder(tmp_path / "model", fill_with("1"))
    os.rename(tmp_path / "model", tmp_path / ".model.old")  # killed between the two renames
    with pytest.raises(CheckpointError):
        write_folder(tmp_path / "model", lambda folder: (_ for _ in ()).throw(OSError(28, "full")))
    assert tree(tmp_path)["model/inner/weights"] == "1"


def test_what_a_crash_left_half_written_is_cleared_away(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "stale").write_text("x", encoding="utf-8")
    write_folder(tmp_path / "model", fill_with("1"))
    assert tree(tmp_path) == {"model/inner/weights": "1", f"model/{MARKER}": "{}"}


def test_a_place_that_cannot_be_written_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match="Not a directory"):
        write_folder(tmp_path / "file" / "model", fill_with("1"))
    with pytest.raises(CheckpointError, match=r"cannot write a file \(.*a.txt\): got (Not a directory|File exists)"):
        replace_file(tmp_path / "file" / "a.txt", "x")
    assert tree(tmp_path) == {"file": "mine"}


def test_a_relative_folder_and_even_the_current_one_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_folder(Path("."), fill_with("1"))
    assert tree(tmp_path) == {"here/inner/weights": "1", f"here/{MARKER}": "{}"}


def test_only_marked_folders_count_and_in_the_order_of_their_steps(tmp_path):
    for step in (10, 9, 100):
        write_folder(tmp_path / f"checkpoint-{step}", fill_with("1"))
    write_folder(tmp_path / "checkpoint-200", fill_with("1"))
    (tmp_path / "checkpoint-200" / MARKER).unlink()
    for name in ("checkpoint-x", "checkpoint-12-old", ".checkpoint-300.partial", "checkpoint-"):
        shutil.copytree(tmp_path / "checkpoint-9", tmp_path / name)
    assert complete_checkpoints(tmp_path) == [(step, tmp_path / f"checkpoint-{step}") for step in (9, 10, 100)]
    assert complete_checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize(("keep", "left"), [(None, [2, 4, 10]), (1, [10]), (2, [4, 10]), (5, [2, 4, 10])])
def test_drop_old_keeps_the_newest(tmp_path, keep, left):
    for step in (10, 2, 4):
        write_folder(tmp_path / f"checkpoint-{step}", fill_with("1"))
    (tmp_path / "checkpoint-3").mkdir()
    drop_old(tmp_path, keep)
    assert [step for step, _ in complete_checkpoints(tmp_path)] == left and (tmp_path / "checkpoint-3").is_dir()


def test_replace_file_leaves_the_new_text_alone(tmp_path):
    for text in ("one", "zwei ä"):
        replace_file(tmp_path / "deep" / "a.json", text)
    assert tree(tmp_path) == {"deep/a.json": "zwei ä"}


def test_replace_file_keeps_the_old_text_when_writing_fails(tmp_path, monkeypatch):
    replace_file(tmp_path / "a.json", "one")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        replace_file(tmp_path / "a.json", "two")
    assert tree(tmp_path) == {"a.json": "one"}
