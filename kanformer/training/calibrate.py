"""Calibrating a checkpoint on text: one pass over the data, restartable, saved for any number of patches."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from pathlib import Path

from torch import nn

from kanformer.errors import ConfigError
from kanformer.surgery.calibrating.calibrate import calibrate as gather
from kanformer.surgery.calibrating.calibration import Calibration
from kanformer.surgery.calibrating.files import INFO, load_calibration
from kanformer.surgery.calibrating.run_state import Run, remove_state
from kanformer.surgery.planning.patchable import check_patchable
from kanformer.surgery.planning.plan import plan_surgery
from kanformer.surgery.saving.loading import load_model, load_tokenizer, quiet_transformers
from kanformer.training.data import read_lines
from kanformer.training.dry_run import tensor_bytes
from kanformer.training.models import calibration_batches, check_length
from kanformer.training.settings import CalibrateArguments

_DATA = ("model", "calibration_samples", "max_length", "batch_size", "gram", "linear", "importance_batches", "attn_implementation")


def calibrate(arguments: CalibrateArguments) -> Calibration | None:
    """Gathers the statistics of every block, saves them and prints the numbers; with dry_run says what it would do, and returns None.

    The state of the run lies beside `out` (`.NAME.running`), complete or not there, until all is done. With resume=True a run that was killed goes on
    from it and ends with the same bits.

    Raises:
        ConfigError: a setting is missing, out is in use, or the state is of other data or settings. DataError: bad text.
        CheckpointError: the model cannot be read, or the calibration not written.
    """
    for name in ("model", "text", "out"):
        if not getattr(arguments, name):
            raise ConfigError("run the command", got=f"no {name}", hint=f"Give --{name}; see --help.")
    out = Path(arguments.out)
    state = out.with_name(f".{out.name}.running")
    if arguments.resume and (out / INFO).is_file():
        remove_state(state)
        return _told(load_calibration(out), arguments, f"complete already: {out}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("write the calibration", subject=f"out={out}", got="a path that is in use", hint="Choose a new folder.")
    texts = read_lines(arguments.text)[: arguments.calibration_samples]
    quiet_transformers()
    model, tokenizer = load_model(arguments.model, attn_implementation=arguments.attn_implementation), load_tokenizer(arguments.model)
    check_patchable(model)
    check_length(model, arguments.max_length)
    if arguments.dry_run:
        return _dry_run(model, len(texts), arguments)
    facts = {name: value for name, value in dataclasses.asdict(arguments).items() if name in _DATA}
    facts["texts"] = zlib.crc32("\n".join(texts).encode())
    run = Run(state, arguments.save_steps, facts, arguments.resume)
    batches = calibration_batches(tokenizer, texts, arguments.calibration_samples, arguments.max_length, arguments.batch_size)
    found = gather(model, batches, gram=arguments.gram, linear=arguments.linear, importance_batches=arguments.importance_batches, run=run)
    found.save(out)
    remove_state(state)
    return _told(found, arguments, (f"went on after batch {run.done}\n" if run.done else "") + f"saved: {out}")


def _dry_run(model: nn.Module, texts: int, arguments: CalibrateArguments) -> None:
    """The blocks, the passes over the data, and what the Gram matrices take."""
    plan = plan_surgery(model)
    batches = math.ceil(texts / arguments.batch_size)
    passes = min(arguments.importance_batches, batches) * len(plan.blocks)
    grams = sum(8 * block.experts * block.mlp_hidden**2 for block in plan.blocks) if arguments.gram else 0
    print(plan)
    print(f"data: {texts:,} texts in {batches:,} batches; {batches:,} runs of the model, and {passes:,} more for the importance of {len(plan.blocks)} blocks")
    print(f"memory: weights {tensor_bytes(model) / 1e6:,.1f} MB, Gram matrices {grams / 1e6:,.1f} MB, half of that on disk")
    print("dry run: nothing was run and nothing written")


def _told(calibration: Calibration, arguments: CalibrateArguments, note: str) -> Calibration:
    print(json.dumps(calibration.to_dict(), indent=2) if arguments.json else f"{calibration}\n{note}")
    return calibration
