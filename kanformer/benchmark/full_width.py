"""What one layer of a large model costs here: time of a block over its MLP, bytes kept for the backward pass, calibration, pruning."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kanformer.benchmark.plan import HIGH, Counts
from kanformer.benchmark.race import Row, Runner, race, step
from kanformer.config import KANConfig
from kanformer.layers import KANFeedForward

_HEADROOM = 1.3


def free_bytes() -> int:
    """Memory that this machine can give."""
    import psutil

    return psutil.virtual_memory().available


def measure_block(d: int, h: int, tokens: int, dtype: torch.dtype, rounds: int, paths: tuple[str, ...]) -> list[Row]:
    """Forward and backward of a gated MLP and of the KAN-FFN on the same matrices, in turns; nothing where memory does not reach."""
    if free_bytes() < _HEADROOM * 2 * 3 * d * h * dtype.itemsize:
        return []
    mlp = _block(d, h, KANConfig(edges="mlp"), dtype)
    rows = []
    for name, basis in (("shared spline", "bspline"), ("shared rational", "rational")):
        kan = _block(d, h, KANConfig(basis=basis), dtype, like=mlp)
        x, grad = torch.randn(tokens, d).to(dtype).requires_grad_(), torch.randn(tokens, d).to(dtype)
        runners = [Runner("MLP", "-", step(mlp, x, grad)), *(Runner(name, path, step(kan, x, grad)) for path in paths)]
        found = race("plan", f"{d} x {h} x {tokens}", dtype, runners, rounds)
        rows += found if not rows else found[1:]
        mlp.zero_grad(set_to_none=True)
        kan.zero_grad(set_to_none=True)
    return rows


def _block(d: int, h: int, config: KANConfig, dtype: torch.dtype, like: KANFeedForward | None = None) -> KANFeedForward:
    with torch.device("meta"):
        block = KANFeedForward(d, h, activation="silu", gated=True, up_bias=False, down_bias=False, config=config)
    if like is not None:
        block.kan_gate, block.kan_up, block.kan_down = like.kan_gate, like.kan_up, like.kan_down
    else:
        for linear in (block.kan_gate, block.kan_up, block.kan_down):
            assert isinstance(linear, nn.Linear)
            linear.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=dtype).normal_(std=linear.in_features**-0.5))
    if config.edges == "shared":
        whole = KANFeedForward(1, h, activation="silu", gated=True, up_bias=False, down_bias=False, config=config).to(dtype)
        block.kan_functions = whole.kan_functions
        for parameter in block.spline_parameters():
            nn.init.normal_(parameter, std=0.05)
    return block


class Saved:
    """Counts the bytes that autograd keeps for the backward pass while it is open, parameters and buffers of `module` apart; each storage once."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {_key(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._seen: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._own:
            self._seen[_key(tensor)] = tensor  # held, so that no other storage takes its place
        return tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def saved_bytes(config: Any, tokens: int, kan: KANConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Bytes per token that autograd keeps: of one patched "layer" of a Llama at full width, of its "block" alone, and of the "head" and loss.

    The layer runs here, with empty weights; the head's are counted: logits in the model's precision, in float32, as log-probabilities, and their gradient.
    """
    from transformers import LlamaModel

    import kanformer

    small = type(config)(**{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 8, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None})
    with torch.device("meta"):
        model: Any = LlamaModel(small)
        model.to(dtype)
    kanformer.patch_model(model, kan or KANConfig(), keep_original=False)
    layer, rotary = _filled(model.layers[0]), LlamaModel(type(small)(**{**small.to_dict(), "intermediate_size": 8})).rotary_emb
    x = torch.zeros(1, tokens, config.hidden_size, dtype=dtype).requires_grad_()
    places = rotary(x, torch.arange(tokens).unsqueeze(0))
    with Saved(layer) as whole:
        layer(x, position_embeddings=places)
    block: Any = next(module for module in layer.modules() if isinstance(module, KANFeedForward))
    with Saved(block) as alone:
        block(x.detach())
    head = config.vocab_size * (dtype.itemsize + 3 * 4)
    return {"layer": whole.bytes / tokens, "block": alone.bytes / tokens, "head": float(head)}


def _filled(module: nn.Module) -> nn.Module:
    """The module with zeros for weights, off the meta device."""
    made = module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.zero_()
    for each in made.modules():
        if hasattr(each, "kan_grid"):
            rows = each.kan_grid.shape[0]  # type: ignore[union-attr]
            each.set_grid_range(torch.full((rows,), -4.0), torch.full((rows,), 4.0))  # type: ignore[operator]
    return made


def measure_gram(h: int, tokens: int, rounds: int) -> tuple[float, int]:
    """(core-seconds per token of adding to a block's Gram matrix, its bytes), on random hidden channels; (nan, bytes) where memory does not reach."""
    from kanformer.conversion.statistics import _add_upper_gram

    size = 8 * h * h
    if free_bytes() < _HEADROOM * 2 * size:
        return float("nan"), size
    gram, x = torch.zeros(h, h, dtype=torch.float64), torch.randn(tokens, h, dtype=torch.float64)
    return _median(lambda: _add_upper_gram(gram, x), rounds) / tokens, gram.nbytes


def measure_elimination(h: int, ratio: float = 0.5, d_over_h: float = 0.25) -> float:
    """Core-seconds of the second-order elimination of a block's hidden channels down to `ratio`, on a random covariance."""
    from kanformer.conversion.prune import eliminate

    covariance = torch.randn(h, h + 64, dtype=torch.float64)
    covariance = covariance @ covariance.t() / h + torch.eye(h, dtype=torch.float64)
    weight = torch.randn(int(h * d_over_h), h, dtype=torch.float64)
    return _median(lambda: eliminate(covariance, weight, int(h * ratio)), 1, warm_up=False)


def _median(call: Callable[[], object], rounds: int, warm_up: bool = True) -> float:
    if warm_up:
        call()
    times = []
    for _ in range(rounds):
        started = time.process_time()  # of all threads: what others do on this machine does not count
        call()
        times.append(time.process_time() - started)
    return statistics.median(times)


def predicted_step(counts: Counts, tokens: int, saved: dict[str, float]) -> dict[str, float]:
    """Bytes of a float32 training step in one process by the formulas: one GPU, nothing gathered."""
    numbers = 4.0 * counts.student
    return {
        "weights": numbers + counts.layers * counts.grids,
        "gradients": numbers,
        "optimizer": 2 * numbers,
        "activations": tokens * (counts.layers * saved["layer"] + HIGH * counts.vocabulary),
    }


def real_step(config: Any, batch: int, length: int) -> dict[str, float]:
    """The same, summed over the tensors of a patched Llama that takes a step: what is there after it, and what autograd kept."""
    from transformers import LlamaForCausalLM

    import kanformer

    model = LlamaForCausalLM(copy.deepcopy(config))  # which the patch writes into
    kanformer.patch_model(model, keep_original=False)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, config.vocab_size, (batch, length))
    with Saved(model) as kept:
        logits = model(input_ids=ids).logits.float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor) and value.dim()]
    return {
        "weights": float(sum(tensor.nbytes for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("kan_grid"))))),
        "gradients": float(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)),
        "optimizer": float(sum(state.nbytes for state in states)),
        "activations": float(kept.bytes),
    }
