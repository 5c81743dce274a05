"""Which tokens are predicted, which bytes they stand for, and what is in memory meanwhile."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation_cases import measured, subjects
from kanformer.evaluation.texts import Reader, byte_widths
from kanformer.training.masking import IGNORED
from kanformer.training.tallies import LanguageTally
from training_cases import checkpoint, texts, tokenizer


@pytest.mark.parametrize(
    ("text", "offsets", "widths"),
    [
        ("the cat sat", [(0, 3), (4, 7), (8, 11)], [3, 4, 4]),  # the space before a word is the word's
        ("the cat sat", [(0, 3), (3, 7)], [3, 4]),  # cut: " sat" is not there
        ("the cat", [(0, 0), (0, 3), (4, 7), (0, 0)], [0, 3, 4, 0]),  # special tokens at both ends
        ("ä€ 😀!", [(0, 1), (1, 2), (3, 4), (4, 5)], [2, 3, 5, 1]),
        ("😀!", [(0, 1), (0, 1), (0, 1), (0, 1), (1, 2)], [4, 0, 0, 0, 1]),  # a character in four tokens
        ("the cat sat", [(4, 7), (8, 11)], [3, 4]),  # cut on the left
        ("  ", [], []),
        ("", [(0, 0)], [0]),
    ],
)
def test_bytes_of_tokens(text, offsets, widths):
    assert byte_widths(text, offsets) == widths


@given(st.text(max_size=30))
def test_tokens_that_cover_a_text_stand_for_all_its_bytes(text):
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    single = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    single.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = byte_widths(text, single.encode(text).offsets)
    assert len(found) == sum(found) == len(text.encode("utf-8"))


def test_bytes_of_a_causal_text_are_those_after_its_first_token_up_to_the_cut():
    reader = Reader(tokenizer(), "causal_lm", max_length=3, batch_size=2)
    batches = list(reader.batches(["bad kuß ümur milo", "kuf", "bad kuf", "  "]))
    assert [batch.scored_bytes for batch in batches] == [len(" kuf"), len(" kuß ümur".encode())]  # shortest texts first; "kuf" predicts nothing
    assert [batch.tokens for batch in batches] == [3, 3] and [int((batch.targets != IGNORED).sum()) for batch in batches] == [1, 2]
    ids = batches[1].inputs["input_ids"]
    assert batches[1].targets.tolist() == [[*ids[0, 1:].tolist(), IGNORED]]


def test_bits_per_byte_by_hand():
    tally = LanguageTally()
    tally.add(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([1, 1]))
    found = tally.result(6)
    assert found["ce"] == pytest.approx(math.log(8) / 2) and found["perplexity"] == pytest.approx(8**0.5) and found["bits_per_byte"] == pytest.approx(3 / 6)
    assert "kl" not in found and tally.result(0)["bits_per_byte"] is None


def test_divergence_by_hand_also_where_the_reference_excludes_tokens():
    tally = LanguageTally()
    reference = torch.tensor([[0.0, 0.0, -torch.inf], [5.0, 0.0, -torch.inf]])
    tally.add(torch.tensor([[math.log(3), 0.0, -torch.inf]] * 2), torch.tensor([0, 0]), reference)
    p = 1 / (1 + math.exp(-5))
    wanted = [0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), p * math.log(p / 0.75) + (1 - p) * math.log((1 - p) / 0.25)]
    assert tally.result(1)["kl"] == pytest.approx(sum(wanted) / 2, rel=1e-5) and tally.result(1)["top1_agreement"] == 1.0


def test_logits_are_worked_on_in_pieces(monkeypatch):
    logits, targets, reference = torch.randn(50, 7), torch.randint(7, (50,)), torch.randn(50, 7)
    results = []
    for numbers in (2**24, 21, 1):
        monkeypatch.setattr("kanformer.training.tallies._NUMBERS", numbers)
        tally = LanguageTally()
        tally.add(logits, targets, reference)
        results.append(tally.result(9))
    assert results[1] == pytest.approx(results[0], rel=1e-6) and results[2] == pytest.approx(results[0], rel=1e-6)


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_bits_per_byte_are_the_summed_bits_over_the_bytes_that_are_predicted(tmp_path, task):
    folder = checkpoint(tmp_path / task, {"causal_lm": "llama", "masked_lm": "bert"}[task], {})
    lines = texts(9)
    result = measured(subjects(None, folder), lines)
    row = result.rows["patched"]
    assert row["bits_per_byte"] == pytest.approx(row["ce"] * result.scored_tokens / math.log(2) / result.scored_bytes)
    whole = sum(len(" ".join(line.split()[1:10]).encode()) + 1 for line in lines)  # a text's second to tenth word with the spaces before them
    assert result.scored_bytes == whole if task == "causal_lm" else 0 < result.scored_bytes < 0.6 * whole


def test_masks_are_the_texts_own_and_change_with_the_seed():
    lines = texts(30)

    def masks(seed: int, size: int) -> list[list[int]]:
        batches = Reader(tokenizer(), "masked_lm", 12, size, seed, 0.3).batches(lines)
        return sorted(row[row != IGNORED].tolist() for batch in batches for row in batch.targets)

    assert masks(0, 1) == masks(0, 7) == masks(0, 30) and masks(0, 1) != masks(1, 1)


def test_texts_are_tokenized_as_they_are_needed():
    words, seen = tokenizer(), []

    class Counting:
        is_fast, pad_token_id, eos_token_id = True, words.pad_token_id, words.eos_token_id

        def __call__(self, lines, **settings):
            seen.append(len(lines))
            return words(lines, **settings)

    batches = Reader(Counting(), "causal_lm", 12, 2).batches(texts(1000))
    next(batches)
    assert seen == [128]
    assert sum(batch.texts for batch in batches) == 998 and max(seen) == 128


def test_a_tokenizer_without_offsets_gives_no_bytes():
    words = tokenizer()

    class Slow:
        is_fast, pad_token_id, eos_token_id = False, words.pad_token_id, words.eos_token_id

        def __call__(self, lines, return_offsets_mapping, **settings):
            assert not return_offsets_mapping
            return words(lines, **settings)

    (batch,) = Reader(Slow(), "causal_lm", 12).batches(texts(3))
    assert batch.scored_bytes is None and int((batch.targets != IGNORED).sum()) > 0
