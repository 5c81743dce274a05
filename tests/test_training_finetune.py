"""Fine-tuning for the three tasks: what is learned, what changes, what is saved."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from datasets import config as datasets_config

from kanformer.errors import ConfigError, DataError
from kanformer.surgery.saving.loading import load_model
from kanformer.training import finetune_task
from kanformer.training.data import Table
from kanformer.training.settings import FinetuneArguments
from kanformer.training.tasks import find_task
from training_cases import checkpoint, curve, metrics, run_finetune, texts, tokenizer, weights, write_text

FAST = {"learning_rate": 1e-2, "new_module_learning_rate": 1e-2, "lr_scheduler_type": "constant"}
TASKS = [("causal_lm", "gpt2"), ("causal_lm", "llama"), ("masked_lm", "bert"), ("classification", "bert"), ("classification", "gpt2")]
AUTO = {"causal_lm": tf.AutoModelForCausalLM, "masked_lm": tf.AutoModelForMaskedLM, "classification": tf.AutoModelForSequenceClassification}
EMPTY = (Table("none", [], []), Table("none", [], []))
each_task = pytest.mark.parametrize(("task", "name"), TASKS, ids=["-".join(pair) for pair in TASKS])


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


def labelled(path, lines=None) -> str:
    """Texts of class "first" begin with "bad", the others with "kuf"."""
    rows = [{"text": f"{('bad', 'kuf')[i % 2]} {line}", "label": ("first", "second")[i % 2]} for i, line in enumerate(lines or texts(40))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def source(tmp_path, task: str, few: bool = False) -> str:
    if task == "classification":
        return labelled(tmp_path / "text.jsonl")
    if few:
        (tmp_path / "text.txt").write_text("bad kuf milo nomur rep sast badst milo\n" * 40, encoding="utf-8")
        return str(tmp_path / "text.txt")
    return write_text(tmp_path / "text.txt")


@each_task
def test_what_can_be_learned_by_heart_is_learned(tmp_path, task, name):
    model = checkpoint(tmp_path / name, name)
    results = run_finetune(model, source(tmp_path, task, few=True), tmp_path / "out", task=task, max_steps=60, mlm_probability=0.3, **FAST)
    losses = [line["loss"] for line in metrics(tmp_path / "out") if "loss" in line]
    assert losses[0] > (0.5 if task == "classification" else 4.0) and sum(losses[-5:]) / 5 < 0.35 * losses[0]
    assert results["eval_loss"] < 0.5 * losses[0] and results["eval_accuracy"] > 0.6


@each_task
def test_the_saved_model_is_bit_for_bit_what_was_evaluated(tmp_path, task, name, monkeypatch):
    seen = []
    real = finetune_task.FinetuneTask.evaluate
    monkeypatch.setattr(finetune_task.FinetuneTask, "evaluate", lambda self: (seen.append((self.model, self)), real(self))[1])
    results = run_finetune(checkpoint(tmp_path / name, name), source(tmp_path, task), tmp_path / "out", task=task)
    trained, job = seen[-1]
    loaded = AUTO[task].from_pretrained(tmp_path / "out" / "model").eval()
    state = trained.state_dict()
    assert state.keys() == loaded.state_dict().keys() and all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    job.connect(loaded)
    with torch.no_grad():
        found = real(job)
    assert found["loss"] == results["eval_loss"]
    words = tf.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert words(texts(1)[0])["input_ids"] == tokenizer()(texts(1)[0])["input_ids"]
    if task == "classification":
        assert loaded.config.id2label == {0: "first", 1: "second"}


@each_task
@pytest.mark.parametrize("train_rest", [True, False])
def test_what_is_trained(tmp_path, task, name, train_rest):
    patched = checkpoint(tmp_path / name, name, {"init": "exact"})
    torch.manual_seed(0)
    run_finetune(patched, source(tmp_path, task), tmp_path / "start", task=task, learning_rate=0.0, new_module_learning_rate=0.0, max_steps=1)
    run_finetune(patched, source(tmp_path, task), tmp_path / "out", task=task, learning_rate=1e-3, train_rest=train_rest)
    before, after = weights(tmp_path / "start"), weights(tmp_path / "out")
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    kan = {key for key in after if "kan_" in key and not key.endswith(("grid", "range", "lo", "hi", "kan_sentinel"))}
    head = {key for key in after if key.startswith(("classifier.", "score."))}
    assert any(key.endswith("kan_coef") for key in changed)
    if train_rest:
        assert {key for key in changed if "attn" in key or "attention" in key}
    else:
        assert changed <= kan | head and bool(changed & head) == (task == "classification")


def test_masking_hides_only_real_tokens_and_only_the_hidden_are_counted(tmp_path):
    words = tokenizer()
    arguments = FinetuneArguments(task="masked_lm", mlm_probability=0.5)
    job = find_task("masked_lm")(arguments, words, *EMPTY)
    batch = job.collate([[9] * 200 + [3]] * 20 + [[8, 3]])
    labels, hidden = batch["labels"], batch["labels"] != -100
    assert 0.45 < hidden[:20, :200].double().mean() < 0.55 and not hidden[:, 200].any() and not hidden[20, 1:].any()
    assert job.items(batch) == hidden.sum() and (labels[:20][hidden[:20]] == 9).all()
    ids = batch["input_ids"][:20][hidden[:20]]
    assert 0.75 < (ids == words.mask_token_id).double().mean() < 0.85 and 0.07 < (ids == 9).double().mean() < 0.16
    assert (batch["input_ids"][~hidden & (batch["attention_mask"] == 1)] != words.mask_token_id).all()


def test_causal_loss_is_that_of_transformers(tmp_path):
    model = load_model(checkpoint(tmp_path / "llama", "llama"))
    ids = torch.randint(4, 40, (3, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    job = find_task("causal_lm")(FinetuneArguments(), tokenizer(), *EMPTY)
    job.connect(model)
    with torch.no_grad():
        assert float(job.module(batch)[0] / job.items(batch)) == pytest.approx(float(model(**batch).loss), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("bert", {"task": "causal_lm"}, ConfigError, "a model that looks ahead.*task=masked_lm"),
        ("bert", {"task": "masked_lm", "kan": None}, ConfigError, "not patched.*--kan.init exact"),
        ("bert", {"task": "masked_lm", "max_length": 65}, ConfigError, "64 positions"),
        ("gpt2", {"kan": {"init": "prune"}}, ConfigError, "param_ratio"),
        ("gpt2", {"max_length": 64, "validation_split_percentage": 1}, DataError, "at least one block of 64"),
        ("bert", {"task": "classification"}, DataError, "labelled text"),
    ],
)
def test_wrong_settings_are_refused_and_leave_nothing(tmp_path, name, settings, error, message):
    with pytest.raises(error, match=message):
        run_finetune(checkpoint(tmp_path / name, name), write_text(tmp_path / "text.txt"), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_masked_language_model_needs_a_mask_token(tmp_path):
    folder, words = checkpoint(tmp_path / "bert"), tokenizer()
    words.mask_token = None
    words.save_pretrained(folder)
    with pytest.raises(ConfigError, match="a tokenizer without a mask token"):
        run_finetune(folder, write_text(tmp_path / "text.txt"), tmp_path / "out", task="masked_lm")


@pytest.mark.parametrize(("labels", "message"), [("aaaa", "one class only"), ("aabb", "unseen held-out classes \\['c', 'd'\\]")])
def test_classes_that_cannot_be_learned_are_refused(tmp_path, labels, message):
    for name, classes in (("t", labels), ("v", "abcd")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": "bad", "label": label}) + "\n" for label in classes), encoding="utf-8")
    settings = {"task": "classification", "validation_file": str(tmp_path / "v.jsonl")}
    with pytest.raises(DataError, match=message):
        run_finetune(checkpoint(tmp_path / "bert"), str(tmp_path / "t.jsonl"), tmp_path / "out", **settings)


def test_evaluation_masks_the_same_tokens_every_time(tmp_path):
    settings = {"task": "masked_lm", "learning_rate": 0.0, "new_module_learning_rate": 0.0, "eval_steps": 3}
    run_finetune(checkpoint(tmp_path / "bert"), write_text(tmp_path / "text.txt"), tmp_path / "out", **settings)
    assert len({line["eval_loss"] for line in curve(tmp_path / "out") if "eval_loss" in line}) == 1
