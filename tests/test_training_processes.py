"""The scripts as users start them: launched by accelerate, over two processes, killed in the middle, diverging."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch

from evaluation_cases import mixture
from kanformer.cli import main
from kanformer.training.checkpoint import complete_checkpoints
from training_cases import ROOT, checkpoint, curve, python, run_distill, run_finetune, same_weights, weights, write_text

SETTINGS = ["--disable_tqdm", "--max_length", "16", "--per_device_train_batch_size", "4", "--warmup_steps", "0"]
SETTINGS += ["--logging_steps", "1", "--max_steps", "8", "--kan.init", "exact"]
LAUNCH_TWO = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/ddp.yaml"), "--num_processes", "2", "--main_process_port"]
KILLED = """
import importlib, os, signal, sys
from kanformer.training import loop
real, where = getattr(loop.Trainer, sys.argv[1]), int(sys.argv[2])
def replaced(self, *words):
    found = real(self, *words)
    if self.step == where:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
setattr(loop.Trainer, sys.argv[1], replaced)
importlib.import_module(f"kanformer.training.{sys.argv[3]}").main(sys.argv[4:])
"""


@pytest.fixture
def words(tmp_path):
    """The command line of a run of `bert`, but for its output_dir."""
    model, text = checkpoint(tmp_path / "bert"), write_text(tmp_path / "text.txt")
    return ["--model_name_or_path", model, "--train_file", text, "--task", "masked_lm", "--save_steps", "3", *SETTINGS]


@pytest.fixture
def stage_two(tmp_path):
    """The same of a distillation end to end, with masks that depend on the random state."""
    teacher, text = checkpoint(tmp_path / "bert", initializer_range=0.3), write_text(tmp_path / "text.txt")
    words = ["--teacher_name_or_path", teacher, "--train_file", text, "--stage", "global", "--ce_weight", "0.1", "--save_steps", "3", *SETTINGS]
    return [*words[: words.index("--kan.init")], "--kan", "{init: random}"]


@pytest.mark.parametrize(("method", "step"), [("_optimize", 4), ("_save_model", 6)], ids=["in-a-step", "in-a-save"])
@pytest.mark.parametrize(("command", "given"), [("finetune", "words"), ("distill", "stage_two")])
def test_a_run_killed_without_warning_goes_on_to_the_same_bits(tmp_path, request, command, given, method, step):
    out, words = tmp_path / "out", request.getfixturevalue(given)
    done = python("-c", KILLED, method, str(step), command, *words, "--output_dir", str(out))
    assert done.returncode == -9, done.stderr
    assert [number for number, _ in complete_checkpoints(out)] == [3] and not (out / "model").exists()
    assert (out / ".checkpoint-6.partial").is_dir() == (method == "_save_model")
    main([command, *words, "--output_dir", str(out), "--resume"])
    main([command, *words, "--output_dir", str(tmp_path / "straight")])
    assert same_weights(out, tmp_path / "straight") and curve(out) == curve(tmp_path / "straight")
    assert not list(out.glob(".*"))


def test_two_processes_take_the_step_of_one_with_the_same_examples(tmp_path):
    model, text = checkpoint(tmp_path / "llama", "llama"), write_text(tmp_path / "text.txt")
    common = ["--model_name_or_path", model, "--train_file", text, *SETTINGS, "--per_device_train_batch_size", "2", "--max_grad_norm", "0.5"]
    two = python(*LAUNCH_TWO, str(_free_port()), str(ROOT / "scripts/finetune.py"), *common, "--output_dir", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    run_finetune(model, text, tmp_path / "one", per_device_train_batch_size=4, max_grad_norm=0.5)
    run_finetune(model, text, tmp_path / "half", per_device_train_batch_size=2, max_grad_norm=0.5)
    one, both, half = (weights(tmp_path / name) for name in ("one", "two", "half"))
    assert max(float((one[name] - both[name]).abs().max()) for name in one) < 1e-5 < max(float((one[name] - half[name]).abs().max()) for name in one)
    assert [line["tokens"] for line in curve(tmp_path / "two") if "tokens" in line] == [line["tokens"] for line in curve(tmp_path / "one") if "tokens" in line]
    assert two.stdout.count("fine-tuned:") == 1
    for mine, theirs in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_two_processes_distil_like_one(tmp_path):
    model, text = checkpoint(tmp_path / "bert"), write_text(tmp_path / "text.txt")
    common = ["--teacher_name_or_path", model, "--train_file", text, *SETTINGS[:-2], "--hidden_weight", "1", "--per_device_train_batch_size", "2"]
    two = python(*LAUNCH_TWO, str(_free_port()), str(ROOT / "scripts/distill.py"), *common, "--output_dir", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    run_distill(model, text, tmp_path / "one", per_device_train_batch_size=4, hidden_weight=1.0)
    one, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((one[name] - both[name]).abs().max()) for name in one) < 1e-5
    assert two.stdout.count("distilled:") == 1


STAGE_TWO = {
    "bert": {"hidden_weight": 1.0, "embedding_weight": 10.0},  # loaded without its head
    "gpt2": {"kl_weight": 0.9, "ce_weight": 0.1, "temperature": 2.0},
    "mixtral": {"kl_weight": 1.0},
}


@pytest.mark.parametrize("name", STAGE_TWO)
def test_two_processes_distil_end_to_end_like_one(tmp_path, name):
    text, lively = write_text(tmp_path / "text.txt"), {"initializer_range": 0.3}
    model = mixture(tmp_path / name) if name == "mixtral" else checkpoint(tmp_path / name, name, auto_class="AutoModel" if name == "bert" else None, **lively)
    settings = {"stage": "global", **STAGE_TWO[name], "train_rest": "all", "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2}
    common = [word for key, value in settings.items() for word in (f"--{key}", str(value))] + ["--kan", "{init: random}"]
    common += ["--teacher_name_or_path", model, "--train_file", text, "--per_device_train_batch_size", "2"]
    base = [*SETTINGS[: SETTINGS.index("--max_steps")], *common]
    two = python(*LAUNCH_TWO, str(_free_port()), str(ROOT / "scripts/distill.py"), *base, "--output_dir", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    run_distill(model, text, tmp_path / "one", per_device_train_batch_size=4, kan={"init": "random"}, **settings)
    one, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = [key for key in one if "key.bias" not in key and "c_attn.bias" not in key]  # see test_training_global
    assert max(float((one[key] - both[key]).abs().max()) for key in moved) < 1e-5 and two.stdout.count("distilled:") == 1
    for mine, theirs in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_the_distillation_script_runs_under_accelerate_with_a_config_and_overrides(tmp_path):
    model, text = checkpoint(tmp_path / "bert"), write_text(tmp_path / "text.txt")
    (tmp_path / "c.yaml").write_text(f"teacher_name_or_path: {model}\ntrain_file: {text}\nmax_steps: 500\nmax_length: 16\n", encoding="utf-8")
    words = ["--config", str(tmp_path / "c.yaml"), "--max_steps", "2", "--kan.param_ratio", "0.25", "--output_dir", str(tmp_path / "out")]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu.yaml")]
    done = python(*launch, str(ROOT / "scripts/distill.py"), *words)
    assert done.returncode == 0, done.stderr
    assert "distilled: FVU" in done.stdout and "tok_s=" in done.stderr
    assert re.search(r"2/2 \[\d\d:\d\d<\d\d:\d\d", done.stderr)  # time so far < time to go
    assert f"Base model: `{Path(model).name}`" in (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    resolved = (tmp_path / "out" / "config.yaml").read_text(encoding="utf-8")
    assert "max_steps: 2\n" in resolved and "param_ratio: 0.25" in resolved and "init: prune" in resolved
    assert weights(tmp_path / "out")["bert.encoder.layer.0.intermediate.kan_up.weight"].shape[0] < 24


def test_a_run_that_diverges_exits_with_3_and_says_so_on_a_line_of_its_own(tmp_path, words, capfd):
    with pytest.raises(SystemExit) as leaving:
        main(["finetune", *words, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "false", "--learning_rate", "1e37", "--max_steps", "9"])
    assert leaving.value.code == 3
    lines = [line.split("\r")[-1] for line in capfd.readouterr().err.split("\n")]
    said = [line for line in lines if "cannot go on training" in line]
    assert len(said) == 1 and said[0].startswith("error: cannot go on training: got ") and "Lower the learning rate" in said[0]
    assert not (tmp_path / "out" / "model").exists() and all(torch.isfinite(tensor).all() for tensor in _last(tmp_path / "out"))


def test_stage_two_that_diverges_exits_with_3_too_and_keeps_its_checkpoint(tmp_path, stage_two, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as leaving:
        main(["distill", *stage_two, "--output_dir", str(out), "--loss_watchdog_threshold", "1e-9", "--loss_watchdog_patience", "5", "--save_steps", "1"])
    assert leaving.value.code == 3 and "a loss above 1e-09 in 5 steps" in capsys.readouterr().err
    assert not complete_checkpoints(out) and not (out / "model").exists()  # none is written while the loss is above


def test_the_last_checkpoint_outlives_a_divergence(tmp_path, words):
    out = tmp_path / "out"
    main(["finetune", *words, "--output_dir", str(out), "--max_steps", "3"])
    before = list(_last(out))
    state = torch.load(out / "checkpoint-3" / "training_state.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["peak_lr"] = 1e37
    torch.save(state, out / "checkpoint-3" / "training_state.pt")
    with pytest.raises(SystemExit) as leaving:
        main(["finetune", *words, "--output_dir", str(out), "--resume"])
    assert leaving.value.code == 3 and [step for step, _ in complete_checkpoints(out)] == [3]
    assert all(torch.equal(a, b) for a, b in zip(before, _last(out), strict=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _last(out):
    """The tensors of the newest checkpoint, if there is one."""
    from safetensors.torch import load_file

    found = complete_checkpoints(out)
    return load_file(found[-1][1] / "model.safetensors").values() if found else ()
