"""Every error says what was attempted, on what, what was got, what was expected and what to do, on one line."""

from __future__ import annotations

import copy
import pickle

import pytest

from kanformer import errors
from kanformer.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    KanformerError,
    NoFeedForwardError,
    ShapeError,
    SurgeryError,
    TrainingDiverged,
    did_you_mean,
)

FAMILY = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, KanformerError)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "cannot fly"),
        ({"subject": "pig"}, "cannot fly (pig)"),
        ({"got": 0}, "cannot fly: got 0"),
        ({"expected": "2 wings"}, "cannot fly: expected 2 wings"),
        ({"hint": "Try a bird."}, "cannot fly. Try a bird."),
        ({"subject": "pig", "got": "0 wings", "expected": "2 wings", "hint": "Try a bird."}, "cannot fly (pig): got 0 wings, expected 2 wings. Try a bird."),
    ],
)
@pytest.mark.parametrize("error", FAMILY, ids=lambda error: error.__name__)
def test_the_message_is_made_of_the_parts_that_are_given(error, parts, message):
    assert str(error("fly", **parts)) == message


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("error", FAMILY, ids=lambda error: error.__name__)
def test_an_error_survives_the_way_between_processes(error, duplicate):
    before = error("fly", subject="pig", got=0, expected=2, hint="Try a bird.")
    after = duplicate(before)
    assert type(after) is error and str(after) == str(before)
    assert (after.action, after.subject, after.got, after.expected, after.hint) == ("fly", "pig", 0, 2, "Try a bird.")


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ConfigError, ValueError),
        (ShapeError, ValueError),
        (DataError, ValueError),
        (SurgeryError, ValueError),
        (NoFeedForwardError, SurgeryError),
        (CheckpointError, OSError),
        (TrainingDiverged, ArithmeticError),
    ],
)
def test_callers_who_know_only_builtin_errors_catch_ours(error, builtin):
    with pytest.raises(builtin, match="cannot fly"):
        raise error("fly")


@pytest.mark.parametrize("word", ["bsplin", "B-spline", "bpsline"])
def test_near_words_are_suggested(word):
    assert did_you_mean(word, ["fourier", "bspline", "rational"]) == "Did you mean 'bspline'?"


def test_without_a_near_word_all_known_ones_are_listed_in_order():
    assert did_you_mean("zzz", {"rational", "bspline"}) == "Known: bspline, rational."


def test_several_near_words_are_all_named():
    assert did_you_mean("grid", ["grid_a", "grid_b", "x"]) == "Did you mean 'grid_b' or 'grid_a'?"
