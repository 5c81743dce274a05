"""What was discovered, as a short text with lines to paste."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.folding import few, fold_paths
from kanformer.surgery.planning.patterns import fits

if TYPE_CHECKING:
    from kanformer.surgery.tracing.discovery import Discovery

_WORDS = {"known": "known", "proposed": "proposed", "refused": "cannot be replaced", "left": "left alone"}


def discovery_text(found: Discovery) -> str:
    """One line for each class, the call that patches them, and what it does to the outputs."""
    counts = {verdict: sum(len(finding.paths) for finding in found.findings if finding.verdict == verdict) for verdict in _WORDS}
    blocks = sum(counts[verdict] for verdict in ("known", "proposed", "refused"))
    lines = [f"{found.model_class}: {blocks} feed-forward blocks seen, {counts['known']} of them known"]
    for verdict, word in _WORDS.items():
        for finding in found.findings:
            if finding.verdict == verdict:
                where = few(path or "the model itself" for path, _ in fold_paths(finding.paths))
                times = f"{len(finding.paths)} x " if len(finding.paths) > 1 else ""
                lines.append(f"  {word}: {where} ({times}{finding.owner})" + (f": {finding.reason}" if finding.reason else ""))
    if counts["known"] or counts["proposed"]:
        lines += ["", call_text(found)]
    if found.difference is not None:
        size = "not at all" if found.difference == 0 else f"by {found.difference:.1e} of their size"
        lines += [f"# tried with {', '.join(found.inputs)}: the proposed blocks change the outputs {size}"]
    return "\n".join(lines)


def call_text(found: Discovery) -> str:
    """The call of `patch_model` as Python."""
    arguments = ["model"]
    if found.specs:
        arguments.append("specs=[\n" + "".join(f"    {spec_text(spec)},\n" for spec in found.specs) + "]")
    if found.exclude:
        arguments.append(f"exclude_modules={_globs(found.exclude, _taken(found))!r}")
    return f"kanformer.patch_model({', '.join(arguments)})"


def spec_text(spec: FFNSpec) -> str:
    """A spec as Python, without what is left at its default, in the order in which a block computes."""
    order = ("name", "owner", "input_norm", "gate", "up", "fused", "activation", "product", "hidden_dropout", "hidden_norm", "down", "output_dropout")
    fields = {field.name: field.default for field in dataclasses.fields(spec)}
    names = (*order, *(name for name in fields if name not in order))
    return f"kanformer.FFNSpec({', '.join(f'{name}={_quoted(getattr(spec, name))}' for name in names if getattr(spec, name) != fields[name])})"


def _quoted(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_quoted, value))}{',' if len(value) == 1 else ''})"
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and '"' not in text else text


def _taken(found: Discovery) -> list[str]:
    return [path for finding in found.findings if finding.verdict in ("known", "proposed") for path in finding.paths]


def _globs(paths: tuple[str, ...], others: list[str]) -> list[str]:
    """Names that exclude these blocks and no others: with a star for the layers' numbers where that takes none of the others."""
    names: dict[str, None] = {}
    for path in paths:
        star = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        names[path if any(fits(star, other) for other in others) else star] = None
    return list(names)
