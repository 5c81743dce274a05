"""Feed-forward blocks in a trace, found by what happens to values: maps d -> h, a nonlinearity or a product, a map h -> d."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kanformer.surgery.tracing.operations import ADDED, ARITHMETIC, LIMITED, MOMENTS, NONLINEAR, NORMS, QUIET, REDUCED
from kanformer.surgery.tracing.trace import Trace
from kanformer.surgery.tracing.values import Value, base


@dataclass(frozen=True)
class TracedBlock:
    """One block as it ran.

    Attributes:
        ups: the map, or the two maps, that read `x`. down: the map at the end.
        between: every value from the maps to what `down` reads.
        x: what the maps read. read: what `down` reads.
    """

    ups: tuple[Value, ...]
    down: Value
    between: tuple[Value, ...]
    x: Value

    @property
    def read(self) -> Value:
        return self.down.inputs[0]

    @property
    def hidden(self) -> int:
        assert self.down.map
        return self.down.map.in_features

    @property
    def fused(self) -> bool:
        """Whether one map gives both factors."""
        return len(self.ups) == 1 and self.ups[0].shape.numel() == 2 * self.read.shape.numel()

    @property
    def gated(self) -> bool:
        return self.fused or len(self.ups) == 2

    @property
    def operations(self) -> list[str]:
        """What happens between the maps, in order, without views, casts, pieces and dropouts."""
        return [value.op for value in sorted(self.between, key=lambda value: value.number) if value.op not in QUIET]


def traced_blocks(trace: Trace) -> Iterator[TracedBlock]:
    """Every block in the order in which they ran; a block that ran several times comes each time."""
    for down in trace.maps:
        found = _behind(down.inputs[0])
        if found is None:
            continue
        ups, between = found
        block = TracedBlock(ups, down, between, base(ups[0].inputs[0])) if ups else None
        if block is not None and _is_block(block):
            yield block


def _behind(read: Value) -> tuple[tuple[Value, ...], tuple[Value, ...]] | None:
    """(the maps that a value is made of, all that lies between), or None if anything else goes into it."""
    maps: dict[Value, None] = {}
    seen: dict[Value, None] = {}
    rest = [read]
    while rest:
        value = rest.pop()
        if value in seen or value in maps or value.op == "constant":
            continue
        if value.map is not None:
            maps[value] = None
            if len(maps) > 2:
                return None
            continue
        if value.op not in QUIET | NONLINEAR | ARITHMETIC | NORMS | MOMENTS:
            return None
        seen[value] = None
        rest += value.inputs
    return tuple(sorted(maps, key=lambda value: value.number)), tuple(seen)


def _is_block(block: TracedBlock) -> bool:
    down, ups = block.down.map, [up.map for up in block.ups]
    if down is None or any(up is None or up.in_features != down.out_features for up in ups) or any(base(up.inputs[0]) is not block.x for up in block.ups):
        return False
    widths = {up.out_features for up in ups if up}
    if widths != {down.in_features} and not (len(ups) == 1 and widths == {2 * down.in_features}):
        return False
    if any((up.x.shape[0], up.y.shape[0]) != (down.x.shape[0], down.y.shape[0]) for up in ups if up):
        return False
    normed = any(value.op in ("mean", "var", "norm") for value in block.between)  # what is made of moments is a norm, and no nonlinearity of the block
    for value in block.between:
        if value.op in NONLINEAR and not (normed and value.op in MOMENTS | {"sqrt", "abs"}):
            return True
        if value.op == "mul" and sum(each.op != "constant" for each in value.inputs) > 1 and not (normed and not block.gated):
            return True
    return False


def why_no_block(block: TracedBlock) -> str | None:
    """What the block's output is used for where it is not added to, or put in the place of, what the block reads: a gate, a head, a pooler."""
    uses = _uses(block.down)
    if "added" in uses:
        return None
    if "gate" in uses:
        return "a gate: other values are multiplied by its output"
    if uses & LIMITED:
        return f"a gate, a router or part of a deeper network: its output goes through {', '.join(sorted(uses & LIMITED))}"
    if block.x.op in LIMITED and any(each.map is not None for each in map(base, block.x.inputs)):
        return f"part of a deeper network: its input comes from {block.x.op} of another map"
    if _is_pooled(block.x):
        return "a pooler or a head: it reads one value per sequence or image, and nothing is added to its output"
    if not uses and not _reads_model_input(block.x):
        return "a head: its output is the model's, and nothing is added to it"
    return None


def _uses(y: Value) -> set[str]:
    """What becomes of a block's output: "added" to something, a "gate" of something, the names of nonlinearities that read it, "used" by anything else;
    empty if it is only returned."""
    found: set[str] = set()
    seen: set[Value] = set()
    rest = [y]
    while rest:
        value = rest.pop()
        for user in dict.fromkeys(value.users):
            if user in seen:
                continue
            seen.add(user)
            others = [each for each in user.inputs if each is not value and each.op != "constant"]
            if user.map is None and user.op in ADDED and others:
                found.add("added")
            elif user.op in ("mul", "div") and any(_is_stream(each, value) for each in others):
                found.add("gate")
            elif user.map is None and user.op in QUIET | NORMS | ARITHMETIC | {"sum", "stack"}:
                rest.append(user)
            elif user.op in MOMENTS:
                continue  # a norm, whose product comes along the other way
            else:
                found.add(user.op if user.map is None and user.op in LIMITED else "used")
    return found


def _is_stream(other: Value, y: Value) -> bool:
    """Whether a factor is what y is applied to, instead of the other way round: it is larger, or as large and no gate itself."""
    return other.count > y.count or (other.count == y.count and base(other).op not in NONLINEAR)


def _is_pooled(x: Value) -> bool:
    """Whether rows were left out or averaged on the way to x, by the last operations before it."""
    while x.map is None and x.inputs:
        if x.op in REDUCED and x.count < x.inputs[0].count:
            return True
        if x.op not in QUIET | NORMS:
            return False
        x = x.inputs[0]
    return False


def _reads_model_input(x: Value) -> bool:
    """Whether no map lies before x."""
    seen: set[Value] = set()
    rest = [x]
    while rest:
        value = rest.pop()
        if value.map is not None:
            return False
        if value not in seen:
            seen.add(value)
            rest += value.inputs
    return True
