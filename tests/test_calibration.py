"""Saved calibrations: bit-equal, damaged, cut off in the middle, of mixtures; the numbers of each block against numpy and by hand."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import kanformer
from kanformer.cli import main
from kanformer.conversion.affine import AffineMoments
from kanformer.conversion.packing import pack_upper, to_tensors, unpack_upper
from kanformer.errors import CheckpointError, ConfigError
from kanformer.surgery import folders
from kanformer.surgery.calibrating import files as calibration_files
from kanformer.surgery.calibrating import run_state as calibration_run
from model_cases import BY_NAME, blocks, same_state, snapshot
from training_cases import checkpoint, python, write_text

BERT = BY_NAME["bert"]
PRUNE = {"init": "prune", "param_ratio": 0.6}


def batches(count=3):
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        ids = torch.randint(3, 99, (4, 16), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, 11:] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def mixture():
    torch.manual_seed(0)
    small: Any = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 20}
    return tf.AutoModelForCausalLM.from_config(tf.MixtralConfig(**small, num_local_experts=4)).eval()


def same(left, right):
    """Whether two calibrations hold the same bits."""
    tensors = [{path: to_tensors(seen) for path, seen in each.statistics.items()} for each in (left, right)]
    equal = all(
        tensors[0][path].keys() == tensors[1][path].keys() and all(torch.equal(tensor, tensors[1][path][name]) for name, tensor in tensors[0][path].items())
        for path in tensors[0]
    )
    facts = [(list(each.statistics), each.forms, each.importance, each.curves, each.gram, each.to_dict()) for each in (left, right)]
    return equal and facts[0] == facts[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A calibration in memory and its folder."""
    found = kanformer.calibrate(BERT.build(), batches(), importance_batches=2)
    folder = tmp_path_factory.mktemp("saved") / "calibration"
    found.save(folder)
    return found, folder


@pytest.mark.parametrize("build", [BERT.build, BY_NAME["llama"].build, mixture], ids=["bert", "llama", "mixture"])
def test_a_saved_calibration_patches_to_the_same_bits(build, tmp_path):
    found = kanformer.calibrate(build(), batches(), importance_batches=1)
    found.save(tmp_path / "calibration")
    loaded = kanformer.load_calibration(tmp_path / "calibration")
    assert same(found, loaded) and not list(tmp_path.glob(".*"))
    models = [kanformer.patch_model(build(), calibration=each, **PRUNE) for each in (found, loaded)]
    assert same_state(*map(snapshot, models)) and blocks(models[0])
    direct = kanformer.patch_model(build(), calibration=batches(), **PRUNE)
    assert same_state(snapshot(direct), snapshot(models[0]))


def test_the_folder_says_what_it_is_of(saved):
    found, folder = saved
    info = json.loads((folder / "calibration.json").read_text())
    assert (info["model_class"], info["version"]) == ("BertForMaskedLM", 1) and "base_model" in info
    block = info["blocks"][1]
    assert block["path"] == "bert.encoder.layer.1.intermediate" and block["tokens"] == 3 * (16 + 3 * 11)
    assert block["form"] == {"in_features": 32, "hidden_features": 48, "gated": False, "up_bias": True, "down_bias": True, "other_parameters": 0}
    assert block["parameters"] == 32 * 48 * 2 + 48 + 32 and block["linear_share"] == found.blocks()[1].linear_share
    assert (folder / block["file"]).stat().st_size < 8 * (48 * 49 // 2 + 33 * 65) + 1024 * (32 + 2 * 48) + 3 * 5056 + 8192


def test_triangles_come_back():
    matrix = torch.randn(7, 7, dtype=torch.float64)
    assert torch.equal(unpack_upper(pack_upper(matrix), 7), matrix.triu()) and pack_upper(matrix).shape == (28,)


def _cut(folder):
    file = folder / "block-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _flip(folder):
    file = folder / "block-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)


def _swap(folder):
    first, second = folder / "block-00000.safetensors", folder / "block-00001.safetensors"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _edit(**changes):
    def edit(folder):
        path = folder / "calibration.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _edit_block(**changes):
    def edit(folder):
        values = json.loads((folder / "calibration.json").read_text())
        values["blocks"][0].update(changes)
        (folder / "calibration.json").write_text(json.dumps(values))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "another checksum"),
        (_flip, "another checksum"),
        (_swap, "another checksum"),
        (lambda folder: (folder / "block-00000.safetensors").unlink(), "No such file"),
        (lambda folder: (folder / "calibration.json").unlink(), "wrote"),
        (lambda folder: (folder / "calibration.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "calibration.json").write_text("[]"), "something else"),
        (_edit(format="other"), "something else"),
        (_edit(version=2), "Install a newer kanformer"),
        (_edit(extra=1), "has not the keys"),
        (_edit(gram="yes"), "other types"),
        (_edit(blocks=[{}]), "has not the keys"),
        (_edit_block(tokens=5), "not of the block"),
        (_edit_block(form={"in_features": 3}), "TypeError"),
        (_edit_block(curve={"widths": ["x"], "errors": [], "variance": 1}), "ValueError"),
        (_edit_block(file="../../../etc/passwd"), "No such file"),
    ],
)
def test_damaged_and_foreign_files_are_named(saved, tmp_path, damage, message):
    folder = tmp_path / "calibration"
    shutil.copytree(saved[1], folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        kanformer.load_calibration(folder)


def test_no_folder_and_another_model_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        kanformer.load_calibration(tmp_path / "none")
    loaded = kanformer.load_calibration(saved[1])
    for other in (BY_NAME["llama"].build(), tf.BertForMaskedLM(tf.BertConfig(**{**BERT.values, "intermediate_size": 40}))):
        before = snapshot(other)
        with pytest.raises(ConfigError, match="no statistics of this block"):
            kanformer.patch_model(other, calibration=loaded, **PRUNE)
        assert same_state(before, snapshot(other))


# The numbers.


def _seen(model, path_in, path_out):
    """The unmasked rows that go into one module and come out of another, in float64."""
    rows = {"in": [], "out": []}
    modules = dict(model.named_modules())
    hooks = [modules[path_in].register_forward_pre_hook(lambda module, args: rows["in"].append(args[0]))]
    hooks.append(modules[path_out].register_forward_hook(lambda module, args, out: rows["out"].append(out)))
    masks = []
    with torch.no_grad():
        for batch in batches():
            model(**batch)
            masks.append(batch["attention_mask"].bool())
    for hook in hooks:
        hook.remove()
    return [torch.cat([x[mask] for x, mask in zip(rows[kind], masks, strict=True)]).double().numpy() for kind in ("in", "out")]


def test_the_linear_share_is_that_of_least_squares(saved):
    for number, block in enumerate(saved[0].blocks()):
        x, y = _seen(BERT.build(), f"bert.encoder.layer.{number}.intermediate.dense", f"bert.encoder.layer.{number}.output.dense")
        design = np.concatenate([np.ones((len(x), 1)), x], 1)
        solution = np.linalg.lstsq(design, y, rcond=1e-5)[0]  # behind a LayerNorm one direction is rounding only, and fits a row by chance
        share = 1 - ((y - design @ solution) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert block.linear_share == pytest.approx(share, abs=1e-7) and 0.5 < share < 0.999999


def test_the_linear_share_of_an_affine_map_is_one_and_of_noise_small():
    x = torch.randn(4000, 6, dtype=torch.float64)
    x[:, 1], x[:, 2] = x[:, 0], 3.0  # a repeated channel and a constant one
    for y, expected in ((x @ torch.randn(6, 4, dtype=torch.float64) + 100, 1.0), (torch.randn(4000, 4, dtype=torch.float64), 0.0)):
        moments = AffineMoments(6, 4)
        moments.update(x[:1500], y[:1500])
        moments.update(x[1500:], y[1500:])
        explained, total = moments.explained()
        assert explained / total == pytest.approx(expected, abs=4e-3) and (expected == 0.0 or explained / total > 1 - 1e-8)


def test_importance_by_hand(saved):
    model: Any = BERT.build()
    down = model.bert.encoder.layer[1].output.dense
    two = list(batches())[:2]
    masks = [batch["attention_mask"].bool() for batch in two]
    seen = []
    with torch.no_grad():
        hook = down.register_forward_hook(lambda module, args, out: seen.append(out))
        before = torch.cat([model.bert(**batch).last_hidden_state[mask] for batch, mask in zip(two, masks, strict=True)]).double()
        hook.remove()
        mean = torch.cat([out[mask] for out, mask in zip(seen, masks, strict=True)]).double().mean(0).float()
        down.weight.zero_()
        down.bias.copy_(mean)
        after = torch.cat([model.bert(**batch).last_hidden_state[mask] for batch, mask in zip(two, masks, strict=True)]).double()
    expected = float((after - before).norm() / before.norm())
    assert saved[0].importance["bert.encoder.layer.1.intermediate"] == pytest.approx(expected, rel=1e-5) and expected > 1e-3


def test_calibrating_leaves_the_model_as_it_was():
    model = BERT.build().train()
    before, hooks = snapshot(model), [copy.copy(module._forward_hooks) for module in model.modules()]
    kanformer.calibrate(model, batches(), importance_batches=1)
    assert same_state(before, snapshot(model)) and model.training and hooks == [module._forward_hooks for module in model.modules()]


def test_what_was_not_asked_for_is_not_there(tmp_path):
    found = kanformer.calibrate(BERT.build(), batches(), gram=False, linear=False)
    found.save(tmp_path / "small")
    loaded = kanformer.load_calibration(tmp_path / "small")
    assert same(found, loaded) and all(block.linear_share is None and block.importance is None for block in loaded.blocks())
    with pytest.raises(ConfigError, match="without Gram matrices"):
        kanformer.patch_model(BERT.build(), calibration=loaded, **PRUNE)
    line = str(loaded).splitlines()[3].split()
    assert line[0] == "bert.encoder.layer.0.intermediate" and line[-3:-1] == ["-", "-"]


# The command, cut off and gone on with.


@pytest.fixture
def job(tmp_path):
    """A model, a text and the words of a command that calibrates in 10 batches, with a state after every third."""
    model, text = checkpoint(tmp_path / "bert"), write_text(tmp_path / "text.txt")
    words = ["calibrate", model, "--text", text, "--max_length", "16", "--batch_size", "4", "--importance_batches", "2", "--save_steps", "3"]
    return SimpleNamespace(model=model, words=words, tmp=tmp_path)


def _killed(words, place, name, number):
    """Runs the command in a child that kills itself (kill -9) when `place.name` is called for the `number`-th time."""
    child = os.fork()
    if child == 0:
        original, calls = getattr(place, name), []

        def deadly(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(place, name, deadly)
        try:
            main(words)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("place", "name", "number", "after"),
    [
        (calibration_run.Run, "after_batch", 5, 3),  # between two states
        (folders, "_sync", 3, 3),  # while the second state is written
        (folders.os, "rename", 3, 3),  # between the two renames that put it in its place
        (calibration_run.Run, "after_block", 2, 10),  # in the midst of the importances
        (calibration_files.json, "dumps", 1, 0),  # before the first state is there
    ],
    ids=["between", "writing", "renaming", "importance", "first"],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(job, capsys, place, name, number, after):
    main([*job.words, "--out", str(job.tmp / "whole")])
    assert _killed([*job.words, "--out", str(job.tmp / "cut")], place, name, number) == -signal.SIGKILL
    assert not (job.tmp / "cut").exists()
    capsys.readouterr()
    main([*job.words, "--out", str(job.tmp / "cut"), "--resume"])
    assert (f"went on after batch {after}" in capsys.readouterr().out) == (after > 0)
    whole, cut = (kanformer.load_calibration(job.tmp / which) for which in ("whole", "cut"))
    assert same(whole, cut) and not list(job.tmp.glob(".*"))
    for file in (job.tmp / "whole").iterdir():
        assert file.read_bytes() == (job.tmp / "cut" / file.name).read_bytes(), file.name


def test_a_state_of_something_else_is_refused(job, capsys):
    words = [*job.words, "--out", str(job.tmp / "cut")]
    assert _killed(words, calibration_run.Run, "after_batch", 5) == -signal.SIGKILL
    with pytest.raises(CheckpointError, match=r"not finished.*--resume"):
        kanformer.load_calibration(job.tmp / ".cut.running")
    with pytest.raises(SystemExit):
        main([*words, "--resume", "--max_length", "12"])
    assert "the state of other data, settings or another model" in capsys.readouterr().err
    main(words)  # without --resume it starts again
    assert "went on" not in capsys.readouterr().out and (job.tmp / "cut").is_dir() and not list(job.tmp.glob(".*"))


def test_the_command_prints_a_table_or_json_and_patch_takes_the_folder(job, capsys):
    out = job.tmp / "calibration"
    main([*job.words, "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == kanformer.load_calibration(out).to_dict() and printed["base_model"] == job.model
    main([*job.words, "--out", str(out), "--resume"])
    assert "linear share" in (text := capsys.readouterr().out) and "complete already" in text
    for name, extra in {"uniform": [], "importance": ["--param_ratios", "importance"]}.items():
        kan = ["--kan.init", "prune", "--kan.param_ratio", "0.5", "--kan.edges", "mlp"]
        main(["patch", job.model, "--out", str(job.tmp / name), "--calibration", str(out), *kan, *extra])
    models = {name: tf.AutoModelForMaskedLM.from_pretrained(job.tmp / name) for name in ("uniform", "importance")}
    ratios = {name: kanformer.compare(model).to_dict()["feed_forward"]["parameters_ratio"] for name, model in models.items()}
    assert all(0.45 < ratio <= 0.5 for ratio in ratios.values())
    reference = kanformer.patch_model(BERT.build(), calibration=kanformer.load_calibration(out), init="prune", param_ratio=0.5, edges="mlp")
    assert [block.hidden_features for block in blocks(models["uniform"]).values()] == [block.hidden_features for block in blocks(reference).values()]


def test_a_yaml_file_drives_it(job, capsys):
    import yaml

    settings = {"model": job.model, "text": job.words[3], "out": str(job.tmp / "calibration"), "max_length": 16, "importance_batches": 0}
    (job.tmp / "job.yaml").write_text(yaml.safe_dump(settings))
    main(["calibrate", "--config", str(job.tmp / "job.yaml"), "--calibration_samples", "5"])
    assert "saved:" in capsys.readouterr().out and not kanformer.load_calibration(job.tmp / "calibration").importance


def test_the_script_lists_its_settings_without_loading_torch():
    code = "import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_path('scripts/calibrate.py', run_name='__main__')\nexcept SystemExit: pass\n"
    done = python("-c", code + "print('torch' in sys.modules)")
    assert done.returncode == 0 and "--importance_batches" in done.stdout and done.stdout.splitlines()[-1] == "False", done.stderr


TWO = """
import os, sys, torch, transformers as tf
import kanformer
from torch import distributed as dist
from test_calibration import BERT, batches
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
own = list(batches())[:2] if rank == 0 else list(batches())[2:]
kanformer.calibrate(BERT.build(), own, importance_batches=2).save(sys.argv[3] + sys.argv[1])
"""


def test_two_processes_find_what_one_finds(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    words = [["-c", TWO, str(rank), str(tmp_path / "meeting"), str(tmp_path / "of")] for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda each: python(*each), words))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr[-1500:] + done[1].stderr[-1500:]
    one = kanformer.calibrate(BERT.build(), batches(), importance_batches=3).blocks()
    both = [kanformer.load_calibration(tmp_path / f"of{rank}").blocks() for rank in range(2)]
    assert both[0] == both[1]
    for block, other in zip(one, both[0], strict=True):
        assert block.tokens == other.tokens and (block.linear_share, block.importance) == pytest.approx((other.linear_share, other.importance), rel=1e-6)
