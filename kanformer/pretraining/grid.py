"""`kanformer pretrain`: prepares the data, times the arms, runs what is missing and writes the report."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from kanformer.errors import ConfigError, KanformerError
from kanformer.experiments.alone import alone
from kanformer.pretraining.outcomes import begin, forget_failures, outcome, wanted_runs, write_failure
from kanformer.pretraining.plan import Plan
from kanformer.pretraining.report import write_report
from kanformer.pretraining.settings import PretrainArguments, RunArguments
from kanformer.pretraining.text import digest, prepare_data, tokenize_text
from kanformer.pretraining.worker import Worker
from kanformer.surgery.folders import check_writable, replace_file
from kanformer.surgery.saving.loading import quiet_transformers
from kanformer.training.checkpoint import RESULTS

_TIMES = "timing.json"


def pretrain(arguments: PretrainArguments) -> list[dict[str, Any]]:
    """Runs the grid that the settings describe, or what is missing of it, and returns the rows of the report (report.csv)."""
    if not arguments.output_dir:
        raise ConfigError("pretrain", got="no output_dir", hint="Give a folder: --output_dir runs/pretrain.")
    quiet_transformers()
    folder = Path(arguments.output_dir) / (arguments.corpus or Path(arguments.text).stem)
    check_writable(folder)
    if arguments.dry_run:
        print(_with_times(Plan(arguments, folder, len(tokenize_text(arguments).tokenizer)), _read_times(folder), required=False))
        return []
    if arguments.report_only and not (folder / "data").is_dir():
        raise ConfigError("write the report", subject=folder, got="no grid there", hint="Run it first, without --report_only.")
    corpus = prepare_data(arguments, folder / "data")
    plan = Plan(arguments, folder, len(corpus.tokenizer), digest(arguments))
    if arguments.report_only:
        return write_report(_with_times(plan, _read_times(folder), required=False))
    with alone(folder, "grid"):
        forget_failures(folder)
        workers = [Worker(arguments.threads) for _ in range(arguments.workers)]
        try:
            plan = _with_times(plan, _times(plan, workers[0]), required=True)
            print(plan, flush=True)
            _run_all(plan, workers)
        finally:
            for worker in workers:
                worker.stop()
    return write_report(plan)


def _with_times(plan: Plan, times: dict[str, Any], required: bool) -> Plan:
    """The plan with its entries for equal time; without them where a time is missing and none is required."""
    known = all(arm.name in times for arm in plan.arms)
    if "time" not in plan.rows or not (known or required):
        return plan
    return Plan(plan.arguments, plan.folder, plan.vocab_size, plan.digest, {arm.name: times[arm.name]["ratio"] for arm in plan.arms})


def _read_times(folder: Path) -> dict[str, Any]:
    path = folder / _TIMES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _times(plan: Plan, worker: Worker) -> dict[str, Any]:
    """Step times of all arms; what was measured once stays, or the steps at equal time would change from start to start."""
    found = _read_times(plan.folder)
    for baseline in plan.baselines:
        arms = [arm for arm in plan.arms if arm.baseline == baseline and (arm.name not in found or arm.is_baseline)]
        if all(arm.name in found for arm in arms):
            continue
        print(f"timing in turns: {', '.join(arm.name for arm in arms)}", flush=True)
        widths = {arm.name: plan.entries[arm.name, "params"].size.width for arm in arms}
        job = {"time": dataclasses.asdict(plan.arguments), "data": str(plan.folder / "data"), "widths": widths}
        answer = worker.do(job, plan.folder / "timing.log")
        if "error" in answer:
            raise KanformerError("time the arms", subject=baseline, got=answer["error"], hint=f"See {plan.folder / 'timing.log'}.")
        found |= {name: times for name, times in answer["result"].items() if name not in found}
        replace_file(plan.folder / _TIMES, json.dumps(found, indent=2))
    return found


def _run_all(plan: Plan, workers: list[Worker]) -> None:
    """Keeps all workers busy until nothing is left to run."""
    from tqdm.auto import tqdm

    idle, running = list(workers), dict[Future, tuple[RunArguments, Worker, float]]()
    total, done = plan.number_of_runs(), sum(1 for _ in plan.folder.glob(f"*/*/*/{RESULTS}"))
    with (
        ThreadPoolExecutor(len(workers)) as threads,
        tqdm(total=total, initial=done, unit="run", disable=plan.arguments.disable_tqdm, dynamic_ncols=True) as bar,
    ):
        try:
            while True:
                busy = {run.output_dir for run, _, _ in running.values()}
                waiting = [run for run in wanted_runs(plan) if run.output_dir not in busy]
                for run in waiting[: len(idle)]:
                    begin(run)
                    worker = idle.pop()
                    running[threads.submit(worker.do, {"run": dataclasses.asdict(run)}, Path(run.output_dir) / "log.txt")] = (run, worker, time.time())
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, worker, started = running.pop(future)
                    idle.append(worker)
                    bar.update()
                    bar.write(_end(plan, run, future.result(), time.time() - started), file=sys.stdout)
                    sys.stdout.flush()
        finally:
            for worker in workers:  # their threads wait for them
                worker.stop()


def _end(plan: Plan, run: RunArguments, answer: dict[str, Any], seconds: float) -> str:
    """Notes a failure, and says in a line how the run ended."""
    if "error" in answer:
        write_failure(run, answer["error"], answer["diverged"])
    ended = outcome(run)
    if ended is None:  # it said that all is well, and its results are not there
        write_failure(run, "no results in its folder", False)
        ended = outcome(run)
    assert ended is not None
    name = Path(run.output_dir).relative_to(plan.folder)
    return f"{name}: " + (f"CE {ended.loss:.4f}" if ended.loss is not None else f"FAILED, {ended.error}") + f" ({seconds:.0f} s)"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `scripts/pretrain.py` and `kanformer pretrain`."""
    from kanformer.training.entry import run

    run(PretrainArguments, pretrain, sys.argv[1:] if argv is None else argv, "pretrain", "Compares feed-forward blocks from scratch.")


if __name__ == "__main__":
    main()
