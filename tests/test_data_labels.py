"""Classes from ClassLabel, words, numbers and names that are given; what is none of them is named."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from kanformer.errors import DataError
from kanformer.training.data import Column, Table
from kanformer.training.data.labels import Classes, find_classes


def part(values: list, feature=None) -> Table:
    rows = Dataset.from_dict({"label": values}, features=None if feature is None else Features({"label": feature}))
    return Table("rows", [Column("label")], rows)


def found(values: list, given=None, feature=None) -> Classes:
    return find_classes(part(values, feature), "label", given, values)


def test_numbers_are_sorted_by_size_and_words_by_letters():
    assert (
        found([10, 2, 1, 2]).names == ("1", "2", "10") and found(["b", "a", "B"]).names == ("B", "a", "b") and found([True, False]).names == ("False", "True")
    )


def test_a_class_label_keeps_its_names_and_numbers_even_where_some_do_not_occur():
    feature = ClassLabel(names=["z", "a", "m"])
    classes, rows = found([2, 0], feature=feature), part([2, 0], feature)
    assert classes.names == ("z", "a", "m") and [classes.number(value, rows) for value in (2, 0, 1)] == [2, 0, 1]
    other = part([0, 1], ClassLabel(names=["m", "z"]))  # the held-out part may number them otherwise
    assert [classes.number(value, other) for value in (0, 1)] == [2, 0]
    with pytest.raises(DataError, match="got number -1, expected 0 to 2"):
        classes.number(-1, rows)


def test_lists_of_class_labels_have_their_names():
    rows = Table("rows", [Column("label")], Dataset.from_dict({"label": [[0, 1]]}, Features({"label": Sequence(ClassLabel(names=["O", "B-X"]))})))
    classes = find_classes(rows, "label", None, [])
    assert classes.names == ("O", "B-X") and classes.number(1, rows) == 1
    assert classes.settings == {"num_labels": 2, "id2label": {0: "O", 1: "B-X"}, "label2id": {"O": 0, "B-X": 1}}


def test_given_names_number_the_words_or_name_the_numbers():
    words = found(["a", "b"], ["b", "a"])
    assert [words.number(value, part(["a"])) for value in ("a", "b")] == [1, 0]
    numbers = found([0, 1], ["no", "yes"])
    assert numbers.number(1, part([1])) == 1 and numbers.names == ("no", "yes")
    with pytest.raises(DataError, match="got class '2', expected one of no, yes"):
        numbers.number(2, part([2]))
    stars = found([5, 1], [1, 5])
    assert [stars.number(value, part([1])) for value in (1, 5)] == [0, 1]


def test_a_checkpoint_keeps_its_numbers_unless_others_are_given():
    label2id = {"yes": 0, "no": 1}
    assert found(["no", "yes"]).as_in(label2id).names == ("yes", "no")
    assert found(["no", "yes"], ["no", "yes"]).as_in(label2id).names == ("no", "yes")
    assert found(["no", "maybe"]).as_in(label2id).names == ("maybe", "no") and found(["a", "b"]).as_in(None).names == ("a", "b")


def test_unseen_classes_are_named_up_to_three():
    with pytest.raises(DataError, match=r"unseen held-out classes \['c', 'd', 'e'\] and 2 more, expected those of the training data \(a, b\)"):
        found(["a", "b"]).check(list("abcdefg"), part(["a"]))
    found(["a", "b"]).check(["a"], part(["a"], Value("string")))
