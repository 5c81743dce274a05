"""Small data of every kind, written where a test wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from training_cases import texts

ROWS = [{"text": text, "label": number % 2} for number, text in enumerate(texts(20))]
TEXTS = [row["text"] for row in ROWS]
COLORS = {"blue": (30, 40, 200), "red": (200, 40, 30)}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Nothing is left in the cache of datasets, and nothing found there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows in the format that the file's ending names; a .txt file gets the texts alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in rows), encoding="utf-8")
    else:
        frame = datasets.Dataset.from_list(rows)
        frame.to_csv(path) if path.suffix == ".csv" else frame.to_parquet(path)
    return str(path)


def source(tmp_path: Path, kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that name these rows as a source of this kind."""
    if kind == "glob":
        for number, start in enumerate(range(0, len(rows), 7)):
            table(tmp_path / "parts" / f"{number}.jsonl", rows[start : start + 7])
        return {"train_file": str(tmp_path / "parts" / "*.jsonl")}
    if kind == "list":
        return {"train_file": [table(tmp_path / "a.jsonl", rows[:3]), table(tmp_path / "b.jsonl", rows[3:])]}
    if kind == "folder":
        table(tmp_path / "folder" / "train.jsonl", rows)
        return {"dataset_name": str(tmp_path / "folder")}
    if kind in ("saved", "saved-dict"):
        saved = datasets.Dataset.from_list(rows)
        (datasets.DatasetDict({"train": saved}) if kind == "saved-dict" else saved).save_to_disk(tmp_path / kind)
        return {"dataset_name": str(tmp_path / kind)}
    return {"train_file": table(tmp_path / f"t.{kind}", rows)}


SOURCES = ["txt", "jsonl", "csv", "parquet", "glob", "list", "folder", "saved", "saved-dict"]
each_source = pytest.mark.parametrize("kind", SOURCES)


def image(path: Path, color: tuple[int, int, int], seed: int, size: int = 32) -> None:
    """A noisy square of a color."""
    noise = np.random.default_rng(seed).integers(-25, 26, (size, size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(path)


def image_folder(folder: Path, per_class: int = 12) -> str:
    """A folder of images for each color."""
    for number, (name, color) in enumerate(COLORS.items()):
        for index in range(per_class):
            image(folder / name / f"{index:03}.png", color, 1000 * number + index)
    return str(folder)


def described_folder(folder: Path, count: int = 12) -> str:
    """Images beside a metadata.jsonl with their classes, in the column "color"."""
    lines = []
    for index in range(count):
        name = list(COLORS)[index % 2]
        image(folder / f"{index:03}.png", COLORS[name], index)
        lines.append(json.dumps({"file_name": f"{index:03}.png", "color": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)
