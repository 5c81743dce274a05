"""The command line: what each short command prints and writes, and one line with exit code 2 for bad input."""

from __future__ import annotations

import json

import pytest

from kanformer import __version__
from kanformer.cli import main
from kanformer.interpret import load_stats
from kanformer.surgery.saving.loading import load_model
from model_cases import blocks, disturb
from training_cases import checkpoint, python, write_text


@pytest.fixture
def places(tmp_path):
    """Folders and files by name, `{name}` in the command lines below."""
    found = {"tmp": tmp_path, "bert": checkpoint(tmp_path / "bert"), "kan": checkpoint(tmp_path / "kan", patch={"init": "exact"})}
    found["cut"] = checkpoint(tmp_path / "cut", patch={"init": "exact"})
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    found["text"] = write_text(tmp_path / "text.txt")
    for name, content in {"empty": b"\n", "latin": "schön".encode("latin-1")}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
        found[name] = tmp_path / f"{name}.txt"
    return found


def refused(words: list[str], capfd, code: int = 2) -> str:
    """The one line that a refused command line leaves on stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main(words)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "it/s]" not in line and "?it/s" not in line]
    assert leaving.value.code == code and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("polt {kan}", "unknown command 'polt'. Did you mean 'plot'"),
        ("compare {kan} --jsn", "unknown key 'jsn'. Did you mean 'json'"),
        ("compare", "no model"),
        ("compare {bert}", "not patched"),
        ("compare {tmp}/none", "no such folder"),
        ("compare {tmp}", "no config.json there"),
        ("compare {cut}", "bytes that is damaged or cut short"),
        ("plot {bert} --out {tmp}/new --text {text} --max_length 16", "no KANFeedForward in it"),
        ("plot {kan} --out {tmp}/new --text {empty} --max_length 16", "an empty file"),
        ("plot {kan} --out {tmp}/new --text {latin} --max_length 16", "not UTF-8 at position 3"),
        ("plot {kan} --out {tmp}/new --text {text} --max_length 65", "with 64 positions. Set --max_length 64 or less"),
        ("plot {kan} --out {tmp}/new --format pgn", "Did you mean 'png'"),
        ("plot {kan} --out {text} --text {text} --max_length 16", "cannot make a folder"),
        ("symbolic {bert} --out {tmp}/new --text {text} --max_length 16", "no KANFeedForward in it"),
        ("symbolic {kan} --out {tmp}/new --text {text} --max_length 16 --library tahn", "Did you mean 'tanh'"),
        ("symbolic {kan} --out {tmp}/new --text {text} --max_length 16 --layer 7", "layer=7"),
        ("symbolic {kan} --out {tmp}/new --loss_budget 0.1", "Add --snap"),
        ("diff {kan}", "no other"),
        ("diff {kan} --other {bert} --text {text} --max_length 16 --out {tmp}/new", "no KANFeedForward in it"),
        ("prune {kan}", "no out"),
        ("prune {kan} --out {kan}", "a path that is in use"),
        ("prune {bert} --out {tmp}/new --text {text} --max_length 16", "no KANFeedForward in it"),
        ("prune {kan} --out {tmp}/new --text {text} --max_length 16 --keep 2", "keep=2.0, expected a share"),
        ("prune {kan} --out {tmp}/new --text {text} --max_length 16 --keep 0.5 --sparsity 0.5", "one of keep, sparsity, loss_budget"),
        ("symbolic {kan} --out {tmp}/new --text {text} --max_length 16 --format xls", "got format='xls'"),
        ("scores {bert} --out {tmp}/new --text {text} --max_length 16", "no KANFeedForward in it"),
        ("scores {kan} --out {tmp}/new --text {text} --max_length 16 --scores efect", "Did you mean 'effect'"),
        ("scores {kan} --out {tmp}/new --text {text} --max_length 16 --scores std --by sens", "by='sens'"),
        ("scores {kan} --out {tmp}/new --text {text} --max_length 16 --format csb", "Did you mean 'csv'"),
        ("scores {kan} --out {tmp}/new --text {text} --max_length 16 --original {kan}", "as it was before patching"),
        ("scores {kan} --out {text} --text {text} --max_length 16", "got a file"),
        ("patch {bert}", "no out"),
        ("patch {bert} --out {kan}", "a path that is in use"),
        ("patch {bert} --out {text}", "a path that is in use"),
        ("patch {kan} --out {tmp}/new", "patched already"),
        ("patch {bert} --out {tmp}/new --kan.inti exact", "unknown key 'inti'. Did you mean 'init'"),
        ("patch {bert} --out {tmp}/new --kan.init prune --kan.param_ratio 0", "param_ratio=0"),
        ("patch {bert} --out {tmp}/new --kan.init prune --kan.param_ratio 0.5", "no calibration data"),
        ("patch {bert} --out {tmp}/new --kan.init prune --kan.param_ratio 0.5 --text {empty} --max_length 16", "an empty file"),
        ("patch {bert} --out {text}/new --max_length 16", "Not a directory"),
        ("patch {bert} --out {tmp}/new --calibration {tmp}/none", "cannot read the calibration"),
        ("patch {bert} --out {tmp}/new --calibration {bert}", "A calibration is a folder"),
        ("patch {bert} --out {tmp}/new --calibration {bert} --text {text}", "got calibration and text"),
        ("patch {bert} --out {tmp}/new --param_ratios importance", "got no calibration"),
        ("patch {bert} --out {tmp}/new --param_ratios even", "one of uniform, importance"),
        ("calibrate {bert} --out {tmp}/new", "no text"),
        ("calibrate {bert} --text {text}", "no out"),
        ("calibrate {bert} --text {empty} --out {tmp}/new", "an empty file"),
        ("calibrate {bert} --text {text} --out {kan} --max_length 16", "a path that is in use"),
        ("calibrate {kan} --text {text} --out {tmp}/new --max_length 16", "patched already"),
        ("calibrate {bert} --text {text} --out {tmp}/new --max_length 65", "with 64 positions"),
        ("calibrate {bert} --text {text} --out {tmp}/new --save_step 3", "Did you mean 'save_steps'"),
        ("calibrate {bert} --text {text} --out {text}/new --max_length 16", "cannot write the checkpoint"),
        ("distill --teacher_name_or_path {bert} --model_name_or_path {bert} --train_file {text} --output_dir {tmp}/new --max_length 16", "not patched"),
        ("distill --teacher_name_or_path {bert} --train_file {empty} --output_dir {tmp}/new", "an empty file"),
        ("distill --teacher_name_or_path {bert} --train_file {latin} --output_dir {tmp}/new", "not UTF-8"),
        ("distill --teacher_name_or_path {bert} --train_file {text} --output_dir {text}", "no folder that can be written to"),
        ("finetune --model_name_or_path {cut} --task masked_lm --train_file {text} --output_dir {tmp}/new", "damaged or cut short"),
        ("finetune --model_name_or_path {kan} --task mlm --train_file {text} --output_dir {tmp}/new", "Did you mean 'masked_lm'"),
        ("finetune --model_name_or_path {kan} --train_file {text} --output_dir {tmp}/new --seed 5000000000", "<= 4294967295"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(places, line, message, capfd):
    before = {path: path.stat().st_mtime_ns for path in places["tmp"].rglob("*")}
    assert message in refused([word.format(**places) for word in line.split()], capfd)
    assert {path: path.stat().st_mtime_ns for path in places["tmp"].rglob("*")} == before


def test_a_real_process_ends_with_code_2_and_no_traceback(places):
    done = python("-m", "kanformer.cli", "compare", str(places["tmp"] / "none"))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("error: cannot load the model")


def test_overview_and_version(capsys):
    main([])
    overview = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == overview
    assert all(f"  {name} " in overview for name in ("calibrate", "patch", "compare", "distill", "finetune", "plot", "demo"))
    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_patch_saves_a_model_with_its_tokenizer(places, capsys):
    out, before = places["tmp"] / "new", load_model(str(places["bert"]))
    main(["patch", places["bert"], "--out", str(out), "--kan.edges", "full", "--kan.grid_size", "3"])
    assert f"saved: {out}" in capsys.readouterr().out and (out / "tokenizer.json").is_file() and not list(places["tmp"].glob(".*"))
    model = load_model(str(out))
    assert [block.edges for block in blocks(model).values()] == ["full", "full"]
    assert model.config.vocab_size == before.config.vocab_size


def test_patch_takes_several_configs(places, capsys):
    out = places["tmp"] / "new"
    main(
        [
            "patch",
            places["bert"],
            "--out",
            str(out),
            "--kan",
            "[{edges: full, layers_to_transform: 0-0}, {basis: rbf, towers: encoder}]",
            "--kan.grid_size",
            "3",
        ]
    )
    first, second = blocks(load_model(str(out))).values()
    assert (first.edges, second.edges) == ("full", "shared") and second.kan_functions.basis.grid_size == first.kan_up.basis.grid_size == 3


def test_patch_can_prune_on_text(places, capsys):
    out = places["tmp"] / "new"
    main(["patch", places["bert"], "--out", str(out), "--text", places["text"], "--max_length", "16", "--kan.init", "prune", "--kan.param_ratio", "0.5"])
    assert all(block.hidden_features < 48 for block in blocks(load_model(str(out))).values())


def test_a_dry_run_prints_the_plan_and_writes_nothing(places, capsys):
    main(["patch", places["bert"], "--out", str(places["tmp"] / "new"), "--dry_run"])
    assert "2 feed-forward blocks" in capsys.readouterr().out and not (places["tmp"] / "new").exists()


def test_compare_prints_a_table_or_json(places, capsys):
    main(["compare", places["kan"]])
    assert "whole model:" in capsys.readouterr().out
    main(["compare", places["kan"], "--json"])
    assert json.loads(capsys.readouterr().out)["feed_forward"]["parameters_ratio"] > 1


def test_symbolic_prints_outcomes_and_writes_the_tables_and_a_snapped_model(places, capsys):
    out = places["tmp"] / "formulas"
    line = ["symbolic", places["kan"], "--out", str(out), "--text", places["text"], "--max_length", "16", "--top", "5", "--layer", "0,1"]
    main([*line, "--snap", "--loss_budget", "0.001", "--format", "csv,json,parquet", "--rank", "effect", "--original", places["bert"]])
    said = capsys.readouterr().out
    assert "original" in said and "formulas.csv, formulas.json, formulas.parquet" in said
    assert "unsnappable" in said and "trial" not in said and f"saved: {out / 'model'}" in said
    found = json.loads((out / "formulas.json").read_text())
    assert (found["schema"], found["version"], [len(one["functions"]) for one in found["maps"]]) == ("kanformer.symbolic", 2, [5, 5])
    header = found["header"]
    assert (
        header["data"] == "text.txt"
        and header["original"] == pytest.approx(header["patched"], abs=1e-6)
        and header["snapped"] is not None
        and {one["score_name"] for one in found["maps"]} == {"effect"}
    )
    assert (out / "formulas.parquet").read_bytes().startswith(b"PAR1")
    assert len((out / "formulas.csv").read_text().splitlines()) == 11
    held: list = [block.kan_functions.kan_formulas for block in blocks(load_model(str(out / "model"))).values()]
    assert [len(formulas) for formulas in held] == [5, 5]


def test_scores_prints_the_header_and_writes_tables_statistics_and_the_truth(places, capsys):
    out = places["tmp"] / "scores"
    line = ["scores", places["kan"], "--out", str(out), "--text", places["text"], "--texts", "4", "--max_length", "16", "--original", places["bert"]]
    main([*line, "--truth", "2", "--top", "7", "--format", "csv,json,parquet"])
    said = capsys.readouterr().out
    assert "all ablated" in said and "Spearman of effect" in said and "the other" in said
    names = {f"{name}.{kind}" for name in ("scores", "functions") for kind in ("csv", "json", "parquet")}
    assert {path.name for path in out.iterdir()} == {*names, "stats", "truth.png"}
    stats = load_stats(out / "stats")
    assert stats.header is not None and stats.header.data == "text.txt" and str(stats.header) in said
    assert stats.header.original == pytest.approx(stats.header.patched, abs=1e-6) and stats.header.sequences == 4
    found = json.loads((out / "scores.json").read_text())
    assert found["header"] == stats.header.to_dict() and found["rows"] == json.loads(stats.top(7).to_json())["rows"]
    assert len((out / "functions.csv").read_text().splitlines()) == 8 and (out / "truth.png").read_bytes().startswith(b"\x89PNG")
    main([*line, "--scores", "std,share", "--by", "share", "--layer", "1", "--keep", "9", "--contexts", "0", "--logits", "0"])
    part = load_stats(out / "stats")
    assert len(part) == 1 and len(part.top(99).columns["layer"]) == 9 and part.header == stats.header


def test_plot_writes_a_figure_per_layer_and_the_table(places, capsys):
    out = places["tmp"] / "figures"
    main(["plot", places["kan"], "--out", str(out), "--text", places["text"], "--max_length", "16", "--top", "4"])
    names = {path.name for path in out.iterdir()}
    assert names >= {"layer_00.png", "layer_01.png", "functions.csv"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png")) and f"files in {out}" in capsys.readouterr().out


def test_prune_shows_the_curve_and_saves_smaller_models(places, capsys):
    line = ["prune", places["kan"], "--text", places["text"], "--max_length", "16"]
    main([*line, "--dry_run", "--out", str(places["tmp"] / "curve")])
    assert "change of the loss" in capsys.readouterr().out and {path.name for path in (places["tmp"] / "curve").iterdir()} == {
        "curve.csv",
        "curve.json",
        "curve.png",
    }
    main([*line, "--out", str(places["tmp"] / "edges"), "--loss_budget", "0.5"])
    assert "taken out" in capsys.readouterr().out
    assert all(block.kan_down.kan_mask is not None for block in blocks(load_model(str(places["tmp"] / "edges"))).values())
    main([*line, "--out", str(places["tmp"] / "neurons"), "--what", "neurons", "--sparsity", "0.5"])
    sizes = [(places["tmp"] / name / "model.safetensors").stat().st_size for name in ("kan", "neurons")]
    assert sizes[1] < sizes[0]


def test_diff_prints_how_far_the_maps_moved_and_writes_tables_and_a_figure(places, capsys):
    out = places["tmp"] / "diff"
    other = places["tmp"] / "tuned"
    disturb(load_model(places["kan"])).save_pretrained(other)
    main(["diff", places["kan"], "--other", str(other), "--out", str(out), "--text", places["text"], "--max_length", "16", "--top", "5"])
    assert "largest distance" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"functions.csv", "edges.csv", "changes.png"}
    assert len((out / "functions.csv").read_text().splitlines()) == 6


def test_the_package_runs_as_a_module(capfd):
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-m", "kanformer", "--version"], capture_output=True, text=True, check=True).stdout.strip() == __version__
