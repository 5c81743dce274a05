"""`kanformer evaluate`: settings, order, output."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kanformer.errors import ConfigError
from kanformer.evaluation.corpus import CorpusResult, measure_corpus
from kanformer.evaluation.report import corpus_table, layer_csv, plain, speed_lines
from kanformer.evaluation.settings import EvaluateArguments
from kanformer.evaluation.speed import PeakMemory, tokens_per_second
from kanformer.evaluation.subjects import Subjects, load_subjects
from kanformer.evaluation.texts import Batch, Reader
from kanformer.surgery.folders import check_writable, replace_file
from kanformer.surgery.saving.loading import quiet_transformers
from kanformer.training.data import file_columns, load_held_out


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Measures a patched model as the settings say, prints the tables, writes and returns the results (evaluation.json)."""
    folder = _check(arguments)
    quiet_transformers()
    corpora = _corpora(arguments)
    subjects = load_subjects(arguments)
    reader = Reader(subjects.tokenizer, subjects.task, arguments.max_length, arguments.per_device_eval_batch_size, arguments.seed, arguments.mlm_probability)
    memory, found = PeakMemory(subjects.device), []
    for name, source, texts in corpora:
        with _bar(name, 2 * len(texts), arguments) as bar:

            def after(batch: Batch, bar: Any = bar) -> None:
                memory.look()
                bar.update(batch.texts)

            found.append(measure_corpus(subjects, reader, texts, CorpusResult(name, source), after))
    speed = _speed(subjects, reader, corpora[0][2], arguments.speed_batches, memory)
    results = _results(arguments, subjects, found, speed, memory.result())
    replace_file(folder / "layers.csv", layer_csv(found))
    replace_file(folder / "evaluation.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    lines = [*(corpus_table(result) + "\n" for result in found), *speed_lines(speed, results["memory"], arguments.speed_batches, results["device"])]
    print("\n".join([*lines, *(f"note: {note}" for note in subjects.notes), f"written: {folder / 'evaluation.json'}, {folder / 'layers.csv'}"]))
    return results


def _check(arguments: EvaluateArguments) -> Path:
    """The output folder; a run of a training script, which has a layers.csv of its own, is not written into."""
    if not arguments.model_name_or_path:
        raise ConfigError("evaluate", got="no model_name_or_path", hint="Name a patched checkpoint: --model_name_or_path FOLDER_OR_ID.")
    if not arguments.output_dir:
        raise ConfigError("evaluate", got="no output_dir", hint="Give a folder: --output_dir runs/evaluation.")
    folder = Path(arguments.output_dir)
    check_writable(folder)
    if (folder / "all_results.json").exists() or (folder / "metrics.jsonl").exists():
        raise ConfigError("evaluate", subject=f"output_dir={folder}", got="a folder that holds a training run", hint="Choose another output_dir.")
    return folder


def _corpora(arguments: EvaluateArguments) -> list[tuple[str, str, list[str]]]:
    """(name, source, texts): what was held out of the training text, and the second corpus if one is given."""
    column, limit = arguments.text_column, arguments.max_eval_samples
    if arguments.validation_file and not (arguments.train_file or arguments.dataset_name):
        texts = file_columns(arguments.validation_file, [column])[column][:limit]
    else:
        texts = load_held_out(arguments, [column])[column]
    held_out = arguments.dataset_name or arguments.validation_file or arguments.train_file
    found = [("training corpus", f"held-out text of {held_out}", texts)]
    if arguments.second_file:
        found.append(("second corpus", arguments.second_file, file_columns(arguments.second_file, [column])[column][:limit]))
    return found


def _speed(subjects: Subjects, reader: Reader, texts: Sequence[str], rounds: int, memory: PeakMemory) -> dict[str, float]:
    if not rounds:
        return {}
    batches = [batch.to(subjects.device) for batch in itertools.islice(reader.batches(texts), rounds)]
    models = {name: model for name, model in (("teacher", subjects.teacher), ("patched", subjects.patched)) if model is not None}
    return tokens_per_second(models, batches, rounds, memory.look)


def _results(arguments: EvaluateArguments, subjects: Subjects, found: list[CorpusResult], speed: dict[str, float], memory: dict[str, Any]) -> dict[str, Any]:
    import transformers

    import kanformer

    name = torch.cuda.get_device_name(subjects.device) if subjects.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return plain(
        {
            "task": subjects.task,
            "model_class": type(subjects.patched).__name__,
            "dtype": str(next(subjects.patched.parameters()).dtype).removeprefix("torch."),
            "corpora": [dataclasses.asdict(result) for result in found],
            "tokens_per_second": speed,
            "memory": memory,
            "notes": subjects.notes,
            "device": name,
            "versions": {
                "kanformer": kanformer.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "settings": dataclasses.asdict(arguments),
        }
    )


def _bar(name: str, total: int, arguments: EvaluateArguments) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="text", desc=name, disable=arguments.disable_tqdm, dynamic_ncols=True, mininterval=0.5)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `scripts/evaluate.py` and `kanformer evaluate`."""
    from kanformer.training.entry import run

    run(EvaluateArguments, evaluate, sys.argv[1:] if argv is None else argv, "evaluate", "Measures a patched model against the original.")


if __name__ == "__main__":
    main()
