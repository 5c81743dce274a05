"""What a run is measured by: everything that `kanformer evaluate` knows, on held-out text of the training corpus and on a second one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn

from kanformer.evaluation.corpus import CorpusResult, measure_corpus
from kanformer.evaluation.report import plain
from kanformer.evaluation.settings import EvaluateArguments
from kanformer.evaluation.subjects import load_subjects
from kanformer.evaluation.texts import Reader
from kanformer.study.linear import LinearMap, linear_blocks
from kanformer.surgery.compare import compare
from kanformer.training.data import file_columns


def measure(model: nn.Module, places: Mapping[str, Any], maps: Mapping[str, LinearMap] | None = None) -> dict[str, Any]:
    """The patched model, or with `maps` the linear ones in the place of its blocks, on both corpora.

    Args:
        places: teacher, max_length, attn_implementation, and `corpora`: (name, source, file) each.
    """
    arguments = EvaluateArguments(
        teacher_name_or_path=places["teacher"], max_length=places["max_length"], attn_implementation=places["attn_implementation"], disable_tqdm=True
    )
    subjects = load_subjects(arguments, model)
    reader = Reader(subjects.tokenizer, subjects.task, arguments.max_length, arguments.per_device_eval_batch_size)
    with linear_blocks(model, maps) if maps else nullcontext():
        found = [measure_corpus(subjects, reader, file_columns(file, ["text"])["text"], CorpusResult(name, source)) for name, source, file in places["corpora"]]
    costs = compare(model).to_dict()["feed_forward"]
    parameters = sum(each.parameters for each in maps.values()) if maps else costs["kan_parameters"]
    corpora = [dataclasses.asdict(result) for result in found]
    return plain({"task": subjects.task, "parameters": parameters, "original": costs["mlp_parameters"], "corpora": corpora, "notes": subjects.notes})
