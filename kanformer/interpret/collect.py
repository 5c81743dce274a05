"""One streaming pass over data: what arrives at every learned function of a model, what it gives, and what the loss makes of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.conversion import processes
from kanformer.conversion.batches import run_batches
from kanformer.errors import ConfigError, DataError, did_you_mean
from kanformer.interpret.blocks import all_paths, choose_blocks, find_blocks
from kanformer.interpret.collecting.finish import common_store, finish_block
from kanformer.interpret.collecting.losses import Objective, UserLoss
from kanformer.interpret.collecting.memory import plan_turns
from kanformer.interpret.collecting.stats import DataUsed, LayerStats, ModelStats
from kanformer.interpret.collecting.watch import BlockWatch, Run
from kanformer.interpret.scoring.edges import BACKWARD, PROBE, SCORES
from kanformer.interpret.scoring.table import keep_first
from kanformer.layers import KANFeedForward
from kanformer.ops import use_backend
from kanformer.ops.spread import is_sharded

__all__ = ["LayerStats", "ModelStats", "collect"]


def collect(
    model: nn.Module,
    batches: Iterable[Mapping],
    max_tokens: int = 16_384,
    progress: Callable[[str], None] | None = None,
    *,
    scores: str | Sequence[str] = ("std",),
    contexts: int = 0,
    logits: int = 0,
    loss: UserLoss | None = None,
    skip_first_token: bool = False,
    layers: Sequence[str | int] | str | int | None = None,
    name: str = "",
    max_memory: int | None = None,
    top: int | None = None,
    probes: int = 1,
) -> ModelStats:
    """Runs the model over batches once and gathers, per input channel of every map with learned functions, moments and a histogram; per output
    moments and gradients; and per edge what the scores asked for need.

    The model runs in eval mode and is afterwards as it was: training and requires_grad flags, gradients, hooks, random numbers. Positions with
    attention_mask == 0 are left out wherever the mask fits the activations. With several processes each gives its own share of the data, and all end
    with the same statistics. Memory does not grow with the data, but for 4 bytes per token with contexts; `plan_collection` tells it beforehand.

    Args:
        model: any module with `KANFeedForward` blocks.
        batches: mappings of the model's inputs, moved to its device; a single mapping is one batch.
        max_tokens: stop after this many tokens per block, >= 1; where a backward pass is needed the batch that reaches it counts whole.
        progress: called with a line of text after each batch.
        scores: of "std", "l1", "range", "share", "nonlinearity", "nonbase", "delta" (a forward pass) and "sens", "effect1", "effect" (a backward pass
            too, for "effect" two), or "all"; see `scoring.edges`. With none only histograms are gathered.
        contexts: tokens to keep per channel and slot (largest, smallest, tenths of its values), 0 for none; see `Contexts`.
        logits: tokens to keep per residual channel and end of its direct effect on the vocabulary, 0 for none; see `logit_effect`.
        loss: what gradients are of, see `Objective`: a function of (outputs, batch); None chooses.
        skip_first_token: leave each sequence's first token out of everything (attention sinks would be the extremes of every channel).
        layers: paths or numbers of the blocks to look at; None for all.
        name: what the data are called in headers.
        max_memory: bytes that the sums and scores may take; None means what the machine has free.
        top: keep the first edges of each map only, by the first of effect, sens and std that is asked for. Where all blocks' sums do not fit into
            memory at one time, the blocks are done in turns, with a pass over the batches each: these must then be a list or a loader.
        probes: draws per sequence for the curvature in "effect", >= 1, with a backward pass each: with less than a hundred sequences more than one pays.

    Returns:
        `ModelStats`: `LayerStats` per block, keyed and ordered as in `model.named_modules()`; a block used twice has one entry.

    Raises:
        NoFeedForwardError: the model has no such block. ConfigError: wrong options, no such layer, more edges than memory allows (says how much).
        DataError: no tokens, a batch the model cannot take, no loss to be made of it, or activations or gradients that are not finite (the message
            names layer and batch).
    """
    wanted = _check(max_tokens, scores, {"contexts": contexts, "logits": logits}, {"top": 1 if top is None else top, "probes": probes})
    blocks = choose_blocks(find_blocks(model), layers)
    _check_whole(blocks, wanted)
    turns = plan_turns(blocks, wanted, contexts, top, max_memory)
    if len(turns) > 1 and iter(batches) is batches:
        raise ConfigError("collect statistics", got=f"an iterator, for {len(turns)} passes", expected="a list or a loader", hint="Pass list(batches).")
    settings = _Settings(wanted, max_tokens, contexts, skip_first_token, top, probes, name)
    found = ModelStats(model=type(model).__name__)
    for turn in turns:
        part, found.data = _collect(model, batches, turn, settings, Objective(model, loss), progress)
        found.update(part)
    if logits:
        from kanformer.interpret.logits import logit_effect

        same = [batches] if isinstance(batches, Mapping) else itertools.islice(batches, found.data.batches)
        found.logits, found.logits_note = logit_effect(model, same, logits)
    return found


def _check_whole(blocks: Mapping[str, KANFeedForward], wanted: list[str]) -> None:
    """Refuses sums per edge of weights that are spread over processes."""
    spread = next((path for path, block in blocks.items() if any(map(is_sharded, block.parameters()))), None)
    asked = sorted({"share", *BACKWARD} & set(wanted))
    if spread is not None and asked:
        raise ConfigError(
            "collect statistics",
            subject=f"{spread}, scores {', '.join(asked)}",
            got="sharded parameters (FSDP2)",
            hint="Collect before sharding, from the saved model, or with the other scores.",
        )


@dataclass(frozen=True)
class _Settings:
    """What was asked for."""

    wanted: list[str]
    max_tokens: int
    contexts: int
    skip_first: bool
    top: int | None
    probes: int
    name: str


def _collect(
    model: nn.Module, batches: Iterable[Mapping], blocks: Mapping[str, KANFeedForward], settings: _Settings, objective: Objective, progress
) -> tuple[dict[str, LayerStats], DataUsed]:
    """One pass, for some of the blocks."""
    wanted = settings.wanted
    backward = bool(BACKWARD & set(wanted))
    watches = [BlockWatch(path, block, wanted, settings.contexts, None if backward else settings.max_tokens) for path, block in blocks.items()]
    run = Run(skip_first=settings.skip_first, gradients=backward)
    task = _Task(model, run, watches, objective, settings.max_tokens, settings.probes if PROBE & set(wanted) else 0, progress)
    if any(watch.counts for watch in watches):
        with _hooked(watches, run), _frozen(model) if backward else contextlib.nullcontext(), use_backend("eager"):
            processes.together("collect statistics", lambda: task.run(batches))
        task.finish(settings.name, settings.skip_first)
    stores = {key: common_store(store) for key, store in run.stores.items()} if settings.contexts else {"": (torch.empty(0), torch.empty(0), 0)}
    paths, found = all_paths(model), {}
    for watch in watches:
        also_at = tuple(path for path in paths[id(watch.block)] if path != watch.path)
        found[watch.path] = finish_block(watch, wanted, stores, max(1.0, task.data.scored), also_at, backward)
        if settings.top is not None:
            keep_first(found[watch.path].scores, settings.top)
    return found, task.data


class _Task:
    """The pass itself."""

    def __init__(self, model: nn.Module, run: Run, watches: list[BlockWatch], objective: Objective, max_tokens: int, probes: int, progress) -> None:
        self.model, self.current, self.watches, self.objective = model, run, watches, objective
        self.max_tokens, self.probes, self.progress = max_tokens, probes, progress
        self.loss = self.scored = 0.0
        self.tokens = self.batches = 0
        self.data = DataUsed()

    def run(self, batches: Iterable[Mapping]) -> None:
        self.batches = run_batches(self.model, batches, self.current.batch, self._enough, self._look, self.current.gradients)

    def _look(self, outputs: Any, inputs: dict[str, Any]) -> None:
        """Backward, where gradients are wanted."""
        calls = self.current.calls
        if not self.current.gradients or not calls:
            return
        measured = self.objective(outputs, inputs, probes=self.probes)
        self.loss, self.scored = self.loss + float(measured.total.detach()), self.scored + measured.count
        deltas = [call.delta for call in calls]
        drawn = list(measured.probes)
        gradients = None if measured.flat else self._gradients(measured.total, deltas, bool(drawn))
        probes = [self._gradients(total, deltas, number + 1 < len(drawn)) for number, total in enumerate(drawn)]
        if gradients is not None and self.probes and not drawn:
            probes = [gradients]
        for number, call in enumerate(calls):
            gradient = None if gradients is None else call.located.rows(gradients[number])
            sides = [call.located.rows(side[number]) for side in probes]
            for side in (gradient, *sides):
                if side is not None and not bool(side.isfinite().all()):
                    raise DataError("collect statistics", subject=f"{call.name}, gradient", got=f"NaN or infinity in batch {self.current.number}")
            call.edges.add(call.located.rows(call.x), call.located.rows(call.y), gradient, sides, call.located.sizes())

    def _gradients(self, total: Tensor, deltas: list[Tensor], again: bool) -> list[Tensor]:
        if not total.requires_grad:
            raise DataError("differentiate the loss", subject=self.objective.name, got="a loss that no block has a part in")
        found = torch.autograd.grad(total, deltas, retain_graph=again, allow_unused=True)
        return [torch.zeros_like(delta) if part is None else part for part, delta in zip(found, deltas, strict=True)]

    def _enough(self, number: int) -> bool:
        self.current.next_batch()
        self.tokens = max(max(watch.counts.values(), default=0) for watch in self.watches)
        if self.progress is not None:
            limit = f" of at most {self.max_tokens:,}" if self.max_tokens < 2**40 else ""
            self.progress(f"statistics: {self.tokens:,}{limit} tokens")
        return self.tokens >= self.max_tokens

    def finish(self, name: str, skip_first: bool) -> None:
        """Adds up the header's numbers over all processes."""
        sequences = sum(len(store.starts) - 1 for store in self.current.stores.values())
        numbers = torch.tensor([self.tokens, sequences, self.batches, self.loss, self.scored], dtype=torch.float64)
        tokens, sequences, count, loss, scored = processes.reduced(numbers).tolist()
        if not tokens:
            raise DataError("collect statistics", got=f"no tokens in {int(count)} batches", expected="at least one that is not padding")
        if self.current.gradients and not scored:
            raise DataError("collect statistics", got=f"nothing to predict in {int(count)} batches", expected="sequences of two tokens or more, or labels")
        label = self.objective.name if self.current.gradients else ""
        self.data = DataUsed(name, int(tokens), int(sequences), int(count), skip_first, label, loss / scored if scored else None, scored)


def _check(max_tokens: int, scores: str | Sequence[str], counts: Mapping[str, int], positive: Mapping[str, int]) -> list[str]:
    for options, least in (({"max_tokens": max_tokens, **positive}, 1), (counts, 0)):
        for option, value in options.items():
            if value < least:
                raise ConfigError("collect statistics", got=f"{option}={value}", expected=f"at least {least}")
    wanted: list[str] = list(SCORES) if scores == "all" else [scores] if isinstance(scores, str) else list(dict.fromkeys(scores))
    for score in wanted:
        if score not in SCORES:
            raise ConfigError("collect statistics", got=f"score {score!r}", hint=did_you_mean(str(score), SCORES))
    return wanted


@contextlib.contextmanager
def _hooked(watches: list[BlockWatch], run: Run) -> Iterator[None]:
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for watch in watches:
            handles.extend(watch.hooks(run))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Nothing but the maps' outputs is differentiated for."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
