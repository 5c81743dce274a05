"""Statistics, scores and figures of learned functions, against brute force on small hand-made models."""

from __future__ import annotations

import copy
import csv
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from kanformer.config import KANConfig
from kanformer.errors import CheckpointError, ConfigError, DataError, NoFeedForwardError
from kanformer.interpret import collect, plot_layer, plot_model, plot_overview, score_layer
from kanformer.layers import EdgeFunctions, KANFeedForward


class Toy(nn.Module):
    """An embedding and residual KAN-FFNs; `flat` runs them on (tokens, d)."""

    def __init__(self, blocks: list[KANFeedForward], flat: bool = False) -> None:
        super().__init__()
        self.embed, self.layers, self.flat = nn.Embedding(50, blocks[0].in_features), nn.ModuleList(blocks), flat
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None):
        x = self.drop(self.embed(input_ids))
        x = x.flatten(0, 1) if self.flat else x
        for layer in self.layers:
            x = x + layer(x)
        return x


def make_block(d: int = 6, h: int = 10, *, gated: bool = False, **config) -> KANFeedForward:
    block = KANFeedForward(d, h, activation="gelu", gated=gated, config=KANConfig(**config))
    block.reset_parameters()
    for coef in block.spline_parameters():
        nn.init.normal_(coef, std=0.3)
    return block


def make_batches(count: int = 3, length: int = 40) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(0, 50, (4, length)), "attention_mask": torch.ones(4, length, dtype=torch.long)} for _ in range(count)]


def inputs_of(model: Toy, module: nn.Module, batches, keep=None) -> torch.Tensor:
    """What really arrives at a module, (tokens, channels) in float64."""
    rows = []
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, -2).double()))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    rows = torch.cat(rows)
    return rows if keep is None else rows[keep]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def brute_edges(module, x: torch.Tensor) -> torch.Tensor:
    """phi[o, i](x_i) for all edges of a KANLinear, (tokens, out, in)."""
    members = module.basis.evaluate(x, module.kan_grid.double())
    base = module.kan_base_weight.detach().double() * module.base(x).unsqueeze(1)
    return base + torch.einsum("tic,oci->toi", members, module.kan_coef.detach().double())


def straight_line_residual(x: torch.Tensor, y: torch.Tensor) -> float:
    return 1 - float(np.corrcoef(x.numpy(), y.numpy())[0, 1] ** 2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [None, 5])
def test_shared_scores_match_brute_force(gated, groups):
    model, batches = Toy([make_block(gated=gated, groups=groups)]), make_batches()
    block = model.layers[0]
    hidden = inputs_of(model, block.kan_down, batches)
    edges = hidden.unsqueeze(1) * block.kan_down.weight.detach().double()  # (tokens, out, channels)
    expected = edges.var(0, correction=0).sum(0).view(block.kan_functions.groups, -1).sum(1)
    scores = score_layer(model, collect(model, batches))["kan_functions"]
    torch.testing.assert_close(scores.score, expected[scores.input], rtol=1e-5, atol=0)
    assert scores.total == pytest.approx(float(expected.sum()), rel=1e-5)
    assert scores.edges_per_function * scores.n_functions == 60
    assert bool((scores.score.diff() <= 0).all())
    x = inputs_of(model, block.kan_functions, batches)
    psi = block.kan_functions(x).detach()
    for row, group in enumerate(scores.input.tolist()):
        channels = [i for i in range(10) if i // (10 // block.kan_functions.groups) == group]
        flat_x, flat_y = x[:, channels].flatten(), psi[:, channels].flatten()
        assert float(scores.std[row]) == pytest.approx(float(flat_y.std(correction=0)), rel=0.01)
        assert float(scores.nonlinearity[row]) == pytest.approx(straight_line_residual(flat_x, flat_y), abs=0.01)


@pytest.mark.parametrize("gated", [False, True])
def test_full_scores_match_brute_force(gated, monkeypatch):
    from kanformer.interpret import scores as module_under_test

    monkeypatch.setattr(module_under_test, "_CHUNK_NUMBERS", 4000)  # several chunks
    model, batches = Toy([make_block(edges="full", gated=gated)]), make_batches()
    ranked = score_layer(model, collect(model, batches))
    assert set(ranked) == ({"kan_gate", "kan_up", "kan_down"} if gated else {"kan_up", "kan_down"})
    for name, scores in ranked.items():
        x = inputs_of(model, getattr(model.layers[0], name), batches)
        edges = brute_edges(getattr(model.layers[0], name), x)
        variance = edges.var(0, correction=0)
        torch.testing.assert_close(scores.score, variance[scores.output, scores.input], rtol=5e-3, atol=1e-4 * float(variance.max()))
        assert scores.total == pytest.approx(float(variance.sum()), rel=0.01)
        o, i = int(scores.output[0]), int(scores.input[0])
        assert float(scores.nonlinearity[0]) == pytest.approx(straight_line_residual(x[:, i], edges[:, o, i]), abs=0.01)
        top = score_layer(model, collect(model, batches), top=7)[name]
        assert len(top) == 7 and float(top.share.sum()) + top.remainder == pytest.approx(1)
        torch.testing.assert_close(top.score, scores.score[:7])


def test_linear_and_constant_functions_are_not_nonlinear():
    block = KANFeedForward(4, 8, activation="identity", config=KANConfig())
    model = Toy([block])
    scores = score_layer(model, collect(model, make_batches()))["kan_functions"]
    assert float(scores.nonlinearity.max()) < 1e-9 and float(scores.learned.max()) == 0 and scores.mean_learned == 0
    nn.init.zeros_(block.kan_down.weight)
    scores = score_layer(model, collect(model, make_batches()), top=3)["kan_functions"]
    assert scores.total == 0 and float(scores.share.sum()) == 0 and scores.remainder == 0


def test_statistics_match_the_data_whatever_the_range():
    model, batches = Toy([make_block()]), make_batches(5)
    with torch.no_grad():
        model.layers[0].kan_up.weight *= torch.logspace(-3, 3, 10).unsqueeze(1)
        model.layers[0].kan_up.bias += 7
        model.embed.weight[3] *= 1000  # an outlier token must not cost the bulk its resolution
    seen = collect(model, batches)["layers.0"].maps["kan_functions"]
    x = inputs_of(model, model.layers[0].kan_functions, batches)
    assert seen.count == len(x) == 800 and bool((seen.counts.sum(1) == 800).all())
    for got, expected in ((seen.mean, x.mean(0)), (seen.variance, x.var(0, correction=0)), (seen.minimum, x.amin(0)), (seen.maximum, x.amax(0))):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(seen.outside, ((x < -4) | (x > 4)).double().mean(0))
    spread = x.quantile(0.9, 0) - x.quantile(0.1, 0)
    assert float(((seen.quantile(0.5) - x.quantile(0.5, 0)).abs() / spread).max()) < 0.05


@pytest.mark.parametrize("flat", [False, True])
def test_padding_is_ignored(flat):
    model, batches = Toy([make_block()], flat), make_batches(2)
    for batch in batches:
        batch["attention_mask"][:, 30:] = 0
    keep = torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()
    seen = collect(model, batches)["layers.0"]
    x = inputs_of(model, model.layers[0].kan_functions, batches, keep)
    assert seen.tokens == 240
    torch.testing.assert_close(seen.maps["kan_functions"].mean, x.mean(0), rtol=1e-5, atol=1e-7)
    hidden = inputs_of(model, model.layers[0].kan_down, batches, keep)
    torch.testing.assert_close(seen.hidden_variance, hidden.var(0, correction=0), rtol=1e-5, atol=0)


def test_max_tokens_is_exact_and_stops_early():
    model = Toy([make_block()])
    taken = []

    def batches():
        for batch in make_batches(9):
            taken.append(1)
            yield batch

    assert collect(model, batches(), max_tokens=200)["layers.0"].tokens == 200
    assert len(taken) == 2


def test_the_model_is_left_as_it_was():
    model = Toy([make_block(), make_block(edges="full")])
    model.train()
    model.layers[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    batches = make_batches()
    random = torch.get_rng_state()

    def drawing_batches():
        for batch in batches:
            torch.rand(3)
            yield batch

    plot_layer(model, collect(model, drawing_batches()), layer=0)
    with pytest.raises(DataError):
        collect(model, [{"nonsense": torch.ones(1)}])
    assert torch.equal(random, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_bad_input_is_named_in_one_line():
    model = Toy([make_block(), make_block()])
    padded = make_batches(1)
    padded[0]["attention_mask"][:] = 0
    for batches, word in (([], "no tokens"), (padded, "no tokens"), (["text"], "mapping"), ([{"wrong": torch.ones(1)}], "wrong")):
        with pytest.raises(DataError, match=word) as caught:
            collect(model, batches)
        assert "\n" not in str(caught.value)
    with torch.no_grad():
        model.layers[1].kan_up.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"layers\.1, input of kan_functions.*NaN"):
        collect(model, make_batches())
    with pytest.raises(NoFeedForwardError, match="Linear"):
        collect(nn.Linear(2, 2), make_batches())
    stats = collect(Toy([make_block(), make_block()]), make_batches(1))
    for layer in (7, "layers.9", None):
        with pytest.raises(ConfigError, match=f"layer={layer!r}"):
            plot_layer(model, stats, layer=layer)
    with pytest.raises(DataError, match="another block"):
        plot_layer(make_block(4, 4), stats["layers.0"])


def test_nan_weights_are_found_when_ranking():
    model = Toy([make_block(edges="full")])
    stats = collect(model, make_batches())
    with torch.no_grad():
        model.layers[0].kan_down.kan_coef[0, 0, 0] = torch.nan
    with pytest.raises(DataError, match=r"layers\.0, kan_down"):
        score_layer(model, stats)


def test_a_block_used_by_two_layers_and_functions_used_by_two_blocks():
    block, other = make_block(), make_block()
    model = Toy([block, block, other])
    stats = collect(model, make_batches())
    assert list(stats) == ["layers.0", "layers.2"] and stats["layers.0"].also_at == ("layers.1",)
    assert stats["layers.0"].tokens == 960 and stats["layers.2"].tokens == 480
    other.kan_functions = block.kan_functions
    stats = collect(model, make_batches())
    assert stats["layers.0"].tokens == 960 and stats["layers.2"].tokens == 480
    assert len(plot_layer(model, stats, layer="layers.1").axes) == 1


def collection(figure, gid):
    return next(item for item in figure.axes[0].collections if item.get_gid() == gid)


def texts(figure) -> str:
    return "\n".join(item.get_text() for item in (*figure.texts, *figure.axes[0].texts, *figure.legends[0].get_texts()))


@pytest.mark.parametrize(("edges", "gated"), [("shared", False), ("shared", True), ("full", False), ("full", True)])
def test_drawn_curves_are_the_modules_functions(edges, gated):
    from kanformer.interpret.cells import make_panels

    model = Toy([make_block(edges=edges, gated=gated)])
    stats = collect(model, make_batches())["layers.0"]
    for name, drawn in score_layer(model.layers[0], stats, top=9).items():
        module = getattr(model.layers[0], name)
        panels = make_panels(module, stats.maps[name], drawn)
        for column, (source, target) in enumerate(zip(drawn.input.tolist(), drawn.output.tolist(), strict=True)):
            x = torch.zeros(panels.x.shape[0], module.kan_grid.shape[0])
            at_zero = module(x.clone()).detach()
            x[:, source] = panels.x[:, column]
            value = module(x).detach()
            if isinstance(module, EdgeFunctions):
                torch.testing.assert_close(panels.learned[:, column], value[:, source], rtol=0, atol=1e-6)
            else:  # the other edges are constant: differences along the curve are the edge's own
                expected = (value - at_zero)[:, target]
                got = panels.learned[:, column] - panels.learned[:1, column] + expected[0]
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("y", ["shared", "free"])
def test_figure_structure(y):
    from matplotlib.collections import LineCollection

    model = Toy([make_block(8, 70)])
    stats = collect(model, make_batches())
    figure = plot_layer(model, stats, y=y, top=48)
    assert len(figure.axes) == 1
    assert sum(isinstance(item, LineCollection) for item in figure.axes[0].collections) == 2
    assert len(collection(figure, "learned").get_segments()) == len(collection(figure, "start").get_segments()) == 48
    assert len(collection(figure, "density").get_paths()) == 48
    words = texts(figure)
    scores = score_layer(model, stats, top=48)["kan_functions"]
    assert "drawn: 48 of 70 functions (384 of 560 edges)" in words and "the other 176 edges" in words
    assert f"#{int(scores.input[0])}  " in words and "480 tokens" in words and "outside the grid" in words
    assert figure.axes[0].get_xlabel().startswith("x: ") and figure.axes[0].get_ylabel().startswith("y: ")
    first, second = (collection(figure, "learned").get_segments()[k][:, 0] for k in (0, 1))
    assert 0 <= first.min() < first.max() <= 1 <= second.min() < second.max() <= 2
    heights = np.concatenate([segment[:, 1] for segment in collection(figure, "learned").get_segments()])
    assert np.isfinite(heights).all() and heights.max() <= 0


def test_text_stays_on_the_figure_and_titles_do_not_overlap():
    model = Toy([make_block(8, 3072 // 16, edges="full")])
    figure = plot_layer(model, collect(model, make_batches()), y="free")
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    boxes = [item.get_window_extent(renderer) for item in (*figure.texts, *figure.axes[0].texts, figure.legends[0], figure.axes[0].yaxis.label)]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    titles = [box for item, box in zip((*figure.texts, *figure.axes[0].texts), boxes, strict=False) if "→" in item.get_text() and "%" in item.get_text()]
    assert not any(a.overlaps(b) for k, a in enumerate(titles) for b in titles[k + 1 :])


def test_a_thousand_curves_draw_in_about_a_second(tmp_path):
    model = Toy([make_block(16, 1024)])
    stats = collect(model, make_batches())
    plot_layer(model, stats).savefig(tmp_path / "warm.png")
    start = time.perf_counter()
    figure = plot_layer(model, stats, top=1000)
    figure.savefig(tmp_path / "many.png", dpi=100)
    assert time.perf_counter() - start < 5  # about 0.5 s on an idle core; slack for a shared machine
    assert len(collection(figure, "learned").get_segments()) == 1000 and len(figure.axes[0].texts) == 0


@pytest.mark.parametrize("edges", ["shared", "full"])
def test_bf16(edges):
    model = Toy([make_block(edges=edges)]).to(torch.bfloat16)
    stats = collect(model, make_batches())
    scores = score_layer(model, stats)
    assert all(bool(torch.isfinite(one.score).all()) and one.total > 0 for one in scores.values())
    plot_layer(model, stats).canvas.draw()


def test_constant_inputs_and_few_tokens_still_draw():
    model = Toy([make_block()])
    stats = collect(model, {"input_ids": torch.ones(1, 1, dtype=torch.long)})
    figure = plot_layer(model, stats)
    figure.canvas.draw()
    assert "nothing varies" in texts(figure)


def test_control_blocks_have_nothing_to_draw(tmp_path):
    model = Toy([make_block(edges="mlp"), make_block()])
    stats = collect(model, make_batches())
    assert stats["layers.0"].maps == {} and score_layer(model, stats, layer=0) == {}
    assert "nothing to draw" in "".join(item.get_text() for item in plot_layer(model, stats, layer=0).texts)
    only = Toy([make_block(edges="mlp")])
    said: list[str] = []
    files = plot_model(only, make_batches(), tmp_path, progress=said.append)
    assert [file.name for file in files] == ["overview.png", "functions.csv"] and any("nothing to draw" in line for line in said)


def test_overview():
    model = Toy([make_block(), make_block(edges="full"), make_block(edges="mlp")])
    figure = plot_overview(model, collect(model, make_batches()), top=5)
    assert len(figure.axes) == 4 and all(axes.get_title(loc="left") and axes.get_ylabel() for axes in figure.axes)
    figure.canvas.draw()


def test_plot_model_writes_whole_files(tmp_path):
    model, said = Toy([make_block(), make_block(edges="full")]), []
    files = plot_model(model, make_batches(), tmp_path / "new" / "figures", top=4, formats=("png", "svg"), progress=said.append)
    names = {file.name for file in files}
    expected = {"layer_00", "layer_01_up", "layer_01_down", "overview"}
    assert names == {f"{name}.{kind}" for name in expected for kind in ("png", "svg")} | {"functions.csv"}
    assert {path.name for path in files[0].parent.iterdir()} == names and len(said) > 5
    rows = list(csv.DictReader(files[-1].open()))
    assert len(rows) == 3 * (4 + 1)
    for name in ("kan_functions", "kan_up", "kan_down"):
        assert sum(float(row["share"]) for row in rows if row["map"] == name) == pytest.approx(1, abs=1e-4)
    assert rows[0]["output"] == "all" and rows[4]["rank"] == "other" and rows[4]["edges"] == "36"


def test_plot_model_refuses_bad_options_and_leaves_nothing(tmp_path):
    model = Toy([make_block()])
    for options in ({"formats": ("gif",)}, {"formats": ()}, {"top": 0}, {"y": "log"}):
        with pytest.raises(ConfigError):
            plot_model(model, make_batches(), tmp_path / "out", **options)
    with pytest.raises(DataError):
        plot_model(model, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="file"):
        plot_model(model, make_batches(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_importing_interpret_loads_no_matplotlib():
    code = """
import sys, kanformer.interpret as interpret
import kanformer.interpret.collect
assert "matplotlib" not in sys.modules and callable(interpret.collect)
interpret.plot_layer
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
