"""Text that every machine has: the docstrings of Python's standard library, and its code as a second kind of text."""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kanformer.errors import DataError

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib", "pydoc_data", "__pycache__", "ensurepip"}
_SHORTEST, _LONGEST = 60, 400  # characters of a text


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, held-out texts of the same kind, and texts of another kind; `name` says what they are."""

    name: str
    train: list[str]
    held_out: list[str]
    second_name: str
    second: list[str]


def standard_library(held_share: int = 10, second_texts: int = 256) -> Corpus:
    """Paragraphs of docstrings; one module in `held_share` is held out whole, and its code is the second kind.

    Raises:
        DataError: the library's sources are not installed.
    """
    train: dict[str, None] = {}
    held: dict[str, None] = {}
    code: dict[str, None] = {}
    for path in _modules():
        held_out = zlib.crc32(path.name.encode()) % held_share == 0
        docstrings, functions = _texts(path)
        (held if held_out else train).update(dict.fromkeys(docstrings))
        if held_out:
            code.update(dict.fromkeys(functions))
    held_texts = _shuffled([text for text in held if text not in train])
    if len(train) < 200 or len(held_texts) < 20 or not code:
        raise DataError(
            "read Python's standard library",
            got=f"{len(train)} docstring paragraphs",
            expected="its sources with docstrings",
            hint="Give a text of your own: --text FILE.",
        )
    return Corpus("docstrings of Python's standard library", _shuffled(list(train)), held_texts, "its source code", _shuffled(list(code))[:second_texts])


def own_text(path: str) -> Corpus:
    """The lines of a text file, every tenth held out; the second kind is still the standard library's code."""
    from kanformer.training.data import read_lines

    lines = list(dict.fromkeys(read_lines(path)))
    if len(lines) < 20:
        raise DataError("use this text", subject=path, got=f"{len(lines)} different lines", expected="at least 20, a text per line")
    library = standard_library()
    return Corpus(Path(path).name, [line for i, line in enumerate(lines) if i % 10], lines[::10], library.second_name, library.second)


def _modules() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(root).parts[:-1]):
            yield path


def _texts(path: Path) -> tuple[list[str], list[str]]:
    """(paragraphs of docstrings, sources of functions) of one module."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return [], []
    paragraphs: list[str] = []
    functions: list[str] = []
    lines = source.splitlines()
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                text = " ".join(paragraph.split())
                if len(text) >= _SHORTEST and not text.startswith(">>>"):
                    paragraphs.append(text[:_LONGEST])
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
            first = node.body[1] if ast.get_docstring(node) else node.body[0]
            text = " ".join(" ".join(lines[first.lineno - 1 : node.end_lineno]).split())
            if len(text) >= _SHORTEST:
                functions.append(text[:_LONGEST])
    return paragraphs, functions


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all statements below it; expressions, which hold no docstring, are not entered."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _statements(child)


def _shuffled(texts: list[str]) -> list[str]:
    """The same order on every machine and in every run, unrelated to the modules."""
    return sorted(texts, key=lambda text: (zlib.crc32(text.encode()), text))
