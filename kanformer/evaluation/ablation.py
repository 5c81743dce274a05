"""A patched model with other outputs in the place of its blocks': nothing, or always the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion.batches import select_tokens
from kanformer.layers import KANExperts, KANFeedForward


def block_outputs(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose output is that of a patched block, by the block's path: before a residual that the block may add, channels last.

    The experts of a mixture are one block, whose output is their weighted sum.
    """
    experts = [path for path, module in model.named_modules() if isinstance(module, KANExperts)]
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, KANExperts):
            found[path] = module
        elif isinstance(module, KANFeedForward) and not any(path.startswith(f"{each}.") for each in experts):
            found[path] = module.output_dropout
    return found


class OutputMeans:
    """Streams the mean output of every block over the tokens of a corpus, padding left out, in float64."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = block_outputs(model)
        self.sums: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(self.modules, 0)

    @contextlib.contextmanager
    def watch(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Takes in what the blocks give while the model runs on this batch."""

        def keeper(path: str):
            def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
                rows = select_tokens(output, batch, path).double()
                self.sums[path] = self.sums[path] + rows.sum(0) if path in self.sums else rows.sum(0)
                self.counts[path] += len(rows)

            return keep

        with _hooks({module: keeper(path) for path, module in self.modules.items()}):
            yield

    def means(self) -> dict[str, Tensor]:
        """(d,) of every block that ran; of one that did not there is nothing to put in its place."""
        return {path: total / self.counts[path] for path, total in self.sums.items() if self.counts[path]}


@contextlib.contextmanager
def replaced_outputs(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Within the block every patched block gives, at every token, its value (d,); without values, zero."""

    def giver(value: Tensor | None):
        def give(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return torch.zeros_like(output) if value is None else value.to(output).expand_as(output).clone()

        return give

    outputs = block_outputs(model)
    with _hooks({module: giver(None if values is None else values[path]) for path, module in outputs.items() if values is None or path in values}):
        yield


@contextlib.contextmanager
def _hooks(hooks: Mapping[nn.Module, Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
