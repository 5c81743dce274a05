"""Entities in IOB tags, as the CoNLL evaluation counts them (Tjong Kim Sang and De Meulder 2003, arXiv cs/0306050)."""

from __future__ import annotations

from collections.abc import Sequence

OUTSIDE = "O"


def is_iob(names: Sequence[str]) -> bool:
    """Whether tags are O, B-... and I-..., as in IOB and IOB2."""
    return OUTSIDE in names and len(names) > 1 and all(name == OUTSIDE or name[:2] in ("B-", "I-") for name in names)


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, one after its last, type) of each entity of a sentence.

    An entity begins with B, or with an I that follows no word of the same type: so IOB2 is read, in which every entity begins with B, and IOB,
    in which only those do that touch another of their type.
    """
    found, start, kind = set(), 0, ""
    for number, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, own = tag.partition("-")
        if kind and (prefix != "I" or own != kind):
            found.add((start, number, kind))
            kind = ""
        if prefix in ("B", "I") and not kind:
            start, kind = number, own
    return found


def f1_scores(right: float, found: float, true: float) -> dict[str, float]:
    """precision, recall and f1 of `right` entities among the `found` and the `true` ones; 0 where there are none."""
    return {"precision": right / found if found else 0.0, "recall": right / true if true else 0.0, "f1": 2 * right / (found + true) if found + true else 0.0}
