"""sentence-transformers with patched encoders: patched in place, from a patched folder, saved and loaded by it, and the real MiniLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf

import kanformer
from kanformer.demo.settings import minilm_path
from kanformer.errors import KanformerError
from model_cases import blocks, disturb
from tool_cases import encoder, tokenizer, trained

st = pytest.importorskip("sentence_transformers", reason="needs the package sentence-transformers, which the extra [demo] installs")

TEXTS = ["w1 w2 w3", "w4 w5", "w6"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder that any encoder could come from."""
    folder = tmp_path_factory.mktemp("plain")
    encoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder):
    return st.SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("whole", [False, True], ids=["its model", "the whole pipeline"])
def test_patched_in_place_it_embeds_as_before_and_is_saved_and_loaded(whole, plain, tmp_path):
    model = load(plain)
    want = model.encode(TEXTS)
    kanformer.patch_model(model if whole else model[0].auto_model)
    assert np.array_equal(model.encode(TEXTS), want)
    disturb(model)
    changed = model.encode(TEXTS)
    assert not np.array_equal(changed, want)
    model.save(str(tmp_path))
    again = load(tmp_path)
    assert np.array_equal(again.encode(TEXTS), changed) and list(blocks(again)) == list(blocks(model)) != []
    again.save(str(tmp_path / "again"))
    assert np.array_equal(load(tmp_path / "again").encode(TEXTS), changed)


def test_a_patched_folder_is_a_sentence_transformer(plain, tmp_path):
    model = trained(encoder())
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    tokens = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**{name: tokens[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    want = (states * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(loaded.encode(TEXTS), want.numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(loaded.encode(TEXTS), load(plain).encode(TEXTS), atol=1e-3)


def test_it_trains_a_patched_encoder(plain, tmp_path):
    """One step of its own trainer moves the functions, and its checkpoint has them."""
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = load(plain)
    kanformer.patch_model(model[0].auto_model)
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=1
    )
    loss = MultipleNegativesRankingLoss(model)
    st.SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss).train()
    assert all(block.kan_functions.kan_coef.abs().max() > 0 for block in blocks(model).values())
    assert np.array_equal(load(tmp_path / "checkpoint-1").encode(TEXTS), model.eval().encode(TEXTS))


def test_the_real_minilm(tmp_path):
    try:
        folder = minilm_path()
    except KanformerError as error:
        pytest.skip(str(error))
    texts = ["Every edge carries a learnable function.", "Kolmogorov met Arnold in Moscow."]
    model = load(folder)
    want = model.encode(texts)
    kanformer.patch_model(model)
    assert np.array_equal(model.encode(texts), want) and len(blocks(model)) == 6
    disturb(model).save(str(tmp_path))
    assert np.array_equal(load(tmp_path).encode(texts), model.encode(texts)) and not np.array_equal(model.encode(texts), want)
    assert isinstance(tf.AutoModel.from_pretrained(tmp_path), tf.BertModel)
