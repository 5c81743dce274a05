"""No space, or no right to write, in the middle of a run: one clear line, exit code 2, nothing that was complete is lost, and the run goes on afterwards."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from kanformer.cli import main
from kanformer.training.checkpoint import complete_checkpoints
from training_cases import checkpoint, curve, python, same_weights, write_text

# Runs the command again and again, each time in a fresh copy of a half-done run and with another largest size of a file; what would be longer fails as on
# a full disk, in the middle of a write.
FULL = """
import contextlib, io, json, resource, shutil, signal, sys
from kanformer.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
half, limits, words = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
for limit in limits:
    shutil.copytree(half, f"{half}-{limit}", symlinks=True)
    said, code = io.StringIO(), 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main([*words, "--output_dir", f"{half}-{limit}", "--resume"])
    except SystemExit as leaving:
        code = leaving.code
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps([limit, code, said.getvalue()]))
"""

# The run's folder can no longer be written to after a step. Root gives up the right to write everywhere (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH).
READ_ONLY = """
import ctypes, os, struct, sys
from kanformer.cli import main
from kanformer.training import loop
out, words = sys.argv[1], sys.argv[2:]
real = loop.Trainer._optimize
def replaced(self):
    if self.step == 4:
        os.chmod(out, 0o555)
    return real(self)
loop.Trainer._optimize = replaced
if os.geteuid() == 0:
    libc, header, sets = ctypes.CDLL(None), struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    assert libc.capget(header, sets) == 0
    effective, *rest = struct.unpack("6I", sets.raw)
    assert libc.capset(header, struct.pack("6I", effective & ~0b110, *rest)) == 0
main([*words, "--output_dir", out])
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(words of a stage 2, its folder after 3 of 8 steps, its folder after all of them)."""
    folder = tmp_path_factory.mktemp("disk")
    teacher, text = checkpoint(folder / "bert", initializer_range=0.3), write_text(folder / "text.txt")
    words = ["distill", "--teacher_name_or_path", teacher, "--train_file", text, "--stage", "global", "--save_steps", "3", "--max_length", "16"]
    words += ["--per_device_train_batch_size", "4", "--disable_tqdm", "--logging_steps", "1", "--max_steps", "8", "--warmup_steps", "0"]
    main([*words, "--output_dir", str(folder / "straight")])
    shutil.copytree(folder / "straight", folder / "half")
    for name in ("checkpoint-6", "model"):
        shutil.rmtree(folder / "half" / name)
    for name in ("all_results.json", "layers.csv"):
        (folder / "half" / name).unlink()
    return words, folder / "half", folder / "straight"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_disk_that_is_full_anywhere_costs_no_complete_checkpoint_and_the_run_goes_on_later(job):
    words, half, straight = job
    weights, state = ((straight / "checkpoint-6" / name).stat().st_size for name in ("model.safetensors", "training_state.pt"))
    kept = [line for line in (half / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True) if json.loads(line)["step"] <= 3]
    kept.append(json.dumps({"step": 3, "note": "x" * (straight / "config.yaml").stat().st_size}) + "\n")
    (half / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    assert weights + 1 < state
    limits = {500: "config.yaml", len("".join(kept)) + 30: "metrics.jsonl", weights // 2: "checkpoint-6", weights + 1: "checkpoint-6"}
    done = python("-c", FULL, str(half), json.dumps(sorted(limits)), *words)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [limit for limit, *_ in found] == sorted(limits)
    before = contents(half / "checkpoint-3")
    for limit, code, said in found:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and limits[limit] in errors[0] and "Traceback" not in said, (limit, said)
        run = half.with_name(f"half-{limit}")
        assert [step for step, _ in complete_checkpoints(run)] == [3] and contents(run / "checkpoint-3") == before
        assert not (run / "model").exists() and not (run / "all_results.json").exists() and not list(run.glob(".*"))
        main([*words, "--output_dir", str(run), "--resume"])
        assert same_weights(run, straight) and [line for line in curve(run) if "note" not in line] == curve(straight)


@pytest.mark.skipif(sys.platform != "linux", reason="rights are given up as Linux does it")
def test_a_folder_that_becomes_read_only_costs_nothing(job, tmp_path):
    words, _, straight = job
    out = tmp_path / "out"
    done = python("-c", READ_ONLY, str(out), *words)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "checkpoint-6): got Permission denied" in errors[0] and "Traceback" not in done.stderr, done.stderr
    assert [step for step, _ in complete_checkpoints(out)] == [3] and not (out / "model").exists()
    out.chmod(0o755)
    main([*words, "--output_dir", str(out), "--resume"])
    assert same_weights(out, straight) and curve(out) == curve(straight)


@pytest.mark.parametrize("place", ["/sys/kanformer", "/proc/kanformer", "file"])
def test_a_place_where_nothing_can_be_written_is_named_on_one_line(tmp_path, job, capsys, place):
    if place == "file":
        (tmp_path / "file").write_text("mine", encoding="utf-8")
        place = str(tmp_path / "file" / "run")
    elif not Path(place).parent.is_dir():
        pytest.skip(f"no {Path(place).parent} on this system")
    with pytest.raises(SystemExit) as leaving:
        main([*job[0], "--output_dir", place])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert leaving.value.code == 2 and len(errors) == 1 and place.rpartition("/")[0] in errors[0]


def test_states_of_the_teacher_that_find_no_space_leave_nothing(tmp_path, job):
    words = [word for word in job[0] if word not in ("--save_steps", "3")]
    states = tmp_path / "states" / "states.bin"
    code = FULL.replace(', "--resume"', "")
    (tmp_path / "run").mkdir()
    settings = ["--kl_weight", "0", "--hidden_weight", "1", "--teacher_states", str(states)]
    done = python("-c", code, str(tmp_path / "run"), "[20000]", *words, *settings)
    assert done.returncode == 0, done.stderr
    limit, leaving, said = json.loads(done.stdout)
    assert leaving == 2 and "error: cannot write the teacher's states" in said and "They take" in said and limit == 20000
    assert not list(states.parent.iterdir()) and not list((tmp_path / "run-20000").iterdir())


def test_the_end_of_the_run_finds_no_space(job, tmp_path, monkeypatch):
    """The final model cannot be written: the checkpoints stand, and the run ends later with the model that it would have had."""
    words, _, straight = job
    out = tmp_path / "out"

    def full(*parts, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as leaving:
        patch.setattr("kanformer.training.loop.save_pretrained", full)
        main([*words, "--output_dir", str(out)])
    assert leaving.value.code == 2 and [step for step, _ in complete_checkpoints(out)] == [3, 6] and not (out / "model").exists()
    main([*words, "--output_dir", str(out), "--resume"])
    assert same_weights(out, straight) and curve(out) == curve(straight)


def test_a_checkpoint_that_is_half_written_is_not_gone_on_from(job, tmp_path):
    words, half, straight = job
    shutil.copytree(half, tmp_path / "out")
    shutil.copytree(straight / "checkpoint-6", tmp_path / "out" / ".checkpoint-6.partial")
    shutil.copytree(straight / "checkpoint-6", tmp_path / "out" / "checkpoint-7")
    (tmp_path / "out" / "checkpoint-7" / "complete.json").unlink()
    main([*words, "--output_dir", str(tmp_path / "out"), "--resume"])
    assert same_weights(tmp_path / "out", straight) and not list((tmp_path / "out").glob(".*"))
