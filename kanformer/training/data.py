"""Text from files or Hugging Face datasets, cut into examples, in an order that depends on nothing but (seed, position)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kanformer.errors import DataError, did_you_mean
from kanformer.training.settings import DataArguments

_WINDOW = 64  # groups among which texts are sorted by length
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_lines(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file.

    Raises:
        DataError: missing, empty or not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "read the text",
            subject=path,
            got=f"bytes that are not UTF-8 at position {error.start:,}",
            hint="Convert the file to UTF-8, for example with iconv.",
        ) from error
    except OSError as error:
        raise DataError("read the text", subject=path, got=error.strerror or str(error)) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError("read the text", subject=path, got="an empty file", expected="a text per line")
    return lines


def load_texts(arguments: DataArguments, columns: Sequence[str]) -> tuple[dict[str, list], dict[str, list]]:
    """(training, held-out) columns. Without held-out data the last part of the training data is held out.

    Raises:
        DataError: no source, an unreadable file, a missing column, too few texts.
    """
    if arguments.dataset_name:
        train, held = _from_hub(arguments, columns)
    elif arguments.train_file:
        train = file_columns(arguments.train_file, columns)
        held = file_columns(arguments.validation_file, columns) if arguments.validation_file else None
    else:
        raise DataError("load the training text", got="neither train_file nor dataset_name", hint="Give one of them in the config or on the command line.")
    if held is None:
        total = len(train[columns[0]])
        cut = max(1, round(total * arguments.validation_split_percentage / 100))
        if total < 2:
            raise DataError("hold out validation text", got=f"{total} text", expected="at least 2", hint="Give more text, or a validation_file.")
        train, held = ({name: values[:-cut] for name, values in train.items()}, {name: values[-cut:] for name, values in train.items()})
    train, held = (
        {name: values[:limit] for name, values in part.items()} for part, limit in ((train, arguments.max_train_samples), (held, arguments.max_eval_samples))
    )
    return train, held


def file_columns(path: str, columns: Sequence[str]) -> dict[str, list]:
    """The named columns of a .jsonl, .json, .csv or .parquet file; the lines of any other file as the only one.

    Raises:
        DataError: an unreadable file, a missing column, no text.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _BUILDERS:
        if len(columns) > 1:
            raise DataError(
                "read labelled text",
                subject=path,
                got=f"a {suffix or 'plain'} file",
                expected=".jsonl, .csv or .parquet with the columns " + ", ".join(columns),
            )
        return {columns[0]: read_lines(path)}
    if not Path(path).is_file():
        raise DataError("read the text", subject=path, got="no such file")
    from datasets import load_dataset

    try:
        with _quiet_datasets():
            table = load_dataset(_BUILDERS[suffix], data_files=path, split="train")
    except Exception as error:
        raise DataError("read the text", subject=path, got=" ".join(str(error).split())[:200]) from error
    return _columns(table, columns, path)


def _from_hub(arguments: DataArguments, columns: Sequence[str]) -> tuple[dict[str, list], dict[str, list] | None]:
    from datasets import load_dataset

    try:
        splits = load_dataset(str(arguments.dataset_name), arguments.dataset_config_name)
    except Exception as error:
        raise DataError("load the dataset", subject=arguments.dataset_name, got=" ".join(str(error).split())[:200]) from error
    held = next((splits[name] for name in ("validation", "test") if name in splits), None)
    name = str(arguments.dataset_name)
    if "train" not in splits:
        raise DataError("load the dataset", subject=name, got="no part 'train'", expected=f"one of its parts ({', '.join(map(str, splits))}) to be called so")
    return _columns(splits["train"], columns, name), None if held is None else _columns(held, columns, name)


def _columns(table: Any, columns: Sequence[str], source: str) -> dict[str, list]:
    for name in columns:
        if name not in table.column_names:
            raise DataError("read the text", subject=source, got=f"no column {name!r}", hint=did_you_mean(name, table.column_names))
    rows = [row for row in zip(*(table[name] for name in columns), strict=True) if row[0] is not None and str(row[0]).strip()]
    if not rows:
        raise DataError("read the text", subject=source, got="no text in it")
    for row in rows:
        if not isinstance(row[0], str):
            raise DataError("read the text", subject=source, got=f"{row[0]!r} in column {columns[0]!r}", expected="text")
        for name, value in zip(columns[1:], row[1:], strict=True):
            if value is None:
                raise DataError("read the text", subject=source, got=f"a row whose column {name!r} has no value")
    return {name: [row[index] for row in rows] for index, name in enumerate(columns)}


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


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """One example per text, cut at max_length; texts without tokens are dropped."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    examples = [example for example in ids if example]
    if not examples:
        raise DataError("tokenize", got="texts without a single token")
    return examples


def pack(tokenizer: Any, texts: Sequence[str], block_size: int) -> list[list[int]]:
    """All texts in a row, separated by the end-of-text token, cut into blocks of exactly block_size tokens.

    Raises:
        DataError: less text than one block.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream = [token for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in (*ids, *end)]
    blocks = [stream[start : start + block_size] for start in range(0, len(stream) - block_size + 1, block_size)]
    if not blocks:
        raise DataError(
            "cut the text into blocks",
            got=f"{len(stream):,} tokens",
            expected=f"at least one block of {block_size}",
            hint="Give more text or a smaller max_length.",
        )
    return blocks


def pad(examples: Sequence[Sequence[int]], pad_id: int, round_to: int = 1, limit: int | None = None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (examples, longest), with longest rounded up to a multiple of `round_to` but not above `limit`.

    Few different shapes keep the caches of compiled GEMMs small.
    """
    longest = max(len(example) for example in examples)
    rounded = -(-longest // round_to) * round_to
    longest = rounded if limit is None else max(longest, min(rounded, limit))
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example)
        mask[row, : len(example)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pad_token(tokenizer: Any) -> int:
    """The padding token's number; models without one are padded with the end-of-text token, which the mask hides."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


class Order:
    """Which example stands at which position of the endless stream of shuffled epochs.

    Args:
        size: number of examples.
        seed: of the shuffling; the stream depends on nothing else, so it can be entered anywhere.
        lengths: tokens of each example; given, steps of `group` examples hold texts of similar length, to save padding.
        group: examples per optimizer step, over all processes.
    """

    def __init__(self, size: int, seed: int, lengths: Sequence[int] | None = None, group: int = 1) -> None:
        self.size, self.seed, self.lengths, self.group = size, seed, lengths, group
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
            self._epoch, self._order = epoch, order if self.lengths is None else self._by_length(order, self.lengths, generator)
        return self._order[index]

    def _by_length(self, order: list[int], lengths: Sequence[int], generator: torch.Generator) -> list[int]:
        """Sorts windows of _WINDOW groups by length and shuffles the groups in each; what fills no group stays at the end."""
        grouped: list[int] = []
        whole = self.size - self.size % self.group
        for start in range(0, whole, _WINDOW * self.group):
            window = sorted(order[start : min(start + _WINDOW * self.group, whole)], key=lambda index: lengths[index])
            for number in torch.randperm(len(window) // self.group, generator=generator).tolist():
                grouped += window[number * self.group : (number + 1) * self.group]
        return grouped + order[whole:]


def micro_batches(order: Order, step: int, rank: int, world: int, batch_size: int, accumulation: int) -> Iterator[list[int]]:
    """The examples of one process in one step, micro-batch by micro-batch; all processes together read consecutive positions."""
    start = step * world * batch_size * accumulation
    for micro in range(accumulation):
        first = start + (micro * world + rank) * batch_size
        yield [order[position] for position in range(first, first + batch_size)]
