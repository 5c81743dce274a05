"""What training costs on machines that are not here: bytes per GPU, FLOPs per token and hours, from counts of models without weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from kanformer.config import KANConfig
from kanformer.conversion.widths import kan_parameters, mlp_parameters, width_within

# Shapes as published in the checkpoints' config.json.
LLAMA: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "tie_word_embeddings": True},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LOW, HIGH, WIDE = 2, 4, 8  # bytes of a bf16, float32 and float64 number
H100_FLOPS = 989e12  # dense bf16, NVIDIA's data sheet
STAGES = ("finetune", "local", "kl")


@dataclass(frozen=True)
class Counts:
    """Parameters of a Llama with and without its patch; `mlp` and `kan` are of one block, `attention` is what else a layer has, `root` the rest.

    Attributes:
        width: h of a student's block. functions: numbers of its learned functions. grids: bytes of its float32 grid.
    """

    name: str
    d: int
    h: int
    layers: int
    vocabulary: int
    mlp: int
    kan: int
    attention: int
    root: int
    width: int
    functions: int
    grids: int

    @property
    def teacher(self) -> int:
        return self.layers * (self.mlp + self.attention) + self.root

    @property
    def student(self) -> int:
        return self.layers * (self.kan + self.attention) + self.root

    @property
    def blocks(self) -> int:
        return self.layers * self.kan


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    teacher: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.teacher + self.activations


def llama_config(name: str) -> Any:
    """transformers' config of one of `LLAMA`."""
    from transformers import LlamaConfig

    return LlamaConfig(**{"num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False, **LLAMA[name]})


def count(config: Any, ratio: float = 1.0, kan: KANConfig | None = None, name: str = "") -> Counts:
    """Counts a Llama, built on the meta device and patched with init="exact"; below ratio 1 the blocks are as wide as pruning to `param_ratio` leaves them."""
    import torch
    from transformers import LlamaForCausalLM

    import kanformer

    kan = kan or KANConfig()
    with torch.device("meta"):
        model = LlamaForCausalLM(copy.deepcopy(config))  # which the patch writes into
    before = sum(p.numel() for p in model.parameters())
    kanformer.patch_model(model, kan, keep_original=False)
    block: Any = next(module for module in model.modules() if isinstance(module, kanformer.KANFeedForward))
    d, h, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    form = {"gated": True, "up_bias": False, "down_bias": False}
    mlp = mlp_parameters(d, h, **form)
    form["down_bias"] = ratio < 1  # pruning refits the down map with a bias
    width = h if ratio >= 1 else width_within(int(ratio * mlp), d, kan, **form)
    numbers = kan_parameters(d, width, kan, **form)
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) - sum(p.numel() for p in block.parameters())
    functions = numbers - mlp_parameters(d, width, **form)
    grids = sum(buffer.nbytes for path, buffer in block.named_buffers() if path.endswith("kan_grid")) * width // h
    return Counts(name, d, h, layers, config.vocab_size, mlp, numbers, layer, before - layers * (mlp + layer), width, functions, grids)


def memory(
    counts: Counts, stage: str, gpus: int, tokens: int, saved: dict[str, float], *, checkpointing: bool = False, shared: bool = False, spread: bool = False
) -> Memory:
    """Bytes per GPU under FSDP2 with mixed_precision bf16: float32 weights, gradients and two Adam moments spread over the GPUs.

    On top come whole bf16 weights and gradients of two units at a time (the one that runs, the one fetched ahead) and of the root, and the grids.

    Args:
        stage: "finetune" trains all; "local" (distillation's first stage) the blocks alone, the rest of the student and the teacher lying whole in
            bf16 on every GPU; "kl" trains all beside a whole teacher.
        tokens: per GPU and micro-batch.
        saved: bytes per token that autograd keeps, see `full_width.saved_bytes`: "layer", "block" and "head".
        checkpointing: only the layers' inputs are kept, and one layer at a time is run again.
        shared: the rest of the student is the teacher's (local only).
        spread: the teacher is sharded too, two of its layers whole at a time; the training loop cannot do that yet.
    """
    trained = counts.blocks if stage == "local" else counts.student
    unit = counts.kan if stage == "local" else counts.kan + counts.attention
    root = 0 if stage == "local" else counts.root
    rest = 0 if stage != "local" or shared else counts.student - counts.blocks
    if stage == "local":
        kept = tokens * counts.layers * (saved["block"] + LOW * counts.d)  # and the teacher's output, the target
    elif checkpointing:
        kept = tokens * (counts.layers * LOW * counts.d + saved["layer"] + saved["head"])
    else:
        kept = tokens * (counts.layers * saved["layer"] + saved["head"])
    if stage == "kl":
        kept += tokens * (LOW + HIGH) * counts.vocabulary  # the teacher's logits, and their log-probabilities
    return Memory(
        weights=HIGH * trained / gpus + LOW * rest + counts.layers * counts.grids,
        gradients=HIGH * trained / gpus,
        optimizer=2 * HIGH * trained / gpus,
        gathered=2 * LOW * (2 * unit + root),
        teacher=0 if stage == "finetune" else LOW * (counts.teacher / gpus + 2 * (counts.mlp + counts.attention) if spread else counts.teacher),
        activations=kept,
    )


def flops_per_token(counts: Counts, stage: str, length: int, *, checkpointing: bool = False) -> float:
    """FLOPs of the matrix products of one training token, a multiply-add counting two; attention's scores as causal, half of all pairs.

    A forward pass takes 2 per parameter, a backward pass twice that. "local" needs no gradient of a block's input: its first maps take half the
    backward pass. Embedding rows are looked up, not multiplied.
    """
    scores = 2 * counts.layers * counts.d * length
    head = counts.vocabulary * counts.d
    teacher = 2 * (counts.layers * (counts.mlp + counts.attention) + head) + scores
    student = 2 * (counts.layers * (counts.kan + counts.attention) + head) + scores
    if stage == "local":
        body = counts.layers * 2 * counts.kan  # forward; backward: gate and up once, down twice, each a third
        return teacher + body + body * (1 + 1 + 2) / 3
    return (teacher if stage == "kl" else 0) + student * (4 if checkpointing else 3)


def hours(flops: float, tokens: float, gpus: int, utilisation: float, peak: float = H100_FLOPS) -> float:
    """Hours for so many tokens on `gpus` at a share `utilisation` of their peak."""
    return flops * tokens / (gpus * peak * utilisation) / 3600


def calibration_bytes(counts: Counts) -> tuple[int, int]:
    """(Gram matrix and moments of one block, of all blocks) in float64: (h, h), and (d + 1, 2 d + 1) for the linear share."""
    block = WIDE * (counts.h**2 + (counts.d + 1) * (2 * counts.d + 1))
    return block, block * counts.layers


def checkpoint_bytes(counts: Counts, stage: str) -> tuple[int, int]:
    """(model, training state) of one checkpoint: what is trained in float32, the rest in bf16; two Adam moments."""
    trained = counts.blocks if stage == "local" else counts.student
    return HIGH * trained + LOW * (counts.student - trained) + counts.layers * counts.grids, 2 * HIGH * trained
