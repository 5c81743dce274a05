"""What the runs of a study share, made once: texts, calibration, pruned starts, linear maps, the teacher's hidden states."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kanformer.config import KANConfig
from kanformer.conversion.affine import AffineMoments
from kanformer.demo.children import save
from kanformer.study.linear import fit_linear, save_maps
from kanformer.study.methods import Arm
from kanformer.study.plan import Plan, Run
from kanformer.study.settings import StudyArguments
from kanformer.study.texts import write_texts
from kanformer.surgery.calibrating.calibrate import calibrate
from kanformer.surgery.calibrating.calibration import Calibration
from kanformer.surgery.calibrating.files import load_calibration
from kanformer.surgery.folders import replace_file, write_folder
from kanformer.surgery.replacing.apply import patch_model
from kanformer.training.data import pad, pad_token
from kanformer.training.distill import store_states
from kanformer.training.settings import DistillArguments
from kanformer.training.teacher_states import remove_teacher_states

_BATCH = 32
Tell = Callable[[str], None]


class Shared:
    """The folder `shared` of a study. What is there and of the same facts is used again; what a killed study left half made is made anew."""

    def __init__(self, plan: Plan, arguments: StudyArguments, out: Path, tell: Tell) -> None:
        self.plan, self.arguments, self.folder, self.tell = plan, arguments, out / "shared", tell
        self.facts = {"teacher": plan.teacher_name, "texts": plan.texts.facts(), "max_length": arguments.max_length}
        self.states = self.folder / "teacher-states.bin"
        self._calibration: Calibration | None = None

    def prepare(self, runs: Sequence[Run]) -> dict[str, str]:
        """Makes what these runs need; returns the texts' files by part."""
        if torch.cuda.is_available():
            self.plan.teacher.cuda()
        texts = self.plan.texts
        parts = {"train": texts.train, "held_out": texts.held_out, "second": texts.second}
        files = {name: write_texts(self.folder / name, part) for name, part in parts.items()}
        arms = list({run.arm.name: run.arm for run in runs}.values())
        pruned = [arm for arm in arms if any(values["init"] == "prune" for values in arm.configs)]
        for arm in pruned:
            self._made(self.start(arm), {"configs": list(arm.configs), "samples": self.arguments.calibration_samples}, lambda arm=arm: self._prune(arm))
        self._calibration = None
        self._fit([arm for arm in arms if arm.method == "linear"])
        trained = [run for run in runs if run.stages]
        if any(uses_states(stage) for run in trained for stage in run.stages):
            self._made(self.states, {"bf16": _bf16(trained[0].stages[0])}, lambda: self._store(trained[0].stages[0]))
        self.plan.teacher.cpu()
        return files

    def start(self, arm: Arm) -> Path:
        """Folder of the pruned model of an arm, file of the maps of a linear one."""
        return self.folder / (f"{arm.name}.safetensors" if arm.method == "linear" else arm.name)

    def clean(self) -> None:
        """Deletes what is large and of no more use when all runs are done."""
        remove_teacher_states(self.states)
        self._facts_of(self.states).unlink(missing_ok=True)

    def _made(self, path: Path, facts: dict[str, Any], make: Callable[[], None]) -> None:
        """Calls `make` unless what is at `path` was made of the same."""
        facts, note = json.loads(json.dumps({**self.facts, **facts})), self._facts_of(path)
        if path.exists() and note.is_file() and json.loads(note.read_text(encoding="utf-8")) == facts:
            return
        note.unlink(missing_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make()
        replace_file(note, json.dumps(facts))

    @staticmethod
    def _facts_of(path: Path) -> Path:
        return path.with_name(f"{path.name}.facts.json")

    def _batches(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        examples, pad_id = self.plan.examples[:count], pad_token(self.plan.tokenizer)
        for start in range(0, len(examples), _BATCH):
            yield pad(examples[start : start + _BATCH], pad_id)

    def _calibrated(self) -> Calibration:
        folder, samples = self.folder / "calibration", self.arguments.calibration_samples

        def make() -> None:
            self.tell(f"calibrate on {min(samples, len(self.plan.examples)):,} texts")
            calibrate(self.plan.teacher, self._batches(samples), linear=False).save(folder)

        if self._calibration is None:
            self._made(folder, {"samples": samples}, make)
            self._calibration = load_calibration(folder)
        return self._calibration

    def _prune(self, arm: Arm) -> None:
        calibration = self._calibrated()
        self.tell(f"prune {arm.name}")
        model = copy.deepcopy(self.plan.teacher)
        patch_model(model, [KANConfig.from_dict(values) for values in arm.configs], calibration=calibration)
        write_folder(self.start(arm), lambda folder: save(model, self.plan.tokenizer, folder))

    def _fit(self, arms: Sequence[Arm]) -> None:
        """The maps of all ratios from one pass over as many texts as the trained runs read, at most all."""
        moments: dict[str, AffineMoments] = {}
        reads = [sum(stage.max_steps * stage.per_device_train_batch_size * stage.gradient_accumulation_steps for stage in run.stages) for run in self.plan.runs]
        count = min(max([self.arguments.calibration_samples, *reads]), len(self.plan.examples))

        def make(arm: Arm) -> None:
            if not moments:
                self.tell(f"gather the linear maps' moments on {count:,} texts")
                found = calibrate(self.plan.teacher, self._batches(count), gram=False)
                moments.update({path: seen.affine for path, seen in found.statistics.items() if seen.affine is not None})
            maps = {path: fit_linear(moments[path], rank, self._ridge()) for path, rank in arm.ranks.items()}
            save_maps(maps, self.start(arm))

        for arm in arms:
            self._made(self.start(arm), {"ranks": arm.ranks, "ridge": self._ridge(), "samples": count}, lambda arm=arm: make(arm))

    def _ridge(self) -> float:
        return float(self.arguments.kan.get("ridge", KANConfig().ridge))

    def _store(self, stage: DistillArguments) -> None:
        self.tell(f"run the teacher over {len(self.plan.examples):,} texts")
        teacher = self.plan.teacher
        with torch.autocast(next(teacher.parameters()).device.type, torch.bfloat16) if _bf16(stage) else nullcontext():
            store_states(self.states, teacher, self.plan.examples, pad_token(self.plan.tokenizer))


def uses_states(stage: DistillArguments) -> bool:
    """Whether the teacher's hidden states are all that a stage asks of the teacher, so that they can be stored once."""
    weights = {name: value for name, value in asdict(stage).items() if name.endswith("_weight")}
    return bool(weights.pop("hidden_weight")) and not any(weights.values())


def _bf16(stage: DistillArguments) -> bool:
    return stage.bf16
