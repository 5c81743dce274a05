"""What an arm costs, and the hidden width at which it costs what its baseline does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from kanformer.errors import ConfigError
from kanformer.pretraining.arms import ARMS, Arm, make_counted
from kanformer.pretraining.settings import ModelArguments
from kanformer.surgery.compare import compare
from kanformer.surgery.saving.loading import quiet_transformers

_WIDEST = 2**20


@dataclass(frozen=True)
class Size:
    """What a model of an arm costs.

    Attributes:
        width: h of each block.
        parameters: of all feed-forward blocks. model_parameters: of the whole model, tied ones once.
        flops: per token and forward pass, the whole model, a multiply-add counts two; attention over the full context. ffn_flops: the blocks' part.
    """

    width: int
    parameters: int
    model_parameters: int
    flops: int
    ffn_flops: int


def size_of(arm: Arm, shape: ModelArguments, width: int, vocab_size: int) -> Size:
    """Counts a model as `kanformer.compare` does, without making its numbers."""
    fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(ModelArguments)}
    return _size_of(arm.name, tuple(fields.items()), width, vocab_size)


@functools.lru_cache(maxsize=4096)
def _size_of(name: str, fields: tuple, width: int, vocab_size: int) -> Size:
    quiet_transformers()
    shape = ModelArguments(**dict(fields))
    one = dataclasses.replace(shape, num_hidden_layers=1)  # all layers are alike
    model = make_counted(ARMS[name], one, width, vocab_size)
    found, layers = compare(model), shape.num_hidden_layers
    parameters, ffn_flops = found.total("kan_parameters"), found.total("kan_flops")
    head = model.get_output_embeddings()  # type: ignore[operator]
    attention = sum(2 * _weights(module) for path, module in model.named_modules() if ".kan_" not in path and module is not head)
    attention += 4 * shape.hidden_size * shape.max_length
    layer = sum(p.numel() for path, p in model.named_parameters() if ".layers.0." in path or ".h.0." in path)
    return Size(
        width=width,
        parameters=layers * parameters,
        model_parameters=found.model_parameters + (layers - 1) * layer,
        flops=layers * (ffn_flops + attention) + 2 * _weights(head),
        ffn_flops=layers * ffn_flops,
    )


def _weights(module: nn.Module) -> int:
    """Numbers of the matrix that a linear map multiplies by."""
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    return weight.numel() if kind in ("Linear", "Conv1D") and weight is not None else 0


def nearest_width(cost: Callable[[int], int], target: int) -> int:
    """The width >= 1 whose cost is nearest to the target, the smaller of two that are as near; the cost rises with the width.

    Raises:
        ConfigError: no width up to a million costs as much.
    """
    low, high = _guess(cost, target)
    while cost(high) < target:
        low, high = high, 2 * high
        if high > _WIDEST:
            raise ConfigError("find a width", got=f"a cost of {target:,}", expected="one that a width up to a million has")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= target else (middle, high)
    return min((low, high), key=lambda width: (abs(cost(width) - target), width))


def _guess(cost: Callable[[int], int], target: int) -> tuple[int, int]:
    """Two widths to start from: costs that rise in a straight line, as those of all arms do, lie right between them."""
    first, slope = cost(1), cost(2) - cost(1)
    if slope > 0:
        width = min(_WIDEST, max(1, 1 + (target - first) // slope))
        if cost(width) <= target <= cost(width + 1):
            return width, width + 1
    return 1, 2


def matched(arm: Arm, shape: ModelArguments, vocab_size: int, baseline: Size, quantity: str, tolerance: float) -> Size:
    """The arm at the width whose `quantity` ("parameters" or "flops") is nearest to the baseline's.

    Raises:
        ConfigError: even the nearest is further away than `tolerance`, a share.
    """
    target = getattr(baseline, quantity)
    width = nearest_width(lambda width: getattr(size_of(arm, shape, width, vocab_size), quantity), target)
    found = size_of(arm, shape, width, vocab_size)
    off = deviation(getattr(found, quantity), target)
    if off > tolerance:
        raise ConfigError(
            "match the baseline",
            subject=f"{arm.name}, equal {quantity}",
            got=f"{getattr(found, quantity):,} at width {width}, {100 * off:.2f} % from {target:,}",
            expected=f"at most {100 * tolerance:g} %",
            hint="Use wider blocks, or raise --tolerance.",
        )
    return found


def deviation(value: float, target: float) -> float:
    """|value - target| as a share of the target."""
    return abs(value - target) / target
