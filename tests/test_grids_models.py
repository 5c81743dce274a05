"""Grids of whole models: moved, refined, stored, checked, in one process and in two."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import kanformer
from kanformer.conversion import DenseFFN, FFNStatistics, convert
from kanformer.conversion.statistics import ChannelRange
from kanformer.errors import ConfigError, DataError, NoFeedForwardError
from kanformer.layers import EdgeFunctions
from kanformer.layers.grids import GridModule
from layer_cases import BASES
from model_cases import BY_NAME, disturb, same_state, snapshot

KINDS = {
    "bert shared": ("bert", {}),
    "bert in groups": ("bert", {"groups": 8}),
    "bert full": ("bert", {"edges": "full", "grid_size": 3}),
    "llama shared": ("llama", {}),
    "llama full": ("llama", {"edges": "full", "grid_size": 3}),
}
each_kind = pytest.mark.parametrize(("name", "settings"), KINDS.values(), ids=KINDS)


def batches(count: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """The second half of every second row is padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        mask = torch.ones(4, 20, dtype=torch.long)
        mask[::2, 10:] = 0
        found.append({"input_ids": torch.randint(3, 99, (4, 20), generator=generator), "attention_mask": mask})
    return found


def splines(model: nn.Module) -> dict[str, GridModule]:
    return {path: module for path, module in model.named_modules() if isinstance(module, GridModule)}


def inputs(model: nn.Module, data) -> dict[str, torch.Tensor]:
    """What arrives at each learned function without padding, (tokens, channels)."""
    rows: dict[str, list] = {path: [] for path in splines(model)}
    handles = [module.register_forward_pre_hook(lambda _, args, path=path: rows[path].append(args[0])) for path, module in splines(model).items()]
    with torch.no_grad():
        for batch in data:
            model(**batch)
            for seen in rows.values():
                seen[-1] = seen[-1][batch["attention_mask"].bool()]
    for handle in handles:
        handle.remove()
    return {path: torch.cat(seen) for path, seen in rows.items()}


@each_kind
def test_moving_the_grids_of_a_fresh_model_changes_no_bit_of_its_output(name, settings, tmp_path):
    case = BY_NAME[name]
    model = kanformer.patch_model(case.build(), **settings)
    before, seen = case.logits(model), inputs(model, batches())
    model.train()
    reports = kanformer.update_grids(model, batches())
    assert model.training and torch.equal(case.logits(model.eval()), before)
    assert list(reports) == list(splines(model)) and all(report.tokens == 180 and report.change == 0 for report in reports.values())
    for path, module in splines(model).items():
        rows = seen[path].double().view(180, len(module.kan_grid), -1)
        lo, hi = rows.amin((0, 2)), rows.amax((0, 2))
        spread = 4 * rows.std(0, correction=0)
        lo, hi = torch.maximum(lo, (rows.mean(0) - spread).amin(1)), torch.minimum(hi, (rows.mean(0) + spread).amax(1))
        torch.testing.assert_close(module.grid_bounds, ((lo - 0.01 * (hi - lo)).float(), (hi + 0.01 * (hi - lo)).float()), rtol=1e-4, atol=1e-5)
    _comes_back(case, disturb(model), tmp_path)


@each_kind
def test_refined_grids_keep_the_function_and_are_stored(name, settings, tmp_path):
    case = BY_NAME[name]
    model = kanformer.patch_model(case.build(), grid_range=(-30.0, 30.0), **settings)
    before = case.logits(disturb(model))
    assert max(kanformer.outside_fractions(model, case.inputs()).values()) == 0
    size, frozen = next(iter(splines(model).values())).basis.grid_size, next(iter(splines(model)))
    splines(model)[frozen].kan_coef.requires_grad_(False)
    reports = kanformer.refine_grids(model, 2 * size)
    assert all(report.change < 1e-12 for report in reports.values())
    assert (case.logits(model) - before).norm() < 1e-6 * before.norm()
    assert [path for path, module in splines(model).items() if not module.kan_coef.requires_grad] == [frozen]
    assert model.config.quantization_config["configs"][0]["grid_size"] == 2 * size
    _comes_back(case, model, tmp_path)
    assert "MLP params" in str(kanformer.compare(model))
    kanformer.unpatch_model(model)


@pytest.mark.parametrize("basis", [{}, *(options for options in BASES.values() if options.get("basis") != "rational")], ids=str)
def test_every_basis_is_updated_refined_and_stored(basis, tmp_path):
    case = BY_NAME["bert"]
    model = disturb(kanformer.patch_model(case.build(torch.bfloat16), grid_size=3, **basis))
    kanformer.update_grids(model, batches(), tolerance=None)
    kanformer.refine_grids(model, 6, tolerance=None)
    _comes_back(case, model, tmp_path, torch.bfloat16)


def _comes_back(case, model, folder, dtype=torch.float32):
    model.save_pretrained(folder)
    loaded, info = getattr(tf, case.auto_class).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and same_state(snapshot(loaded), snapshot(model))
    assert torch.equal(case.logits(loaded.eval(), dtype), case.logits(model, dtype))


def test_padding_and_the_number_of_batches_do_not_matter():
    models = [kanformer.patch_model(BY_NAME["bert"].build(), knots="free") for _ in range(3)]
    data = batches(6)
    spoiled = [{**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)} for batch in data]
    together = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
    for model, given in zip(models, (data, spoiled, together), strict=True):
        kanformer.update_grids(model, given)
    for one, two, three in zip(*(splines(model).values() for model in models), strict=True):
        torch.testing.assert_close(two.kan_grid, one.kan_grid, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(three.grid_bounds, one.grid_bounds, rtol=1e-4, atol=1e-4)
        assert (three.kan_grid - one.kan_grid).abs().max() < 0.05 * float((one.grid_bounds[1] - one.grid_bounds[0]).max())


def test_a_refusal_leaves_every_layer_as_it_was():
    model = kanformer.patch_model(BY_NAME["bert"].build())
    last = list(splines(model))[-1]
    nn.init.normal_(splines(model)[last].kan_coef)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=rf"{last}.*changes the function"):
        kanformer.update_grids(model, batches())
    assert same_state(snapshot(model), before)
    with pytest.raises(ConfigError, match="a multiple of 8, such as 16"):
        kanformer.refine_grids(model, 12)
    assert same_state(snapshot(model), before) and model.config.quantization_config["configs"][0]["grid_size"] == 8
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_misuse_is_named():
    model = kanformer.patch_model(BY_NAME["bert"].build())
    empty = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    for call in (kanformer.update_grids, kanformer.outside_fractions):
        with pytest.raises(NoFeedForwardError, match="no learned functions"):
            call(BY_NAME["bert"].build(), batches())
        with pytest.raises(DataError, match=r"intermediate.kan_functions.*got no tokens"):
            call(model, empty)
        with pytest.raises(ConfigError, match="max_tokens=0"):
            call(model, batches(), max_tokens=0)
    model.bert.embeddings.LayerNorm.weight.data[0] = torch.nan
    with pytest.raises(DataError, match=r"kan_functions.*NaN"):
        kanformer.update_grids(model, batches())
    with pytest.raises(ConfigError, match="no grid to refine"):
        kanformer.refine_grids(kanformer.patch_model(BY_NAME["bert"].build(), basis="rational"), 16)


def test_max_tokens_stops_the_pass():
    def endless():
        while True:
            yield from batches(1)

    model = kanformer.patch_model(BY_NAME["llama"].build(), grid_range=(-100.0, 100.0))
    assert all(report.tokens == 100 for report in kanformer.update_grids(model, endless(), max_tokens=100).values())


def test_values_outside_the_grids_are_counted_and_warned_of():
    model = kanformer.patch_model(BY_NAME["bert"].build(), grid_range=(-0.05, 0.05))
    seen = inputs(model, batches())
    with pytest.warns(UserWarning, match=r"intermediate.kan_functions: \d+\.\d% of the values lie outside its grid \(more than 5%\)") as caught:
        fractions = kanformer.outside_fractions(model, batches())
    assert len(caught) == len(fractions) == 2 and caught[0].filename == __file__
    for path, fraction in fractions.items():
        assert fraction == pytest.approx(float((seen[path].abs() > 0.05).double().mean())) and fraction > 0.05
    reports = kanformer.update_grids(model, batches())
    assert all(report.outside_before == pytest.approx(fractions[path]) and report.outside_after < 0.01 for path, report in reports.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max(kanformer.outside_fractions(model, batches()).values()) < 0.01


# Calibration.


def test_calibration_warns_where_its_own_grids_leave_values_out():
    dense = DenseFFN(torch.eye(4), None, torch.eye(4), None, nn.GELU(), None, None)
    x = torch.zeros(200, 4)
    x[:6], x[6:12] = 1.0, -1.0  # 6 % beyond four standard deviations
    statistics = FFNStatistics("layer 1", gram=False)
    statistics.update(dense, x)
    with pytest.warns(UserWarning, match=r"layer 1.kan_functions: 6\.0% of the values"):
        convert(dense, kanformer.KANConfig(), statistics)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics.update(dense, torch.randn(5000, 4))
        convert(dense, kanformer.KANConfig(), statistics)


def test_the_range_of_a_constant_channel_holds_its_value():
    ranges = ChannelRange()
    ranges.update(torch.tensor([[3.0, 50.0, -7.0]]).expand(20, -1))
    lo, hi = ranges.grid_range((-4.0, 4.0))
    assert (lo.tolist(), hi.tolist()) == ([-4.0, 46.0, -11.0], [4.0, 54.0, -3.0])


def test_the_sample_is_fair_and_bounded():
    ranges = ChannelRange()
    for piece in torch.arange(40_000.0).view(-1, 1).split(128):
        ranges.update(piece)
    rows = ranges.sample.rows.flatten()
    assert len(rows) == 256 == len(rows.unique()) and abs(float(rows.mean()) - 20_000) < 3 * 40_000 / 12**0.5 / 16
    assert len((rows % 128).unique()) > 90, "every position of a sequence, not one of them"


# Two processes.

_FIRST = "bert.encoder.layer.0.intermediate.kan_functions.kan_grid"

WORKER = """
import sys, datetime, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[4])
import kanformer
from kanformer.errors import DataError
from model_cases import BY_NAME, disturb
from test_grids_models import adapted, batches
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
data = batches(3, seed=0) + batches(2, seed=1)
mine = data if world == 1 else (data[:3] if rank == 0 else data[3:])  # three batches against two
states = {name: adapted(mine, **settings) for name, settings in {
    "shared": {}, "free": {"knots": "free"}, "full": {"edges": "full", "grid_size": 3}, "pruned": {"init": "prune", "param_ratio": 0.6}}.items()}
torch.save(states, f"{folder}/{world}-{rank}.pt")
if world > 1:
    model = kanformer.patch_model(BY_NAME["bert"].build())
    if rank == 1:
        model.bert.embeddings.LayerNorm.weight.data[0] = float("nan")
    for call in (kanformer.update_grids, kanformer.calibrate):
        try:
            call(model if call is kanformer.update_grids else BY_NAME["bert"].build(), mine if rank == 0 else [{}] * (call is kanformer.calibrate) or mine)
        except DataError as error:
            print(call.__name__, "|", error)
    none = kanformer.update_grids(kanformer.patch_model(BY_NAME["bert"].build()), mine if rank == 0 else [])
    print("tokens", {report.tokens for report in none.values()})
    dist.destroy_process_group()
"""


def adapted(data, **settings) -> dict[str, dict[str, torch.Tensor]]:
    """The state after calibration, after moving trained functions, and after refining them."""
    found = {}
    model = kanformer.patch_model(BY_NAME["bert"].build(), calibration=data, **settings)
    found["calibrated"] = snapshot(model)
    for module in splines(disturb(model)).values():
        lo, hi = module.grid_bounds
        module.set_grid_range(lo - 1, hi + 2)
    kanformer.update_grids(model, data, tolerance=None)
    found["updated"] = snapshot(model)
    kanformer.refine_grids(model, 2 * next(iter(splines(model).values())).basis.grid_size)
    found["refined"] = snapshot(model)
    return found


def test_two_processes_end_with_one_grid_that_of_all_the_data(tmp_path):
    words = [sys.executable, "-c", WORKER]
    runs = [
        subprocess.Popen([*words, str(rank), str(world), str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]
    said = [run.communicate(timeout=300) for run in runs]
    assert all(run.returncode == 0 for run in runs), said
    first, second, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    for name, stages in alone.items():
        for stage, one in stages.items():
            left, right = first[name][stage], second[name][stage]
            assert same_state(left, right), (name, stage)
            for key in (key for key in one if key.endswith(("kan_grid", "kan_coef"))):
                if stage != "calibrated" and (key.endswith("kan_coef") or name == "free"):  # they read the histogram, whose bins differ
                    assert (left[key] - one[key]).norm() < 0.01 * one[key].norm(), f"{name} {stage} {key}"
                else:
                    torch.testing.assert_close(left[key], one[key], rtol=1e-5, atol=1e-6, msg=f"{name} {stage} {key}")
    share = adapted(batches(3, seed=0))  # what the first process would have made of its own share
    for stage in share:
        assert not torch.allclose(share[stage][_FIRST], first["shared"][stage][_FIRST], rtol=1e-3)
    # A failure in one process is an error in both; a process without data takes part.
    assert "update_grids | cannot update the grids: got an error in 1 other process" in said[0][0] and "NaN" in said[1][0]
    assert "calibrate | cannot calibrate: got an error in 1 other process" in said[0][0]
    assert all("tokens {180}" in out for out, _ in said[:2])


def test_a_layer_of_ones_own_counts_too():
    model = nn.Sequential(nn.Linear(4, 6), EdgeFunctions(6))
    reports = kanformer.update_grids(_Named(model), [{"x": torch.randn(50, 4)}])
    assert list(reports) == ["inner.1"] and kanformer.refine_grids(model, 16)["1"].change == 0 and model[1].kan_coef.shape == (6, 19)


class _Named(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)
