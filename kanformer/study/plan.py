"""The grid: which runs a study has, with which settings, and what they cost."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from torch import nn

from kanformer.demo.children import fast_bf16
from kanformer.errors import ConfigError, DataError, SurgeryError
from kanformer.study.methods import Arm, make_arms
from kanformer.study.settings import StudyArguments, checked_goals, checked_kan, checked_methods, checked_ratios, checked_seeds, checked_stages
from kanformer.study.texts import Texts, gather
from kanformer.surgery.saving.loading import load_model, load_tokenizer
from kanformer.surgery.tables import table
from kanformer.training.data import Order, tokenize
from kanformer.training.models import check_length, is_patched
from kanformer.training.settings import DistillArguments

PLACES = ("model_name_or_path", "train_file", "validation_file", "output_dir", "resume", "disable_tqdm", "teacher_states")  # no numbers depend on them


@dataclass(frozen=True)
class Run:
    """One run: an arm and a seed, which is None where nothing depends on it. `stages` are empty where nothing is trained."""

    arm: Arm
    seed: int | None
    stages: tuple[DistillArguments, ...]

    @property
    def name(self) -> str:
        return self.arm.name if self.seed is None else f"{self.arm.name}-s{self.seed}"


@dataclass
class Plan:
    """What a study will do. `tokens` are those of a run's training, by seed, the same for all methods."""

    teacher_name: str
    teacher: nn.Module
    tokenizer: Any
    texts: Texts
    examples: list[list[int]]
    arms: list[Arm]
    runs: list[Run]
    tokens: dict[int, int]
    seeds: list[int]

    def settings(self, run: Run, arguments: StudyArguments) -> dict[str, Any]:
        """All on which the run's numbers depend, as plain JSON values."""
        stages = [{name: value for name, value in dataclasses.asdict(stage).items() if name not in PLACES} for stage in run.stages]
        return {
            "method": run.arm.method,
            "ratio": run.arm.ratio,
            "seed": run.seed,
            "teacher": self.teacher_name,
            "configs": list(run.arm.configs),
            "ranks": run.arm.ranks,
            "ridge": arguments.kan.get("ridge"),
            "stages": stages,
            "texts": self.texts.facts(),
            "max_length": arguments.max_length,
            "calibration_samples": arguments.calibration_samples,
            "attn_implementation": arguments.attn_implementation,
        }

    def __str__(self) -> str:
        rows = [self._row(arm) for arm in self.arms]
        header = ("method", "ratio", "parameters", "reached", "hidden", "functions", "training", "runs")
        texts, low, high = self.texts, min(self.tokens.values(), default=0), max(self.tokens.values(), default=0)
        held = f"held out: {len(texts.held_out):,}; second: {texts.second_source}, {len(texts.second):,}"
        return "\n".join(
            [
                f"{self.teacher_name}: {type(self.teacher).__name__}, {self.arms[0].original:,} parameters in its feed-forward blocks",
                f"training: {texts.source}, {len(texts.train):,} texts; {held}",
                table(header, rows, right=(1, 2, 3, 4, 5, 7)),
                f"{len(self.runs)} runs; those that are trained read {low:,}{f' to {high:,}' if high > low else ''} tokens each, the same for all methods",
            ]
        )

    def _row(self, arm: Arm) -> tuple[str, ...]:
        runs = sum(run.arm is arm for run in self.runs)
        hidden = "-" if arm.hidden is None else f"{arm.hidden:,}"
        return (arm.method, f"{arm.ratio:g}", f"{arm.parameters:,}", f"{arm.reached:.4f}", hidden, _functions(arm), arm.training, str(runs))


def _functions(arm: Arm) -> str:
    """Learned functions per block, by form of block."""
    if arm.method == "kan_full":
        return "per edge"
    return ", ".join(str(values["groups"] or "per channel") for values in arm.configs if "groups" in values) or "-"


def make_plan(arguments: StudyArguments) -> Plan:
    """Checks all settings, loads the teacher and the texts, and lays out the runs, the first seed first. Writes nothing.

    Raises:
        ConfigError: a wrong setting. DataError: bad or too little text. SurgeryError: a teacher that is patched.
        CheckpointError: a teacher that cannot be read.
    """
    methods, ratios, seeds, kan = checked_methods(arguments), checked_ratios(arguments), checked_seeds(arguments), checked_kan(arguments)
    checked_goals(arguments)
    checked_stages(arguments)
    name = arguments.teacher_name_or_path or _minilm()
    teacher = load_model(name, attn_implementation=arguments.attn_implementation).requires_grad_(False)
    if is_patched(teacher):
        raise SurgeryError("study", subject=name, got="a teacher that is patched", expected="the original model")
    if getattr(teacher.config, "is_encoder_decoder", False):
        raise ConfigError("study", subject=name, got="an encoder-decoder model", expected="an encoder or a language model")
    check_length(teacher, arguments.max_length)
    arms = make_arms(teacher, methods, ratios, kan)
    tokenizer, texts = load_tokenizer(name), gather(arguments)
    examples = tokenize(tokenizer, texts.train, arguments.max_length)
    stages = {seed: tuple(checked_stages(arguments, **_fixed(arguments, name, seed))) for seed in seeds}
    runs = [Run(arm, None, ()) for arm in arms if arm.training != "steps"]
    runs += [Run(arm, seed, stages[seed]) for seed, arm in itertools.product(seeds, arms) if arm.training == "steps"]
    trained = any(run.stages for run in runs)
    tokens = {seed: sum(tokens_of(stage, examples) for stage in stages[seed]) for seed in seeds} if trained else {}
    return Plan(name, teacher, tokenizer, texts, examples, arms, runs, tokens, seeds)


def tokens_of(stage: DistillArguments, examples: list[list[int]]) -> int:
    """How many tokens a stage reads in one process, by the order in which it reads.

    Raises:
        DataError: fewer texts than one step takes.
    """
    group = stage.per_device_train_batch_size * stage.gradient_accumulation_steps
    if len(examples) < group:
        raise DataError("train on the text", got=f"{len(examples)} texts", expected=f"at least the {group} of one step")
    lengths = [len(example) for example in examples]
    order = Order(len(examples), stage.seed, lengths, group)
    return sum(lengths[order[position]] for position in range(stage.max_steps * group))


def _fixed(arguments: StudyArguments, teacher: str, seed: int) -> dict[str, Any]:
    """What the study sets in every stage of every run."""
    values: dict[str, Any] = {"teacher_name_or_path": teacher, "seed": seed, "resume": True, "disable_tqdm": True}
    values |= {"max_length": arguments.max_length, "attn_implementation": arguments.attn_implementation}
    stages = arguments.distill if isinstance(arguments.distill, list) else [arguments.distill]
    if not any("bf16" in stage or "fp16" in stage for stage in stages):
        values["bf16"] = fast_bf16()
    return values


def _minilm() -> str:
    from kanformer.demo.settings import minilm_path

    return minilm_path()
