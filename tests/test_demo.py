"""The whole demo on tiny models: its stages, its files, its errors."""

from __future__ import annotations

import json

import pytest
import torch

from kanformer.cli import main
from kanformer.surgery.saving.loading import load_model
from model_cases import blocks
from training_cases import checkpoint, write_text


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_demo_runs_end_to_end_on_a_users_model_and_text(name, tmp_path, capfd):
    model, out = checkpoint(tmp_path / "model", name), tmp_path / "out"
    text = write_text(tmp_path / "text.txt", count=200)
    main(["demo", "--model", model, "--text", text, "--out", str(out), "--steps", "3", "--held_out", "8", "--batch_size", "4", "--max_length", "16"])
    shown = capfd.readouterr().out
    results = json.loads((out / "demo.json").read_text())
    assert results["exact_max_difference"] == 0.0 and results["reload_bit_equal"] is True
    assert "outputs differ by at most 0.0" in shown
    for arm in ("KAN", "MLP control"):
        assert 0.3 < results[arm]["parameters"]["parameters_ratio"] <= 0.5
        assert -1 <= results[arm]["before"]["held_out"] <= 1.0001 and results[arm]["distillation"]["steps"] == 3
        assert ("perplexity" in results[arm]["after"]) == (name == "llama")
    assert {path.name for path in (out / "figures").iterdir()} >= {"layer_00.png", "layer_01.png", "overview.png", "functions.csv"}
    loaded = load_model(str(out / "model"))
    assert len(blocks(loaded)) == 2 and all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps"),
        (["--param_ratio", "0"], "param_ratio"),
        (["--param_ratio", "1.5"], "param_ratio"),
        (["--model", "{tmp}/nothing"], "no such folder"),
        (["--model", "{patched}"], "patched already"),
        (["--model", "{model}", "--text", "{tmp}/no.txt"], "no.txt"),
        (["--model", "{model}", "--text", "{empty}"], "empty"),
        (["--model", "{model}", "--text", "{latin}"], "UTF-8"),
        (["--model", "{model}", "--text", "{short}"], "at least 20"),
        (["--model", "{model}", "--out", "{busy}"], "no demo wrote"),
        (["--seeds", "3"], "seed"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    names = {"tmp": tmp_path, "model": checkpoint(tmp_path / "model"), "patched": checkpoint(tmp_path / "patched", patch={})}
    for name, content in {"empty": b"\n\n", "latin": "caf\xe9".encode("latin-1") * 9, "short": b"one\ntwo\n"}.items():
        names[name] = tmp_path / f"{name}.txt"
        names[name].write_bytes(content)
    names["busy"] = tmp_path / "busy"
    names["busy"].mkdir()
    (names["busy"] / "thesis.tex").write_text("mine")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(out), *[word.format(**names) for word in arguments]])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert error[-1].startswith("error:") and message in error[-1] and len([line for line in error if line.startswith("error:")]) == 1
    assert not out.exists() and (names["busy"] / "thesis.tex").read_text() == "mine"
