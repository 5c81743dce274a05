"""Figures of a node, an input, an importance map and the layers' health show the numbers that were collected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import kanformer
from interpret_cases import texts, tiny
from kanformer.errors import ConfigError, DataError, ShapeError
from kanformer.interpret import collect, plot_health, plot_importance, plot_input, plot_node
from kanformer.interpret.curves import pick
from kanformer.interpret.differences import compare_functions
from kanformer.interpret.drawing.changes import plot_changes
from kanformer.interpret.drawing.health import dead_edges
from kanformer.interpret.heat import block_max
from kanformer.layers import EdgeFunctions, KANLinear

_KINDS = {"full": {"edges": "full", "grid_size": 3}, "shared": {"edges": "shared"}, "groups": {"edges": "shared", "groups": 4}}


@pytest.fixture(scope="module", params=[("gpt2", "full"), ("gpt2", "groups"), ("llama", "shared"), ("llama", "full")], ids="-".join)
def seen(request):
    model = tiny(request.param[0], **_KINDS[request.param[1]])
    return model, collect(model, texts(), scores="all")


def labels(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_block_maxima_keep_every_strong_edge():
    scores = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))
    heat = block_max(scores, 8, 10)
    assert heat.values.shape == (8, 9) and float(heat.values.max()) == float(scores.max())
    for row in range(8):
        for column in range(9):
            part = scores[row * heat.tall : (row + 1) * heat.tall, column * heat.wide : (column + 1) * heat.wide]
            assert heat.values[row, column] == part.max() == scores[heat.output[row, column], heat.input[row, column]]
            assert float(heat.total[row, column]) == pytest.approx(float(part.sum()), abs=1e-4)
    scores[3, 4] = torch.nan
    assert bool(block_max(scores, 37, 53).values[:3].isfinite().all())
    with pytest.raises(ShapeError, match="heat map"):
        block_max(torch.zeros(3), 2, 2)


def test_the_importance_map_shows_the_scores(seen, tmp_path):
    _, stats = seen
    figure = plot_importance(stats, 0, rows=4, columns=4)
    one = list(stats.layer(0).scores.values())[-1]
    heat = block_max(one.values["effect"], 4, 4)
    shown: Any = figure.axes[0].images[0].get_array()
    positive = heat.values > 0
    assert torch.allclose(torch.as_tensor(shown.data)[positive], heat.values[positive].to(torch.float64), rtol=1e-6)
    text = " ".join(each.get_text() for each in figure.texts)
    assert f"{one.values['effect'].numel():,} edges" in text and "effect" in text
    for kind in ("svg", "pdf"):
        figure.savefig(tmp_path / f"figure.{kind}")


def test_a_node_shows_its_shares_and_what_is_left(seen):
    model, stats = seen
    name = list(stats.layer(1).scores)[-1]
    row = stats.layer(1).scores[name].values["share"][2].double()
    figure = plot_node(model, stats, 2, layer=1, top=4)
    bars = figure.axes[0].patches
    widths = [bar.get_width() for bar in bars]
    order = row.abs().argsort(descending=True, stable=True)[:4]
    assert widths[:4] == pytest.approx(row[order].tolist(), rel=1e-6) and sum(widths) == pytest.approx(1, abs=1e-6)
    assert labels(figure.axes[0])[0].startswith(f"input {int(order[0])}") and labels(figure.axes[0])[-1].startswith(f"other {len(row) - 4:,}")
    lines = [axes for axes in figure.axes[1:] if len(axes.lines) == 2]
    assert len(lines) == 4


def test_a_nodes_curve_is_what_the_edge_adds(seen):
    model, stats = seen
    name = list(stats.layer(0).scores)[-1]
    figure = plot_node(model, stats, 1, layer=0, top=1)
    channel = int(labels(figure.axes[0])[0].split()[1])
    x, y = next(axes for axes in figure.axes[1:] if len(axes.lines) == 2).lines[1].get_data()
    block = next(module for module in model.modules() if isinstance(module, kanformer.KANFeedForward))
    functions, down = (block.kan_functions, block.kan_down)
    points = torch.zeros(len(x), block.hidden_features, dtype=torch.float64)
    points[:, channel] = torch.as_tensor(x, dtype=torch.float64)
    with torch.no_grad():
        if name == "kan_down" and isinstance(down, torch.nn.Linear):
            wanted = functions(points)[:, channel] * down.weight[1, channel]
        else:
            wanted = down(points)[:, 1] - down(torch.zeros_like(points))[:, 1]
            zero = down(torch.zeros(1, block.hidden_features, dtype=torch.float64))[0, 1]
            points[:, channel] = 0
            silent = down(points)[:, 1]
            wanted = wanted + zero - silent + (y[0] - wanted[0])  # up to what the edge adds at 0
    assert torch.allclose(torch.as_tensor(y, dtype=torch.float64), wanted, atol=1e-5)


def test_an_input_shows_the_functions_that_read_it(seen):
    model, stats = seen
    figure = plot_input(model, stats, 3, layer=0, top=5)
    texts_on = [text.get_text() for text in figure.axes[0].texts]
    full = any("→" in text for text in texts_on)
    titles = [text for text in texts_on if "→" in text or text.startswith("#")]
    assert len(titles) == (5 if full else 1)
    groups = 12 // next(module for module in model.modules() if isinstance(module, kanformer.KANFeedForward)).kan_functions.groups if not full else 1
    assert all(title.startswith("3→" if full else f"#{3 // groups}") for title in titles)


def test_health_counts_the_dead_and_the_nonlinear(seen):
    model, stats = seen
    rows = sum(len(layer.scores) for layer in stats.values())
    figure = plot_health(stats)
    assert len(figure.axes) == 2 * rows
    layer = stats.layer(0)
    name = next(iter(layer.scores))
    dead = dead_edges(layer, name)
    assert figure.axes[1].patches[0].get_width() == pytest.approx(float(dead.double().mean()))
    fits = kanformer.fit_symbolic(model, stats, tol_node=0.5, r2_min=0.5)
    with_fits = plot_health(stats, fits)
    assert len(with_fits.axes) == 3 * rows
    shares = [patch.get_width() for patch in with_fits.axes[2].patches]
    assert not shares or sum(shares) == pytest.approx(1)


def test_a_dead_edge_is_counted():
    model = tiny("gpt2", edges="full", grid_size=3)
    block = next(module for module in model.modules() if isinstance(module, kanformer.KANFeedForward))
    with torch.no_grad():
        block.kan_down.kan_base_weight[:, 2] = 0
        block.kan_down.kan_coef[:, :, 2] = 0
    stats = collect(model, texts(), scores=("std", "nonlinearity"))
    dead = dead_edges(stats.layer(0), "kan_down")
    assert bool(dead[:, 2].all()) and not bool(dead.all())


def test_a_difference_is_the_distance_over_the_data(seen):
    model, stats = seen
    other = copy.deepcopy(model)
    same = compare_functions(model, other, stats)
    assert all(row["changed"] == 0 for row in same.summary())
    generator = torch.Generator().manual_seed(1)
    for module in other.modules():
        if isinstance(module, EdgeFunctions | KANLinear):
            with torch.no_grad():
                module.kan_coef.add_(0.1 * torch.randn(module.kan_coef.shape, generator=generator, dtype=torch.float64))
    diff = compare_functions(model, other, stats)
    path = next(iter(stats))
    mine, theirs = (dict(each.named_modules())[path] for each in (model, other))
    name, module = next(mine.spline_modules())
    one, changed = diff.maps[path][name], dict(theirs.spline_modules())[name]
    levels = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    x = torch.stack([stats[path].maps[name].quantile(float(level)) for level in levels])  # (64, rows)
    row, ends = 2, None if isinstance(module, EdgeFunctions) else torch.tensor([1])
    a, b = (pick(each, torch.tensor([row]), ends).learned(x[:, row : row + 1])[:, 0] for each in (module, changed))
    scale = a.std(correction=0) if ends is None else stats[path].outputs[name].variance[1].sqrt()
    found = one.values["distance"][row] if ends is None else one.values["distance"][1, row]
    assert float(found) == pytest.approx(float((a - b).std(correction=0) / scale), rel=1e-6)
    table = diff.top(5, functions=ends is None)
    assert table.columns["distance"] == sorted(table.columns["distance"], reverse=True) and "largest distance" in str(diff)
    figure = plot_changes(model, other, stats, diff, top=3)
    assert sum(len(axes.lines) == 2 for axes in figure.axes) == 3


def test_models_of_other_shapes_cannot_be_compared():
    model = tiny("gpt2", edges="full", grid_size=3)
    stats = collect(model, texts(count=1), scores=("std",))
    compare_functions(model, tiny("gpt2", edges="full", grid_size=5, basis="rbf"), stats)  # another basis and grid may be
    with pytest.raises(DataError, match=r"\(edges, gated, d, h\) = \('shared'"):
        compare_functions(model, tiny("gpt2"), stats)
    with pytest.raises(DataError, match="the same blocks in both"):
        compare_functions(model, tiny("llama", edges="full", grid_size=3), stats)


def test_bad_input_is_a_clear_error(seen):
    model, stats = seen
    few = collect(model, texts(count=1), scores=("std",))
    for call, message in (
        (lambda: plot_importance(stats, 9), "layer=9"),
        (lambda: plot_importance(stats, 0, map="kan_side"), "map='kan_side'"),
        (lambda: plot_importance(few, 0, by="effect"), "by='effect'"),
        (lambda: plot_node(model, stats, 99, layer=0), "output=99"),
        (lambda: plot_node(model, few, 0, layer=0), "no share of all edges"),
        (lambda: plot_node(model, stats, 0, layer=0, top=0), "top=0"),
        (lambda: plot_input(model, stats, 99, layer=0), "input=99"),
        (lambda: plot_health(few), "no nonlinearity"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
