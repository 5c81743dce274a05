"""What patching would do, as an immutable, printable table; nothing is touched."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kanformer.config import KANConfig
from kanformer.configs import Configs, make_configs
from kanformer.surgery.finding.candidates import checked_disagreement
from kanformer.surgery.finding.discover import find_sites
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.modules import get_path, join
from kanformer.surgery.planning.blocks import PlannedBlock, Refusal, plan_block
from kanformer.surgery.planning.lookalikes import lookalikes
from kanformer.surgery.planning.patchable import check_patchable
from kanformer.surgery.planning.plan_table import plan_text
from kanformer.surgery.planning.select import Where, assign


@dataclass(frozen=True)
class SurgeryPlan:
    """What would be replaced, in the order of the model. `print(plan)` shows it in a table that fits the terminal.

    Attributes:
        blocks: the selected blocks, each with the config that it gets.
        refusals: selected blocks that cannot be replaced; `patch_model` raises while there are any.
        left: paths of the blocks that no config selects; they stay MLPs.
        unknown: modules that look like feed-forward blocks and fit no description; they stay as they are.
    """

    model_class: str
    configs: tuple[KANConfig, ...]
    blocks: tuple[PlannedBlock, ...]
    refusals: tuple[Refusal, ...]
    sites: tuple[Site, ...]
    left: tuple[str, ...]
    unknown: tuple[Refusal, ...] = ()

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size((100, 24)).columns)

    def text(self, width: int) -> str:
        """A table in lines of at most `width` columns (80 or more): like blocks in one row, like refusals in one line."""
        return plan_text(self, max(width, 80))


def plan_surgery(
    model: nn.Module, config: Configs = None, *, specs: Sequence[FFNSpec] | None = None, where: Where | None = None, **overrides: Any
) -> SurgeryPlan:
    """Says which blocks `patch_model` would replace and by what. Never changes the model.

    Args:
        config: see `KANConfig`, or a list of them: a block gets the first that selects it. `overrides` replace single values, in each.
        specs: descriptions of blocks that kanformer does not know. They come first, and what it knows applies to the rest; to have these blocks
            alone, add `where=lambda block: block.family == "mine"` with your spec's name. `discover` proposes them.
        where: a function of a `FoundBlock` (path, layer, towers, expert, owner, widths, ...) that says whether the block may be taken, in every config:
            `where=lambda block: block.mlp_hidden > 1024`.

    Raises:
        NoFeedForwardError: no block found, or the selection matches nothing or only in part.
        SurgeryError: the model is patched already, or another quantizer holds its config.
        ConfigError: a wrong setting.
    """
    configs = make_configs(config, overrides)
    check_patchable(model)
    users = _parameter_users(model)
    blocks, refusals, good = [], [], []
    found = find_sites(model, specs)
    chosen = assign(found, configs, where)
    for site, own in chosen:
        reason = site.problem() or _copied_by_peft(site) or _tied_outside(site, users) or checked_disagreement(site)
        if reason is None and not site.path:
            reason = "the block is the whole model; patch the module that holds it"
        if reason is not None:
            refusals.append(Refusal(site.path, site.spec.name, reason, type(site.owner).__name__))
        else:
            blocks.append(plan_block(site, own))
            good.append(site)
    taken = {site.path for site, _ in chosen}
    left = tuple(site.path for site in found if site.path not in taken)
    return SurgeryPlan(type(model).__name__, configs, tuple(blocks), tuple(refusals), tuple(good), left, lookalikes(model, [site.owner_path for site in found]))


def _parameter_users(model: nn.Module) -> dict[int, list[str]]:
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, Tensor):
                users.setdefault(id(parameter), []).append(join(path, name))
    return users


def _copied_by_peft(site: Site) -> str | None:
    """peft's `modules_to_save` keeps two copies of a module side by side; only one of them stays, at another path, when the adapter is merged."""
    names = site.path.split(".")
    for depth in range(1, len(names) + 1):
        module = get_path(site.model, ".".join(names[:depth]))
        if any(kind.__name__ == "AuxiliaryTrainingWrapper" and kind.__module__.startswith("peft.") for kind in type(module).__mro__):
            return f"{'.'.join(names[:depth])} is {type(module).__name__} of peft: patch the model first, then give it to peft"
    return None


def _tied_outside(site: Site, users: dict[int, list[str]]) -> str | None:
    for module in site.own_modules:
        for parameter in module.parameters(recurse=False):
            if len(users.get(id(parameter), ())) > 1:
                return f"a weight is tied: {' = '.join(users[id(parameter)])}"
    return None
