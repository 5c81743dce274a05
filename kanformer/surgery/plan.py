"""What patching would do, as an immutable, printable table; nothing is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kanformer.config import Configs, KANConfig, make_configs
from kanformer.conversion.build import hidden_width
from kanformer.conversion.widths import kan_parameters, mlp_parameters
from kanformer.errors import SurgeryError
from kanformer.layers import KANFeedForward
from kanformer.surgery.discover import find_sites
from kanformer.surgery.modules import join
from kanformer.surgery.select import assign
from kanformer.surgery.sites import Site
from kanformer.surgery.spec import FFNSpec
from kanformer.surgery.tables import table


@dataclass(frozen=True)
class PlannedBlock:
    """One block that will be replaced, and the config that it gets. Widths in channels, parameters as counts."""

    path: str
    family: str
    structure: str
    in_features: int
    mlp_hidden: int
    kan_hidden: int
    gated: bool
    activation: str
    up_bias: bool
    down_bias: bool
    dtype: str
    device: str
    mlp_parameters: int
    kan_parameters: int
    config: KANConfig


@dataclass(frozen=True)
class Refusal:
    """One block that was found and cannot be replaced."""

    path: str
    family: str
    reason: str


@dataclass(frozen=True)
class SurgeryPlan:
    """The blocks in the order of the model, and the refusals. `print(plan)` shows both."""

    model_class: str
    configs: tuple[KANConfig, ...]
    blocks: tuple[PlannedBlock, ...]
    refusals: tuple[Refusal, ...]
    sites: tuple[Site, ...]

    def __str__(self) -> str:
        rows = [
            (
                block.path,
                block.family,
                f"{block.in_features}/{block.mlp_hidden}" + (f">{block.kan_hidden}" if block.kan_hidden != block.mlp_hidden else ""),
                ("gated " if block.gated else "") + block.activation,
                block.dtype,
                f"{block.mlp_parameters:,}",
                f"{block.kan_parameters:,}",
            )
            for block in self.blocks
        ]
        old, new = (sum(getattr(block, name) for block in self.blocks) for name in ("mlp_parameters", "kan_parameters"))
        rows.append(("total", "", "", "", "", f"{old:,}", f"{new:,}"))
        what = "; ".join(f"{config.edges} edges, {config.basis}, init={config.init}" for config in self.configs)
        head = f"{self.model_class}: {len(self.blocks)} feed-forward blocks -> {what}, {new / max(old, 1):.3f} x the parameters"
        text = head + "\n" + table(("block", "family", "d/h", "activation", "dtype", "MLP params", "KAN params"), rows, right=(5, 6))
        for refusal in self.refusals:
            text += f"\nrefused: {refusal.path} ({refusal.family}): {refusal.reason}"
        return text


def plan_surgery(model: nn.Module, config: Configs = None, *, specs: Sequence[FFNSpec] | None = None, **overrides) -> SurgeryPlan:
    """Says which blocks `patch_model` would replace and by what. Never changes the model.

    Args:
        config: see `KANConfig`, or a list of them: a block gets the first that selects it. `overrides` replace single values, in each.
        specs: descriptions of the blocks, for model classes that kanformer does not know.

    Raises:
        NoFeedForwardError: no block found, or the selection matches nothing.
        SurgeryError: the model is patched already, or another quantizer holds its config.
        ConfigError: a wrong setting.
    """
    configs = make_configs(config, overrides)
    check_patchable(model)
    users = _parameter_users(model)
    checked: dict[tuple, str | None] = {}
    blocks, refusals, good = [], [], []
    for site, own in assign(find_sites(model, specs), configs):
        reason = site.problem() or _tied_outside(site, users) or _checked_disagreement(site, checked)
        if reason is None and not site.path:
            reason = "the block is the whole model; patch the module that holds it"
        if reason is not None:
            refusals.append(Refusal(site.path, site.spec.name, reason))
        else:
            blocks.append(_describe(site, own))
            good.append(site)
    return SurgeryPlan(type(model).__name__, configs, tuple(blocks), tuple(refusals), tuple(good))


def check_patchable(model: nn.Module) -> None:
    """Raises SurgeryError if the model is no module, patched already or quantized."""
    if not isinstance(model, nn.Module):
        raise SurgeryError("plan surgery", got=type(model).__name__, expected="a torch.nn.Module, for example from AutoModel.from_pretrained(...)")
    patched = next((path for path, module in model.named_modules() if isinstance(module, KANFeedForward)), None)
    if patched is not None:
        raise SurgeryError(
            "patch the model",
            subject=type(model).__name__,
            got=f"a model that is patched already (at {patched})",
            hint="Call kanformer.unpatch_model(model) first, or load the original.",
        )
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", type(quantization).__name__)
        raise SurgeryError(
            "patch the model",
            subject=type(model).__name__,
            got=f"a model quantized by {method}",
            expected="an unquantized one",
            hint="Load it without quantization_config.",
        )


def _describe(site: Site, config: KANConfig) -> PlannedBlock:
    dense = site.dense()
    form = {"gated": dense.gated, "up_bias": dense.up_bias is not None, "down_bias": dense.down_bias is not None}
    hidden = hidden_width(dense, config)
    kan_form = form | ({"down_bias": True} if config.init == "prune" else {})
    return PlannedBlock(
        path=site.path,
        family=site.spec.name,
        structure=site.spec.structure,
        in_features=dense.in_features,
        mlp_hidden=dense.hidden_features,
        kan_hidden=hidden,
        activation=_activation_name(site),
        dtype=str(dense.up_weight.dtype).removeprefix("torch."),
        device=str(dense.up_weight.device),
        mlp_parameters=mlp_parameters(dense.in_features, dense.hidden_features, **form),
        kan_parameters=kan_parameters(dense.in_features, hidden, config, **kan_form),
        gated=dense.gated,
        up_bias=form["up_bias"],
        down_bias=kan_form["down_bias"],
        config=config,
    )


def _activation_name(site: Site) -> str:
    activation = site.activation
    name = type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "function")
    return name.removesuffix("Activation")


def _parameter_users(model: nn.Module) -> dict[int, list[str]]:
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, Tensor):
                users.setdefault(id(parameter), []).append(join(path, name))
    return users


def _tied_outside(site: Site, users: dict[int, list[str]]) -> str | None:
    for module in site.linears.values():
        for parameter in module.parameters(recurse=False):
            if len(users.get(id(parameter), ())) > 1:
                return f"a weight is tied: {' = '.join(users[id(parameter)])}"
    return None


def _checked_disagreement(site: Site, checked: dict[tuple, str | None]) -> str | None:
    """`site.disagreement()`, once per class and shape."""
    key = (type(site.owner), site.spec, tuple(tuple(module.weight.shape) for module in site.linears.values()), _activation_name(site))  # type: ignore[union-attr,arg-type]
    if key not in checked:
        checked[key] = site.disagreement()
    return checked[key]
