"""Every source gives its rows, streamed or not, and says what is wrong with it in one error."""

from __future__ import annotations

import datasets
import pytest

from data_cases import ROWS, TEXTS, described_folder, each_source, image_folder, own_cache, source, table  # noqa: F401
from kanformer.errors import ConfigError, DataError
from kanformer.training.data import IMAGE, TEXT, Column, file_columns, load_held_out, load_texts, open_data
from kanformer.training.data.images import open_image
from kanformer.training.settings import DataArguments
from training_cases import python

pytestmark = pytest.mark.usefixtures("own_cache")
IMAGES = [Column("image", IMAGE), Column("label")]
WORDS = [Column("text", TEXT)]


@each_source
def test_every_source_gives_all_its_texts_in_order(tmp_path, kind):
    train, held = load_texts(DataArguments(**source(tmp_path, kind, ROWS), validation_split_percentage=25), ["text"])
    assert train["text"] == TEXTS[:15] and held["text"] == TEXTS[15:]


@each_source
def test_a_stream_of_it_gives_the_same_texts(tmp_path, kind):
    settings = source(tmp_path, kind, ROWS)
    rows, held = open_data(DataArguments(**settings, streaming=True, validation_samples=5, shuffle_buffer_size=4), WORDS, seed=None)
    windows = list(rows.windows(0, 0))
    assert held.values("text") == TEXTS[:5] and [row["text"] for _, window in windows for row in window] == TEXTS[5:]
    assert [start for start, _ in windows] == [0, 4, 8, 12] and max(len(window) for _, window in windows) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_a_dataset_are_chosen_by_name(tmp_path, streaming):
    parts = {"learn": ROWS[:8], "validation": ROWS[8:12], "check": ROWS[12:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "d")
    settings = {"dataset_name": str(tmp_path / "d"), "streaming": streaming}
    assert load_held_out(DataArguments(**settings, train_split="learn"), ["text"])["text"] == TEXTS[8:12]
    rows, held = open_data(DataArguments(**settings, train_split="check", validation_split="learn"), WORDS, seed=None)
    found = [row["text"] for _, window in rows.windows(0, 0) for row in window] if streaming else rows.values("text")
    assert found == TEXTS[12:] and held.values("text") == TEXTS[:8]
    with pytest.raises(DataError, match=r"no part 'train', expected one of its parts \(learn, validation, check\).*train_split"):
        open_data(DataArguments(**settings), WORDS)
    with pytest.raises(DataError, match="no part 'dev'"):
        open_data(DataArguments(**settings, train_split="learn", validation_split="dev"), WORDS)


def test_a_part_may_be_an_expression_of_datasets(tmp_path):
    settings = source(tmp_path, "folder", ROWS)
    train, held = load_texts(DataArguments(**settings, train_split="train[:80%]", validation_split="train[80%:]"), ["text"])
    assert train["text"] == TEXTS[:16] and held["text"] == TEXTS[16:]


def test_a_validation_file_goes_with_a_dataset_and_limits_hold(tmp_path):
    settings = {**source(tmp_path, "saved", ROWS), "validation_file": table(tmp_path / "v.csv", ROWS[:4]), "max_train_samples": 6, "max_eval_samples": 3}
    train, held = load_texts(DataArguments(**settings), ["text", "label"])
    assert train == {"text": TEXTS[:6], "label": [0, 1, 0, 1, 0, 1]} and held["text"] == TEXTS[:3]


def test_a_column_of_another_name_is_read_and_plain_text_takes_that_name(tmp_path):
    path = table(tmp_path / "t.parquet", [{"story": text, "n": 1} for text in TEXTS])
    assert file_columns(path, ["story"]) == {"story": TEXTS}
    assert file_columns(table(tmp_path / "t.txt", ROWS), ["story"]) == {"story": TEXTS}


@pytest.mark.parametrize("streaming", [False, True])
def test_image_folders_have_the_classes_of_their_folders_and_stay_closed(tmp_path, streaming):
    arguments = DataArguments(train_dir=image_folder(tmp_path / "i", 6), streaming=streaming, validation_samples=3)
    rows, held = open_data(arguments, IMAGES, mix=True, seed=None)
    found = [row for _, window in rows.windows(0, 0) for row in window] if streaming else [rows[index] for index in range(len(rows))]
    assert rows.feature("label").names == ["blue", "red"] and len(found) + len(held) == 12
    assert all(set(row["image"]) == {"bytes", "path"} for row in found)
    for row in found:
        red, _, blue = open_image(row["image"], "").resize((1, 1)).getpixel((0, 0))
        assert (red > blue) == bool(row["label"])


def test_an_image_folder_may_be_described_by_a_file_or_be_a_dataset(tmp_path):
    arguments = DataArguments(train_dir=described_folder(tmp_path / "i"), validation_dir=image_folder(tmp_path / "v", 2))
    train, held = open_data(DataArguments(dataset_name=arguments.train_dir), [Column("image", IMAGE), Column("color")], mix=True)
    assert sorted([*train.values("color"), *held.values("color")]) == ["blue"] * 6 + ["red"] * 6
    with pytest.raises(DataError, match="no column 'color'"):  # the held-out folder has folders
        open_data(arguments, [Column("image", IMAGE), Column("color")])


def test_what_is_held_out_of_sorted_images_is_of_all_classes_and_always_the_same(tmp_path):
    arguments = DataArguments(train_dir=image_folder(tmp_path / "i", 20), validation_split_percentage=30)
    first, second = (open_data(arguments, IMAGES, mix=True)[1].values("label") for _ in range(2))
    assert first == second and len(first) == 12 and {0, 1} == set(first)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dataset_name": "nobody/nothing"}, DataError, r"load the dataset \(nobody/nothing\): got .*Check the name and the network.*train_file"),
        ({"dataset_name": "{tmp}/empty"}, DataError, "any data files.*save_to_disk"),
        ({"train_dir": "{tmp}/empty"}, DataError, r"read the images \(.*empty\).*any data files.*a folder of images for each class"),
        ({"train_dir": "{tmp}/none"}, DataError, "no such folder"),
        ({"train_file": "{tmp}/*.parquet"}, DataError, "No such file"),
        ({"train_file": ["{tmp}/t.txt", "{tmp}/none.txt"]}, DataError, "none.txt.*No such file"),
        ({"train_file": []}, DataError, "neither train_file"),
        ({"train_file": ["{tmp}/t.txt", "{tmp}/t.csv"]}, DataError, r"got \.csv, \.txt, expected files of one kind"),
        ({"train_file": "{tmp}"}, DataError, "a directory.*dataset_name"),
        ({"train_file": "{tmp}/t.txt", "dataset_name": "x"}, ConfigError, "dataset_name and train_file, expected one of them"),
        ({"train_file": "{tmp}/t.txt", "validation_file": "v", "validation_dir": "w"}, ConfigError, "expected one of them"),
        ({"train_file": "{tmp}/t.csv", "text_column": "txet"}, DataError, "no column 'txet'. Did you mean 'text'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_read_is_one_clear_error(tmp_path, settings, error, message, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for suffix in ("txt", "csv"):
        table(tmp_path / f"t.{suffix}", ROWS)
    fill = lambda value: value.format(tmp=tmp_path) if isinstance(value, str) else [each.format(tmp=tmp_path) for each in value]  # noqa: E731
    arguments = DataArguments(**{name: fill(value) for name, value in settings.items()}, streaming=streaming)
    with pytest.raises(error, match=message) as caught:
        open_data(arguments, [Column(arguments.text_column, TEXT)])
    assert "\n" not in str(caught.value)


def test_a_name_without_a_network_is_refused_at_once_and_says_so(tmp_path):
    words = [
        "finetune",
        "--model_name_or_path",
        "x",
        "--dataset_name",
        "nobody/nothing",
        "--output_dir",
        str(tmp_path / "out"),
        "--tokenizer_name",
        str(tmp_path),
    ]
    from training_cases import tokenizer

    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    done = python("-m", "kanformer.cli", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Couldn't reach 'nobody/nothing'" in done.stderr and not (tmp_path / "out").exists()
