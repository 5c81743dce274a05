"""Means, intervals and differences of a study, and how they are read."""

from __future__ import annotations

import pytest
from scipy import stats

from kanformer.study.report import markdown, table_csv
from kanformer.study.results import ArmResult, Interval, Outcome, StudyResult

SOURCES = [["training corpus", "held out of a book", 30], ["second corpus", "a play", 20]]


def outcome(method: str, seed: int | None, value: float, metric: str = "embedding_cosine") -> Outcome:
    teacher = {metric: 1.0 if metric == "embedding_cosine" else 2.0}
    rows = {"teacher": teacher, "patched": {metric: value}, "without_functions": {metric: value - 0.25}}
    corpora = [{"name": name, "rows": rows} for name, *_ in SOURCES]
    return Outcome(f"{method}-r0.5-s{seed}", seed, {"parameters": 501, "tokens": 70, "corpora": corpora})


def study_of(arms: dict[str, list[Outcome]], seeds: list[int]) -> StudyResult:
    facts = {"parameters": 500, "original": 1000, "training": "steps"}
    plan = {"teacher": "/models/mine", "class": "BertModel", "tokens": {"0": 70}, "seeds": seeds, "stages": [[4, 16, True]]}
    plan["texts"] = {"train": ["a book", 300], "corpora": SOURCES}
    return StudyResult(plan, tuple(ArmResult(method, 0.5, facts, tuple(outcomes)) for method, outcomes in arms.items()))


@pytest.mark.parametrize("values", [(0.97, 0.98), (1.0, 2.0, 4.0), (0.5, 0.5, 0.5, 0.7, 0.1)])
def test_the_interval_is_students(values):
    found = Interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.half is not None and (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert Interval(values[:1]).half is None and Interval((0.5,)).text(".2f") == "0.50" and " ± " in found.text(".2f")


def test_differences_are_taken_seed_by_seed_whatever_the_order():
    kan = [outcome("kan", seed, value) for seed, value in enumerate([0.90, 0.80, 0.70])]
    mlp = [outcome("mlp", seed, value) for seed, value in [(2, 0.69), (0, 0.88), (1, 0.79)]]
    found = study_of({"kan": kan, "mlp": mlp}, [0, 1, 2])
    difference = found.difference(0.5, 1, "embedding_cosine")
    assert difference is not None and difference.values == pytest.approx((0.02, 0.01, 0.01))
    assert "the KAN is better" not in markdown(found, {}, "mine") and "a tie: the interval holds 0" in markdown(found, {}, "mine")
    assert found.difference(0.25, 0, "embedding_cosine") is None


@pytest.mark.parametrize(
    ("metric", "gains", "reading"),
    [
        ("embedding_cosine", (0.010, 0.011, 0.012), "the KAN is better"),
        ("embedding_cosine", (-0.010, -0.011, -0.012), "the KAN is worse"),
        ("ce", (0.010, 0.011, 0.012), "the KAN is worse"),
        ("ce", (-0.010, -0.011, -0.012), "the KAN is better"),
        ("ce", (-0.010, 0.011, 0.0), "a tie: the interval holds 0"),
        ("ce", (0.0, 0.0, 0.0), "equal"),
        ("ce", (-0.5,), "one pair: no interval"),
    ],
)
def test_a_difference_is_read_by_its_interval_and_by_what_is_better(metric, gains, reading):
    kan = [outcome("kan", seed, 0.5 + gain, metric) for seed, gain in enumerate(gains)]
    mlp = [outcome("mlp", seed, 0.5, metric) for seed in range(len(gains))]
    text = markdown(study_of({"kan": kan, "mlp": mlp}, list(range(len(gains)))), {}, "mine")
    assert text.count(reading) == 2 and "501 | 0.5010" in text and "1.00000" in text


def test_goals_are_met_by_the_mean_in_the_direction_that_is_better():
    kan = [outcome("kan", seed, value) for seed, value in enumerate([0.98, 0.99])]
    assert "| 0.5 | >= 0.985 | 0.9850 ± 0.0635 | yes |" in markdown(study_of({"kan": kan}, [0, 1]), {0.5: 0.985}, "mine")
    assert "| no |" in markdown(study_of({"kan": kan}, [0, 1]), {0.5: 0.9851}, "mine")
    lower = [outcome("kan", 0, 3.5, "ce")]
    assert "| 0.5 | <= 3.6 | 3.5000 | yes |" in markdown(study_of({"kan": lower}, [0]), {0.5: 3.6}, "mine")


def test_a_report_without_a_finished_run_says_so():
    waiting = study_of({"kan": [Outcome("kan-r0.5-s0", 0, None, "not run yet")], "mlp": [Outcome("mlp-r0.5-s0", 0, None, "failed: no | memory")]}, [0])
    text = markdown(waiting, {0.5: 0.9}, "mine")
    assert "| kan-r0.5-s0 | not run yet |" in text and "failed: no \\| memory" in text and "0 of 1 (failed)" in text and "minus" not in text
    assert table_csv(waiting).splitlines()[2].endswith("failed: no | memory")
