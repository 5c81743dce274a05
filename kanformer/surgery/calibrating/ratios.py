"""How much each block keeps: more where the model depends on it and pruning costs it much, under one budget for all."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from kanformer.config import KANConfig
from kanformer.conversion.allocate import Claim, share_out
from kanformer.conversion.error_curve import pooled
from kanformer.conversion.widths import kan_parameters, width_within
from kanformer.errors import ConfigError
from kanformer.surgery.assemble import site_path
from kanformer.surgery.calibrating.calibration import BlockForm, Calibration

_ACTION = "divide the parameters by importance"
SELECTING = {"target_modules": None, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "towers": None, "experts": "include"}


def ratios_from_importance(
    calibration: Calibration,
    param_ratio: float,
    *,
    floor: float | None = None,
    ceil: float = 1.0,
    config: KANConfig | None = None,
    paths: Collection[str] | None = None,
    **settings: Any,
) -> list[KANConfig]:
    """A config for each block, for `patch_model(model, configs, calibration=calibration)`: all blocks together keep `param_ratio` of their parameters.

    Replacing a block's output by its mean is an error of 1 (of its output's variance) and moves the final hidden state by `importance`; to first order an
    error e moves it by importance * sqrt(e), and independent errors add up in squares. So the widths are chosen that minimise the sum of
    importance^2 * e(width), where e is the error that was measured while the block's channels were eliminated one after the other (`ErrorCurve`). The
    curves fall convexly: parameters go to where one takes off most, until the budget is spent, which is the optimum (water-filling).

    On all-MiniLM-L6-v2 it does not pay: with half of the parameters (edges="mlp", 1,024 lines of WikiText-2 to calibrate, 256 others to measure) the
    embeddings' mean cosine to the original's is 0.9304, against 0.9419 with the same ratio for all; with a quarter 0.8596 against 0.8685. Pruned alone to
    half, each block there moves the final hidden state by 0.117 to 0.178, so that equal ratios are near the best already, while a mean in a block's
    place is too large a change to tell what a small error does. So it is no default: measure both on your model.

    Args:
        calibration: made with importance_batches > 0 and gram=True.
        param_ratio: parameters of all KAN-FFNs over their MLPs', in (0, 1]; never exceeded, and missed by less than a channel of a block.
        floor, ceil: least and greatest ratio of a block; floor=None is a quarter of `param_ratio`.
        config: the other settings of all blocks, without a selection; `settings` replace single values.
        paths: of the blocks to divide among (`Site.path`, as in a plan); None means all. The others get no config.

    Raises:
        ConfigError: a calibration without what is needed, bounds that hold no such budget, a block too small for them.
    """
    base = (config or KANConfig()).replace(**{**settings, "init": "prune", "param_ratio": param_ratio})
    floor = param_ratio / 4 if floor is None else floor
    if not 0 < floor <= param_ratio <= ceil <= 1:
        raise ConfigError(_ACTION, got=f"floor={floor}, param_ratio={param_ratio}, ceil={ceil}", expected="0 < floor <= param_ratio <= ceil <= 1")
    chosen = [name for name, nothing in SELECTING.items() if getattr(base, name) != nothing]
    if chosen:
        raise ConfigError(_ACTION, got=f"a config with {', '.join(chosen)}", hint="Name the blocks with paths=, or plan with the config and take the plan's.")
    blocks = _blocks(calibration, paths)
    claims = [_claim(calibration, site, members, base, floor, ceil) for site, members in blocks.items()]
    forms = {site: (calibration.forms[members[0]], len(members)) for site, members in blocks.items()}
    lowest = sum(count * _cost(form, claim.low, base) for claim, (form, count) in zip(claims, forms.values(), strict=True))
    other = sum(count * form.other_parameters for form, count in forms.values())
    budget = int(param_ratio * sum(count * form.parameters for form, count in forms.values())) - other
    widths = share_out(claims, budget - lowest)
    pairs = zip(forms.items(), widths, strict=True)
    return [base.replace(target_modules=re.escape(site), param_ratio=_ratio(form, width, base)) for (site, (form, _)), width in pairs]


def _blocks(calibration: Calibration, paths: Collection[str] | None) -> dict[str, list[str]]:
    """The `block_paths` of each site."""
    found: dict[str, list[str]] = {}
    for path in calibration.statistics:
        if paths is None or site_path(path) in paths:
            found.setdefault(site_path(path), []).append(path)
    missing = sorted(set(paths or ()) - set(found))
    if missing or not found:
        raise ConfigError(_ACTION, subject=", ".join(missing[:3]), got="no statistics of this block", hint="Calibrate the model that you patch.")
    return found


def _claim(calibration: Calibration, site: str, members: list[str], config: KANConfig, floor: float, ceil: float) -> Claim:
    importance = calibration.importance.get(site)
    curves = [(calibration.statistics[path].tokens, calibration.curves[path]) for path in members if path in calibration.curves]
    if importance is None or not curves:
        hint = "Calibrate with importance_batches=4 or more and gram=True; a block with a norm between its maps cannot be pruned."
        raise ConfigError(_ACTION, subject=site, got="no importance" if importance is None else "no error curve", hint=hint)
    form = calibration.forms[members[0]]
    low, high = (min(_width_within(form, share, config), form.hidden_features) for share in (floor, ceil))
    step = config.groups or 1
    cost = len(members) * (_cost(form, 2 * step, config) - _cost(form, step, config))
    return Claim(pooled(curves), importance**2, low, high, step, cost)


def _kan_form(form: BlockForm) -> dict[str, bool]:
    return {"gated": form.gated, "up_bias": form.up_bias, "down_bias": True}  # the refit puts the removed channels' means there


def _width_within(form: BlockForm, share: float, config: KANConfig) -> int:
    return width_within(int(share * (form.parameters - form.other_parameters)), form.in_features, config, **_kan_form(form))


def _cost(form: BlockForm, width: int, config: KANConfig) -> int:
    return kan_parameters(form.in_features, width, config, **_kan_form(form))


def _ratio(form: BlockForm, width: int, config: KANConfig) -> float:
    """The `param_ratio` that gives this width."""
    return min(1.0, (_cost(form, width, config) + 0.5) / (form.parameters - form.other_parameters))
