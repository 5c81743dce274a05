"""What a patch cannot keep: said as a warning before anything is touched."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from kanformer.surgery.finding.sites import Site
from kanformer.surgery.folding import few, fold_paths
from kanformer.surgery.modules import join
from kanformer.surgery.replacing.state import HOOKS


def warn_of_losses(model: nn.Module, sites: Sequence[Site], stacklevel: int = 3) -> None:
    """Warns of gradients, optimizers, compiled code and hooks that the replaced parts have."""
    parameters = [parameter for site in sites for linear in site.linears.values() for parameter in linear.parameters()]
    for message in (_gradients(sites), _optimizers(parameters), _compiled(model, sites), _hooks(sites)):
        if message:
            warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _gradients(sites: Sequence[Site]) -> str | None:
    paths = [site.path for site in sites if any(p.grad is not None for linear in site.linears.values() for p in linear.parameters())]
    return f"the gradients of {_folded(paths)} are lost with the MLPs: patch before training, or after optimizer.zero_grad()" if paths else None


def _optimizers(parameters: Sequence[nn.Parameter]) -> str | None:
    """Optimizers are looked for among all living objects: nothing leads from a parameter to its optimizer."""
    wanted = set(map(id, parameters))
    if not _holding(wanted):
        return None
    gc.collect()  # one that nobody uses any more does not count
    names = _holding(wanted)
    if not names:
        return None
    return f"parameters of the replaced MLPs are in an optimizer ({few(names)}) made before: it will not train the KAN-FFNs; make it after patching"


def _holding(wanted: set[int]) -> list[str]:
    """Classes of the optimizers that have one of these parameters."""
    kinds = _subclasses(Optimizer)
    if not any(getattr(vars(kind).get("step"), "hooked", False) for kind in kinds):
        return []  # torch marks a class's step when it makes the first of the class: there is none, and a tenth of a second is saved
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return sorted({type(each).__name__ for each in found if any(id(p) in wanted for group in getattr(each, "param_groups", ()) for p in group["params"])})


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(each) for each in cls.__subclasses__()))


def _compiled(model: nn.Module, sites: Sequence[Site]) -> str | None:
    compiled = [path for path, module in model.named_modules() if getattr(module, "_compiled_call_impl", None) is not None]
    touched = [path for path in compiled if any(_nested(path, site.path) for site in sites)]
    where = ", ".join(path or "the model" for path in touched[:3])
    return f"{where} was compiled in place (module.compile()): the code is made again at the next call; compile after patching" if touched else None


def _nested(outer: str, inner: str) -> bool:
    return not outer or f"{inner}.".startswith(f"{outer}.") or f"{outer}.".startswith(f"{inner}.")


def _hooks(sites: Sequence[Site]) -> str | None:
    """Hooks on parts that are taken out; those of a block that is a module of its own go over to the KAN-FFN."""
    lost = []
    for site in sites:
        inner = site.owner.named_modules() if site.spec.structure == "module" else ((part, site.part(part)) for part in (site.spec.slot, *site.spec.identities))
        for path, module in inner:
            if isinstance(module, nn.Module) and (path or site.spec.structure != "module") and any(getattr(module, name) for name in HOOKS):
                lost.append(join(site.owner_path, path))
    return f"the hooks on {_folded(lost)} do not run while the model is patched: these modules are taken out. Put them on the KAN-FFN" if lost else None


def _folded(paths: Sequence[str]) -> str:
    return few(path for path, _ in fold_paths(paths))
