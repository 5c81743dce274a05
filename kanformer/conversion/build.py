"""The three starting points of a KAN-FFN: exact, pruned and refitted, random."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kanformer.config import KANConfig
from kanformer.conversion.dense import DenseFFN
from kanformer.conversion.prune import prune_channels
from kanformer.conversion.statistics import FFNStatistics
from kanformer.conversion.widths import mlp_parameters, width_within
from kanformer.errors import ConfigError
from kanformer.layers import KANFeedForward
from kanformer.layers.density import warn_outside
from kanformer.layers.edge_functions import EdgeFunctions
from kanformer.layers.feed_forward import copy_linear
from kanformer.layers.kan_linear import KANLinear


def hidden_width(dense: DenseFFN, config: KANConfig) -> int:
    """The hidden width that `config` asks for in the place of `dense`.

    Raises:
        ConfigError: the budget is too small, or the groups do not divide the width.
    """
    if dense.hidden_norm is not None and (config.init == "prune" or config.width is not None):
        raise ConfigError(
            "change the width of a block with a norm between its maps",
            got=f"init={config.init!r}, width={config.width!r} and {type(dense.hidden_norm).__name__} over {dense.hidden_features} channels",
            hint="The norm mixes all channels, so none can go. Use init='exact', or leave the block out with exclude_modules.",
        )
    form = {"gated": dense.gated, "up_bias": dense.expanding_bias, "down_bias": dense.down_bias is not None}
    budget = mlp_parameters(dense.in_features, dense.hidden_features, **form)
    if config.param_ratio is not None:
        form["down_bias"] = True  # the refit puts the removed channels' means there
        width = width_within(int(config.param_ratio * budget), dense.in_features, config, **form)
        return min(width, dense.hidden_features)
    if config.width == "match":
        return width_within(budget, dense.in_features, config, **form)
    width = config.width if isinstance(config.width, int) else dense.hidden_features
    if config.groups is not None and width % config.groups:
        raise ConfigError("split the hidden channels into groups", got=f"groups={config.groups} for {width} channels", expected=f"a divisor of {width}")
    return width


def empty_block(dense: DenseFFN, config: KANConfig, hidden: int, *, down_bias: bool, device=None) -> KANFeedForward:
    """The KAN-FFN of this shape with unset weights, on `device` (default: where the MLP is) and in the MLP's dtype."""
    return KANFeedForward(
        dense.in_features,
        hidden,
        activation=dense.activation,
        gated=dense.gated,
        up_bias=dense.expanding_bias,
        down_bias=down_bias,
        config=config,
        hidden_dropout=dense.hidden_dropout,
        output_dropout=dense.output_dropout,
        up_function=dense.up_function,
        input_norm=dense.input_norm,
        hidden_norm=dense.hidden_norm,
        channels_first=dense.channels_first,
        device=dense.up_weight.device if device is None else device,
        dtype=dense.up_weight.dtype,
    )


@torch.no_grad()
def convert(dense: DenseFFN, config: KANConfig, statistics: FFNStatistics | None = None) -> KANFeedForward:
    """Builds the KAN-FFN that takes the place of `dense`.

    With init="exact" and keep_original=False its linear maps are the old block's tensors themselves, so that a model is patched in the memory that it has.

    Args:
        statistics: needed by init="prune"; with any init they set the grids to the data's ranges.

    Raises:
        ConfigError: init="prune" without statistics, or a width that does not fit.
        DataError: statistics without tokens.
    """
    hidden = hidden_width(dense, config)
    keep = torch.arange(dense.hidden_features, device=dense.up_weight.device)
    if config.init == "prune":
        if statistics is None:
            raise ConfigError("prune", got="no calibration data", hint="Pass calibration=batches to patch_model.")
        block = empty_block(dense, config, hidden, down_bias=True)
        pruned = prune_channels(dense, statistics, hidden, config.ridge)
        order = _group_order(block, statistics, pruned.keep)
        keep = pruned.keep[order]
        _copy_expanding(block, dense, keep)
        copy_linear(block.kan_down, pruned.weight[:, order], pruned.bias)
    else:
        block = empty_block(dense, config, hidden, down_bias=dense.down_bias is not None)
        if config.init == "random":
            block.reset_parameters()
        elif config.keep_original:
            _copy_expanding(block, dense, keep)
            copy_linear(block.kan_down, dense.down_weight, dense.down_bias)
        else:
            _take_over(block, dense)
    if statistics is not None and statistics.tokens and config.init != "random":
        _set_grids(block, statistics, keep, config)
    return block


def _copy_expanding(block: KANFeedForward, dense: DenseFFN, keep: Tensor) -> None:
    pairs = [(block.kan_up, dense.up_weight, dense.up_bias)]
    if block.kan_gate is not None and dense.gate_weight is not None:
        pairs.append((block.kan_gate, dense.gate_weight, dense.gate_bias))
    for target, weight, bias in pairs:
        copy_linear(target, weight[keep], None if bias is None else bias[keep])


def _take_over(block: KANFeedForward, dense: DenseFFN) -> None:
    """Makes the old block's weights and biases those of the new block; what was there is freed."""
    maps = [(block.kan_up, dense.up_weight, dense.up_bias), (block.kan_down, dense.down_weight, dense.down_bias)]
    if block.kan_gate is not None and dense.gate_weight is not None:
        maps.append((block.kan_gate, dense.gate_weight, dense.gate_bias))
    for target, weight, bias in maps:
        full = isinstance(target, KANLinear)
        for name, tensor in (("kan_base_weight" if full else "weight", weight), ("kan_bias" if full else "bias", bias)):
            if tensor is not None:
                setattr(target, name, nn.Parameter(tensor if _can_be_saved(tensor) else tensor.contiguous()))
        if full:
            target.kan_coef.zero_()


def _can_be_saved(tensor: Tensor) -> bool:
    """Whether safetensors can write the tensor as it lies: in one piece, or turned but alone in its memory."""
    alone = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return tensor.is_contiguous() or (alone and tensor.t().is_contiguous())


def _group_order(block: KANFeedForward, statistics: FFNStatistics, keep: Tensor) -> Tensor:
    """The order of the kept channels: where several share a function, those that see a like range of values come together."""
    functions = block.kan_functions
    if not isinstance(functions, EdgeFunctions) or functions.groups == functions.channels:
        return torch.arange(keep.numel(), device=keep.device)
    return statistics.preactivations.total[keep].argsort()


def _set_grids(block: KANFeedForward, statistics: FFNStatistics, keep: Tensor, config: KANConfig) -> None:
    """Moves every grid to the range of the data that reaches it; the splines are still zero. Warns where more than 5 % of the values lie outside."""
    everything = torch.arange(block.in_features, device=keep.device)
    for name, module in block.spline_modules():
        source, channels = (statistics.inputs, everything) if name in ("kan_up", "kan_gate") else (statistics.preactivations, keep)
        if name == "kan_down" and not block.activation_in_down:
            source = statistics.hidden
        lo, hi = (bound[channels] for bound in source.grid_range(config.grid_range))
        rows = module.kan_grid.shape[0]
        lo, hi = lo.view(rows, -1).amin(1), hi.view(rows, -1).amax(1)
        module.set_grid_range(lo, hi)
        lo, hi = (bound.to(channels.device).repeat_interleave(len(channels) // rows) for bound in module.grid_bounds)
        warn_outside(f"{statistics.name}.{name}", float(source.sample.outside(lo, hi, channels).mean()))
