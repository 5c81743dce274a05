"""A model as it would be without what its functions have learned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from kanformer.errors import NoFeedForwardError
from kanformer.layers import KANFeedForward
from kanformer.layers.formulas import formulas_out
from kanformer.layers.grids import GridModule


@contextlib.contextmanager
def without_functions(model: nn.Module) -> Iterator[None]:
    """Within the block every learned function contributes zero, so that psi(x) is b(x), and phi(x) is base_weight * b(x); after it all bits are as before.

        with kanformer.without_functions(model):
            loss_of_the_rest = model(**batch).loss

    What is left are the linear maps and the old activations, as they are now: a freshly and exactly patched model does not change. The coefficients are
    set aside, not copied, and zeros of their size stand in for them: look, do not train, within the block. Formulas that functions were replaced by are
    learned functions too. Blocks with edges="mlp" have none.

    Raises:
        NoFeedForwardError: the model holds no KAN-FFN and no learned function.
    """
    modules = [module for module in model.modules() if isinstance(module, GridModule)]
    if not modules and not any(isinstance(module, KANFeedForward) for module in model.modules()):
        raise NoFeedForwardError(
            "switch the functions off", subject=type(model).__name__, got="no learned functions", hint="Patch it first: kanformer.patch_model(model)."
        )
    kept = [(coef, coef.data) for coef in dict.fromkeys(module.kan_coef for module in modules)]
    try:
        for coef, data in kept:
            coef.data = torch.zeros_like(data)
        with formulas_out(modules):
            yield
    finally:
        for coef, data in kept:
            coef.data = data
