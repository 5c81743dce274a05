"""The state of a calibration that is under way, on disk: complete or not there, so that a run that was killed goes on and ends with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kanformer.conversion.processes import several
from kanformer.errors import ConfigError
from kanformer.surgery.assemble import dense_blocks
from kanformer.surgery.calibrating.calibration import Calibration
from kanformer.surgery.calibrating.files import read_calibration, write_calibration
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.folders import recover, replace_file

_IMPORTANCE = "importance.json"


class Run:
    """Where the state of `calibrate` is kept and how often.

    Args:
        folder: of the state. every: batches between two states.
        facts: what the run is of, as plain JSON values: a state of something else is refused.
        resume: whether to go on from the state, if there is one.
    """

    def __init__(self, folder: Path, every: int, facts: dict[str, Any], resume: bool) -> None:
        self.folder, self.every, self.facts, self.resume = folder, every, json.loads(json.dumps(facts)), resume
        self.done = self.seen = self.written = 0

    def start(self, calibration: Calibration, sites: Sequence[Site]) -> int:
        """Fills `calibration` with the state, if there is one to go on from; returns how many batches are in it.

        Raises:
            ConfigError: it is the state of another run. CheckpointError: it is damaged.
        """
        if several():
            raise ConfigError("keep the state of a calibration", got="several processes", hint="Calibrate in one process, or without a state.")
        self.calibration = calibration
        if not self.resume:
            remove_state(self.folder)
            return 0
        recover(self.folder)
        if not self.folder.exists():
            return 0
        saved, running = read_calibration(self.folder)
        if running is None or running["facts"] != self.facts or saved.forms != calibration.forms:
            got = "the state of other data, settings or another model"
            raise ConfigError("go on with the calibration", subject=self.folder, got=got, hint="Start again without --resume.")
        for site in sites:
            for path, dense in dense_blocks(site).items():
                calibration.statistics[path] = saved.statistics[path].to(dense.up_weight.device)
        self.done = self.seen = self.written = int(running["batches"])
        return self.done

    def after_batch(self, number: int) -> None:
        """Writes the state after every so many batches."""
        self.seen = self.done + number
        if self.seen % self.every == 0:
            self._write()

    def after_stream(self) -> None:
        """Writes the state after the last batch."""
        if self.seen != self.written:
            self._write()

    def importance(self) -> dict[str, float | None]:
        """What was measured of it before the run was cut off."""
        try:
            return json.loads((self.folder / _IMPORTANCE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def after_block(self, path: str, value: float | None) -> None:
        """Notes a block's importance beside the state."""
        replace_file(self.folder / _IMPORTANCE, json.dumps({**self.importance(), path: value}))

    def _write(self) -> None:
        write_calibration(self.calibration, self.folder, {"facts": self.facts, "batches": self.seen})
        self.written = self.seen


def remove_state(folder: Path) -> None:
    """Deletes a state, and what a crash left of another."""
    for each in (folder, *(folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))):
        shutil.rmtree(each, ignore_errors=True)
