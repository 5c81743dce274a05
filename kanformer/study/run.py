"""`kanformer study`: plan, prepare, run what is not finished, report."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kanformer.errors import ConfigError, KanformerError
from kanformer.experiments.alone import alone
from kanformer.study.methods import summary
from kanformer.study.one import RESULT, RUN
from kanformer.study.plan import PLACES, Plan, Run, make_plan
from kanformer.study.pool import last_words, run_all
from kanformer.study.prepare import Shared, uses_states
from kanformer.study.report import write_report
from kanformer.study.results import FAILURE, PLAN
from kanformer.study.settings import StudyArguments
from kanformer.surgery.folders import check_writable, replace_file
from kanformer.surgery.saving.loading import quiet_transformers
from kanformer.training.arguments import to_yaml
from kanformer.training.entry import DIVERGED
from kanformer.training.settings import DistillArguments


def study(arguments: StudyArguments) -> None:
    """Runs the grid as the settings say and writes the report. Called again, it does what is left to do: finished runs stand, a killed one goes on.

    Raises:
        ConfigError: a wrong setting, or settings of which a run in output_dir was not made. DataError: bad or too little text.
        KanformerError: after the report, if runs have failed.
    """
    if not arguments.output_dir and not arguments.dry_run:
        raise ConfigError("study", got="no output_dir", hint="Give a folder: --output_dir runs/study.")
    out = Path(arguments.output_dir)
    if arguments.report_only:
        print(write_report(out, arguments))
        return
    quiet_transformers()
    plan = make_plan(arguments)
    print(plan, flush=True)
    if arguments.dry_run:
        return
    check_writable(out)
    with alone(out, "study"):
        _Study(plan, arguments, out).run()


class _Study:
    """One call of the command."""

    def __init__(self, plan: Plan, arguments: StudyArguments, out: Path) -> None:
        self.plan, self.arguments, self.out, self.started = plan, arguments, out, time.time()
        self.settings = {run.name: json.loads(json.dumps(plan.settings(run, arguments))) for run in plan.runs}
        self.ended = 0

    def run(self) -> None:
        for run in self.plan.runs:
            self._check(run)
        pending = [run for run in self.plan.runs if not (self._folder(run) / RESULT).is_file()]
        self._write_plan()
        self._tell(f"{len(self.plan.runs) - len(pending)} of {len(self.plan.runs)} runs are finished")
        shared = Shared(self.plan, self.arguments, self.out, self._tell)
        if pending:
            files = shared.prepare(pending)
            for run in pending:
                self._lay_out(run, shared, files)
            self.left = len(pending)
            del self.plan.teacher  # the children need the memory
            run_all([self._folder(run) for run in pending], self.arguments.workers, self._end)
        print(write_report(self.out, self.arguments))
        self._sum_up(shared)

    def _folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def _check(self, run: Run) -> None:
        """Refuses to mix runs of different settings."""
        for name in (RESULT, RUN):
            try:
                known = _with_defaults(json.loads((self._folder(run) / name).read_text(encoding="utf-8"))["settings"])
            except (OSError, ValueError, KeyError):
                continue
            wanted = self.settings[run.name]
            changed = sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))
            if changed:
                raise ConfigError(
                    "go on with the study",
                    subject=self._folder(run),
                    got=f"other settings than those of this run ({', '.join(_differences(known, wanted, changed))})",
                    hint="Choose another output_dir, or delete that folder to repeat the run.",
                )

    def _write_plan(self) -> None:
        arms = [summary(arm) for arm in self.plan.arms]
        runs = [{"name": run.name, "arm": run.arm.name, "seed": run.seed} for run in self.plan.runs]
        texts = self.plan.texts
        facts = {"teacher": self.plan.teacher_name, "class": type(self.plan.teacher).__name__, "tokens": self.plan.tokens, "seeds": self.plan.seeds}
        facts |= {"texts": {"train": [texts.source, len(texts.train)], "corpora": [[name, source, len(part)] for name, source, part in texts.parts()]}}
        steps = [[stage.max_steps, stage.per_device_train_batch_size, stage.bf16] for run in self.plan.runs for stage in run.stages]
        facts |= {"stages": next(([list(each) for each in steps[: len(run.stages)]] for run in self.plan.runs if run.stages), [])}
        replace_file(self.out / "config.yaml", to_yaml(self.arguments))
        replace_file(self.out / PLAN, json.dumps({**facts, "arms": [{"name": a.name, **s} for a, s in zip(self.plan.arms, arms, strict=True)], "runs": runs}))

    def _lay_out(self, run: Run, shared: Shared, files: dict[str, str]) -> None:
        stages = [self._stage(stage, shared, files) for stage in run.stages]
        pruned = any(values["init"] == "prune" for values in run.arm.configs)
        corpora = [(name, source, files[part]) for part, (name, source, _) in zip(("held_out", "second"), self.plan.texts.parts(), strict=True)]
        places = {
            "teacher": self.plan.teacher_name,
            "start": str(shared.start(run.arm)) if pruned or run.arm.method == "linear" else None,
            "stages": stages,
            "corpora": corpora,
            "max_length": self.arguments.max_length,
            "attn_implementation": self.arguments.attn_implementation,
            "keep_model": self.arguments.keep_models,
        }
        (self._folder(run) / FAILURE).unlink(missing_ok=True)
        replace_file(self._folder(run) / RUN, json.dumps({"settings": self.settings[run.name], "places": places}, indent=1))

    @staticmethod
    def _stage(stage: Any, shared: Shared, files: dict[str, str]) -> dict[str, Any]:
        own = {"train_file": files["train"], "validation_file": files["held_out"], "teacher_states": str(shared.states) if uses_states(stage) else None}
        return {**dataclasses.asdict(stage), **own}

    def _end(self, folder: Path, code: int) -> None:
        self.ended += 1
        head = f"{self.ended}/{self.left} {folder.name}: "
        if (folder / RESULT).is_file():
            found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            row = found["corpora"][0]["rows"]["patched"]
            name = next(name for name in ("embedding_cosine", "ce") if name in row)
            self._tell(f"{head}{name} {row[name]:.4f}, {found['seconds']:.0f} s")
            return
        failure = {"exit_code": code, "diverged": code == DIVERGED, "message": last_words(folder, code)}
        replace_file(folder / FAILURE, json.dumps(failure))
        self._tell(f"{head}{'diverged' if failure['diverged'] else 'failed'}: {failure['message']}")

    def _sum_up(self, shared: Shared) -> None:
        failed = [run.name for run in self.plan.runs if not (self._folder(run) / RESULT).is_file()]
        if failed:
            got = f"{len(failed)} of {len(self.plan.runs)} runs that failed: {', '.join(failed[:4])}{', ...' if len(failed) > 4 else ''}"
            raise KanformerError(
                "finish the study", subject=self.out, got=got, hint="Each has its run.log in the folder runs; started again, they are repeated."
            )
        shared.clean()

    def _tell(self, text: str) -> None:
        print(f"[{time.time() - self.started:5.0f} s] {text}", flush=True)


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that an older kanformer may have made: what training has learned to do since then, it did not do."""
    fields = DistillArguments.__dataclass_fields__
    added = {name: field.default for name, field in fields.items() if name not in PLACES and field.default is not dataclasses.MISSING}
    return {**settings, "stages": [{**added, **stage} for stage in settings["stages"]]}


def _differences(known: dict[str, Any], wanted: dict[str, Any], changed: list[str]) -> Iterator[str]:
    for key in changed:
        old, new = known.get(key), wanted.get(key)
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and all(isinstance(each, dict) for each in [*old, *new]):
            for before, after in zip(old, new, strict=True):
                yield from (f"{name}: {before.get(name)} then, {after.get(name)} now" for name in {*before, *after} if before.get(name) != after.get(name))
        else:
            yield f"{key}: {old} then, {new} now"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `scripts/study.py`."""
    from kanformer.training.entry import run

    text = "Compares what replaced blocks keep of a pretrained model: methods, parameter ratios, seeds."
    run(StudyArguments, study, sys.argv[1:] if argv is None else argv, "study", text)


if __name__ == "__main__":
    main()
