"""The experts of a mixture, each a KAN-FFN, behind the router that was there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from kanformer.layers.feed_forward import KANFeedForward

CALLS = ("routed", "sorted", "weighted")
_rows: list[tuple[Tensor, int]] = []


class KANExperts(nn.Module):
    """Stands where a module with all experts' weights in one tensor stood, and is called as that was.

    Args:
        experts: one block per expert, all of the same width.
        call: "routed": forward(x (tokens, d), index (tokens, k), weights (tokens, k)), the weighted sum of the chosen experts' outputs; "sorted":
            forward(x (experts * tokens, d)), the rows of the first expert first; "weighted": forward(x (..., d), weights (..., experts)), all experts.
        identities: whether a routed index beyond the last expert stands for the identity (LongCat); else such a row adds nothing,
            as under expert parallelism.
        expert_norm: module that an expert's output goes through before it is weighted, one for all experts.

    Shapes: the output is that of x, in its dtype.
    """

    def __init__(self, experts: Iterable[KANFeedForward], call: str = "routed", *, identities: bool = False, expert_norm: nn.Module | None = None) -> None:
        super().__init__()
        self.kan_experts = nn.ModuleList(experts)
        if call not in CALLS:
            raise ValueError(f"call={call!r} is none of {', '.join(CALLS)}")
        self.call, self.identities, self.expert_norm = call, identities, expert_norm

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        routing = (*routing, *named.values())
        expected = {"routed": 2, "sorted": 0, "weighted": 1}[self.call]
        if len(routing) != expected:
            raise TypeError(f"{type(self).__name__} was given {len(routing)} tensors beside the hidden states, expected {expected} ({self.call})")
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.call == "sorted":
            y = self._sorted(x)
        elif self.call == "weighted":
            y = self._weighted(x, routing[0].reshape(x.shape[0], -1))
        elif torch.compiler.is_compiling():
            y = self._traced(x, *routing)
        else:
            y = self._routed(x, *routing)
        return y.to(hidden_states.dtype).view_as(hidden_states)

    def _routed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Every expert runs on its own tokens, which lie together; sums in a fixed order."""
        chosen = weights.shape[1]
        expert, order = torch.sort(index.reshape(-1), stable=True)
        rows = order // chosen
        counts = torch.bincount(expert.clamp(max=len(self.kan_experts)), minlength=len(self.kan_experts) + 1).tolist()
        parts = []
        for block, some in zip((*self.kan_experts, None), rows.split(counts), strict=True):
            # In training an expert without tokens gets a gradient of zeros, as its slice of a stacked tensor would: DDP and sharding wait for it.
            if len(some) or (block is not None and self.training and torch.is_grad_enabled()):
                parts.append(self._one(block, x[some], some, x.shape[0]))
        y = torch.cat(parts)[torch.argsort(order)] if parts else x.new_zeros(0, x.shape[1])
        return (y.view(*weights.shape, x.shape[1]) * weights.unsqueeze(-1)).sum(1)

    def _traced(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same sum where shapes must not depend on data (compiled with fullgraph, exported): every expert runs on every token."""
        blocks = (*self.kan_experts, *([None] if self.identities else []))
        last = len(self.kan_experts)
        y = torch.zeros((), device=x.device)
        for number, block in enumerate(blocks):
            share = (weights * (index.clamp(max=last) == number)).sum(1, keepdim=True)
            y = y + self._one(block, x) * share
        return y

    def _sorted(self, x: Tensor) -> Tensor:
        parts = x.view(len(self.kan_experts), -1, x.shape[1])
        return torch.cat([self._one(block, part) for block, part in zip(self.kan_experts, parts, strict=True)])

    def _weighted(self, x: Tensor, weights: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device)
        return torch.stack([(self._one(block, x, rows, x.shape[0]) * weights[:, i, None]).float() for i, block in enumerate(self.kan_experts)]).sum(0)

    def _one(self, block: nn.Module | None, x: Tensor, rows: Tensor | None = None, tokens: int = 0) -> Tensor:
        """One expert's output for x, which are these rows of all tokens; None is what lies beyond the last expert."""
        if block is None:
            return x if self.identities else torch.zeros_like(x)
        if rows is None:
            y = block(x)
        else:
            with _at_work(rows, tokens):
                y = block(x)
        return y if self.expert_norm is None else self.expert_norm(y)

    def extra_repr(self) -> str:
        return f"call={self.call}, identities={self.identities}"


@contextlib.contextmanager
def _at_work(rows: Tensor, tokens: int) -> Iterator[None]:
    _rows.append((rows, tokens))
    try:
        yield
    finally:
        _rows.pop()


def rows_at_work() -> tuple[Tensor, int] | None:
    """(which of the tokens the running expert was given, how many tokens there are); None outside of experts."""
    return _rows[-1] if _rows else None
