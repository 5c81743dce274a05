"""A corpus as blocks of tokens: vocabulary from the training part, split by position, written once for all runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kanformer.errors import CheckpointError, ConfigError, DataError
from kanformer.evaluation.texts import byte_widths
from kanformer.pretraining.settings import PretrainArguments
from kanformer.surgery.folders import MARKER, reason, write_folder

END_OF_TEXT = "<|endoftext|>"  # also stands for a character that the training part does not have


@dataclass(frozen=True)
class Corpus:
    """What a run reads.

    Attributes:
        train, held: token numbers (tokens,) of the two parts.
        held_bytes: (tokens,) UTF-8 bytes that each held-out token stands for.
        tokenizer: a `PreTrainedTokenizerFast`.
    """

    train: Tensor
    held: Tensor
    held_bytes: Tensor
    tokenizer: Any


def split_text(arguments: PretrainArguments) -> tuple[str, str]:
    """(training, held-out) part of the text, cut by position.

    Raises:
        DataError: no such file, not UTF-8, or nothing in one of the parts.
    """
    if not arguments.text:
        raise DataError("read the text", got="no text", hint="Name a file: --text FILE.")
    try:
        text = Path(arguments.text).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("read the text", subject=arguments.text, got=reason(error)) from error
    cut = len(text) - round(len(text) * arguments.validation_split_percentage / 100)
    if not 0 < cut < len(text):
        raise DataError("split the text", subject=arguments.text, got=f"{len(text):,} characters", expected="enough for a training and a held-out part")
    return text[:cut], text[cut:]


def char_tokenizer(text: str) -> Any:
    """A token per character of the text, and END_OF_TEXT, which is number 0."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([END_OF_TEXT, *sorted(set(text))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def bpe_tokenizer(text: str, vocab_size: int) -> Any:
    """Byte-level BPE of at most `vocab_size` tokens trained on the text; any text goes there and back. END_OF_TEXT is number 0.

    Source: Sennrich et al. 2016, arXiv 1508.07909, over bytes as in GPT-2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def digest(arguments: PretrainArguments) -> str:
    """What the data are made of: a hash of both parts and of how they become tokens."""
    found = hashlib.sha256()
    for part in split_text(arguments):
        found.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    found.update(f"{arguments.vocabulary} {arguments.vocab_size if arguments.vocabulary == 'bpe' else ''}".encode())
    return found.hexdigest()[:16]


def prepare_data(arguments: PretrainArguments, folder: Path) -> Corpus:
    """Tokenizes the text into `folder`, or reads what is there.

    Raises:
        ConfigError: the folder holds another text or vocabulary. DataError: too little text for a block of each part.
    """
    wanted = digest(arguments)
    if (folder / MARKER).is_file():
        found = json.loads((folder / MARKER).read_text(encoding="utf-8")).get("digest")
        if found != wanted:
            raise ConfigError("use the output folder", subject=folder, got="data of another text or vocabulary", hint="Choose another output_dir.")
        return load_data(folder)
    corpus = tokenize_text(arguments)
    write_folder(folder, lambda aside: _write(corpus, aside), {"digest": wanted})
    return load_data(folder)


def tokenize_text(arguments: PretrainArguments) -> Corpus:
    """Both parts as tokens of a vocabulary that only the training part made.

    Raises:
        DataError: less than a block in one of them.
    """
    train, held = split_text(arguments)
    tokenizer = char_tokenizer(train) if arguments.vocabulary == "char" else bpe_tokenizer(train, arguments.vocab_size)
    encoded = tokenizer(held, return_offsets_mapping=True, add_special_tokens=False)
    corpus = Corpus(
        torch.tensor(tokenizer(train, add_special_tokens=False)["input_ids"], dtype=torch.int32),
        torch.tensor(encoded["input_ids"], dtype=torch.int32),
        torch.tensor(byte_widths(held, encoded["offset_mapping"]), dtype=torch.int32),
        tokenizer,
    )
    for name, part in (("training", corpus.train), ("held-out", corpus.held)):
        if len(part) < arguments.max_length + 1:
            raise DataError(
                "cut the text into blocks",
                subject=f"{name} part of {arguments.text}",
                got=f"{len(part):,} tokens",
                expected=f"at least one block of {arguments.max_length} and the token after it",
                hint="Give more text, or a smaller max_length.",
            )
    return corpus


def _write(corpus: Corpus, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"train": corpus.train, "held": corpus.held, "held_bytes": corpus.held_bytes}, folder / "tokens.safetensors")
    corpus.tokenizer.save_pretrained(folder / "tokenizer")


def load_data(folder: Path) -> Corpus:
    """What `prepare_data` wrote.

    Raises:
        CheckpointError: a missing or damaged file.
    """
    from safetensors.torch import load_file
    from transformers import PreTrainedTokenizerFast

    try:
        tensors = load_file(folder / "tokens.safetensors")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        return Corpus(tensors["train"], tensors["held"], tensors["held_bytes"], tokenizer)
    except Exception as error:
        raise CheckpointError("read the tokenized text", subject=folder, got=reason(error), hint="Delete that folder to make it again.") from error


def blocks(tokens: Tensor, length: int) -> Tensor:
    """(n, length + 1) blocks, each with the token after it, so that every token but the first is predicted once."""
    return tokens.unfold(0, length + 1, length)
