"""Whole studies of tiny models: what they measure, what they share, what they repeat, and what they do with a run that fails."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kanformer.errors import ConfigError, KanformerError, TrainingDiverged
from kanformer.layers import KANFeedForward
from kanformer.layers.grids import GridModule
from kanformer.study.linear import load_maps
from kanformer.study.measure import measure
from kanformer.study.run import study
from kanformer.surgery.calibrating.calibrate import calibrate
from kanformer.surgery.calibrating.files import load_calibration
from kanformer.surgery.compare import compare
from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.saving.loading import load_model
from kanformer.training.data import pad, read_lines
from study_cases import DISTILL, curve, results, run_in_process, run_study, settings
from training_cases import tokenizer, write_text

ALL = ["kan", "mlp", "random_mlp", "linear"]


def report(arguments) -> str:
    return (Path(arguments.output_dir) / "report.md").read_text()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_method_is_measured_on_both_corpora_at_equal_tokens(name, tmp_path, monkeypatch, capsys):
    started = run_in_process(monkeypatch)
    arguments = settings(tmp_path, name, methods=ALL, ratios=[1.0, 0.5], goals={0.5: 0.985}, docs_dir=str(tmp_path / "docs"))
    found = run_study(arguments)
    assert set(found) == set(started) and len(started) == 11  # exact kan and mlp, linear, and 2 seeds of kan, mlp and twice random_mlp
    primary = "embedding_cosine" if name == "bert" else "ce"
    for run, result in found.items():
        assert [corpus["name"] for corpus in result["corpora"]] == ["training corpus", "second corpus"]
        for corpus in result["corpora"]:
            rows = corpus["rows"]
            assert corpus["texts"] == 20 and set(rows) == {"teacher", "patched", "without_functions", "zero_ablation", "mean_ablation"}
            exact = run in ("kan-r1", "mlp-r1")
            assert (rows["patched"][primary] == pytest.approx(rows["teacher"][primary], abs=1e-6)) == exact
            assert (rows["patched"]["explained_variance"] == pytest.approx(1, abs=1e-6)) == exact and len(corpus["layers"]) == 2
            if name == "llama":
                assert {"ce", "perplexity", "bits_per_byte", "kl", "top1_agreement", "recovered_zero", "recovered_mean"} <= rows["patched"].keys()
    tokens = {(run.rpartition("-s")[2], result["tokens"]) for run, result in found.items() if "tokens" in result}
    assert len(tokens) == 2 and all(result["steps"] == 4 for result in found.values() if "steps" in result)
    text, table = report(arguments), csv.DictReader((tmp_path / "study" / "results.csv").read_text().splitlines())
    assert "KAN minus pruned MLP" in text and "switched off" in text and "Runs without a result" not in text and text.count("exact start") == 4
    assert {(row["method"], row["seed"]) for row in table} >= {("kan", ""), ("kan", "1"), ("linear", "")}
    assert (tmp_path / "docs" / "study.md").read_text().startswith("# study\n") and (tmp_path / "docs" / "study.csv").is_file()
    assert (tmp_path / "docs" / "study.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert f"11/11 random_mlp-r0.5-s1: {primary}" in shown and text.splitlines()[-1] in shown


def test_the_order_of_the_texts_is_that_of_the_seed_in_every_method(tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    arguments = settings(tmp_path, methods=["kan", "mlp", "random_mlp"], distill={**DISTILL, "max_steps": 8})
    found = run_study(arguments)
    read = {run: [line["tokens"] for line in curve(arguments, run) if "tokens" in line] for run in found}
    for seed in (0, 1):
        kan, mlp, random = (read[f"{method}-r0.5-s{seed}"] for method in ("kan", "mlp", "random_mlp"))
        assert kan == mlp == random and len(kan) == 8
    assert read["kan-r0.5-s0"] != read["kan-r0.5-s1"]
    plan = json.loads((tmp_path / "study" / "study.json").read_text())
    assert plan["tokens"] == {"0": read["kan-r0.5-s0"][-1], "1": read["kan-r0.5-s1"][-1]}


def test_the_kept_models_have_the_numbers_and_parameters_that_the_report_shows(tmp_path, monkeypatch):
    """The cosine of embeddings with and without learned functions, text by text."""
    run_in_process(monkeypatch)
    arguments = settings(tmp_path, seeds=1, ratios=[0.75], distill={**DISTILL, "max_steps": 12, "spline_learning_rate": 0.3})
    result = run_study(arguments)["kan-r0.75-s0"]
    folder = tmp_path / "study" / "runs" / "kan-r0.75-s0"
    model, original, words = load_model(str(folder / "model")), load_model(arguments.teacher_name_or_path), tokenizer()

    @torch.no_grad()
    def cosine() -> float:
        rows = [torch.tensor([words(text)["input_ids"][:16]]) for text in read_lines(tmp_path / "validation.txt")]
        pairs = [[each(input_ids=ids).last_hidden_state[0].double().mean(0) for each in (model, original)] for ids in rows]
        return float(torch.stack([F.cosine_similarity(*pair, dim=0) for pair in pairs]).mean())

    rows = result["corpora"][0]["rows"]
    assert rows["patched"]["embedding_cosine"] == pytest.approx(cosine(), abs=1e-5)
    for module in model.modules():
        if isinstance(module, GridModule):
            module.kan_coef.data.zero_()
    assert rows["without_functions"]["embedding_cosine"] == pytest.approx(cosine(), abs=1e-5)
    assert abs(rows["without_functions"]["embedding_cosine"] - rows["patched"]["embedding_cosine"]) > 1e-4
    assert compare(model).to_dict()["feed_forward"]["kan_parameters"] == result["parameters"]
    assert sorted(path.name for path in folder.iterdir()) == ["model", "result.json", "run.json", "stage-0"] and not list(folder.glob("stage-0/checkpoint-*"))


def test_the_linear_control_explains_its_share_of_every_block(tmp_path, monkeypatch):
    """On the text that it was fitted on, the explained variance is the linear share that calibrating tells."""
    run_in_process(monkeypatch)
    arguments = settings(tmp_path, methods=["linear"])
    result = run_study(arguments)["linear-r0.5"]
    shared = tmp_path / "study" / "shared"
    assert not (shared / "calibration").exists() and result["parameters"] == 2 * (32 * 32 + 32) and "tokens" not in result
    places = {"teacher": arguments.teacher_name_or_path, "max_length": 16, "attn_implementation": None, "corpora": [("fitted", "", shared / "train.txt")]}
    model = patch_model(load_model(arguments.teacher_name_or_path), edges="mlp")
    found = measure(model, places, load_maps(shared / "linear-r0.5.safetensors"))["corpora"][0]["layers"]
    batch = pad([ids[:16] for ids in tokenizer()(read_lines(shared / "train.txt"))["input_ids"]], 0)
    seen = calibrate(load_model(arguments.teacher_name_or_path), [batch], gram=False)
    shares = [block.linear_share for block in seen.blocks()]
    assert [row["patched"] for row in found.values()] == pytest.approx(shares, abs=1e-4) and all(0.3 < share < 0.999 for share in shares)


def test_calibration_and_pruned_starts_are_made_once_for_all_seeds(tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    arguments = settings(tmp_path, ratios=[0.75, 0.5])
    run_study(arguments)
    shared = tmp_path / "study" / "shared"
    assert {path.name for path in shared.iterdir() if path.is_dir()} == {"calibration", "kan-r0.75", "mlp-r0.75", "kan-r0.5", "mlp-r0.5"}
    assert not (shared / "teacher-states.bin").exists() and load_calibration(shared / "calibration").gram
    kinds = {path.name: {module.edges for module in load_model(str(path)).modules() if isinstance(module, KANFeedForward)} for path in shared.glob("*-r*/")}
    assert kinds == {name: {"shared" if name.startswith("kan") else "mlp"} for name in kinds}


def test_several_stages_run_one_after_the_other(tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    second = {**DISTILL, "max_steps": 2, "local_weight": 1.0, "hidden_weight": 0.0}
    arguments = settings(tmp_path, seeds=1, distill=[DISTILL, second], keep_models=False)
    result = run_study(arguments)["kan-r0.5-s0"]
    first, last = result["stages"]
    assert (first["steps"], last["steps"], result["steps"]) == (4, 2, 6) and result["tokens"] == first["tokens"] + last["tokens"]
    assert last["start_fvu"] == first["eval_fvu"] != last["eval_fvu"]
    assert not list((tmp_path / "study" / "runs").glob("*/model")) and "4 steps of 4 texts, then 2 steps of 4 texts" in report(arguments)


def test_finished_runs_stand_and_the_grid_may_grow(tmp_path, monkeypatch, capsys):
    started = run_in_process(monkeypatch)
    arguments = settings(tmp_path, seeds=1)
    first = run_study(arguments)
    assert run_study(arguments) == first and started == ["kan-r0.5-s0", "mlp-r0.5-s0"]
    assert "2 of 2 runs are finished" in capsys.readouterr().out and "One seed: there is no interval" in report(arguments)
    assert "one pair: no interval" in report(arguments) and "±" not in report(arguments).replace("± is", "")
    more = run_study(dataclasses.replace(arguments, seeds=2, ratios=[0.75, 0.5]))
    assert len(started) == 8 and {name: more[name] for name in first} == first and "±" in report(arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distill": {**DISTILL, "max_steps": 5}}, "max_steps: 4 then, 5 now"),
        ({"kan": {"grid_size": 4}}, "grid_size: 3 then, 4 now"),
        ({"max_length": 12}, "max_length: 16 then, 12 now"),
        ({"calibration_samples": 10}, "calibration_samples: 1024 then, 10 now"),
        ({"max_train_samples": 40}, "texts: "),
    ],
)
def test_other_settings_are_refused_before_anything_changes(change, message, tmp_path, monkeypatch):
    started = run_in_process(monkeypatch)
    arguments = settings(tmp_path, methods=["kan"], seeds=1)
    run_study(arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*") if path.name != ".lock"}
    with pytest.raises(ConfigError, match="other settings than those of this run") as caught:
        study(dataclasses.replace(arguments, **change))
    assert message in str(caught.value) and len(started) == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*") if path.name != ".lock"} == before


def test_runs_of_a_version_without_some_setting_stand(tmp_path, monkeypatch):
    started = run_in_process(monkeypatch)
    arguments = settings(tmp_path, methods=["kan"], seeds=1)
    run_study(arguments)
    for name in ("run.json", "result.json"):
        path = tmp_path / "study" / "runs" / "kan-r0.5-s0" / name
        values = json.loads(path.read_text())
        assert values["settings"]["stages"][0].pop("kan_smoothness") == 0.0
        path.write_text(json.dumps(values))
    run_study(arguments)
    assert len(started) == 1
    with pytest.raises(ConfigError, match=r"kan_smoothness: 0.0 then, 1.0 now"):
        study(dataclasses.replace(arguments, distill={**DISTILL, "kan_smoothness": 1.0}))


def test_failed_runs_are_shown_and_repeated_and_stop_no_other(tmp_path, monkeypatch, capsys):
    broken = {"kan-r0.5-s0": TrainingDiverged("go on training", got="loss nan in step 3"), "mlp-r0.5-s1": ConfigError("run", got="no luck")}

    def fail(folder):
        if folder.name in broken:
            raise broken[folder.name]

    started = run_in_process(monkeypatch, fail)
    arguments = settings(tmp_path, goals={0.5: 0.985, 0.25: 0.9})
    with pytest.raises(KanformerError, match=r"2 of 4 runs that failed: kan-r0.5-s0, mlp-r0.5-s1"):
        study(arguments)
    text = report(arguments)
    assert set(results(arguments)) == {"mlp-r0.5-s0", "kan-r0.5-s1"} and text.count("1 of 2 (failed)") == 4
    assert "| kan-r0.5-s0 | diverged: cannot go on training: got loss nan in step 3 |" in text and "| mlp-r0.5-s1 | failed: cannot run: got no luck |" in text
    assert "KAN minus pruned MLP" not in text and "| 0.25 | >= 0.9 | - | not run |" in text  # no seed has both
    assert "kan-r0.5-s0: diverged: cannot go on training" in capsys.readouterr().out
    broken.clear()
    assert len(run_study(arguments)) == 4 and started[4:] == ["kan-r0.5-s0", "mlp-r0.5-s1"]
    assert "failed" not in report(arguments)


def test_report_only_reads_what_is_there_and_runs_nothing(tmp_path, monkeypatch, capsys):
    started = run_in_process(monkeypatch)
    arguments = settings(tmp_path, seeds=1)
    run_study(arguments)
    (tmp_path / "study" / "runs" / "mlp-r0.5-s0" / "result.json").unlink()
    capsys.readouterr()
    study(dataclasses.replace(arguments, report_only=True, teacher_name_or_path="/nowhere"))
    assert "| mlp-r0.5-s0 | not run yet |" in capsys.readouterr().out and len(started) == 2


def test_two_studies_do_not_write_into_one_folder(tmp_path, monkeypatch):
    import fcntl

    arguments = settings(tmp_path)
    (tmp_path / "study").mkdir()
    with open(tmp_path / "study" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another study is at work"):
            study(arguments)
    assert not (tmp_path / "study" / "runs").exists()


def test_texts_that_were_trained_on_are_not_measured_on(tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    arguments = settings(tmp_path, methods=["linear"], text_column="text")
    held = Path(arguments.validation_file)
    held.write_text(held.read_text() + Path(arguments.train_file).read_text())
    assert run_study(arguments)["linear-r0.5"]["corpora"][0]["texts"] == 20


def test_texts_of_several_lines_stay_one_text(tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    lines = [json.dumps({"story": f"bad kuf\nmilo {text}"}) for text in read_lines(write_text(tmp_path / "some.txt", 90, seed=4))]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    arguments = settings(tmp_path, methods=["linear"], text_column="story")
    (tmp_path / "second.jsonl").write_text("\n".join(lines).replace("bad", "mid"))
    files = {"train_file": str(tmp_path / "train.jsonl"), "second_file": str(tmp_path / "second.jsonl")}
    result = run_study(dataclasses.replace(arguments, **files, validation_file=None, validation_split_percentage=20))["linear-r0.5"]
    assert [corpus["texts"] for corpus in result["corpora"]] == [18, 90] and (tmp_path / "study" / "shared" / "train.jsonl").is_file()
