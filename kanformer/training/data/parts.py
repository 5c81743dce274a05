"""The training and the held-out part of the data, as tables or streamed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from kanformer.errors import ConfigError, DataError
from kanformer.training.data.columns import TEXT, VALUE, Column, pick
from kanformer.training.data.packing import tokenize, tokenize_streamed
from kanformer.training.data.sources import Source, open_sources, read_files
from kanformer.training.data.streams import Rows, Stream, hold_out_first
from kanformer.training.data.tables import Table, hold_out
from kanformer.training.settings import DataArguments


def open_data(arguments: DataArguments, columns: Sequence[Column], *, mix: bool = False, seed: int | None = 0) -> tuple[Table | Rows, Table]:
    """(training rows, held-out rows) of what the settings name.

    Without held-out data the last part of the training data is held out; of a stream the first `validation_samples` rows, and the stream starts after
    them. Of a streamed held-out source no more rows are read either.

    Args:
        mix: bring the training rows into an order of their own first, so that neither what is held out nor `max_train_samples` is of one class only
            where the data are sorted. Not for streams.
        seed: of a stream's order; None leaves it as it is.

    Raises:
        ConfigError: settings that do not go together. DataError: no source, unreadable data, a missing column, too few rows.
    """
    train, held = open_sources(arguments)
    if arguments.streaming:
        return _streamed(arguments, train, held, tuple(columns), seed)
    table = Table.read(train, columns)
    table = table.mixed() if mix else table
    if held is None:
        table, other = hold_out(table, arguments.validation_split_percentage)
    else:
        other = Table.read(held, columns)
    return table.first(arguments.max_train_samples), other.first(arguments.max_eval_samples)


def _streamed(arguments: DataArguments, train: Source, held: Source | None, columns: tuple[Column, ...], seed: int | None) -> tuple[Rows, Table]:
    train, count, skip = pick(train, columns), arguments.validation_samples, 0
    if held is None:
        other, skip = hold_out_first(train, columns, count)
    else:
        other, _ = hold_out_first(pick(held, columns), columns, count)
    rows = Rows(train, columns, arguments.shuffle_buffer_size, seed, skip, arguments.max_train_samples)
    if skip and next(rows.windows(0, 0), None) is None:
        raise DataError(
            "hold out validation data",
            subject=train.name,
            got=f"a stream of {skip:,} rows",
            expected=f"more than validation_samples={count:,}",
            hint="Lower --validation_samples, give validation_file, or do without streaming.",
        )
    return rows, other.first(arguments.max_eval_samples)


def load_texts(arguments: DataArguments, columns: Sequence[str]) -> tuple[dict[str, list], dict[str, list]]:
    """(training, held-out) columns, the first of them text. Without held-out data the last part of the training data is held out.

    Raises:
        ConfigError: the settings ask for a stream. DataError: no source, an unreadable file, a missing column, too few texts.
    """
    if arguments.streaming:
        raise ConfigError(
            "load the text",
            got="streaming=true",
            hint="This command reads all texts at once: leave streaming out.",
        )
    train, held = open_data(arguments, text_columns(columns))
    assert isinstance(train, Table)
    return train.all(), held.all()


def open_texts(arguments: DataArguments, seed: int | None = 0) -> tuple[Table | Rows, Table]:
    """The same for the texts alone, streamed or not, see `open_data`."""
    return open_data(arguments, text_columns([arguments.text_column]), seed=seed)


def first_texts(part: Table | Rows, count: int) -> list[str]:
    """The first `count` texts of a part that holds texts alone, of a stream before it is shuffled."""
    name = part.columns[0].name
    if isinstance(part, Table):
        return part.first(count).values(name)
    windows = dataclasses.replace(part, seed=None).windows(0, 0)
    return list(itertools.islice((row[name] for _, rows in windows for row in rows), count))


def text_examples(part: Table | Rows, tokenizer: Any, max_length: int) -> list[list[int]] | Stream:
    """The token ids of each text of a part that holds texts alone, cut at `max_length`."""
    name = part.columns[0].name
    if isinstance(part, Table):
        return tokenize(tokenizer, part.values(name), max_length)
    return Stream(part, lambda row: tokenize_streamed(tokenizer, row[name], max_length))


def load_held_out(arguments: DataArguments, columns: Sequence[str]) -> dict[str, list]:
    """The held-out columns alone, streamed or not, see `load_texts` and `open_data`."""
    return open_data(arguments, text_columns(columns))[1].all()


def file_columns(path: str | Sequence[str], columns: Sequence[str]) -> dict[str, list]:
    """The named columns of .jsonl, .json, .csv or .parquet files (a path, a glob or a list of them); the lines of any other file as the only one.

    Raises:
        DataError: an unreadable file, a missing column, no text.
    """
    return Table.read(read_files(path), text_columns(columns)).all()


def text_columns(names: Sequence[str]) -> list[Column]:
    """The first is text, the others hold any value."""
    return [Column(name, TEXT if number == 0 else VALUE) for number, name in enumerate(names)]
