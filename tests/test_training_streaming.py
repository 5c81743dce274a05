"""Training on a stream: the curve of the table, killed and resumed to the same bits, on two processes as on one."""

from __future__ import annotations

import json

import pytest

from data_cases import ROWS, image_folder, own_cache, table  # noqa: F401
from kanformer.cli import main
from kanformer.errors import CheckpointError, ConfigError
from kanformer.training.checkpoint import complete_checkpoints
from test_training_processes import KILLED, LAUNCH_TWO, SETTINGS, _free_port
from test_training_tasks import sentences, vision
from training_cases import checkpoint, curve, python, run_distill, run_finetune, same_weights, weights, write_text

pytestmark = pytest.mark.usefixtures("own_cache")
STREAM = {"streaming": True, "validation_samples": 4, "shuffle_buffer_size": 8}
STREAMED = [word for name, value in STREAM.items() for word in (f"--{name}", str(value).lower())]
READ = """
import json, os, sys
from kanformer.training import finetune_task, finetune
real = finetune_task.FinetuneTask.batch
def batch(self, indices):
    found = real(self, indices)
    with open(f"{sys.argv[1]}.{os.environ['RANK']}", "a") as file:
        file.write(json.dumps([row[mask.bool()].tolist() for row, mask in zip(found["input_ids"], found["attention_mask"])]) + "\\n")
    return found
finetune_task.FinetuneTask.batch = batch
finetune.main(sys.argv[2:])
"""


@pytest.mark.parametrize(("name", "task", "packing"), [("llama", "causal_lm", True), ("llama", "causal_lm", False), ("bert", "masked_lm", False)])
def test_a_stream_in_its_own_order_trains_as_the_table_does(tmp_path, name, task, packing):
    model, text, held = checkpoint(tmp_path / name, name), write_text(tmp_path / "t.txt", 20), write_text(tmp_path / "v.txt", 6, seed=1)
    common = {"task": task, "packing": packing, "validation_file": held, "train_sampling_strategy": "sequential", "max_steps": 9}
    run_finetune(model, text, tmp_path / "table", **common)
    run_finetune(model, text, tmp_path / "stream", streaming=True, shuffle_buffer_size=6, **common)
    assert curve(tmp_path / "table") == curve(tmp_path / "stream") and same_weights(tmp_path / "table", tmp_path / "stream")
    assert len({line["loss"] for line in curve(tmp_path / "table") if "loss" in line}) == 9


def test_a_packed_run_killed_without_warning_goes_on_to_the_same_bits(tmp_path):
    model, text = checkpoint(tmp_path / "llama", "llama"), table(tmp_path / "t.jsonl", ROWS)
    words = ["--model_name_or_path", model, "--train_file", text, "--save_steps", "3", *SETTINGS, *STREAMED]
    done = python("-c", KILLED, "_optimize", "7", "finetune", *words, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == -9, done.stderr
    assert [step for step, _ in complete_checkpoints(tmp_path / "out")] == [3, 6]
    main(["finetune", *words, "--output_dir", str(tmp_path / "out"), "--resume"])
    main(["finetune", *words, "--output_dir", str(tmp_path / "straight")])
    assert same_weights(tmp_path / "out", tmp_path / "straight") and curve(tmp_path / "out") == curve(tmp_path / "straight")


def test_two_processes_read_each_text_once_and_are_killed_and_resumed_to_the_same_bits(tmp_path):
    model, text = checkpoint(tmp_path / "llama", "llama"), write_text(tmp_path / "t.txt", 36)
    words = ["--model_name_or_path", model, "--train_file", text, "--packing", "false", "--save_steps", "2", *SETTINGS[:-4], *STREAMED]
    words += ["--per_device_train_batch_size", "2", "--max_steps", "8", "--kan.init", "exact"]

    def launch(code: str, *arguments: str):
        (tmp_path / "script.py").write_text(code, encoding="utf-8")
        return python(*LAUNCH_TWO, str(_free_port()), str(tmp_path / "script.py"), *arguments)

    done = launch(READ, str(tmp_path / "read"), *words, "--output_dir", str(tmp_path / "straight"))
    assert done.returncode == 0, done.stderr
    parts = [[json.loads(line) for line in (tmp_path / f"read.{rank}").read_text(encoding="utf-8").splitlines()] for rank in (0, 1)]
    assert [len(part) for part in parts] == [8, 8]
    found = [example for pair in zip(*parts, strict=True) for part in pair for example in part]
    run_finetune(model, text, tmp_path / "one", packing=False, per_device_train_batch_size=4, max_steps=8, **STREAM)
    assert len(found) == len({tuple(example) for example in found}) == 32  # 36 texts, 4 of them held out
    for mine, theirs in zip(curve(tmp_path / "one"), curve(tmp_path / "straight"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    killed = launch(KILLED, "_optimize", "5", "finetune", *words, "--output_dir", str(tmp_path / "out"))
    assert killed.returncode != 0 and [step for step, _ in complete_checkpoints(tmp_path / "out")] == [2, 4]
    resumed = launch(READ, str(tmp_path / "again"), *words, "--output_dir", str(tmp_path / "out"), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(tmp_path / "out", tmp_path / "straight") and curve(tmp_path / "out") == curve(tmp_path / "straight")
    rest = [json.loads(line) for line in (tmp_path / "again.1").read_text(encoding="utf-8").splitlines()]
    assert rest == parts[1][4:]


def test_going_on_with_other_steps_or_another_kind_of_data_is_refused(tmp_path):
    model, text = checkpoint(tmp_path / "llama", "llama"), write_text(tmp_path / "t.txt")
    run_finetune(model, text, tmp_path / "out", save_steps=4, **STREAM)
    with pytest.raises(CheckpointError, match="got 4 examples per step, expected a stream, 8 per step.*as they were"):
        run_finetune(model, text, tmp_path / "out", save_steps=4, resume=True, gradient_accumulation_steps=2, **STREAM)
    assert run_finetune(model, text, tmp_path / "out", resume=True, gradient_accumulation_steps=2, per_device_train_batch_size=2, **STREAM)["steps"] == 8
    run_finetune(model, text, tmp_path / "table", save_steps=4)
    with pytest.raises(CheckpointError, match="data that were not streamed"):
        run_finetune(model, text, tmp_path / "table", save_steps=4, resume=True, **STREAM)


def test_classes_and_images_are_streamed_too(tmp_path):
    settings = {"train_dir": image_folder(tmp_path / "i", 8), "task": "image_classification", "max_steps": 5, **STREAM, "shuffle_buffer_size": 16}
    results = run_finetune(vision(tmp_path / "vit"), None, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert results["tokens"] == 20
    path, tags = table(tmp_path / "t.jsonl", sentences(30)), ["O", "B-A", "I-A", "B-C"]
    run_finetune(checkpoint(tmp_path / "bert"), path, tmp_path / "tags", task="token_classification", label_names=tags, max_steps=5, **STREAM)
    config = json.loads((tmp_path / "tags" / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["label2id"] == {tag: number for number, tag in enumerate(tags)}


def test_distillation_streams_and_needs_a_table_for_stored_states(tmp_path):
    teacher, text, held = checkpoint(tmp_path / "bert"), write_text(tmp_path / "t.txt", 20), write_text(tmp_path / "v.txt", 6, seed=1)
    common = {"validation_file": held, "hidden_weight": 1.0, "kan": {"init": "prune", "param_ratio": 0.5}, "save_steps": 3}
    run_distill(teacher, text, tmp_path / "out", **common, **STREAM)
    run_distill(teacher, text, tmp_path / "again", **common, **STREAM)
    assert curve(tmp_path / "out") == curve(tmp_path / "again") and weights(tmp_path / "out").keys()
    losses = [line["loss"] for line in curve(tmp_path / "out") if "loss" in line]
    assert len(losses) == 8 and sum(losses[-3:]) < sum(losses[:3])
    with pytest.raises(ConfigError, match="teacher_states with streaming"):
        run_distill(teacher, text, tmp_path / "new", **{**common, "local_weight": 0.0}, teacher_states=str(tmp_path / "s"), **STREAM)


def test_what_packing_leaves_over_is_said_once(tmp_path, capfd):
    model, text = checkpoint(tmp_path / "llama", "llama"), write_text(tmp_path / "t.txt", 60)
    run_finetune(model, text, tmp_path / "stream", max_steps=30, **STREAM)
    run_finetune(model, text, tmp_path / "table", max_steps=30)
    said = capfd.readouterr()
    assert (said.out + said.err).count("fill none and are left out") == 2
