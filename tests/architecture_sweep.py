"""All model types in worker processes with a time limit, cached as JSON lines, and the table of docs/architectures.md."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import resource
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import transformers

import kanformer
from architecture_check import CRASH, DIFFERS, EQUAL, NOT_BUILDABLE, NOT_FOUND, REFUSED, Result, check

_PACKAGES = ("bases", "ops", "layers", "conversion", "surgery")
_OWN = ("sizes", "inputs", "factory", "scan", "check")
_RENEW_AFTER = 40  # types per process: modules and compiled code pile up
_START_SECONDS = 120
_MEMORY = 8 << 30  # bytes a process may map: random durations can ask for any length of sound
_INTRODUCTION = """# Architectures

Every model type of transformers that can be built from a tiny config and run on a CPU: is each feed-forward block replaced with the output unchanged,
or refused by name? `python scripts/sweep_architectures.py` builds each model with random float32 weights, plans and patches it (`init="exact"`),
compares every floating tensor that the forward returns, saves and loads it with perturbed functions, and unpatches it.
Unchanged means bit-equal where the blocks hold a separate `nn.Linear` for each map, and 1e-6 relative otherwise (`Conv1D`, fused maps, stacked experts).
"""
_OTHER_KINDS = """\
Of the types without a block found, these have a feed-forward block of a kind that is not replaced: efficientloftr and lightglue (the input is twice as
wide as the output), ibert (quantised), jetmoe (experts behind two modules), levit (a batch norm after each map), reformer (dropout before the activation),
rwkv (a gate over the output), squeezebert (grouped convolutions), zamba2 (adapters on a shared block). Refused are glpn, pvt_v2 and segformer (a
convolution between the maps)."""
_COLUMNS = """## Model types

`patched`: blocks replaced (run: those that the inputs reached, if fewer). `refused`: blocks and reasons. `left`: classes that look like feed-forward
blocks by the shapes of their weights and are not in the plan (projectors, gates and heads look like them)."""


@functools.cache
def sources() -> str:
    """A hash of what decides a result: the parts of kanformer that patch, and the files here that build and compare."""
    root, here = Path(kanformer.__file__).parent, Path(__file__).parent
    own = [here / f"architecture_{name}.py" for name in _OWN]
    files = [root / "config.py", *own, *(file for name in _PACKAGES for file in (root / name).rglob("*.py"))]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def sweep(types: Iterable[str], cache: Path, *, refresh: bool = False, workers: int = 2, seconds: float = 60) -> list[Result]:
    """Checks every type that the cache does not hold for these versions; prints one line each.

    Args:
        cache: a file of JSON lines, one per result, written as they come; the last of a type counts.
        seconds: what one type may take.
    """
    known = {} if refresh else read(cache)
    todo = [model_type for model_type in types if model_type not in known]
    lock = threading.Lock()
    local = threading.local()
    started: list[_Worker] = []
    cache.parent.mkdir(parents=True, exist_ok=True)

    def one(model_type: str) -> None:
        if not hasattr(local, "worker"):
            local.worker = _Worker(seconds)
            started.append(local.worker)
        result = local.worker.check(model_type)
        with lock, cache.open("a") as file:
            known[model_type] = result
            file.write(json.dumps({"transformers": transformers.__version__, "sources": local.worker.sources, **dataclasses.asdict(result)}) + "\n")
            print(f"{len(known)}: {model_type}: {result.status}{': ' if result.reason else ''}{result.reason[:100]}", flush=True)

    try:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, todo))
    finally:
        for worker in started:
            worker.stop()
    return [known[model_type] for model_type in types]


def read(cache: Path) -> dict[str, Result]:
    """What the cache holds for the versions of today."""
    found: dict[str, Result] = {}
    for line in cache.read_text().splitlines() if cache.exists() else ():
        values = json.loads(line)
        if (values.pop("transformers"), values.pop("sources")) == (transformers.__version__, sources()):
            found[values["model_type"]] = Result(**values)
    return found


class _Worker:
    """A process that checks one type after the other; replaced when it is stuck, has died or has done enough.

    Attributes:
        sources: the hash of the files as the process found them, which someone may be editing.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: multiprocessing.process.BaseProcess | None = None
        self.done = 0
        self.sources = sources()

    def check(self, model_type: str) -> Result:
        if self.process is None or not self.process.is_alive() or self.done >= _RENEW_AFTER:
            self._start()
        self.done += 1
        step = "start"
        try:
            self.connection.send(model_type)
            while self.connection.poll(self.seconds):
                answer = self.connection.recv()
                if isinstance(answer, Result):
                    return answer
                step = answer
            reason = f"nothing after {self.seconds:g} s in step {step}"
        except (EOFError, OSError):
            reason = f"the process died in step {step}"
        self.stop()
        return Result(model_type, NOT_BUILDABLE if step in ("start", "build") else CRASH, reason)

    def _start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.done = 0
        if self.connection.poll(_START_SECONDS):
            self.sources = self.connection.recv()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(connection: Connection) -> None:
    import torch
    from transformers.utils import logging

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    connection.send(sources())
    while True:
        connection.send(check(connection.recv(), connection.send))


def report(results: list[Result]) -> str:
    """docs/architectures.md."""
    by_status = Counter(result.status for result in results)
    buildable = [result for result in results if result.status != NOT_BUILDABLE]
    patched = [result for result in results if result.patched]
    blocks, run, refused = (sum(result.patched for result in patched), sum(result.run for result in patched), sum(sum(r.refused.values()) for r in results))
    equal = {"Reload": sum(result.reload == "equal" for result in patched), "Unpatched": sum(result.unpatched == 0 for result in patched)}
    lines = [
        _INTRODUCTION,
        f"transformers {transformers.__version__}, {len(results)} model types, {len(buildable)} of them built and run.",
        "",
        "| status | model types |",
        "|---|---|",
        *(f"| {status} | {by_status[status]} |" for status in (EQUAL, DIFFERS, REFUSED, NOT_FOUND, NOT_BUILDABLE, CRASH)),
        "",
        f"Blocks: {blocks} patched in {len(patched)} types, {run} of them run by the inputs at hand; {refused} refused. "
        + " ".join(f"{name} bit-equal: {count} types." for name, count in equal.items()),
        "",
        _OTHER_KINDS,
        "",
        _COLUMNS,
        "",
        "| model type | class | patched | difference | reload | refused | left |",
        "|---|---|---|---|---|---|---|",
        *(_row(result) for result in buildable),
        "",
        "## Not built or not run here",
        "",
        *(f"- {result.model_type}: {_plain(result.reason)}" for result in results if result.status == NOT_BUILDABLE),
    ]
    return "\n".join(lines) + "\n"


def _row(result: Result) -> str:
    blocks = f"{result.patched}" + (f" (run: {result.run})" if result.run < result.patched else "") if result.patched else result.status
    if result.status == CRASH:
        blocks = f"crash: {_plain(result.reason)}"
    difference = f"{result.difference:.0e}" if result.difference else "0" if result.patched else ""
    refused = "; ".join(f"{count} x {_plain(reason)}" for reason, count in result.refused.items())
    left = ", ".join(f"{count} {name}" for name, count in result.missed.items())
    return f"| {result.model_type} | {result.model_class} | {blocks} | {difference} | {_plain(result.reload)} | {refused} | {left} |"


def _plain(text: str, limit: int = 160) -> str:
    """Text for one table cell."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= limit else text[: limit - 3] + "..."
