"""The fine-tuning tasks beside language modelling: what can be learned is learned, losses and metrics are those of a plain computation, models load again."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from data_cases import COLORS, described_folder, image, image_folder, own_cache, table  # noqa: F401
from kanformer.cli import main
from kanformer.errors import ConfigError, DataError
from kanformer.training.data.images import open_image
from kanformer.training.settings import FinetuneArguments
from kanformer.training.tasks import available, embedding, find_task
from model_cases import blocks
from training_cases import ROOT, checkpoint, curve, metrics, run_finetune, texts, tokenizer, weights

pytestmark = pytest.mark.usefixtures("own_cache")
FAST = {"learning_rate": 1e-2, "new_module_learning_rate": 1e-2, "lr_scheduler_type": "constant"}
TAGS = {"bad": "B-A", "kuf": "I-A", "milo": "B-C"}  # of single words; all others are O


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words whose tags follow from themselves."""
    dice, rows = random.Random(seed), []
    for _ in range(count):
        words = dice.choices(["bad", "kuf", "milo", "rep", "sast"], k=dice.randint(3, 8))
        rows.append({"tokens": words, "tags": [TAGS.get(word, "O") for word in words]})
    return rows


def pairs(count: int, scored: bool = False) -> list[dict[str, Any]]:
    """Texts that belong together share their first three words; scored, half of the pairs do not belong together."""
    dice, rows = random.Random(1), []
    for _ in range(count):
        topic, other, *rest = (" ".join(text.split()[:3]) for text in texts(4, dice.randint(0, 10**9)))
        same = not scored or dice.random() < 0.5
        row = {"text": f"{topic} {rest[0]}", "positive": f"{topic if same else other} {rest[1]}"}
        rows.append({**row, "score": float(same)} if scored else row)
    return rows


def ratings(count: int) -> list[dict[str, Any]]:
    """Texts with the number that their first word stands for."""
    values = {"bad": 0.1, "kuf": 0.5, "milo": 0.9}
    return [{"text": f"{word} {text}", "label": values[word]} for word, text in zip(random.Random(2).choices(list(values), k=count), texts(count), strict=True)]


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (
        tf.ViTConfig,
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8},
    ),
    "swin": (tf.SwinConfig, {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    "convnext": (tf.ConvNextConfig, {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4, "image_size": 32}),
}


def vision(folder: Path, name: str = "vit") -> str:
    """A tiny image model and its processor."""
    config, values = VISION[name]
    torch.manual_seed(0)
    tf.AutoModelForImageClassification.from_config(config(**values)).save_pretrained(folder)
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def run(model: str, out: Path, **settings: Any) -> dict[str, Any]:
    """A run without a text file."""
    return run_finetune(model, None, out, **settings)  # type: ignore[arg-type]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if "loss" in line]


def test_tasks_are_found_by_their_files():
    assert available() == ("causal_lm", "classification", "embedding", "image_classification", "masked_lm", "token_classification")
    assert [find_task(name).__name__ for name in available()] == [
        "CausalLM",
        "Classification",
        "Embedding",
        "ImageClassification",
        "MaskedLM",
        "TokenClassification",
    ]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_tags_are_learned_and_named_in_the_saved_model(tmp_path, name):
    model, path = checkpoint(tmp_path / name, name), table(tmp_path / "t.jsonl", sentences(60))
    results = run_finetune(model, path, tmp_path / "out", task="token_classification", max_steps=40, **FAST)
    first = losses(tmp_path / "out")[0]
    assert first > 1.0 and results["eval_loss"] < 0.1 * first and results["eval_accuracy"] == results["eval_f1"] == results["eval_recall"] == 1.0
    loaded = tf.AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "model").eval()
    assert loaded.config.id2label == {0: "B-A", 1: "B-C", 2: "I-A", 3: "O"} and blocks(loaded)
    words = tokenizer()(["milo rep bad kuf"], return_tensors="pt")
    with torch.no_grad():
        found = loaded(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).logits.argmax(-1)[0].tolist()
    assert [loaded.config.id2label[number] for number in found] == ["B-C", "O", "B-A", "I-A"]


@pytest.mark.parametrize("name", list(VISION))
def test_colors_of_images_are_learned_and_the_processor_is_saved(tmp_path, name):
    folder = image_folder(tmp_path / "images")
    results = run(vision(tmp_path / name, name), tmp_path / "out", train_dir=folder, task="image_classification", max_steps=25, **FAST)
    first = losses(tmp_path / "out")[0]
    assert results["eval_accuracy"] == 1.0 and results["eval_loss"] < 0.3 * first
    loaded = tf.AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "model").eval()
    processor = tf.AutoImageProcessor.from_pretrained(tmp_path / "out" / "model")
    assert loaded.config.id2label == {0: "blue", 1: "red"} and blocks(loaded)
    image(tmp_path / "new.png", COLORS["red"], 99, 48)
    with torch.no_grad():
        logits = loaded(**processor([open_image(str(tmp_path / "new.png"), "")], return_tensors="pt")).logits
    assert int(logits.argmax()) == 1


@pytest.mark.parametrize("scored", [False, True], ids=["negatives", "scores"])
def test_texts_that_belong_together_come_close(tmp_path, scored):
    settings = {"task": "embedding", "text_pair_column": "positive", "max_steps": 60, "per_device_train_batch_size": 8, "max_eval_samples": 32}
    path = table(tmp_path / "t.jsonl", pairs(300, scored))
    model = checkpoint(tmp_path / "bert")
    settings |= {"score_column": "score"} if scored else {}
    results = run_finetune(model, path, tmp_path / "out", validation_split_percentage=20, eval_on_start=True, **settings, **{**FAST, "learning_rate": 3e-3})
    metric = "eval_spearman" if scored else "eval_accuracy"
    start = next(line for line in metrics(tmp_path / "out") if metric in line)
    assert results["eval_loss"] < 0.5 * start["eval_loss"] and results[metric] > start[metric] and results[metric] > 0.6
    assert blocks(tf.AutoModel.from_pretrained(tmp_path / "out" / "model"))


def test_numbers_are_learned_by_their_squared_error(tmp_path):
    model, path = checkpoint(tmp_path / "bert"), table(tmp_path / "t.jsonl", ratings(80))
    results = run_finetune(model, path, tmp_path / "out", task="classification", max_steps=60, **{**FAST, "learning_rate": 3e-3})
    assert results["eval_mae"] < 0.08 and results["eval_loss"] < 0.1 * losses(tmp_path / "out")[0] and "eval_accuracy" not in results
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert loaded.config.num_labels == 1 and loaded.config.problem_type == "regression"


def test_pairs_of_texts_are_classified_as_the_tokenizer_joins_them(tmp_path):
    rows = [{"text": "bad", "pair": "kuf milo", "label": n % 2} for n in range(4)]
    arguments = FinetuneArguments(text_pair_column="pair", label_names=["no", "yes"])
    task, part = _task("classification", arguments, rows)
    (ids, _, label), *_ = task.encode(part.all(), part)
    assert ids == tokenizer()("bad", "kuf milo")["input_ids"] and label == 0 and len(ids) == 3


def _task(name: str, arguments: FinetuneArguments, rows: list[dict[str, Any]], held: list[dict[str, Any]] | None = None):
    """A task with its rows, and these."""
    from datasets import Dataset

    from kanformer.training.data import Table
    from kanformer.training.data.sources import Source

    kind = find_task(name)
    train, other = (Table.read(Source("rows", Dataset.from_list(each)), kind.columns(arguments)) for each in (rows, held or rows))
    return kind(arguments, tokenizer(), train, other), train


def test_labels_lie_on_the_first_token_of_each_word():
    class Pieces:
        """Cuts words into pieces of three letters; a start token before, as BERT has one."""

        pad_token_id, eos_token_id = 0, None

        def __call__(self, rows, **settings):
            self.words = [[None, *(n for n, word in enumerate(row) for _ in range(0, len(word), 3))][: settings["max_length"]] for row in rows]
            found = {"input_ids": [[1 if n is None else 2 + n for n in words] for words in self.words]}
            return type("Found", (dict,), {"word_ids": lambda _, row: self.words[row]})(found)

    rows = [{"tokens": ["abcdefg", "ab", "abcd"], "tags": ["O", "B-X", "O"]}]
    task, part = _task("token_classification", FinetuneArguments(max_length=6), rows)
    task.tokenizer = Pieces()
    examples = task.encode(part.all(), part)
    assert examples == [([1, 2, 2, 2, 3, 4], [-100, 1, -100, -100, 0, 1])]
    batch = task.collate([*examples, ([1, 2], [-100, 1])])
    assert batch["labels"].tolist()[1] == [-100, 1, -100, -100, -100, -100] and int(task.items(batch)) == 4


def test_the_contrastive_loss_is_the_cross_entropy_over_the_batch(tmp_path):
    rows = pairs(5)
    task, part = _task("embedding", FinetuneArguments(text_pair_column="positive", similarity_scale=7.0), rows)
    model = tf.AutoModel.from_pretrained(checkpoint(tmp_path / "bert")).eval()
    task.connect(model)
    batch = task.collate(task.encode(part.all(), part))
    with torch.no_grad():
        loss, found = task.module(batch)
        first, second = (
            torch.stack([model(**tokenizer()([row[key]], return_tensors="pt")).last_hidden_state[0].mean(0) for row in rows]) for key in ("text", "positive")
        )
    cosines = F.cosine_similarity(first[:, None], second[None], dim=-1)
    want = sum(-torch.log_softmax(7.0 * cosines[row], -1)[row] for row in range(5))
    assert float(loss) == pytest.approx(float(want), rel=1e-5) and int(task.items(batch)) == 5
    assert float(found["accuracy"]) == sum(int(cosines[row].argmax()) == row for row in range(5))


def test_spearman_is_the_correlation_of_ranks():
    dice = random.Random(0)
    left, right = [dice.random() for _ in range(40)], [round(dice.random(), 1) for _ in range(40)]

    def ranks(values: list[float]) -> torch.Tensor:
        return torch.tensor([sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values])

    want = float(torch.corrcoef(torch.stack([ranks(left), ranks(right)]))[0, 1])
    assert embedding.spearman(left, right) == pytest.approx(want, abs=1e-6) and embedding.spearman([1.0, 1.0], [0.0, 1.0]) == 0.0


@pytest.mark.parametrize("settings", [{"score_column": "score"}, {}], ids=["scores", "negatives"])
def test_accumulation_changes_the_negatives_and_nothing_else(tmp_path, settings):
    path, model = table(tmp_path / "t.jsonl", pairs(40, scored=True)), checkpoint(tmp_path / "bert", **STILL)
    for name, batch in (("one", 4), ("many", 2)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        run_finetune(model, path, tmp_path / name, task="embedding", text_pair_column="positive", max_steps=2, **{**settings, **sizes})
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    difference = max(float((one[name] - many[name]).abs().max()) for name in one)
    assert difference < 1e-5 if settings else difference > 1e-4


@pytest.mark.parametrize("task", ["token_classification", "image_classification", "regression"])
def test_accumulation_gives_the_step_of_the_large_batch(tmp_path, task):
    if task == "image_classification":
        model, settings = vision(tmp_path / "vit"), {"train_dir": image_folder(tmp_path / "images", 8), "task": task}
    else:
        rows = sentences(30) if task == "token_classification" else ratings(30)
        model, settings = checkpoint(tmp_path / "bert", **STILL), {"task": "classification" if task == "regression" else task}
        settings["train_file"] = table(tmp_path / "t.jsonl", rows)
    for name, batch in (("one", 4), ("many", 1)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 2, "max_grad_norm": 0.5}
        run_finetune(model, settings.get("train_file"), tmp_path / name, **{k: v for k, v in settings.items() if k != "train_file"}, **sizes)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert max(float((one[name] - many[name]).abs().max()) for name in one) < 1e-5
    assert [line["loss"] for line in curve(tmp_path / "many")[:2]] == pytest.approx([line["loss"] for line in curve(tmp_path / "one")[:2]], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"task": "token_classification"}, DataError, "no column 'tokens'"),
        ({"task": "embedding"}, ConfigError, "no text_pair_column"),
        ({"task": "embedding", "text_pair_column": "text"}, DataError, "a column that shall be two things"),
        ({"task": "embedding", "text_pair_column": "pair", "per_device_train_batch_size": 1}, ConfigError, "no other pair in the batch"),
        (
            {"task": "embedding", "text_pair_column": "pair", "score_column": "grade", "validation_split_percentage": 20},
            DataError,
            "got 2.0, expected a cosine.*Divide",
        ),
        ({"task": "embedding", "text_pair_column": "pair", "score_column": "same"}, DataError, "held-out scores that are all the same"),
        ({"task": "classification", "label_column": "name", "label_names": ["x"]}, DataError, "one class only"),
        ({"task": "classification", "label_column": "name", "label_names": ["x", "x"]}, DataError, "the same name twice"),
        (
            {"task": "classification", "label_column": "name", "label_names": ["x", "z"]},
            DataError,
            r"unseen held-out classes \['y'\]|class 'y', expected one of x, z",
        ),
        ({"task": "classification", "label_column": "lable"}, DataError, "no column 'lable'"),
        ({"task": "classification", "label_column": "grade", "label_names": None, "text_pair_column": "empty"}, DataError, "column 'empty' has no value"),
        ({"task": "causal_lm", "streaming": True, "num_train_epochs": 1.0, "validation_samples": 4}, ConfigError, "got a stream. Set --max_steps"),
        (
            {"task": "classification", "label_column": "name", "streaming": True, "validation_samples": 4},
            DataError,
            "does not say which there are.*label_names",
        ),
        ({"task": "image_classification"}, OSError, "load the image processor.*tokenizer_name"),
    ],
)
def test_wrong_settings_are_refused_and_leave_nothing(tmp_path, settings, error, message):
    grades = [0.5, 2.0] * 10
    rows = [{"text": "bad", "pair": "kuf", "empty": " ", "grade": grades[n], "same": 0.5, "name": "xy"[n % 2]} for n in range(20)]
    model = checkpoint(tmp_path / "m", "llama" if settings["task"] == "causal_lm" else "bert")
    with pytest.raises(error, match=message):
        run_finetune(model, table(tmp_path / "t.jsonl", rows), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_tags_that_do_not_fit_are_refused(tmp_path):
    model = checkpoint(tmp_path / "bert")
    bad = {"unequal": {"tokens": ["bad", "kuf"], "tags": ["O"]}, "no-list": {"tokens": ["bad"], "tags": "O"}, "numbers": {"tokens": [1], "tags": ["O"]}}
    messages = {
        "unequal": r"2 words and 1 tags \(bad kuf\), expected a tag for each word",
        "no-list": "'O', expected a list of tags",
        "numbers": "a list of words",
    }
    for name, row in bad.items():
        with pytest.raises(DataError, match=messages[name]):
            run_finetune(model, table(tmp_path / f"{name}.jsonl", [row] * 4), tmp_path / "out", task="token_classification")
    held = table(tmp_path / "v.jsonl", [{"tokens": ["bad"], "tags": ["B-NEW"]}])
    with pytest.raises(DataError, match=r"unseen held-out classes \['B-NEW'\]"):
        run_finetune(model, table(tmp_path / "t.jsonl", sentences(9)), tmp_path / "out", task="token_classification", validation_file=held)


def test_an_image_that_is_cut_is_named(tmp_path):
    folder = image_folder(tmp_path / "images", 4)
    broken = Path(folder) / "red" / "001.png"
    broken.write_bytes(broken.read_bytes()[:700])
    with pytest.raises(DataError, match=r"read the image \(.*red/001.png\).*Replace it"):
        run(vision(tmp_path / "vit"), tmp_path / "out", train_dir=folder, task="image_classification", calibration_samples=8)


def test_paths_in_a_table_are_images_too(tmp_path):
    described_folder(tmp_path / "i", 12)
    lines = [json.loads(line) for line in (tmp_path / "i" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    path = table(tmp_path / "t.jsonl", [{"picture": str(tmp_path / "i" / line["file_name"]), "color": line["color"]} for line in lines])
    settings = {"task": "image_classification", "image_column": "picture", "label_column": "color", "max_steps": 2}
    results = run_finetune(vision(tmp_path / "vit"), path, tmp_path / "out", train_rest=False, **settings)
    assert 0.0 <= results["eval_accuracy"] <= 1.0 and results["tokens"] == 8  # images are counted


@pytest.mark.parametrize("name", [*available(), "streamed"])
def test_the_configs_of_the_tasks_run_as_their_comments_say(tmp_path, name):
    words = {"causal_lm": ("llama", "text.txt"), "masked_lm": ("bert", "text.txt"), "streamed": ("llama", "text.txt")}
    family, file = words.get(name, ("bert", "rows.jsonl"))
    rows = {
        "token_classification": sentences(40),
        "embedding": pairs(40),
        "classification": [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(texts(40))],
    }
    if name == "image_classification":
        model, source = vision(tmp_path / "model"), ["--train_dir", image_folder(tmp_path / "images", 6)]
    else:
        path = tmp_path / file
        source = ["--train_file", table(path, rows.get(name) or [{"text": text} for text in texts(40)])]
        model = checkpoint(tmp_path / "model", family)
    more = ["--streaming", "--validation_samples", "10", "--shuffle_buffer_size", "20"] if name == "streamed" else []
    config = ROOT / f"configs/finetune_{'causal_lm' if name == 'streamed' else name}.yaml"
    command = re.findall(r"#   accelerate launch .* scripts/finetune.py (--config \S+) (--\S+)", config.read_text(encoding="utf-8"))
    assert command == [(f"--config configs/{config.name}", source[0])]
    small = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), "--max_length", "12", "--max_steps", "2", "--disable_tqdm"]
    sizes = ["--per_device_train_batch_size", "4", "--eval_steps", "1", "--save_steps", "2"]
    main(["finetune", "--config", str(config), *source, *small, *sizes, *more])
    assert (tmp_path / "out" / "model" / "config.json").is_file() and (tmp_path / "out" / "all_results.json").is_file()
