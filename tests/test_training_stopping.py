"""Where a run ends before its last step, and what then stands: early stopping, the best model, divergence; and who else gets the metrics."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from kanformer.cli import main
from kanformer.errors import CheckpointError, ConfigError, TrainingDiverged
from kanformer.training import finetune_task, loop
from kanformer.training.checkpoint import complete_checkpoints
from kanformer.training.settings import LoopArguments
from kanformer.training.stopping import Stopping
from kanformer.training.trackers import wanted_trackers
from training_cases import checkpoint, curve, metrics, run_distill, run_finetune, same_weights, weights, write_text

VALUES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.5, 10: 1.0, 12: 1.0}  # a held-out loss: no better at 6 and 8, best at 10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(model, text) of every run."""
    folder = tmp_path_factory.mktemp("inputs")
    return checkpoint(folder / "llama", "llama", num_hidden_layers=1), write_text(folder / "text.txt")


@pytest.fixture
def told(monkeypatch):
    """Evaluations measure what VALUES say."""
    real = finetune_task.FinetuneTask.evaluate
    trainers = []

    def keep(self, *words, **options):
        trainers.append(self)
        return start(self, *words, **options)

    def evaluate(self):
        return {**real(self), "loss": VALUES.get(trainers[-1].step, 9.0)}

    start = loop.Trainer.__init__
    monkeypatch.setattr(loop.Trainer, "__init__", keep)
    monkeypatch.setattr(finetune_task.FinetuneTask, "evaluate", evaluate)


SETTINGS = {"max_steps": 12, "eval_steps": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    ("values", "options", "best_step", "stopped"),
    [
        ([3, 2, 2.5, 2.5], {}, 4, 8),
        ([3, 2, 2.5, 1.9, 1.95, 2.0], {}, 8, 12),
        ([3, 2, 1.95, 1.92, 1.91, 1.9], {"early_stopping_threshold": 0.1}, 8, 8),
        ([1, 2, 3, 3, 2.9, 2.8], {"greater_is_better": True}, 6, 10),
        ([5, 5, 5], {}, 2, 6),
    ],
)
def test_patience_counts_as_transformers_callback_does(values, options, best_step, stopped):
    import transformers as tf

    stopping = Stopping(LoopArguments(early_stopping_patience=2, **options), ("loss", "accuracy"))
    callback, control, state = tf.EarlyStoppingCallback(2, options.get("early_stopping_threshold", 0.0)), tf.TrainerControl(), tf.TrainerState()
    arguments = tf.TrainingArguments(metric_for_best_model="loss", greater_is_better=options.get("greater_is_better", False), use_cpu=True)
    for number, value in enumerate(values, 1):
        callback.on_evaluate(arguments, state, control, {"eval_loss": value})
        better = state.best_metric is None or (value > state.best_metric if arguments.greater_is_better else value < state.best_metric)
        state.best_metric = value if better else state.best_metric
        assert stopping.see(2 * number, {"loss": value, "accuracy": 0.0}) == better
        assert (stopping.stop, stopping.waited) == (control.should_training_stop, callback.early_stopping_patience_counter)
        if stopping.stop:
            break
    assert (2 * number, stopping.best, stopping.best_step) == (stopped, state.best_metric, best_step)


def test_accuracy_is_better_when_greater_and_what_is_not_measured_is_an_error():
    assert Stopping(LoopArguments(metric_for_best_model="eval_accuracy"), ("loss", "accuracy")).sign == 1
    assert Stopping(LoopArguments(), ("fvu", "fvu_worst")).sign == -1
    with pytest.raises(ConfigError, match=r"metric_for_best_model\): got 'los'. Did you mean 'loss'"):
        Stopping(LoopArguments(metric_for_best_model="los"), ("loss", "accuracy"))


def test_a_run_stops_when_patience_ends_and_says_so(tmp_path, inputs, told):
    results = run_finetune(*inputs, tmp_path / "out", early_stopping_patience=2, logging_steps=5, **SETTINGS)
    assert (results["steps"], results["eval_loss"], results["best_step"], results["best_loss"]) == (8, 2.5, 4, 2.0)
    assert [(line["step"], line.get("eval_loss")) for line in metrics(tmp_path / "out")] == [
        *((2, 3.0), (4, 2.0), (5, None), (6, 2.5)),
        *((8, 2.5), (8, None)),  # the steps since the last line are not lost
    ]


def test_a_stopped_run_that_was_interrupted_stops_at_the_same_step_with_the_same_bits(tmp_path, inputs, told, monkeypatch):
    settings = {"early_stopping_patience": 2, "save_steps": 1, "save_total_limit": None, "load_best_model_at_end": True, **SETTINGS}
    run_finetune(*inputs, tmp_path / "straight", **settings)
    real = loop.Trainer._optimize
    for broken in (7, 8):  # before the evaluation that ends the run, and after it but before the end was written
        out = tmp_path / f"broken-{broken}"

        def optimize(self, broken=broken):
            if self.step == broken - 1 and broken == 7:
                raise InterruptedError("pulled the plug")
            return real(self)

        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(loop.Trainer, "_optimize", optimize)
            if broken == 8:
                patch.setattr(loop.Trainer, "_final_metrics", lambda self: (_ for _ in ()).throw(InterruptedError))
            run_finetune(*inputs, out, **settings)
        results = run_finetune(*inputs, out, resume=True, **settings)
        assert (results["steps"], results["steps_this_run"], results["best_step"]) == (8, 8 - complete_before(broken), 4)
        assert same_weights(out, tmp_path / "straight") and curve(out) == curve(tmp_path / "straight")


def complete_before(broken: int) -> int:
    """The step of the newest checkpoint when the run broke."""
    return 6 if broken == 7 else 8


def test_the_best_model_is_kept_and_is_the_one_that_is_saved(tmp_path, inputs, told):
    out = tmp_path / "out"
    results = run_finetune(*inputs, out, load_best_model_at_end=True, save_steps=1, save_total_limit=1, **{**SETTINGS, "max_steps": 9})
    assert [step for step, _ in complete_checkpoints(out)] == [4, 9]  # 4 is spared
    best, last = (load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in (4, 9))
    final = weights(out)
    assert all(torch.equal(final[name], best[name]) for name in best) and not all(torch.equal(final[name], last[name]) for name in last)
    assert results["best_step"] == 4 and results["steps"] == 9
    (out / "checkpoint-4" / "complete.json").unlink()
    (out / "checkpoint-4").rename(out / "elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint-4, whose model is the best so far.*Go on without"):
        run_finetune(*inputs, out, load_best_model_at_end=True, resume=True, **{**SETTINGS, "max_steps": 9})


def test_the_results_are_those_of_the_best_model(tmp_path, inputs):
    out = tmp_path / "out"
    settings = {"metric_for_best_model": "accuracy", "greater_is_better": False, "load_best_model_at_end": True, "max_steps": 6, "eval_steps": 2}
    results = run_finetune(*inputs, out, learning_rate=3e-2, new_module_learning_rate=3e-2, **settings)
    line = next(line for line in metrics(out) if line["step"] == results["best_step"] and "eval_loss" in line)
    assert {key: value for key, value in results.items() if key.startswith("eval_")} == {key: value for key, value in line.items() if key != "step"}


def test_an_evaluation_at_the_start_changes_nothing_else(tmp_path, inputs):
    for name in (False, True):
        run_finetune(*inputs, tmp_path / str(name), eval_on_start=name, max_steps=3)
    first, *rest = curve(tmp_path / "True")
    assert first["step"] == 0 and first["eval_loss"] > 0 and "loss" not in first
    assert rest == curve(tmp_path / "False") and same_weights(tmp_path / "True", tmp_path / "False")
    (tmp_path / "True" / "all_results.json").unlink()  # no checkpoint: it starts anew, and so does the file
    run_finetune(*inputs, tmp_path / "True", eval_on_start=True, max_steps=3, resume=True)
    assert curve(tmp_path / "True") == [first, *rest]


def test_distillation_stops_by_the_variance_that_is_unexplained(tmp_path, inputs):
    settings = {"new_module_learning_rate": 0.0, "early_stopping_patience": 1, "eval_steps": 1, "max_steps": 9}  # nothing learns: no better at once
    results = run_distill(*inputs, tmp_path / "out", **settings)
    assert (results["steps"], results["best_step"]) == (2, 1) and results["best_fvu"] == results["start_fvu"]


@pytest.mark.parametrize("setting", [{"early_stopping_patience": 1}, {"load_best_model_at_end": True}])
def test_stopping_needs_evaluations(tmp_path, inputs, setting):
    with pytest.raises(ConfigError, match="no evaluations on the way. Set --eval_steps"):
        run_finetune(*inputs, tmp_path / "out", **setting)


def test_a_loss_beyond_the_watchdogs_limit_ends_the_run_and_leaves_the_last_good_checkpoint(tmp_path, inputs, monkeypatch):
    real = loop.Trainer._optimize
    losses = {3: 50.0, 6: 50.0, 7: 50.0, 8: 50.0}

    def optimize(self):
        _, found, count, tokens = real(self)
        return losses.get(self.step + 1, 1.0) * count, found, count, tokens

    monkeypatch.setattr(loop.Trainer, "_optimize", optimize)
    settings = {"loss_watchdog_threshold": 20.0, "save_steps": 1, "save_total_limit": 2, "max_steps": 10}
    with pytest.raises(TrainingDiverged, match="a loss above 20 in 3 steps in a row, 50 in step 8"):
        run_finetune(*inputs, tmp_path / "out", **settings)
    assert [step for step, _ in complete_checkpoints(tmp_path / "out")] == [4, 5]
    losses.clear()
    assert run_finetune(*inputs, tmp_path / "out", resume=True, **settings)["steps_this_run"] == 5


def test_a_run_that_becomes_nan_exits_with_3_and_keeps_its_checkpoint(tmp_path, inputs, capsys):
    words = ["finetune", "--model_name_or_path", inputs[0], "--train_file", inputs[1], "--kan.init", "exact", "--disable_tqdm", "--max_length", "16"]
    words += ["--max_steps", "60", "--save_steps", "1", "--max_grad_norm", "0", "--learning_rate", "1e30", "--warmup_steps", "0", "--output_dir"]
    with pytest.raises(SystemExit) as caught:
        main([*words, str(tmp_path / "out")])
    assert caught.value.code == 3 and "Lower the learning rate" in capsys.readouterr().err
    saved = complete_checkpoints(tmp_path / "out")
    assert saved and all(tensor.isfinite().all() for _, path in saved for tensor in load_file(path / "model.safetensors").values())


def test_trackers_are_asked_for_by_name():
    assert wanted_trackers("none") == wanted_trackers("") == wanted_trackers([]) == []
    with pytest.raises(ConfigError, match=r"report the metrics \(report_to\): got 'tensorbord'. Did you mean 'tensorboard'"):
        wanted_trackers("tensorbord")


@pytest.fixture
def only_wandb(monkeypatch):
    """A machine on which wandb is the only tracker; what it is told."""
    import accelerate.tracking

    calls: dict = {"log": []}
    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda values, step=None, **_: calls["log"].append({"step": step, **values}), finish=lambda: calls.update(finished=True))
    fake.init = lambda **options: calls.update(init=options) or run  # type: ignore[attr-defined]
    fake.config = types.SimpleNamespace(update=lambda values, **_: calls.update(config=values))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.tracking.LoggerType.WANDB])
    return calls


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_made(tmp_path, inputs, only_wandb):
    with pytest.raises(ConfigError, match=r"report_to=trackio\): got trackio, which is not installed. pip install trackio, or set report_to to none or wandb"):
        run_finetune(*inputs, tmp_path / "out", report_to="wandb,trackio")
    assert not (tmp_path / "out").exists() and wanted_trackers("all") == ["wandb"]


def test_where_no_tracker_is_installed_all_is_an_error(monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match="report_to=all.*no tracker that is installed"):
        wanted_trackers("all")


def test_a_tracker_gets_what_the_file_gets(tmp_path, inputs, only_wandb):
    run_finetune(*inputs, tmp_path / "out", report_to=["wandb"], max_steps=4, eval_steps=2, eval_on_start=True, project="mine")
    assert only_wandb["log"] == metrics(tmp_path / "out") and len(only_wandb["log"]) == 7
    assert only_wandb["init"] == {"project": "mine", "name": "out", "dir": str(tmp_path / "out")} and only_wandb["finished"]
    assert only_wandb["config"]["max_steps"] == 4 and only_wandb["config"]["kan"] == "{'init': 'exact'}"


def test_tensorboard_gets_one_curve_over_a_resume(tmp_path, inputs):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"report_to": "tensorboard", "save_steps": 2, "max_steps": 4}
    run_finetune(*inputs, tmp_path / "out", **settings)
    (tmp_path / "out" / "checkpoint-4" / "complete.json").unlink()
    run_finetune(*inputs, tmp_path / "out", resume=True, **settings)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert [event.step for event in events.Scalars("eval_loss")] == [4]


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one precision per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_is_a_setting_of_its_own(tmp_path, inputs, monkeypatch, fresh_accelerate):
    real, seen = finetune_task.SummedLoss.forward, set()

    def forward(self, batch):
        seen.add((torch.is_autocast_enabled("cpu"), self.model.model.layers[0].mlp.kan_up(torch.ones(1, 32)).dtype))
        return real(self, batch)

    monkeypatch.setattr(finetune_task.SummedLoss, "forward", forward)
    run_finetune(*inputs, tmp_path / "out", bf16=True, max_steps=2)
    assert seen == {(True, torch.bfloat16)} and weights(tmp_path / "out")["model.layers.0.mlp.kan_up.weight"].dtype == torch.float32
    with pytest.raises(ConfigError, match="got bf16 and fp16, expected at most one"):
        run_finetune(*inputs, tmp_path / "both", bf16=True, fp16=True)
