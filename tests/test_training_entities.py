"""Entities and their F1 against counts made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanformer.training.entities import entities, f1_scores, is_iob

TAGS = st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), max_size=12)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-X I-X O B-Y", {(0, 2, "X"), (3, 4, "Y")}),
        ("B-X B-X", {(0, 1, "X"), (1, 2, "X")}),
        ("I-X I-X O I-X", {(0, 2, "X"), (3, 4, "X")}),  # IOB: an I opens an entity
        ("I-X I-Y", {(0, 1, "X"), (1, 2, "Y")}),
        ("B-X I-Y I-Y", {(0, 1, "X"), (1, 3, "Y")}),
        ("I-X B-X I-X", {(0, 1, "X"), (1, 3, "X")}),
        ("O O", set()),
        ("B-A-B I-A-B", {(0, 2, "A-B")}),
    ],
)
def test_entities_by_hand(tags, expected):
    assert entities(tags.split()) == expected


@given(TAGS)
def test_every_tagged_word_is_in_exactly_one_entity_of_its_type(tags):
    covered = [(number, kind) for start, end, kind in entities(tags) for number in range(start, end)]
    assert sorted(covered) == [(number, tag[2:]) for number, tag in enumerate(tags) if tag != "O"]


@given(TAGS)
def test_every_b_opens_an_entity(tags):
    assert {start for start, _, _ in entities(tags)} >= {number for number, tag in enumerate(tags) if tag[0] == "B"}


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    found = f1_scores(3, 4, 6)
    assert found["precision"] == 0.75 and found["recall"] == 0.5 and found["f1"] == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert f1_scores(0, 0, 0) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("names", "expected"), [(["O", "B-X", "I-X"], True), (["O", "I-X"], True), (["NOUN", "VERB"], False), (["O"], False), (["O", "B-X", "S-X"], False)]
)
def test_what_looks_like_iob(names, expected):
    assert is_iob(names) == expected
