"""What patching would do, as an immutable, printable table; nothing is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kanformer.config import KANConfig
from kanformer.conversion.build import hidden_width
from kanformer.conversion.widths import kan_parameters, mlp_parameters
from kanformer.errors import ConfigError, SurgeryError
from kanformer.layers import KANFeedForward
from kanformer.surgery.discover import find_sites
from kanformer.surgery.modules import get_path, join
from kanformer.surgery.record import QUANT_METHOD
from kanformer.surgery.select import select
from kanformer.surgery.sites import Site
from kanformer.surgery.spec import FFNSpec
from kanformer.surgery.tables import table


@dataclass(frozen=True)
class PlannedBlock:
    """One block that will be replaced. Widths in channels, parameters as counts."""

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
    config: KANConfig
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
        what = f"{self.config.edges} edges, {self.config.basis}, init={self.config.init}"
        head = f"{self.model_class}: {len(self.blocks)} feed-forward blocks -> {what}, {new / max(old, 1):.3f} x the parameters"
        text = head + "\n" + table(("block", "family", "d/h", "activation", "dtype", "MLP params", "KAN params"), rows, right=(5, 6))
        for refusal in self.refusals:
            text += f"\nrefused: {refusal.path} ({refusal.family}): {refusal.reason}"
        return text


def plan_surgery(model: nn.Module, config: KANConfig | None = None, *, specs: Sequence[FFNSpec] | None = None, **overrides) -> SurgeryPlan:
    """Says which blocks `patch_model` would replace and by what. Never changes the model.

    Args:
        config: see `KANConfig`; `overrides` replace single values.
        specs: descriptions of the blocks, for model classes that kanformer does not know.

    Raises:
        NoFeedForwardError: no block found, or the selection matches nothing.
        SurgeryError: the model is patched already, or another quantizer holds its config.
        ConfigError: a wrong setting.
    """
    config = make_config(config, overrides)
    check_patchable(model)
    sites = select(find_sites(model, specs), config)
    users = _parameter_users(model)
    checked: dict[tuple, str | None] = {}
    blocks, refusals, good = [], [], []
    for site in sites:
        reason = site.problem() or _copied_by_peft(site) or _tied_outside(site, users) or _checked_disagreement(site, checked)
        if reason is None and not site.path:
            reason = "the block is the whole model; patch the module that holds it"
        if reason is not None:
            refusals.append(Refusal(site.path, site.spec.name, reason))
        else:
            blocks.append(_describe(site, config))
            good.append(site)
    return SurgeryPlan(type(model).__name__, config, tuple(blocks), tuple(refusals), tuple(good))


def make_config(config: KANConfig | None, overrides: dict) -> KANConfig:
    """The config with overrides applied."""
    if config is not None and not isinstance(config, KANConfig):
        raise ConfigError("read the configuration", got=type(config).__name__, expected="kanformer.KANConfig or None")
    return KANConfig.from_dict(overrides) if config is None else config.replace(**overrides) if overrides else config


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
    method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", type(quantization).__name__)
    if quantization is not None and method != QUANT_METHOD:  # without a block, our own entry is left over: the config was taken from a patched model
        raise SurgeryError(
            "patch the model",
            subject=type(model).__name__,
            got=f"a model quantized by {getattr(method, 'value', method)}",
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


def _copied_by_peft(site: Site) -> str | None:
    """peft's `modules_to_save` keeps two copies of a module side by side; only one of them stays, at another path, when the adapter is merged."""
    names = site.path.split(".")
    for depth in range(1, len(names) + 1):
        module = get_path(site.model, ".".join(names[:depth]))
        if any(kind.__name__ == "AuxiliaryTrainingWrapper" and kind.__module__.startswith("peft.") for kind in type(module).__mro__):
            return f"{'.'.join(names[:depth])} is {type(module).__name__} of peft: patch the model first, then give it to peft"
    return None


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
