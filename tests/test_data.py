"""Text from files, cut into examples, in an order that depends on seed and position only."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kanformer.errors import DataError
from kanformer.training.data import Order, load_texts, micro_batches, pack, pad, pad_token, read_lines, tokenize
from kanformer.training.settings import DataArguments
from training_cases import texts, tokenizer, write_text

ROWS = [{"text": text, "label": number % 2} for number, text in enumerate(texts(20))]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(path: Path, rows: list[dict]) -> str:
    """Writes rows in the format that the file's ending names."""
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        frame = datasets.Dataset.from_list(rows)
        frame.to_csv(path) if path.suffix == ".csv" else frame.to_parquet(path)
    return str(path)


def load(path: str, columns: tuple[str, ...] = ("text",), **settings):
    return load_texts(DataArguments(train_file=path, **settings), columns)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_table_format_gives_the_same_columns(tmp_path, suffix):
    train, held = load(table(tmp_path / f"t.{suffix}", ROWS), ("text", "label"), validation_split_percentage=25)
    assert [*train["text"], *held["text"]] == [row["text"] for row in ROWS] and len(held["text"]) == 5
    assert [*train["label"], *held["label"]] == [row["label"] for row in ROWS]


def test_a_text_file_gives_its_lines_that_are_not_empty(tmp_path):
    (tmp_path / "t.txt").write_text("\ufeffone\n\n  two  \r\n \t\nthrée\n", encoding="utf-8")
    assert read_lines(tmp_path / "t.txt") == ["one", "two", "thrée"]


def test_held_out_text_is_disjoint_and_at_least_one(tmp_path):
    path = write_text(tmp_path / "t.txt", 10)
    train, held = load(path, validation_split_percentage=1)
    assert (train["text"], held["text"]) == (texts(10)[:9], texts(10)[9:])
    other = write_text(tmp_path / "v.txt", 4, seed=1)
    train, held = load(path, validation_file=other, max_train_samples=3)
    assert (train["text"], held["text"]) == (texts(10)[:3], texts(4, seed=1))


def test_rows_without_text_are_left_out_with_their_labels(tmp_path):
    rows = [{"text": "a b", "label": 0}, {"text": "  ", "label": 1}, {"text": None, "label": 2}, {"text": "c d", "label": 3}]
    train, held = load(table(tmp_path / "t.jsonl", rows), ("text", "label"), validation_split_percentage=50)
    assert (train, held) == ({"text": ["a b"], "label": [0]}, {"text": ["c d"], "label": [3]})


@pytest.mark.parametrize("content", [b"", b" \n\n\t\n"], ids=["no-bytes", "blank"])
def test_an_empty_text_file_is_refused(tmp_path, content):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(DataError, match="got an empty file"):
        load(str(tmp_path / "t.txt"))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe\x9c broken \xe4"], ids=["empty", "broken"])
def test_a_table_that_cannot_be_read_is_refused_on_one_line(tmp_path, suffix, content, capfd):
    (tmp_path / f"t.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the text \(.*t\.") as caught:
        load(str(tmp_path / f"t.{suffix}"), ("text", "label"))
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_bytes_that_are_not_utf8_are_named_by_their_position(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"gut\n" + "schön".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 at position 7.*iconv"):
        load(str(tmp_path / "t.txt"))


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.csv", "none.parquet", "."])
def test_a_missing_file_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"[Nn]o such file|directory"):
        load(str(tmp_path / name))


def test_a_missing_column_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(DataError, match="no column 'txt'.*Did you mean 'text'"):
        load(table(tmp_path / "t.jsonl", ROWS), ("txt",))


def test_labels_need_a_table(tmp_path):
    with pytest.raises(DataError, match="got a .txt file, expected .jsonl, .csv or .parquet with the columns text, label"):
        load(write_text(tmp_path / "t.txt"), ("text", "label"))


def test_one_text_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match="got 1 row, expected at least 2"):
        load(write_text(tmp_path / "t.txt", 1))


def test_no_source_at_all_is_refused():
    with pytest.raises(DataError, match="neither train_file nor dataset_name nor train_dir"):
        load_texts(DataArguments(), ["text"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 5, "label": 0}, {"text": 6, "label": 1}], "in column 'text', expected text"),
        ([{"text": ["a", "b"], "label": 0}, {"text": ["c"], "label": 1}], "in column 'text', expected text"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": None}], "column 'label'.*no value"),
    ],
    ids=["numbers", "lists", "no-label"],
)
def test_columns_of_the_wrong_content_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load(table(tmp_path / "t.jsonl", rows), ("text", "label"))


def test_a_dataset_brings_its_own_held_out_part(monkeypatch):
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", ROWS[:8]), ("test", ROWS[8:]))}
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: parts)
    train, held = load_texts(DataArguments(dataset_name="mine"), ["text"])
    assert (len(train["text"]), len(held["text"])) == (8, 12)
    del parts["train"]
    with pytest.raises(DataError, match="load the dataset.*mine.*no part 'train'"):
        load_texts(DataArguments(dataset_name="mine"), ["text"])


def test_tokenize_cuts_and_refuses_texts_without_tokens():
    assert [len(example) for example in tokenize(tokenizer(), [" ".join(["bad"] * 9), "kuf"], 4)] == [4, 1]
    with pytest.raises(DataError, match="without a single token"):
        tokenize(tokenizer(), ["", " "], 4)


def test_pack_loses_nothing_but_the_last_part_of_a_block():
    mine = tokenizer()
    blocks = pack(mine, texts(9), 8)
    stream = [token for text in texts(9) for token in (*mine(text)["input_ids"], mine.eos_token_id)]
    assert sum(blocks, []) == stream[: len(stream) // 8 * 8] and {len(block) for block in blocks} == {8}


def test_less_text_than_one_block_is_refused():
    with pytest.raises(DataError, match="got 3 tokens, expected at least one block of 4.*smaller max_length"):
        pack(tokenizer(), ["bad bad"], 4)
    assert len(pack(tokenizer(), ["bad bad"], 3)) == 1


def test_pad_marks_what_is_text():
    batch = pad([[5, 6, 7], [8]], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]] and batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_models_without_a_padding_token_are_padded_with_the_end():
    mine = tokenizer()
    assert pad_token(mine) == 0
    mine.pad_token = None
    assert pad_token(mine) == mine.eos_token_id


@given(size=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 50))
def test_every_epoch_reads_every_example_once(size, seed, epoch):
    order = Order(size, seed)
    assert sorted(order[position] for position in range(epoch * size, (epoch + 1) * size)) == list(range(size))


@given(positions=st.lists(st.integers(0, 500), max_size=30))
def test_an_example_depends_on_seed_and_position_only(positions):
    straight = [Order(23, 7)[position] for position in positions]
    torch.manual_seed(99)
    order = Order(23, 7)
    assert [order[position] for position in positions] == straight


@given(size=st.integers(1, 60), group=st.integers(1, 7), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_grouping_by_length_still_reads_every_example_once_per_epoch(size, group, seed, epoch):
    lengths = torch.randint(1, 30, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    read = [Order(size, seed, lengths, group)[position] for position in range(epoch * size, (epoch + 1) * size)]
    order = Order(size, seed, lengths, group)
    assert sorted(read) == list(range(size)) and read[::-1] == [order[position] for position in range((epoch + 1) * size - 1, epoch * size - 1, -1)]


def test_grouped_steps_hold_texts_of_similar_length_in_no_order():
    lengths = torch.randint(1, 100, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    padding = {}
    for name, order in (("plain", Order(400, 0)), ("grouped", Order(400, 0, lengths, 8))):
        steps = [[lengths[order[position]] for position in range(start, start + 8)] for start in range(0, 400, 8)]
        padding[name] = sum(8 * max(step) - sum(step) for step in steps) / sum(lengths)
    assert padding["grouped"] < 0.5 * padding["plain"] and padding["plain"] > 0.4
    assert [max(step) for step in steps] != sorted(max(step) for step in steps)


def test_seeds_and_epochs_differ_and_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    epochs = {tuple(Order(30, seed)[position] for position in range(start, start + 30)) for seed in range(5) for start in (0, 30, 60)}
    assert len(epochs) == 15 and torch.equal(before, torch.get_rng_state())


@given(world=st.integers(1, 4), accumulation=st.integers(1, 4), size=st.integers(1, 5), step=st.integers(0, 9))
def test_processes_and_micro_batches_share_one_stream(world, accumulation, size, step):
    order, share = Order(29, 3), size * world * accumulation
    read = [list(micro_batches(order, step, rank, world, size, accumulation)) for rank in range(world)]
    assert all(len(batch) == size for batches in read for batch in batches)
    stream = [index for micro in range(accumulation) for rank in range(world) for index in read[rank][micro]]
    assert stream == [order[position] for position in range(step * share, (step + 1) * share)]
    assert stream == next(micro_batches(order, step, 0, 1, share, 1))
