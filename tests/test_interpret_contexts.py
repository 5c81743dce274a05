"""Contexts, the direct logit effect, tables and files, the memory plan, and several processes."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kanformer
from interpret_cases import texts, tiny
from kanformer.errors import CheckpointError, ConfigError
from kanformer.interpret import Faithfulness, load_stats, logit_effect, plan_collection
from kanformer.interpret.blocks import find_blocks
from kanformer.interpret.collecting.contexts import ContextRecorder, _ascending, _value
from kanformer.interpret.scoring.table import Scores, first_places

TESTS = Path(__file__).parent


def read_by(model, module, batches) -> list[torch.Tensor]:
    """What arrives at a module, (sequences, length, channels) per batch."""
    found = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return found


@pytest.mark.parametrize("edges", ["full", "shared"])
@pytest.mark.parametrize("skip", [False, True])
def test_contexts_are_those_of_a_naive_pass(edges, skip):
    model, batches = tiny("gpt2", torch.float32, edges=edges, grid_size=3), texts()
    stats = kanformer.collect(model, batches, contexts=4, scores=(), skip_first_token=skip)
    for path, block in find_blocks(model).items():
        for name, found in stats[path].contexts.items():
            rows, places = [], []
            for number, (x, batch) in enumerate(zip(read_by(model, getattr(block, name), batches), batches, strict=True)):
                for row in range(4):
                    for offset in range(1 if skip else 0, int(batch["attention_mask"][row].sum())):
                        rows.append(x[row, offset])
                        places.append((number, row, offset))
            x = torch.stack(rows)
            assert found.values.shape == (x.shape[1], 12, 4) and found.bins == 10 and found.sampled == len(x)
            for channel in (0, 5):
                order = x[:, channel].argsort(descending=True)
                assert torch.equal(found.values[channel, 0], x[order[:4], channel])
                assert torch.equal(found.values[channel, 1], x[order.flip(0)[:4], channel])
                for slot in (0, 1, 4, 11):
                    for record in found.records(channel, slot):
                        number, row, offset = *divmod(record["sequence"], 4), record["offset"]
                        ids, length = batches[number]["input_ids"][row], int(batches[number]["attention_mask"][row].sum())
                        assert record["ids"] == ids[max(0, offset - 8) : min(length, offset + 9)].tolist() and record["ids"][record["index"]] == int(
                            ids[offset]
                        )
                        assert record["value"] == float(x[places.index((number, row, offset)), channel])
                        if slot > 1:
                            assert found.edges[channel, slot - 2] <= record["value"] <= found.edges[channel, slot - 1]


def test_contexts_do_not_depend_on_batches_and_their_order():
    model, batches = tiny("gpt2", torch.float64, edges="shared", grid_size=3), texts()
    single = [{key: value[row : row + 1] for key, value in batch.items()} for batch in batches for row in range(4)][::-1]
    one, two = (kanformer.collect(model, each, contexts=3, scores=()) for each in (batches, single))
    for path in one:
        a, b = one[path].contexts["kan_functions"], two[path].contexts["kan_functions"]
        torch.testing.assert_close(a.values, b.values, equal_nan=True, rtol=1e-6, atol=1e-6)
        for channel in range(12):
            for slot in range(12):
                assert [r["ids"] for r in a.records(channel, slot)] == [r["ids"] for r in b.records(channel, slot)]


def test_ties_are_ordered_by_content():
    recorders = [ContextRecorder(2, 3), ContextRecorder(2, 3)]
    values, priority = torch.ones(50, 2), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for recorder, order in zip(recorders, (torch.arange(50), torch.arange(50).flip(0)), strict=True):
        for part in order.split(7):
            recorder.add(values[part], part, priority[part])
    found = [recorder.finish(torch.arange(50, dtype=torch.int32), torch.tensor([0, 50])) for recorder in recorders]
    assert torch.equal(found[0].tokens, found[1].tokens) and torch.equal(found[0].tokens[0, 0], priority.argsort(descending=True)[:3])


def test_order_of_floats():
    values = torch.tensor([-torch.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, torch.inf])
    ordered = _ascending(values)
    assert torch.equal(ordered.sort().values, ordered) and torch.equal(_value(ordered), values + 0.0)


def test_decoded_contexts():
    model = tiny("gpt2", torch.float32, edges="shared", grid_size=3)
    stats = kanformer.collect(model, texts(), contexts=2)
    record = stats.layer(0).contexts["kan_functions"].records(3, 0, decode=lambda ids: " ".join(map(str, ids)), around=2)[0]
    assert record["token"] == str(record["ids"][record["index"]]) and record["before"].split() == [str(i) for i in record["ids"][: record["index"]]]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logit_effect_is_that_of_the_model_with_cached_norm(kind):
    model, batches = tiny(kind, edges="full", grid_size=2), texts()
    norm = model.transformer.ln_f if kind == "gpt2" else model.model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
    found, note = logit_effect(model, batches, count=5)
    assert note == "" and found is not None and found.norm == ("layer" if kind == "gpt2" else "rms") and found.factor == pytest.approx(1, abs=1e-6)
    residual = torch.cat([x[batch["attention_mask"] != 0] for x, batch in zip(read_by(model, norm, batches), batches, strict=True)])
    eps = norm.eps if kind == "gpt2" else norm.variance_epsilon
    centred = residual - residual.mean(1, keepdim=True) if kind == "gpt2" else residual
    scale = (centred.square().mean(1) + eps).sqrt()
    assert found.scale == pytest.approx(float((1 / scale).mean()), rel=1e-6) and found.tokens == len(residual)

    def logits(x):  # the head behind the norm at the scale that was cached
        x = x - x.mean(1, keepdim=True) if kind == "gpt2" else x
        y = x / scale.unsqueeze(1) * norm.weight + (norm.bias if kind == "gpt2" else 0)
        return model.get_output_embeddings()(y)

    with torch.no_grad():
        for channel in (0, 3, 7):
            moved = (logits(residual + torch.eye(8, dtype=torch.float64)[channel]) - logits(residual)).mean(0)
            torch.testing.assert_close(found.top_values[channel], moved.topk(5).values.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.bottom_values[channel], moved.topk(5, largest=False).values.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(moved[found.top[channel]].float(), found.top_values[channel], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "reason"), [("bert", "no head"), ("bert-mlm", "output of a norm|residual stream")])
def test_no_logit_effect_is_said(kind, reason):
    import re

    found, note = logit_effect(tiny(kind, edges="shared", grid_size=2), texts())
    assert found is None and re.search(reason, note)
    stats = kanformer.collect(tiny(kind, edges="shared", grid_size=2), iter(texts()), logits=2)
    assert stats.logits is None and stats.logits_note


def test_tables(tmp_path):
    model, batches = tiny("gpt2", edges="full", grid_size=2), texts()
    stats = kanformer.collect(model, batches, scores="all")
    everything = torch.cat([one.values["effect"].flatten() for layer in stats.values() for one in layer.scores.values()])
    stats.header = Faithfulness(2.0, 4.0, 1.0, loss_name="a loss", data="random", tokens=7)
    found = stats.top(7)
    assert found.by == "effect" and found.columns["effect"] == everything.sort(descending=True).values[:7].tolist() and found.total == len(everything)
    assert found.remainder == pytest.approx(float(everything.sum()) - sum(found.columns["effect"]), abs=1e-12)
    row = next(iter(found))
    assert stats[row["layer"]].scores[row["map"]].values["share"][row["output"], row["input"]] == row["share"]
    assert "the other" in str(found) and len(stats.layer(-1).top(3, by="std", map="kan_up")) == 3
    read = list(csv.DictReader(io.StringIO(found.to_csv(tmp_path / "a.csv"))))
    assert float(read[3]["effect"]) == found.columns["effect"][3] and (tmp_path / "a.csv").read_text() == found.to_csv()
    content = json.loads(found.to_json(tmp_path / "a.json"))
    assert (content["schema"], content["version"], content["by"]) == ("kanformer.scores", 2, "effect") and content["rows"][2] == list(list(found)[2].values())
    assert content["header"] == stats.header.to_dict() and content["header"]["recovered"] == {"patched": pytest.approx(2 / 3)}
    assert json.loads(stats.layer(0).top(1).to_json())["header"] is None
    parquet = pytest.importorskip("pyarrow.parquet")
    found.to_parquet(tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column("effect").to_pylist() == found.columns["effect"] and table.schema.metadata[b"version"] == b"2"
    assert json.loads(table.schema.metadata[b"header"]) == content["header"] and [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(CheckpointError, match="write a file"):
        found.to_parquet(tmp_path / "none" / "a.parquet")
    assert sum(len(part) for part in stats.layer(0).scores["kan_up"].rows(step=10)) == 96
    for options in ({"n": 0}, {"by": "efect"}, {"functions": True}):
        with pytest.raises(ConfigError):
            stats.top(**{"n": 2, **options})
    with pytest.raises(ConfigError, match="kan_up"):
        stats.layer(0).top(map="kan_upp")


def test_first_places_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 5, 40):
        values = torch.randint(0, 5, (40,), generator=generator).double()
        assert torch.equal(first_places(values, n), values.argsort(descending=True, stable=True)[:n])
    assert first_places(torch.tensor([torch.nan, 1.0, 2.0]), 3).tolist() == [2, 1, 0]
    assert len(Scores("", "", "edge")) == 0


@pytest.mark.parametrize(("kind", "edges"), [("gpt2", "full"), ("llama", "shared")])
def test_saved_statistics_come_back_to_the_bit(tmp_path, kind, edges):
    model, batches = tiny(kind, edges=edges, grid_size=2), texts()
    stats = kanformer.collect(model, batches, scores="all", contexts=2, logits=3, name="random")
    stats.header = Faithfulness(2.0, 4.0, snapped=3.0)
    stats.save(tmp_path / "stats")
    again = load_stats(tmp_path / "stats")
    assert list(again) == list(stats) and again.data == stats.data and again.model == stats.model and again.header == stats.header
    assert_same(dict(stats), dict(again))
    assert_same(stats.logits, again.logits)
    assert {file.name for file in (tmp_path / "stats").iterdir()} == {"stats.json", "stats.safetensors", "complete.json"}
    stats.save(tmp_path / "stats")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="no folder of statistics"):
        stats.save(tmp_path / "other")
    old = json.loads((tmp_path / "stats" / "stats.json").read_text()) | {"version": 1}
    del old["header"]
    (tmp_path / "stats" / "stats.json").write_text(json.dumps(old))
    assert load_stats(tmp_path / "stats").header is None
    for damage in ('{"schema": "kanformer.stats", "version": 9}', "{", '{"schema": "kanformer.stats", "version": 1}'):
        (tmp_path / "stats" / "stats.json").write_text(damage)
        with pytest.raises(CheckpointError, match="load the statistics"):
            load_stats(tmp_path / "stats")
    with pytest.raises(CheckpointError):
        load_stats(tmp_path / "nowhere")


def assert_same(one, two) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_same(one[key], two[key])
    elif hasattr(one, "__dataclass_fields__"):
        assert type(one) is type(two)
        assert_same(vars(one), vars(two))
    else:
        assert one == two


def test_the_memory_plan():
    model = tiny("gpt2", torch.float32, edges="full", grid_size=2)
    plan = plan_collection(find_blocks(model), ["std", "effect"], 0, None, 2**30)
    assert plan.edges == 4 * 96 and [one.map for one in plan.maps] == ["kan_up", "kan_down"] * 2
    assert plan.maps[0].passing >= 96 * 4 * 3 and plan.maps[0].kept >= 96 * 4 * 2
    assert "384 edges" in str(plan) and "GiB of 1.00 GiB" in str(plan)
    plan.check()
    with pytest.raises(ConfigError, match="384 edges, which need"):
        plan_collection(find_blocks(model), ["std", "effect"], 0, None, 100).check()
    assert plan_collection(find_blocks(model), ["std"], 0, None, None).available


def test_the_first_edges_only_in_turns():
    model, batches = tiny("gpt2", edges="full", grid_size=2), texts()
    whole = kanformer.collect(model, batches, scores="all")
    passes = []
    one_block = max(
        plan_collection({path: block}, list(whole.layer(0).scores["kan_up"].values), 0, None, None).bytes for path, block in find_blocks(model).items()
    )
    kept = sum(one.kept for one in plan_collection(find_blocks(model), list(whole.layer(0).scores["kan_up"].values), 0, 7, None).maps)
    limit = int(1.2 * one_block) + kept
    some = kanformer.collect(model, batches, scores="all", top=7, max_memory=limit, progress=passes.append)
    assert len(passes) == 2 * len(batches) and list(some) == list(whole)
    assert some.top(7).columns == whole.top(7).columns
    assert some.top(7).total == whole.top(7).total and some.top(7).remainder == pytest.approx(whole.top(7).remainder, abs=1e-12)
    assert len(some.layer(0).scores["kan_up"]) == 7
    with pytest.raises(ConfigError, match="2 passes"):
        kanformer.collect(model, iter(batches), scores="all", top=7, max_memory=limit)
    with pytest.raises(ConfigError, match="rank by"):
        kanformer.collect(model, batches, scores=("share",), top=7)
    with pytest.raises(ConfigError, match="edges, which need"):
        kanformer.collect(model, batches, scores="all", top=7, max_memory=1000)


PROCESS = """
import datetime, sys, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import kanformer
from interpret_cases import texts, tiny
folder, rank = sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120))
batches = texts()[:2] if rank == 0 else texts()[2:]
for kind, edges in (("gpt2", "full"), ("mixtral", "shared")):
    kanformer.collect(tiny(kind, edges=edges, grid_size=3), batches, scores="all", contexts=2, logits=2).save(f"{folder}/{kind}-{rank}")
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Path:
    """What two processes saved."""
    folder = tmp_path_factory.mktemp("two")
    children = [subprocess.Popen([sys.executable, "-c", PROCESS, str(TESTS), str(folder), str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for child in children:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors
    return folder


@pytest.mark.parametrize(("kind", "edges"), [("gpt2", "full"), ("mixtral", "shared")])
def test_two_processes_are_one(processes, kind, edges):
    one, two = (load_stats(processes / f"{kind}-{rank}") for rank in (0, 1))
    assert_same(dict(one), dict(two))
    assert_same(one.logits, two.logits)
    whole = kanformer.collect(tiny(kind, edges=edges, grid_size=3), texts(), scores="all", contexts=2, logits=2)
    assert one.data.tokens == whole.data.tokens and one.data.loss == pytest.approx(whole.data.loss, rel=1e-12)
    for path, layer in whole.items():
        for name, scores in layer.scores.items():
            for score, value in scores.values.items():
                loose = {"rtol": 1e-6, "atol": 1e-9} if score not in ("l1", "range") or edges == "shared" else {"rtol": 0.2, "atol": 0.05}
                torch.testing.assert_close(one[path].scores[name].values[score], value, **loose, msg=lambda text, score=score: f"{score}: {text}")
        for name, scores in layer.functions.items():
            for score, value in scores.values.items():
                torch.testing.assert_close(one[path].functions[name].values[score], value, rtol=1e-6, atol=1e-9)
        for name, contexts in layer.contexts.items():
            torch.testing.assert_close(one[path].contexts[name].values, contexts.values, rtol=1e-6, atol=1e-6, equal_nan=True)
            assert [r["ids"] for r in one[path].contexts[name].records(0, 0)] == [r["ids"] for r in contexts.records(0, 0)]


def test_the_calls_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    code = (TESTS.parent / "docs" / "interpretation.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    model, original = tiny("gpt2", edges="full", grid_size=2), tiny("gpt2", edges="full", grid_size=2)
    kanformer.unpatch_model(original)
    exec(code.replace("k=50, random=50", "k=3, random=3"), {"kanformer": kanformer, "model": model, "original": original, "batches": texts(1)})
    assert (tmp_path / "truth.png").stat().st_size > 1000 and (tmp_path / "stats" / "stats.json").exists()
    assert "next token: original" in capsys.readouterr().out
