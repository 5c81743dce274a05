"""A child process that does jobs one after the other, so that libraries and compiled kernels are loaded once."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from kanformer.errors import KanformerError, TrainingDiverged


class Worker:
    """The parent's end. A job is a mapping that `work` understands; its output goes to a log file.

    Args:
        threads: CPU threads of the process.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.process: subprocess.Popen[str] | None = None

    def do(self, job: dict[str, Any], log: Path) -> dict[str, Any]:
        """Waits for the job. Returns {"result": ...}, or {"error": text, "diverged": whether the loss did}; a worker that dies is an error too."""
        log.parent.mkdir(parents=True, exist_ok=True)
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({**job, "log": str(log)}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self.process = None
        return {"error": f"its process ended with exit code {process.wait()}", "diverged": False}

    def _start(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            count = str(self.threads)
            environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}
            command = [sys.executable, "-m", "kanformer.pretraining.worker"]
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self.process

    def stop(self) -> None:
        """Ends the process, in the middle of a job if need be."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def work(job: dict[str, Any]) -> Any:
    """{"run": settings of a run} or {"time": settings of the grid, "data": folder, "widths": {arm: width}}."""
    from kanformer.pretraining.run import pretrain_run
    from kanformer.pretraining.settings import PretrainArguments, RunArguments
    from kanformer.pretraining.timing import measure_times

    if "run" in job:
        return pretrain_run(RunArguments(**job["run"]))
    return measure_times(PretrainArguments(**job["time"]), Path(job["data"]), job["widths"])


def main() -> None:
    """Reads jobs from the standard input until it closes; leaves when its parent does."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints must not be taken for an answer
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Does a job with both output streams in its "log"; what `Worker.do` returns."""
    with open(job.pop("log"), "a", encoding="utf-8") as log, _output_to(log):
        try:
            return {"result": work(job)}
        except Exception as error:  # of whatever kind: one run's failure must not end the others
            import traceback

            traceback.print_exc()
            text = str(error) if isinstance(error, KanformerError) else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return {"error": text, "diverged": isinstance(error, TrainingDiverged)}


@contextlib.contextmanager
def _output_to(log: TextIO) -> Iterator[None]:
    """Both output streams, those of libraries in C too, go into the log."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def _leave_with(parent: int) -> None:
    """A grid that was killed must not leave runs behind that write into folders in which the next one works."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
