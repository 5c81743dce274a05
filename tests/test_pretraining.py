"""The grid: end to end, killed and started again, refused where settings differ, and what its report says."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers as tf
from scipy import stats

from kanformer.errors import ConfigError, DataError, KanformerError
from kanformer.experiments.intervals import mean_interval
from kanformer.layers import KANFeedForward
from kanformer.pretraining import grid as grid_module
from kanformer.pretraining.arms import ARMS as ALL_ARMS
from kanformer.pretraining.grid import pretrain
from kanformer.pretraining.report import put_in_page
from kanformer.pretraining.settings import PretrainArguments
from kanformer.pretraining.timing import ratios, step_clock
from kanformer.pretraining.worker import Worker, answer
from kanformer.training.arguments import parse_arguments
from pretraining_cases import GRID, results, settings, write_story
from training_cases import ROOT

ARMS = ["gated_kan_bspline", "kan_full"]


class HereWorker(Worker):
    """Does its jobs in this process; remembers them."""

    jobs: ClassVar[list[dict]] = []

    def do(self, job, log):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.jobs.append(job)
        return answer({**job, "log": str(log)})


@pytest.fixture
def here(monkeypatch):
    """Grids without child processes; the jobs that they gave."""
    monkeypatch.setattr(grid_module, "Worker", HereWorker)
    monkeypatch.setattr(HereWorker, "jobs", [])
    return HereWorker.jobs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, rows of the report) of a small grid with two hosts."""
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_module, "Worker", HereWorker)
        return folder, pretrain(settings(folder, arms=ARMS, docs_dir=str(folder / "docs")))


def runs(jobs):
    return [Path(job["run"]["output_dir"]).parent.parent.name + "/" + Path(job["run"]["output_dir"]).name for job in jobs if "run" in job]


def test_a_grid_from_end_to_end(finished):
    folder, rows = finished
    found = results(folder)
    assert {(row["arm"], row["row"]) for row in rows} == {(arm, f"equal {row}") for arm in ("swiglu", "mlp", *ARMS) for row in ("params", "flops", "time")}
    for arm in ("swiglu", "mlp", *ARMS):
        trials = {name: value["eval_loss"] for name, value in found.items() if name.startswith(f"{arm}/equal-params") and name.endswith("seed0")}
        assert len(trials) == 2
        best = min(trials, key=lambda name: trials[name])
        rate = float(best.split("/lr")[1].split("-seed")[0])
        losses = [trials[best], found[best.replace("seed0", "seed1")]["eval_loss"]]
        row = next(row for row in rows if row["arm"] == arm and row["row"] == "equal params")
        assert row["learning_rate"] == rate and row["seeds"] == 2 and row["failed"] == row["missing"] == 0
        assert row["ce"] == pytest.approx(statistics.fmean(losses)) and row["learning_rate_at_edge"] == ("lowest" if rate == 1e-3 else "highest")
        assert abs(row["ffn_parameters_ratio"] - 1) <= GRID["tolerance"] and row["peak_memory_bytes"] > 50 * 2**20
    assert all(value["steps"] == 6 for name, value in found.items() if "equal-time" not in name)


def test_differences_are_paired_by_seed_and_have_t_intervals(finished):
    folder, rows = finished
    found = results(folder)
    for arm, base in (("gated_kan_bspline", "swiglu"), ("kan_full", "mlp")):
        row, other = (next(row for row in rows if row["arm"] == name and row["row"] == "equal params") for name in (arm, base))
        pairs = []
        for seed in (0, 1):
            names = [f"{name}/equal-params/lr{each['learning_rate']:g}-seed{seed}" for name, each in ((arm, row), (base, other))]
            pairs.append([found[name]["eval_loss"] for name in names])
        wanted = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
        mean, half = row["ce_difference"], row["ce_difference_half_interval"]
        assert (mean - half, mean + half) == pytest.approx(tuple(wanted), rel=1e-6)
        assert row["ce_difference_percent"] == pytest.approx(100 * mean / statistics.fmean(pair[1] for pair in pairs))
        assert row["reading"] == ("tie" if wanted.low <= 0 <= wanted.high else "better" if mean < 0 else "worse")


def test_rows_take_other_widths_and_steps_or_say_that_they_reuse(finished):
    folder, rows = finished
    times = json.loads((folder / "out" / "story" / "timing.json").read_text())
    for row in rows:
        if row["row"] == "equal time" and row["arm"] in ARMS:
            wanted = max(1, round(6 / times[row["arm"]]["ratio"]))
            reused = abs(wanted - 6) / 6 <= GRID["tolerance"]
            assert row["reuses_equal_params"] == reused and row["steps"] == (6 if reused else wanted)
            assert row["step_time_ratio"] == times[row["arm"]]["ratio"]
        if row["row"] == "equal flops" and not row["reuses_equal_params"]:
            assert abs(row["flops_ratio"] - 1) <= GRID["tolerance"]
        assert row["reuses_equal_params"] or row["row"] == "equal params" or row["arm"] in ARMS  # baselines keep their runs


def test_all_arms_of_a_seed_have_one_data_order_and_schedule(finished):
    folder, _ = finished
    base = folder / "out" / "story"
    read = [json.loads(path.read_text()) for path in base.glob("*/equal-params/*/run.json")]
    own = {"output_dir", "arm", "width", "learning_rate", "new_module_learning_rate", "spline_learning_rate", "seed"}
    assert len({json.dumps({name: value for name, value in each.items() if name not in own}, sort_keys=True) for each in read}) == 1
    assert all(each["learning_rate"] == each["new_module_learning_rate"] == each["spline_learning_rate"] for each in read)
    lines = [path.read_text().splitlines() for path in base.glob("*/equal-params/*/metrics.jsonl")]
    tokens = [[json.loads(line)["tokens"] for line in each if "tokens" in line] for each in lines]
    assert len(tokens) >= 12 and all(each[-1:] == [6 * 4 * 8] for each in tokens)


def test_models_are_saved_for_the_auto_classes(finished):
    folder, rows = finished
    story = (folder / "story.txt").read_text()
    for arm in ("swiglu", "mlp", *ARMS):
        rate = next(row["learning_rate"] for row in rows if row["arm"] == arm)
        path = folder / "out" / "story" / arm / "equal-params" / f"lr{rate:g}-seed0"
        model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(path / "model"), tf.AutoTokenizer.from_pretrained(path / "model")
        assert any(isinstance(module, KANFeedForward) for module in model.modules()) == (arm in ARMS)
        ids = tokenizer(story[-400:], return_tensors="pt")["input_ids"]
        assert tokenizer.decode(ids[0]) == story[-400:] and ids.shape[1] == 400
        assert tokenizer.pad_token is None and tokenizer.eos_token_id == model.config.eos_token_id == 0
        again = tf.AutoModelForCausalLM.from_pretrained(path / "model")
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids[:, :8]).logits, again(input_ids=ids[:, :8]).logits)


def test_the_report_is_written_for_reading_for_machines_and_for_the_docs(finished):
    folder, rows = finished
    base, docs = folder / "out" / "story", folder / "docs"
    text = (base / "report.md").read_text()
    for phrase in ("equal parameters, equal steps, against swiglu", "equal training time, against mlp", "gated_kan_bspline", "tried by every arm: 0.001, 0.01"):
        assert phrase in text
    assert (base / "report.png").read_bytes()[:4] == b"\x89PNG" == (docs / "pretraining-story.png").read_bytes()[:4]
    for path in (base / "report.csv", docs / "pretraining-story.csv"):
        read = list(csv.DictReader(path.read_text().splitlines()))
        assert [row["arm"] for row in read] == [row["arm"] for row in rows] and float(read[0]["ce"]) == rows[0]["ce"]
    every = list(csv.DictReader((base / "runs.csv").read_text().splitlines()))
    assert len(every) == len(results(folder)) and all(row["error"] == "" for row in every)


def test_a_finished_grid_runs_nothing_and_reports_the_same(finished, here, capsys):
    folder, rows = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("all_results.json")}
    for more in ({}, {"report_only": True}):
        assert pretrain(settings(folder, arms=ARMS, **more)) == rows
    assert here == [] and before == {path: path.stat().st_mtime_ns for path in before}
    assert "equal parameters, equal steps, against swiglu" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"max_steps": 7}, r"max_steps=6, expected max_steps=7"),
        ({"weight_decay": 0.2}, r"weight_decay=0.1"),
        ({"function_learning_rate_ratio": 2.0}, "spline_learning_rate="),
        ({"mlp_width": 88, "arms": ["kan_full"]}, "width="),
        ({"seeds": 3, "hidden_size": 32, "tolerance": 0.2}, "hidden_size=16"),
        ({"vocabulary": "bpe"}, "another text or vocabulary"),
    ],
)
@pytest.mark.parametrize("report_only", [False, True])
def test_finished_runs_of_other_settings_are_refused(finished, here, changes, match, report_only):
    folder, _ = finished
    with pytest.raises(ConfigError, match=match):
        pretrain(settings(folder, **{"arms": ARMS, "report_only": report_only, **changes}))
    assert here == []


def test_a_setting_that_a_later_version_has_counts_as_its_default(tmp_path, here):
    changes = {"arms": ["swiglu"], "rows": ["params"], "learning_rates": [1e-3], "seeds": 1}
    pretrain(settings(tmp_path, **changes))
    path = tmp_path / "out" / "story" / "swiglu" / "equal-params" / "lr0.001-seed0" / "run.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in found.items() if name != "kan_l1"}))
    here.clear()
    pretrain(settings(tmp_path, **changes))
    assert here == []
    for text, error in [(json.dumps({**found, "of_another_version": 1}), "of_another_version=1"), ("[", "Delete its folder")]:
        path.write_text(text)
        with pytest.raises(KanformerError, match=error):
            pretrain(settings(tmp_path, **changes))


def test_more_seeds_add_runs_only(finished, here):
    folder, _ = finished
    rows = pretrain(settings(folder, arms=["gated_kan_bspline"], rows=["params"], headline_seeds=3))
    assert sorted(name[: name.index("/")] for name in runs(here)) == ["gated_kan_bspline", "swiglu"]
    assert [row["seeds"] for row in rows] == [3, 3] and all("seed2" in name for name in runs(here))


def start(folder):
    """`scripts/pretrain.py` on a short grid, in a process of its own."""
    values = {name: value for name, value in GRID.items() if not isinstance(value, list | bool)}
    arguments = [f"--{name}={value}" for name, value in {**values, "text": folder / "story.txt", "output_dir": folder / "out", "max_steps": 40}.items()]
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *arguments, "--arms=[swiglu]", "--rows=[params]", "--learning_rates=[0.001, 0.01]"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_killed_grid_goes_on_and_ends_as_one_that_was_not_killed(tmp_path, here):
    long = {"arms": ["swiglu"], "rows": ["params"], "max_steps": 40}
    rows = pretrain(settings(tmp_path / "straight", **long))
    settings(tmp_path / "killed")
    process = start(tmp_path / "killed")
    try:
        limit = time.time() + 240
        while not results(tmp_path / "killed"):
            assert process.poll() is None, process.stderr.read()
            assert time.time() < limit
            time.sleep(0.02)
        with pytest.raises(ConfigError, match="another grid is at work"):
            pretrain(settings(tmp_path / "killed", **long))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("all_results.json")}
    time.sleep(1.2)  # the worker leaves by itself, and its run with it
    for path in set((tmp_path / "killed").rglob("all_results.json")) - set(done):
        done[path] = path.stat().st_mtime_ns
    here.clear()
    again = pretrain(settings(tmp_path / "killed", **long))
    assert len(runs(here)) == 3 - len(done) and all(path.stat().st_mtime_ns == then for path, then in done.items())
    for left, right in zip(rows, again, strict=True):
        assert {name: left[name] for name in ("arm", "ce", "learning_rate", "seeds")} == {name: right[name] for name in ("arm", "ce", "learning_rate", "seeds")}


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path, here):
    """A run that dies in its second half is trained from there, with what was learned before."""
    changes = {"arms": ["gated_kan_bspline"], "rows": ["params"], "learning_rates": [1e-2], "seeds": 1, "save_steps": 3}
    pretrain(settings(tmp_path, **changes))
    run = tmp_path / "out" / "story" / "gated_kan_bspline" / "equal-params" / "lr0.01-seed0"
    first = json.loads((run / "all_results.json").read_text())
    (run / "all_results.json").unlink()
    for path in (run / "checkpoint-6").iterdir():
        path.unlink()
    here.clear()
    pretrain(settings(tmp_path, **changes))
    second = json.loads((run / "all_results.json").read_text())
    assert runs(here) == ["gated_kan_bspline/lr0.01-seed0"] and second["steps_this_run"] == 3
    assert second["eval_loss"] == first["eval_loss"]


def test_a_diverged_run_is_counted_and_does_not_stop_the_others(tmp_path, here, capsys):
    changes = {"arms": ["swiglu"], "rows": ["params"], "learning_rates": [1e-3, 1e30], "seeds": 2}
    (row,) = pretrain(settings(tmp_path, **changes))
    assert row["failed"] == 1 and row["seeds"] == 2 and row["learning_rate"] == 1e-3
    report = (tmp_path / "out" / "story" / "report.md").read_text()
    assert "swiglu, equal params: lr1e+30 FAILED: cannot go on training" in report
    here.clear()
    pretrain(settings(tmp_path, **changes))
    assert here == []  # it would diverge again
    assert "lr1e+30-seed0: FAILED" in capsys.readouterr().out


def test_an_arm_of_which_all_trials_failed_has_no_result_and_says_so(tmp_path, here):
    (row,) = pretrain(settings(tmp_path, arms=["swiglu"], rows=["params"], learning_rates=[1e30]))
    assert row["ce"] is None and row["failed"] == 1 and row["learning_rate"] is None
    assert "FAILED" in (tmp_path / "out" / "story" / "report.md").read_text()


def test_a_worker_that_dies_is_a_failed_run_which_the_next_grid_tries_again(tmp_path, monkeypatch, here):
    changes = {"arms": ["swiglu"], "rows": ["params"], "learning_rates": [1e-3], "seeds": 1}
    do, dead = HereWorker.do, {"error": "its process ended with exit code -9", "diverged": False}
    monkeypatch.setattr(HereWorker, "do", lambda self, job, log: dead if "run" in job else do(self, job, log))
    (row,) = pretrain(settings(tmp_path, **changes))
    assert row["failed"] == 1 and row["seeds"] == 0
    monkeypatch.setattr(HereWorker, "do", do)
    (row,) = pretrain(settings(tmp_path, **changes))
    assert row["failed"] == 0 and row["seeds"] == 1


def test_a_real_worker_tells_of_errors_and_of_its_own_death(tmp_path):
    worker = Worker(threads=1)
    try:
        found = worker.do({"run": {"arm": "swiglu", "output_dir": str(tmp_path / "run"), "data_dir": str(tmp_path / "none")}}, tmp_path / "log.txt")
        assert "read the tokenized text" in found["error"] and found["diverged"] is False and "Traceback" in (tmp_path / "log.txt").read_text()
        assert worker.process is not None
        worker.process.kill()
        worker.process.wait()
        assert worker.do({"time": {}, "data": "", "widths": {}}, tmp_path / "log.txt")["error"].startswith(
            ("TypeError", "IndexError", "cannot read")
        )  # a new one
    finally:
        worker.stop()


def test_one_seed_has_no_interval_and_the_report_says_so(tmp_path, here):
    rows = pretrain(settings(tmp_path, arms=["gated_kan_rational"], rows=["params"], learning_rates=[1e-2], seeds=1))
    row = rows[1]
    assert row["ce"] is not None and row["ce_difference"] is not None
    assert row["ce_half_interval"] is row["ce_difference_half_interval"] is None and row["reading"] == "one seed, no interval"
    report = (tmp_path / "out" / "story" / "report.md").read_text()
    assert "gated_kan_rational, equal params: one seed only, so no interval." in report and "one learning rate only was tried" in report


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, here, capsys):
    assert pretrain(settings(tmp_path, dry_run=True)) == []
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists() and here == []
    for phrase in ("kan_full", "equal params", "equal flops", "FLOP/token", "learning rates 0.001, 0.01", "192 tokens per run", "reused"):
        assert phrase in text


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"arms": ["kan_fool"]}, ConfigError, "kan_full"),
        ({"rows": ["params", "money"]}, ConfigError, "params, flops, time"),
        ({"learning_rates": []}, ConfigError, "a list of numbers"),
        ({"learning_rates": [0.0]}, ConfigError, "a list of numbers"),
        ({"learning_rates": ["fast"]}, ConfigError, "a list of numbers"),
        ({"output_dir": ""}, ConfigError, "--output_dir"),
        ({"text": ""}, DataError, "--text FILE"),
        ({"max_length": 5000}, DataError, "block of 5000"),
        ({"report_only": True}, ConfigError, "no grid there"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path, here, changes, error, match):
    with pytest.raises(error, match=match) as caught:
        pretrain(settings(tmp_path, **changes))
    assert isinstance(caught.value, KanformerError) and here == []
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.7, 1.71, 1.69, 1.75], [3.0, 3.0, 3.0]])
def test_intervals_against_scipy(values):
    mean, half = mean_interval(values)
    scale = stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=statistics.fmean(values), scale=scale) if scale else (mean, mean)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)


def test_nothing_and_one_value_have_no_interval():
    assert mean_interval([]) == (None, None) and mean_interval([2.5]) == (2.5, None)


def test_a_step_time_ratio_compares_within_rounds():
    """A machine that is slow for a while slows both of a round: the ratio stays."""
    noise = [1, 1, 9, 1, 5, 3, 1]
    found = ratios({"base": [10.0 * n for n in noise], "arm": [12.5 * n for n in noise]}, "base")
    assert found["arm"]["ratio"] == pytest.approx(1.25) and found["base"]["ratio"] == 1 and found["base"]["ms"] == 10


def test_one_thread_is_timed_by_its_own_time_and_several_by_the_wall_clock(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step_clock(1) is time.process_time and step_clock(2) is time.perf_counter
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert step_clock(1) is time.perf_counter


def test_a_page_gets_the_tables_between_its_marks_only(tmp_path):
    page = tmp_path / "pretraining.md"
    page.write_text("a\n<!-- begin pretraining x -->\nold\n<!-- end pretraining x -->\nb\n<!-- begin pretraining y -->\n<!-- end pretraining y -->\n")
    assert put_in_page(page, "x", "new \\1\n") and not put_in_page(page, "z", "new") and not put_in_page(tmp_path / "none.md", "x", "new")
    assert page.read_text().startswith("a\n<!-- begin pretraining x -->\nnew \\1\n<!-- end pretraining x -->\nb\n<!-- begin")


def test_the_command_is_there_and_its_script(tmp_path):
    help_text = subprocess.run([sys.executable, "-m", "kanformer.cli", "pretrain", "--help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--headline_seeds" in help_text and "--tolerance" in help_text
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "pretrain.py"), "--arm", "mlp"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and "unknown key 'arm'" in done.stderr


@pytest.mark.parametrize("name", ["char", "bpe"])
def test_the_configs_of_the_project_match_all_arms_within_a_percent(tmp_path, capsys, name):
    path = write_story(tmp_path / "story.txt", 4000)
    grid_module.main(["--config", str(ROOT / "configs" / f"pretrain_{name}.yaml"), "--text", path, "--dry_run"])
    text = capsys.readouterr().out
    lines = {tuple(line.split()[1:4]): line.split() for line in text.splitlines() if line.startswith(("llama", "gpt2"))}
    for (arm, _, row), cells in lines.items():
        parameters, flops = float(cells[6]), float(cells[9])
        assert abs((parameters if row == "params" else flops) - 1) < 0.01, (arm, row)
    assert {arm for arm, _, _ in lines} == set(ALL_ARMS) and "d=128" in text


def test_the_commands_of_the_docs_page_can_be_run():
    page = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
    commands = [line.split() for line in page.splitlines() if line.startswith("    python ")]
    assert len(commands) == 2
    for _, script, *words in commands:
        assert (ROOT / script).is_file()
        words[1] = str(ROOT / words[1])
        found = parse_arguments(PretrainArguments, words, "pretrain", "")
        assert f"<!-- begin pretraining {Path(found.text).stem} -->" in page and f"(pretraining-{Path(found.text).stem}.png)" in page
