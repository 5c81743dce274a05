"""A surgery plan as text that fits a terminal: like blocks in one row, like refusals in one line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kanformer.config import KANConfig
from kanformer.surgery.folding import few, fold_paths
from kanformer.surgery.planning.blocks import PlannedBlock, Refusal
from kanformer.surgery.tables import table

if TYPE_CHECKING:
    from kanformer.surgery.planning.plan import SurgeryPlan

_HEADER = ("block", "x", "config", "family", "d/h", "activation", "dtype", "MLP params", "KAN params")
_NUMBERS = ("x", "config", "MLP params", "KAN params")
_DISPENSABLE = ("family", "dtype", "activation")
_SHORTEST_PATH = 24
_MOST_REFUSALS = 12


def plan_text(plan: SurgeryPlan, width: int) -> str:
    """The plan in lines of at most `width` columns, if that is 80 or more."""
    old, new = (sum(getattr(block, name) for block in plan.blocks) for name in ("mlp_parameters", "kan_parameters"))
    head = f"{plan.model_class}: {len(plan.blocks)} feed-forward blocks -> "
    head += f"{_made(plan.configs[0])}, " if len(plan.configs) == 1 else ""
    lines = textwrap.wrap(f"{head}{new / max(old, 1):.3f} x the parameters", width)
    if len(plan.configs) > 1:
        lines += [f"config {number}: {_made(config)}" for number, config in enumerate(plan.configs)]
    rows = [*_rows(plan), ("total", str(len(plan.blocks)), *[""] * 5, f"{old:,}", f"{new:,}")]
    lines.append(_fitting(rows, width, {"config"} if len(plan.configs) == 1 else set()))
    notes = [f"refused: {text}" for text in refusal_lines(plan.refusals)]
    notes += [f"stays as it is: {text}" for text in refusal_lines(plan.unknown)]
    if plan.left:
        notes.append(f"not selected, {len(plan.left)} in all: {few(path for path, _ in fold_paths(plan.left))}")
    return "\n".join([*lines, *(line for note in notes for line in textwrap.wrap(note, width, subsequent_indent="  "))])


def refusal_lines(refusals: Iterable[Refusal], limit: int = _MOST_REFUSALS) -> list[str]:
    """One line for each class and reason, with a count."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for refusal in refusals:
        alike.setdefault((refusal.owner, refusal.family, refusal.reason), []).append(refusal.path)
    lines = []
    for (owner, family, reason), paths in alike.items():
        where = few(path or "the model itself" for path, _ in fold_paths(paths))
        lines.append(f"{where} ({f'{len(paths)} x ' if len(paths) > 1 else ''}{owner or family}): {reason}")
    return lines if len(lines) <= limit else [*lines[:limit], f"and for {len(lines) - limit} reasons more: see plan.refusals"]


def _made(config: KANConfig) -> str:
    return f"{config.edges} edges, {config.basis}, init={config.init}"


def _rows(plan: SurgeryPlan) -> list[tuple[str, ...]]:
    alike: dict[tuple[str, ...], list[PlannedBlock]] = {}
    for block in plan.blocks:
        widths = f"{block.in_features}/{block.mlp_hidden}" + (f">{block.kan_hidden}" if block.kan_hidden != block.mlp_hidden else "")
        activation = ("gated " if block.gated else "") + block.activation + (f", {block.experts} experts" if block.experts > 1 else "")
        key = (str(plan.configs.index(block.config)), block.family, widths, activation, block.dtype, str(block.mlp_parameters), str(block.kan_parameters))
        alike.setdefault(key, []).append(block)
    return [
        (path, str(count), *key[:5], f"{count * int(key[5]):,}", f"{count * int(key[6]):,}")
        for key, group in alike.items()
        for path, count in fold_paths(block.path for block in group)
    ]


def _fitting(rows: Sequence[tuple[str, ...]], width: int, without: set[str]) -> str:
    """The table with as many columns as fit, and the middle of long paths left out where even that is too wide."""
    for hidden in (without.union(_DISPENSABLE[:count]) for count in range(len(_DISPENSABLE) + 1)):
        shown = [index for index, name in enumerate(_HEADER) if name not in hidden]
        header = [_HEADER[index] for index in shown]
        cells = [[row[index] for index in shown] for row in rows]
        right = [index for index, name in enumerate(header) if name in _NUMBERS]
        drawn = table(header, cells, right)
        excess = max(map(len, drawn.splitlines())) - width
        if excess <= 0:
            return drawn
    longest = max(_SHORTEST_PATH, max(len(row[0]) for row in rows) - excess)
    return table(header, [[_shortened(row[0], longest), *row[1:]] for row in cells], right)


def _shortened(path: str, longest: int) -> str:
    if len(path) <= longest:
        return path
    half = (longest - 3) // 2
    return f"{path[:half]}...{path[-(longest - 3 - half) :]}"
