"""The demo's text: the same on every call, held out by module, and errors for a text of one's own."""

from __future__ import annotations

import pytest

from kanformer.demo import corpus
from kanformer.errors import DataError
from training_cases import texts


@pytest.fixture(scope="module")
def library():
    return corpus.standard_library()


def test_there_is_text_of_each_kind_and_no_two_kinds_share_any(library):
    parts = [library.train, library.held_out, library.second]
    assert len(library.train) >= 200 and len(library.held_out) >= 20 and library.second
    assert all(len(part) == len(set(part)) for part in parts) and len(set().union(*parts)) == sum(map(len, parts))
    assert all(corpus._SHORTEST <= len(text) <= corpus._LONGEST and "\n" not in text for part in parts for text in part)


def test_it_is_the_same_every_time_and_in_no_order_of_modules(library):
    assert corpus.standard_library() == library and library.train != sorted(library.train)


def test_no_sources_is_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="got 0 docstring paragraphs.*--text FILE"):
        corpus.standard_library()


def test_own_text_holds_out_every_tenth_line(tmp_path, library, monkeypatch):
    monkeypatch.setattr(corpus, "standard_library", lambda: library)
    lines = list(dict.fromkeys(texts(40)))
    (tmp_path / "mine.txt").write_text("\n".join([*lines, *lines]), encoding="utf-8")
    found = corpus.own_text(str(tmp_path / "mine.txt"))
    assert found.held_out == lines[::10] and sorted([*found.train, *found.held_out]) == sorted(lines) and found.name == "mine.txt"
    assert found.second == library.second


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "an empty file"), ("ä\n".encode("latin-1"), "not UTF-8"), (b"same\n" * 30, "1 different lines"), (None, "No such file")]
)
def test_text_that_cannot_be_used_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        corpus.own_text(str(tmp_path / "mine.txt"))
