"""Streams: the same examples as tables give, an order that depends on (seed, position) only, entered anywhere, no more than a window in memory."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_cases import ROWS, TEXTS, each_source, own_cache, source, table  # noqa: F401
from kanformer.errors import ConfigError, DataError
from kanformer.training.data import TEXT, Column, Packer, Stream, load_held_out, load_texts, open_data, pack, tokenize, tokenize_streamed
from kanformer.training.data.sources import Source
from kanformer.training.data.streams import Rows
from kanformer.training.settings import DataArguments
from training_cases import tokenizer

WORDS = (Column("text", TEXT),)


class Numbers:
    """A streamed table of texts "0", "1", ... that counts how many rows were made."""

    features, column_names = None, ["text"]

    def __init__(self, size: int, first: int = 0, made: list[int] | None = None, fail_at: int | None = None) -> None:
        self.size, self.start, self.made, self.fail_at = size, first, [0] if made is None else made, fail_at

    def skip(self, count: int):
        return Numbers(self.size, self.start + count, self.made, self.fail_at)

    def take(self, count: int):
        return Numbers(min(self.size, self.start + count), self.start, self.made, self.fail_at)

    def __iter__(self):
        for number in range(self.start, self.size):
            if number == self.fail_at:
                raise OSError("the line is dead")
            self.made[0] += 1
            yield {"text": str(number)}


def numbers(size: int, window: int = 4, seed: int | None = 0, **settings) -> Rows:
    return Rows(Source("numbers", Numbers(size, fail_at=settings.pop("fail_at", None))), WORDS, window, seed, **settings)


def texts_of(rows: Rows) -> Stream:
    return Stream(rows, lambda row: row["text"])


def read(stream: Stream, count: int, first: int = 0) -> list:
    return [stream[position] for position in range(first, first + count)]


def portion(size: int) -> list[str]:
    return [" ".join(["bad", "kuf", "milo"][: 1 + number % 3]) for number in range(size)]


@given(size=st.integers(1, 30), window=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_gives_every_text_once_and_epochs_differ(size, window, seed):
    found = read(texts_of(numbers(size, window, seed)), 3 * size)
    epochs = [found[start : start + size] for start in range(0, 3 * size, size)]
    assert all(sorted(epoch, key=int) == [str(number) for number in range(size)] for epoch in epochs)
    for epoch in epochs:  # a text leaves its window for no other
        assert all({*epoch[start : start + window]} == {str(n) for n in range(start, min(start + window, size))} for start in range(0, size, window))


def test_seeds_and_epochs_and_windows_have_orders_of_their_own_and_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    orders = set()
    for seed in range(3):
        found = [int(text) % 50 for text in read(texts_of(numbers(100, 50, seed)), 200)]
        orders |= {tuple(found[start : start + 50]) for start in (0, 50, 100, 150)}
    assert len(orders) == 12 and torch.equal(before, torch.get_rng_state())


@given(stop=st.integers(0, 60), ahead=st.integers(0, 9))
def test_a_stream_goes_on_from_its_state_wherever_it_stopped(stop, ahead):
    straight, first = read(texts_of(numbers(17)), 80), texts_of(numbers(17))
    read(first, stop)
    second = texts_of(numbers(17))
    second.load(first.state())
    assert read(second, 10, stop + ahead) == straight[stop + ahead : stop + ahead + 10]


@given(stop=st.integers(0, 40))
def test_a_packed_stream_goes_on_from_its_state_wherever_it_stopped(stop):
    def make() -> Stream:
        source = Numbers(23)
        source.__class__ = type("Words", (Numbers,), {"__iter__": lambda self: iter([{"text": text} for text in portion(23)[self.start :]]), "skip": _skip})
        return Stream(Rows(Source("words", source), WORDS, 5, 1), lambda block: block, Packer(tokenizer(), 4))

    straight, first = read(make(), 60), make()
    read(first, stop)
    second = make()
    second.load(first.state())
    assert read(second, 15, stop) == straight[stop : stop + 15] and all(len(block) == 4 for block in straight)


def _skip(self, count):
    other = Numbers(self.size, self.start + count)
    other.__class__ = type(self)
    return other


def test_going_on_reads_past_the_rows_before_without_encoding_them():
    encoded = []
    rows = numbers(1000, 10)
    stream = Stream(rows, lambda row: encoded.append(row["text"]) or row["text"])
    straight = read(texts_of(numbers(1000, 10)), 1000)
    read(stream, 503)
    state, again = stream.state(), Stream(numbers(1000, 10), lambda row: encoded.append(row["text"]) or row["text"])
    encoded.clear()
    again.load(state)
    assert read(again, 4, 503) == straight[503:507] == encoded
    assert again.rows.source.table.made[0] <= 10  # datasets' own skip stands in for the rest


def test_a_process_encodes_its_own_examples_alone():
    encoded = []
    stream = Stream(numbers(100), lambda row: encoded.append(row["text"]) or row["text"])
    chosen = [position for position in range(40) if position // 2 % 2]
    found = [stream[position] for position in chosen]
    assert found == encoded and found == [read(texts_of(numbers(100)), 40)[position] for position in chosen]


def test_no_more_than_two_windows_of_rows_are_alive():
    class Row(dict):
        pass

    alive: weakref.WeakSet = weakref.WeakSet()

    class Watched(Numbers):
        def __iter__(self):
            for number in range(self.start, self.size):
                row = Row(text=str(number))
                row.__class__.__hash__ = object.__hash__  # type: ignore[method-assign]
                alive.add(row)
                yield row

        def skip(self, count):
            return Watched(self.size, self.start + count)

    stream, most = texts_of(Rows(Source("watched", Watched(2000)), WORDS, 20, 0)), 0
    for position in range(1500):
        assert stream[position]
        most = max(most, len(alive))
    assert 20 <= most <= 41


def test_going_back_starts_anew():
    stream = texts_of(numbers(30))
    straight = read(stream, 30)
    assert stream[25] == straight[25] and stream[2] == straight[2] and stream[29] == straight[29]


def test_skipped_rows_never_come_and_a_limit_ends_the_epoch():
    found = read(texts_of(numbers(30, 4, None, skip=5, limit=12)), 24)
    assert found == [str(number) for number in range(5, 17)] * 2


@each_source
def test_streamed_and_mapped_examples_of_the_same_unshuffled_data_are_the_same(tmp_path, own_cache, kind):  # noqa: F811
    settings, mine = source(tmp_path, kind, ROWS), tokenizer()
    held = {"validation_file": table(tmp_path / "v.jsonl", ROWS[:2])}
    rows, _ = open_data(DataArguments(**settings, **held, streaming=True, shuffle_buffer_size=3), WORDS, seed=None)
    mapped = load_texts(DataArguments(**settings, **held), ["text"])[0]["text"]
    assert mapped == TEXTS
    assert read(Stream(rows, lambda row: tokenize_streamed(mine, row["text"], 7)), 20) == tokenize(mine, mapped, 7)
    blocks = pack(mine, mapped, 8)
    assert read(Stream(rows, lambda block: block, Packer(mine, 8)), 2 * len(blocks)) == 2 * blocks


def test_the_first_texts_are_held_out_and_a_held_out_file_is_cut(tmp_path, own_cache):  # noqa: F811
    path = table(tmp_path / "t.jsonl", [{"text": " "}, *ROWS])
    rows, held = open_data(DataArguments(train_file=path, streaming=True, validation_samples=6, max_eval_samples=4), WORDS, seed=None)
    assert held.values("text") == TEXTS[:4] and read(texts_of(rows), 14) == TEXTS[6:]
    arguments = DataArguments(train_file=path, validation_file=path, streaming=True, validation_samples=3)
    assert load_held_out(arguments, ["text"]) == {"text": TEXTS[:3]} and read(texts_of(open_data(arguments, WORDS, seed=None)[0]), 20) == TEXTS


def test_bad_streams_are_refused(tmp_path, own_cache):  # noqa: F811
    path = table(tmp_path / "t.jsonl", ROWS)
    with pytest.raises(DataError, match="a stream of 20 rows, expected more than validation_samples=20.*Lower --validation_samples"):
        open_data(DataArguments(train_file=path, streaming=True, validation_samples=20), WORDS)
    with pytest.raises(ConfigError, match="got streaming=true"):
        load_texts(DataArguments(train_file=path, streaming=True), ["text"])
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="no row that can be used"):
        open_data(DataArguments(train_file=str(tmp_path / "empty.txt"), streaming=True), WORDS)
    with pytest.raises(DataError, match="5 in column 'text', expected text"):
        open_data(DataArguments(train_file=table(tmp_path / "n.jsonl", [{"text": 5}]), streaming=True), WORDS)
    (tmp_path / "latin.txt").write_bytes(b"gut\n" * 3000 + "schön".encode("latin-1"))
    rows, _ = open_data(DataArguments(train_file=str(tmp_path / "latin.txt"), streaming=True, validation_samples=2), WORDS, seed=None)
    with pytest.raises(DataError, match="not UTF-8 at position 12,003"):
        read(texts_of(rows), 2999)


def test_a_stream_that_breaks_off_or_is_empty_or_too_short_says_so():
    with pytest.raises(DataError, match=r"read the stream \(numbers\): got .*the line is dead.*--resume"):
        read(texts_of(numbers(30, fail_at=9)), 20)
    with pytest.raises(DataError, match="no row that can be used"):
        read(texts_of(numbers(0)), 1)
    with pytest.raises(DataError, match="got 6 tokens, expected at least one block of 8"):
        read(Stream(numbers(3), lambda block: block, Packer(tokenizer(), 8)), 1)


def test_what_packing_leaves_over_is_told_once():
    told: list[str] = []
    stream = Stream(numbers(9), lambda block: block, Packer(tokenizer(), 4), tell=told.append)
    read(stream, 30)
    assert told == ["packed 18 tokens into 4 blocks of 4; the last 2 fill none and are left out"]
    assert len(list(itertools.islice(stream.rows.windows(0, 0), 9))) == 3
