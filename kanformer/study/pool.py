"""Runs in processes of their own, several at a time; the failure of one does not stop the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LOG = "run.log"


def run_all(folders: Sequence[Path], workers: int, ended: Callable[[Path, int], None]) -> None:
    """Runs every folder's run.json, `workers` at a time, each with its share of the cores and a log file.

    Args:
        ended: called with a folder and its process's exit code, in the order in which they end.
    """
    waiting, running = list(folders), {}
    environment = _environment(max(1, (os.cpu_count() or 1) // workers))
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                folder = waiting.pop(0)
                running[folder] = _start(folder, environment)
            for folder in [folder for folder, child in running.items() if child.poll() is not None]:
                ended(folder, running.pop(folder).returncode)
            time.sleep(0.2)
    finally:
        for child in running.values():
            child.terminate()
            child.wait()


def _start(folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    with open(folder / LOG, "ab") as log:
        # Its standard input ends when this process does, however it dies: see `one`.
        command = [sys.executable, "-m", "kanformer.study.one", str(folder)]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)


def _environment(threads: int) -> dict[str, str]:
    # A run is too short to earn back the start of a compiler.
    fixed = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return {"KANFORMER_BACKEND": "eager", **os.environ, **fixed}


def last_words(folder: Path, code: int) -> str:
    """Why a run ended with this exit code: the last error in its log."""
    if code < 0:
        return f"killed by signal {-code}"
    lines = [line.strip() for line in (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1].removeprefix("error: ")
