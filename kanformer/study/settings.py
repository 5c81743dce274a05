"""The settings of `kanformer study`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kanformer.errors import ConfigError, did_you_mean
from kanformer.training.arguments import from_mapping, option
from kanformer.training.settings import DataArguments, DistillArguments

METHODS = ("kan", "mlp", "random_mlp", "linear", "kan_full")
_DATA = set(DataArguments.__dataclass_fields__) - {"max_eval_samples"}
_OWN_STAGE = _DATA | {"model_name_or_path", "teacher_name_or_path", "tokenizer_name", "kan", "calibration_samples", "teacher_states"}
_OWN_STAGE |= {"output_dir", "seed", "resume", "disable_tqdm", "progress_position", "run_name"}
_OWN_KAN = {"init", "edges", "param_ratio", "width", "keep_original", "schema_version"}


@dataclass
class StudyArguments(DataArguments):
    """Settings of `scripts/study.py`."""

    teacher_name_or_path: str | None = option(None, "the original, an encoder or a language model; absent: all-MiniLM-L6-v2 from its package")
    output_dir: str = option("", "folder for the runs and the report; its name is the study's")
    methods: list = option(["kan", "mlp", "random_mlp", "linear"], f"what takes the place of the blocks, any of {', '.join(METHODS)}")
    ratios: list = option([1.0, 0.75, 0.5, 0.25], "parameters of the blocks over the original's, each in (0, 1]")
    seeds: list | int = option([0, 1, 2], "of data order and new weights; a number n means 0 to n - 1")
    second_file: str | None = option(None, "text of another kind to measure on; absent: source code of Python's standard library")
    kan: dict = option({"grid_size": 6}, "KANConfig values of the KANs; those that select blocks, and ridge, hold for all methods")
    distill: dict | list = option({}, "settings of kanformer distill, the same for all methods, or a list: stages one after the other")
    calibration_samples: int = option(1024, "texts for pruning and grids", ge=1)
    goals: dict = option({}, "what is to be reached, by ratio: the least cosine of an encoder's embeddings, or the greatest CE of a language model")
    workers: int = option(2, "runs at the same time, which share the cores", ge=1)
    keep_models: bool = option(True, "keep the trained models")
    dry_run: bool = option(False, "print the plan and stop")
    report_only: bool = option(False, "write the report of what has been run, and stop")
    docs_dir: str | None = option(None, "folder for a copy of table, CSV and figure, named after the study")


def checked_seeds(arguments: StudyArguments) -> list[int]:
    """The seeds.

    Raises:
        ConfigError: none, twice the same, or no whole numbers from 0 on.
    """
    given = list(range(arguments.seeds)) if isinstance(arguments.seeds, int) else arguments.seeds
    _check("seeds", given, lambda seed: isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32, "whole numbers from 0 on")
    return given


def checked_ratios(arguments: StudyArguments) -> list[float]:
    """The ratios, the greatest first.

    Raises:
        ConfigError: none, twice the same, or one outside (0, 1].
    """
    _check("ratios", arguments.ratios, lambda ratio: isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio <= 1, "numbers in (0, 1]")
    return sorted(map(float, arguments.ratios), reverse=True)


def checked_methods(arguments: StudyArguments) -> list[str]:
    """The methods.

    Raises:
        ConfigError: none, twice the same, or an unknown one.
    """
    for method in arguments.methods:
        if method not in METHODS:
            raise ConfigError("plan the study", subject="methods", got=repr(method), hint=did_you_mean(str(method), METHODS))
    _check("methods", arguments.methods, lambda method: True, f"any of {', '.join(METHODS)}")
    return list(arguments.methods)


def checked_goals(arguments: StudyArguments) -> dict[float, float]:
    """The goals by ratio.

    Raises:
        ConfigError: something else than numbers by ratio.
    """
    try:
        return {float(ratio): float(value) for ratio, value in arguments.goals.items()}
    except (TypeError, ValueError) as error:
        raise ConfigError("plan the study", subject="goals", got=repr(arguments.goals), expected="numbers by ratio, such as {0.5: 0.985}") from error


def checked_kan(arguments: StudyArguments) -> dict[str, Any]:
    """The KANs' settings, without those that make the methods what they are.

    Raises:
        ConfigError: one of those.
    """
    _refuse("kan", arguments.kan, _OWN_KAN)
    return dict(arguments.kan)


def checked_stages(arguments: StudyArguments, **values: Any) -> list[DistillArguments]:
    """The stages of every trained run; `values` are what the study itself sets.

    Raises:
        ConfigError: a setting that is unknown, wrong, or the study's.
    """
    from kanformer.training.objective import learns_nothing

    stages = arguments.distill if isinstance(arguments.distill, list) else [arguments.distill]
    if not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError("plan the study", subject="distill", got=repr(arguments.distill), expected="a mapping of settings, or a list of them")
    for stage in stages:
        _refuse("distill", stage, _OWN_STAGE)
    found = [from_mapping(DistillArguments, {**stage, **values}, "distill") for stage in stages]
    for stage in found:
        if learns_nothing(stage):
            raise ConfigError("plan the study", subject="distill", got="stages without a loss", hint="Set local_weight or hidden_weight above 0.")
    return found


def _check(name: str, given: Any, good: Any, expected: str) -> None:
    wrong = [value for value in given if not good(value)]
    if wrong or not given or len(set(given)) < len(given):
        got = repr(wrong[0]) if wrong else "an empty list" if not given else "the same twice"
        raise ConfigError("plan the study", subject=name, got=got, expected=expected)


def _refuse(name: str, given: dict[str, Any], own: Iterable[str]) -> None:
    for key in sorted(set(given) & set(own)):
        raise ConfigError(
            "plan the study", subject=name, got=f"{key!r}, which the study sets for every run", hint="Leave it out, or set it for the whole study."
        )
