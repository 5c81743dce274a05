"""The texts of a study: to train on, held out, and of another kind; no text of the first stands in the others."""

from __future__ import annotations

import dataclasses
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from kanformer.demo.corpus import standard_library
from kanformer.errors import DataError
from kanformer.study.settings import StudyArguments
from kanformer.surgery.folders import replace_file
from kanformer.training.data import file_columns, load_texts

FEWEST = 8  # held-out texts, and texts of another kind


@dataclass(frozen=True)
class Texts:
    """Texts and where they are from; `dropped` of the held-out and second ones stood in the training text too."""

    train: list[str]
    held_out: list[str]
    second: list[str]
    source: str
    second_source: str
    dropped: int

    def facts(self) -> dict[str, list[int]]:
        """Number and checksum of each part."""
        parts = {"train": self.train, "held_out": self.held_out, "second": self.second}
        return {name: [len(texts), zlib.crc32("\n".join(texts).encode())] for name, texts in parts.items()}

    def parts(self) -> list[tuple[str, str, list[str]]]:
        """(name, source, texts) of what is measured on."""
        return [("training corpus", f"held out of {self.source}", self.held_out), ("second corpus", self.second_source, self.second)]


def gather(arguments: StudyArguments) -> Texts:
    """What the settings name, each part cut to its maximum number of samples.

    Raises:
        DataError: an unreadable file, or too little text.
    """
    column, limit = arguments.text_column, arguments.max_eval_samples
    own = arguments.train_file or arguments.dataset_name
    library = None if own and arguments.second_file else standard_library()
    if own:
        train, held = (part[column] for part in load_texts(dataclasses.replace(arguments, max_eval_samples=None), [column]))
    else:
        assert library is not None
        train, held = library.train[: arguments.max_train_samples], library.held_out
    if arguments.second_file:
        second, second_source = file_columns(arguments.second_file, [column])[column], Path(arguments.second_file).name
    else:
        assert library is not None
        second, second_source = library.second, "source code of Python's standard library"
    seen = set(train)
    held_out, other = ([text for text in dict.fromkeys(part) if text not in seen] for part in (held, second))
    dropped = len(held) + len(second) - len(held_out) - len(other)
    files = [own] if isinstance(own, str) else own or []
    source = ", ".join(Path(file).name for file in files) or (library.name if library else "")
    found = Texts(train, held_out[:limit], other[:limit], source, second_source, dropped)
    for name, part in (("held-out", found.held_out), ("second", found.second)):
        if len(part) < FEWEST:
            raise DataError("measure the models", subject=f"{name} text", got=f"{len(part)} texts that are not in the training text", expected=f"{FEWEST}")
    return found


def write_texts(path: Path, texts: list[str]) -> str:
    """Writes the texts, a line each, for the training script; as JSON lines where a text is more than a line. Returns the path."""
    plain = all(text == text.strip() and len(text.splitlines()) == 1 for text in texts)
    path = path.with_suffix(".txt" if plain else ".jsonl")
    replace_file(path, "".join(f"{text if plain else json.dumps({'text': text})}\n" for text in texts))
    return str(path)
