"""How many parameters a block has, and which hidden width fits a budget."""

from __future__ import annotations

from kanformer.bases import make_basis
from kanformer.config import KANConfig
from kanformer.errors import ConfigError


def mlp_parameters(in_features: int, hidden: int, *, gated: bool, up_bias: bool, down_bias: bool) -> int:
    """Parameters of a plain or gated MLP d -> h -> d."""
    expanding = 2 if gated else 1
    return expanding * hidden * (in_features + up_bias) + in_features * (hidden + down_bias)


def kan_parameters(in_features: int, hidden: int, config: KANConfig, *, gated: bool, up_bias: bool, down_bias: bool) -> int:
    """Parameters of the `KANFeedForward` with these settings."""
    base = mlp_parameters(in_features, hidden, gated=gated, up_bias=up_bias, down_bias=down_bias)
    if config.edges == "mlp":
        return base
    basis = make_basis(config.basis, config.grid_size, config.spline_order)
    if config.edges == "shared":
        return base + (config.groups or hidden) * (basis.n_basis + basis.n_inner)
    inner = basis.n_inner * ((2 if gated else 1) * in_features + hidden)  # one set per input of each map
    return base + (3 if gated else 2) * in_features * hidden * basis.n_basis + inner


def width_within(budget: int, in_features: int, config: KANConfig, **form: bool) -> int:
    """The largest hidden width whose KAN-FFN has at most `budget` parameters (a multiple of `config.groups`).

    Raises:
        ConfigError: not even the smallest width fits.
    """
    step = config.groups or 1
    low, high = 0, budget // step + 1  # in steps; every hidden channel costs at least one parameter
    while high - low > 1:
        middle = (low + high) // 2
        if kan_parameters(in_features, middle * step, config, **form) <= budget:
            low = middle
        else:
            high = middle
    if low == 0:
        raise ConfigError(
            "fit a KAN-FFN into the budget",
            got=f"{budget:,} parameters",
            expected=f"at least {kan_parameters(in_features, step, config, **form):,}",
            hint="Raise param_ratio, or lower grid_size or groups.",
        )
    return low * step


def free_groups(budget: int, in_features: int, config: KANConfig, **form: bool) -> int:
    """How many learned functions fit into `budget` beside the widest MLP that does, so that they cost (almost) no channel: a divisor of the width.

    For shared edges that are to be compared with an MLP of the same width and parameters.
    """
    basis = make_basis(config.basis, config.grid_size, config.spline_order)
    width = width_within(budget, in_features, config.replace(edges="mlp", groups=None), **form)
    for hidden in range(width, 0, -1):
        spare = (budget - mlp_parameters(in_features, hidden, **form)) // (basis.n_basis + basis.n_inner)
        divisors = [groups for groups in range(1, min(hidden, spare) + 1) if hidden % groups == 0]
        if divisors:
            return divisors[-1]
    raise ConfigError("fit learned functions into the budget", got=f"{budget:,} parameters", hint="Raise param_ratio, or lower grid_size.")
