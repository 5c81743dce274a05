"""A study whose processes are real: killed at any moment, it goes on and ends with the same numbers."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from kanformer.cli import main
from kanformer.training.arguments import to_yaml
from study_cases import DISTILL, curve, results, settings
from training_cases import ROOT


def start(config: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "kanformer.cli", "study", "--config", str(config)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(found, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not found():
        assert time.time() < end
        time.sleep(0.02)


def numbers(arguments) -> dict:
    """The results without what depends on the clock and on where a run went on."""
    clock = ("seconds", "train_seconds", "steps_this_run", "stages")
    return {name: {key: value for key, value in result.items() if key not in clock} for name, result in results(arguments).items()}


def test_a_study_that_is_killed_goes_on_to_the_numbers_of_one_that_is_not(tmp_path, capsys):
    slow = {**DISTILL, "max_steps": 30, "save_steps": 5}
    arguments = settings(tmp_path, methods=["kan"], seeds=1, workers=1, distill=slow, max_eval_samples=8)
    (tmp_path / "study.yaml").write_text(to_yaml(arguments))
    run = tmp_path / "study" / "runs" / "kan-r0.5-s0"
    killed = start(tmp_path / "study.yaml")
    try:
        wait_for(lambda: list(run.glob("stage-0/checkpoint-*/complete.json")))
        children = psutil.Process(killed.pid).children()
        assert children
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    wait_for(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
    assert not (run / "result.json").exists()
    main(["study", "--config", str(tmp_path / "study.yaml"), "--docs_dir", str(tmp_path / "docs")])
    assert "0 of 1 runs are finished" in capsys.readouterr().out
    assert results(arguments)["kan-r0.5-s0"]["stages"][0]["steps_this_run"] < 30
    straight = dataclasses.replace(arguments, output_dir=str(tmp_path / "straight"))
    (tmp_path / "straight.yaml").write_text(to_yaml(straight))
    main(["study", "--config", str(tmp_path / "straight.yaml")])
    assert numbers(straight) == numbers(arguments) and curve(straight, run.name) == curve(arguments, run.name)


def test_a_run_whose_process_dies_is_shown_as_failed(tmp_path, capsys, monkeypatch):
    """The teacher's folder is taken away under the running study, so that its processes find none."""
    from kanformer.study import prepare

    arguments = settings(tmp_path, methods=["kan", "mlp"], ratios=[1.0], seeds=1)
    (tmp_path / "study.yaml").write_text(to_yaml(arguments))
    whole = prepare.Shared.prepare

    def and_lose(self, runs):
        files = whole(self, runs)
        (Path(arguments.teacher_name_or_path) / "config.json").unlink()
        return files

    monkeypatch.setattr(prepare.Shared, "prepare", and_lose)
    try:
        main(["study", "--config", str(tmp_path / "study.yaml")])
    except SystemExit as leaving:
        assert leaving.code == 2
    report = (tmp_path / "study" / "report.md").read_text()
    assert report.count("failed: cannot load the model") == 2 and "2 of 2 runs that failed" in capsys.readouterr().err
