"""Where rows come from: the Hugging Face hub, folders and files; each as a `datasets.Dataset`, or an `IterableDataset` when streamed."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kanformer.errors import ConfigError, DataError
from kanformer.training.data.lines import iterate_lines
from kanformer.training.settings import DataArguments

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_HELD_OUT = ("validation", "test")  # what a dataset's own held-out part is called


@dataclass(frozen=True)
class Source:
    """A `datasets.Dataset` or `IterableDataset`, what it is called in messages, and whether it was made of the lines of plain text."""

    name: str
    table: Any
    plain: bool = False

    @property
    def streamed(self) -> bool:
        return not hasattr(self.table, "__len__")


def open_sources(arguments: DataArguments) -> tuple[Source, Source | None]:
    """(training rows, held-out rows or None) of what the settings name.

    Raises:
        ConfigError: no source, or two of them. DataError: nothing there, or what cannot be read.
    """
    given = [name for name in ("dataset_name", "train_file", "train_dir") if getattr(arguments, name)]
    if not given:
        hint = "Give one of them in the config or on the command line; train_dir is for images."
        raise DataError("load the training data", got="neither train_file nor dataset_name nor train_dir", hint=hint)
    if len(given) > 1:
        raise ConfigError("load the training data", got=" and ".join(given), expected="one of them")
    if arguments.validation_file and arguments.validation_dir:
        raise ConfigError("load the held-out data", got="validation_file and validation_dir", expected="one of them")
    if arguments.train_file:
        train, held = read_files(arguments.train_file, arguments.streaming), None
    else:
        train, held = _parts(arguments)
    if arguments.validation_file:
        held = read_files(arguments.validation_file, arguments.streaming)
    elif arguments.validation_dir:
        folder = arguments.validation_dir
        held = _part(folder, _image_folder(folder, arguments.streaming), "train")
    return train, held


def read_files(files: str | Sequence[str], streaming: bool = False) -> Source:
    """The rows of a file, of several, or of those that a glob finds; a file that is no table has a row per line, in the column "text".

    Raises:
        DataError: no such file, files of different kinds, or one that cannot be read.
    """
    paths = find_files(files)
    name = paths[0] if len(paths) == 1 else f"{len(paths)} files, {paths[0]} to {paths[-1]}"
    kinds = {_BUILDERS.get(Path(path).suffix.lower()) for path in paths}
    if len(kinds) > 1:
        raise DataError("read the text", subject=name, got=", ".join(sorted({Path(path).suffix for path in paths})), expected="files of one kind")
    kind = kinds.pop()
    if kind is None:
        return Source(name, _text_table(paths, streaming), plain=True)
    import datasets

    return Source(name, _load("read the text", name, lambda: datasets.load_dataset(kind, data_files=paths, split="train", streaming=streaming)))


def find_files(files: str | Path | Sequence[str]) -> list[str]:
    """The paths that are meant, in the given order; those of a glob sorted.

    Raises:
        DataError: one that is not there, a folder, or a glob that finds nothing.
    """
    found: list[str] = []
    for name in [str(files)] if isinstance(files, str | Path) else files:
        matches = [name] if Path(name).exists() else sorted(path for path in glob.glob(str(name), recursive=True) if Path(path).is_file())
        if not matches:
            raise DataError("read the text", subject=name, got="No such file or directory")
        if Path(matches[0]).is_dir():
            raise DataError("read the text", subject=name, got="a directory", hint="Name its files (FOLDER/*.jsonl), or give it as dataset_name.")
        found += map(str, matches)
    if not found:
        raise DataError("read the text", got="an empty list of files")
    return found


def _text_table(paths: list[str], streaming: bool) -> Any:
    from datasets import Dataset, Features, IterableDataset, Value

    features = Features({"text": Value("string")})
    if streaming:
        return IterableDataset.from_generator(_line_rows, features=features, gen_kwargs={"paths": paths})
    lines = list(iterate_lines(paths))
    if not lines:
        raise DataError("read the text", subject=paths[0], got="an empty file", expected="a text per line")
    return Dataset.from_dict({"text": lines}, features=features)


def _line_rows(paths: list[str]) -> Iterator[dict[str, str]]:
    for line in iterate_lines(paths):
        yield {"text": line}


def _parts(arguments: DataArguments) -> tuple[Source, Source | None]:
    """The training and held-out splits of a dataset or an image folder."""
    name = str(arguments.dataset_name or arguments.train_dir)
    splits = _image_folder(name, arguments.streaming) if arguments.train_dir else _dataset(name, arguments)
    train = _split(arguments, name, splits, arguments.train_split)
    if arguments.validation_split:
        return train, _split(arguments, name, splits, arguments.validation_split)
    held = next((part for part in _HELD_OUT if part in splits and part != arguments.train_split), None)
    return train, None if held is None else _part(name, splits, held)


def _split(arguments: DataArguments, name: str, splits: dict[str, Any], wanted: str) -> Source:
    """A split by its name, or an expression of datasets such as train[:80%]."""
    if wanted in splits or not any(sign in wanted for sign in "[+") or _on_disk(name) or arguments.train_dir:
        return _part(name, splits, wanted)
    return Source(f"{name} {wanted}", _dataset(name, arguments, wanted))


def _part(name: str, splits: dict[str, Any], wanted: str) -> Source:
    if wanted not in splits:
        known = ", ".join(map(str, splits))
        hint = "Name the parts by train_split and validation_split."
        raise DataError("load the dataset", subject=name, got=f"no part {wanted!r}", expected=f"one of its parts ({known})", hint=hint)
    return Source(name, splits[wanted])


def _dataset(name: str, arguments: DataArguments, split: str | None = None) -> Any:
    """The splits of a dataset of the hub, of a folder of files, or of one that `save_to_disk` wrote."""
    import datasets

    if _on_disk(name):
        found = _load("load the dataset", name, lambda: datasets.load_from_disk(name))
        splits = found if isinstance(found, dict) else {"train": found}
        return {part: table.to_iterable_dataset() for part, table in splits.items()} if arguments.streaming else splits
    options = {"revision": arguments.dataset_revision, "streaming": arguments.streaming, "split": split}
    return _load("load the dataset", name, lambda: datasets.load_dataset(name, arguments.dataset_config_name, **options), _missing(name))


def _on_disk(name: str) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _missing(name: str) -> str:
    if Path(name).exists():
        return "The folder must hold files that datasets knows (.jsonl, .csv, .parquet, .txt, images), or be written by save_to_disk."
    return "Check the name and the network, or give a local folder as dataset_name, or files as train_file."


def _image_folder(folder: str, streaming: bool) -> dict[str, Any]:
    import datasets

    if not Path(folder).is_dir():
        raise DataError("read the images", subject=folder, got="no such folder")
    hint = "It must hold a folder of images for each class, or images and a metadata.jsonl with their file_name."
    return _load("read the images", folder, lambda: datasets.load_dataset("imagefolder", data_dir=folder, streaming=streaming), hint)


def _load(action: str, name: str, work: Callable[[], Any], hint: str | None = None) -> Any:
    """What `work` loads; what goes wrong there as one error on one line."""
    try:
        with _quiet_datasets():
            return work()
    except Exception as error:
        raise DataError(action, subject=name, got=reading_error(error), hint=hint) from error


def reading_error(error: BaseException) -> str:
    """A library's error on one line, with its class where the text alone says little."""
    text = " ".join(str(error).split())[:200]
    return text if len(text) > 20 else f"{type(error).__name__} {text}".strip()


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Reading a file shows no progress bar and logs nothing: what goes wrong is said once, by our error."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, disabled = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not disabled:
            enable_progress_bars()
