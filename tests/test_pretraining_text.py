"""Vocabularies, the split, blocks, and bits per byte."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kanformer.errors import CheckpointError, ConfigError, DataError
from kanformer.pretraining.arms import ARMS, make_model
from kanformer.pretraining.settings import ModelArguments
from kanformer.pretraining.task import PretrainTask
from kanformer.pretraining.text import END_OF_TEXT, blocks, bpe_tokenizer, char_tokenizer, load_data, prepare_data, split_text
from kanformer.training.data import Order
from pretraining_cases import SHAPE, settings

TEXT = "Der Käse, «so alt»:\n\n  zwei  Leerzeichen\tund 🙂 Tabs.\nThe end's near, isn't it? <|endo"


@pytest.fixture(scope="module")
def char():
    return char_tokenizer(TEXT)


@pytest.fixture(scope="module")
def bpe():
    return bpe_tokenizer(TEXT * 20, 300)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_characters_go_there_and_back_one_by_one(char):
    found = ids(char, TEXT)
    assert len(found) == len(TEXT) and char.decode(found) == TEXT
    assert len(char) == len(set(TEXT)) + 1 and char.eos_token_id == 0 and 0 not in found


def test_a_character_that_was_not_there_is_the_end_of_text(char):
    assert ids(char, "eße") == [*ids(char, "e"), 0, *ids(char, "e")]


@given(st.text(max_size=40))
def test_bpe_goes_there_and_back_for_any_text(bpe, text):
    if END_OF_TEXT not in text:
        assert bpe.decode(ids(bpe, text)) == text


def test_bpe_has_at_most_the_tokens_that_were_asked_for_and_learned_some(bpe):
    assert 257 < len(bpe) <= 300 and len(ids(bpe, TEXT)) < len(TEXT.encode())
    assert bpe.eos_token == END_OF_TEXT and bpe.eos_token_id == 0


def test_the_text_is_split_by_position_and_only_the_first_part_makes_the_vocabulary(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("ab" * 90 + "xyz!" * 5, encoding="utf-8")
    arguments = settings(tmp_path, text=str(path))
    train, held = split_text(arguments)
    assert (train, held) == ("ab" * 90, "xyz!" * 5)
    corpus = prepare_data(arguments, tmp_path / "data")
    assert len(corpus.tokenizer) == 3 and corpus.held.tolist() == [0] * 20 and corpus.held_bytes.tolist() == [1] * 20


@pytest.mark.parametrize("vocabulary", ["char", "bpe"])
def test_data_are_written_once_and_read_back_the_same(tmp_path, vocabulary):
    arguments = settings(tmp_path, vocabulary=vocabulary, vocab_size=300)
    first = prepare_data(arguments, tmp_path / "data")
    before = (tmp_path / "data" / "tokens.safetensors").stat().st_mtime_ns
    again = prepare_data(arguments, tmp_path / "data")
    assert (tmp_path / "data" / "tokens.safetensors").stat().st_mtime_ns == before
    train, held = split_text(arguments)
    for corpus in (first, again):
        assert corpus.tokenizer.decode(corpus.train.tolist()) == train and corpus.tokenizer.decode(corpus.held.tolist()) == held
        assert int(corpus.held_bytes.sum()) == len(held.encode())


def test_another_text_or_vocabulary_in_the_same_folder_is_refused(tmp_path):
    prepare_data(settings(tmp_path), tmp_path / "data")
    with pytest.raises(ConfigError, match="another text or vocabulary"):
        prepare_data(settings(tmp_path, vocabulary="bpe"), tmp_path / "data")
    with open(tmp_path / "story.txt", "a", encoding="utf-8") as file:
        file.write("more")
    with pytest.raises(ConfigError, match="another text or vocabulary"):
        prepare_data(settings(tmp_path), tmp_path / "data")


def test_damaged_data_are_named(tmp_path):
    prepare_data(settings(tmp_path), tmp_path / "data")
    (tmp_path / "data" / "tokens.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="data"):
        load_data(tmp_path / "data")


@pytest.mark.parametrize(
    "content, match", [("", "0 characters"), ("a", "1 characters"), ("ab" * 20, "held-out part of .*: got 4 tokens, expected at least one block of 8")]
)
def test_too_little_text_is_refused_and_leaves_nothing(tmp_path, content, match):
    path = tmp_path / "t.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=match):
        prepare_data(settings(tmp_path, text=str(path)), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_no_text_and_a_file_that_is_none_are_refused(tmp_path):
    for text, match in [("", "--text FILE"), (str(tmp_path / "none.txt"), "No such file"), (str(tmp_path), "directory")]:
        with pytest.raises(DataError, match=match):
            split_text(settings(tmp_path, text=text))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bad\.txt"):
        split_text(settings(tmp_path, text=str(tmp_path / "bad.txt")))


@given(st.integers(9, 60), st.integers(2, 8))
def test_every_token_but_the_first_is_predicted_at_most_once(count, length):
    found = blocks(torch.arange(count), length)
    targets = found[:, 1:].flatten().tolist()
    assert targets == list(range(1, len(targets) + 1)) and count - 1 - len(targets) < length
    assert found.shape[1] == length + 1


def task_of(corpus, eval_blocks, arm="mlp"):
    torch.manual_seed(0)
    shape = ModelArguments(**SHAPE)
    return PretrainTask(make_model(ARMS[arm], shape, 24, len(corpus.tokenizer)), corpus, shape.max_length, eval_blocks, 3)


@pytest.mark.parametrize("eval_blocks", [5, 10_000])
def test_loss_and_bits_per_byte_against_one_token_at_a_time(tmp_path, eval_blocks):
    corpus = prepare_data(settings(tmp_path, vocabulary="bpe", vocab_size=300), tmp_path / "data")
    task = task_of(corpus, eval_blocks)
    task.model.eval()
    with torch.no_grad():
        found = task.evaluate()
        nats = tokens = width = 0.0
        rows = blocks(corpus.held, 8)
        chosen = sorted({number * len(rows) // min(eval_blocks, len(rows)) for number in range(min(eval_blocks, len(rows)))})
        for row in chosen:
            piece = corpus.held[row * 8 : row * 8 + 9].long()
            scores = task.model(input_ids=piece[None, :-1]).logits.double().log_softmax(-1)[0]
            nats -= sum(float(scores[place, piece[place + 1]]) for place in range(8))
            tokens += 8
            width += len(corpus.tokenizer.decode(corpus.held[: row * 8 + 9].tolist()).encode("utf-8", "replace")) - len(
                corpus.tokenizer.decode(corpus.held[: row * 8 + 1].tolist()).encode("utf-8", "replace")
            )
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / width, rel=0.02)  # a letter that is cut in two decodes to another width
    assert int(task.held_bytes) == int(sum(corpus.held_bytes[row * 8 + 1 : row * 8 + 9].sum() for row in chosen))


def test_all_arms_see_the_same_blocks_in_the_same_order(tmp_path):
    corpus = prepare_data(settings(tmp_path), tmp_path / "data")
    seen = []
    for arm in ARMS:
        task = task_of(corpus, 7, arm)
        order = Order(task.examples, 3)
        batches = [task.batch([order[4 * step + place] for place in range(4)]) for step in range(2 * task.examples // 4)]
        seen.append((torch.cat([batch["input_ids"] for batch in batches]), torch.cat([batch["labels"] for batch in batches]), task.held))
        assert int(task.items(batches[0])) == 4 * 8
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
    inputs, labels, _ = seen[0]
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
