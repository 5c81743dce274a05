"""Settings of `scripts/pretrain.py`: the grid, and one run of it."""

from __future__ import annotations

from dataclasses import dataclass

from kanformer.training.arguments import option
from kanformer.training.settings import SCHEDULES, LoopArguments

VOCABULARIES = ("char", "bpe")
BACKENDS = ("auto", "eager", "compile")
ROWS = ("params", "flops", "time")


@dataclass
class ModelArguments:
    """The model that all arms share."""

    hidden_size: int = option(128, "d, the width of the model", ge=1)
    num_hidden_layers: int = option(2, "layers", ge=1)
    num_attention_heads: int = option(4, "attention heads, a divisor of hidden_size", ge=1)
    max_length: int = option(64, "context: tokens that the model sees at once", ge=2)
    grid_size: int = option(8, "intervals of the shared functions' grids", ge=1)
    full_grid_size: int = option(5, "the same with full edges", ge=1)
    full_init: str = option("exact", "start of full edges: the host's fresh MLP with zero splines (exact), or random", ("exact", "random"))


@dataclass
class PretrainArguments(ModelArguments):
    """Settings of `scripts/pretrain.py`."""

    text: str = option("", "text file; its last part is held out")
    corpus: str | None = option(None, "its name in folders and tables; absent: that of the file")
    output_dir: str = option("", "folder for data, runs and report, <corpus>/<arm>/<row>/lr...-seed... in it")
    vocabulary: str = option("char", "characters, or byte-level BPE trained on the training part", VOCABULARIES)
    vocab_size: int = option(1024, "tokens of the BPE vocabulary", ge=257)
    validation_split_percentage: float = option(10.0, "held-out share of the text in percent", gt=0, le=50)
    eval_blocks: int = option(800, "held-out blocks to evaluate on, evenly spaced; at most as many as there are", ge=1)
    arms: list = option([], "feed-forward blocks to compare, with the baseline of each host; empty: all")
    mlp_width: int = option(512, "hidden width of the baseline mlp", ge=1)
    swiglu_width: int = option(341, "hidden width of the baseline swiglu", ge=1)
    rows: list = option(list(ROWS), "comparisons: equal params, flops, time")
    tolerance: float = option(0.01, "how far parameters and FLOPs may be from the baseline's, as a share; a row within it reuses the runs", gt=0, le=0.5)
    learning_rates: list = option([1e-3, 2e-3, 4e-3, 8e-3], "trials of every arm, with the first seed and all steps")
    function_learning_rate_ratio: float = option(1.0, "learning rate of the learned functions over the rest's, in all arms", gt=0)
    seeds: int = option(3, "seeds per arm at its best learning rate", ge=1)
    headline_seeds: int | None = option(None, "the same for the arms of host llama (swiglu and gated); absent: seeds", ge=1)
    first_seed: int = option(0, "of initial weights and data order", ge=0, le=2**31)
    max_steps: int = option(600, "optimizer steps", ge=1)
    per_device_train_batch_size: int = option(16, "blocks per step", ge=1)
    per_device_eval_batch_size: int = option(32, "blocks per batch in evaluation", ge=1)
    weight_decay: float = option(0.1, "on matrices; never on learned functions, biases and norms", ge=0)
    lr_scheduler_type: str = option("cosine", "after the warm-up (cosine: down to 5 %)", SCHEDULES)
    warmup_steps: float = option(0.08, "share of max_steps, so that it scales with equal time", ge=0, le=0.99)
    max_grad_norm: float = option(1.0, "gradient clipping; 0 switches it off", ge=0)
    loss_watchdog_threshold: float | None = option(None, "a loss above it counts as diverging")
    logging_steps: int = option(50, "steps between lines of a run's metrics.jsonl", ge=1)
    save_steps: int = option(0, "steps between checkpoints, from which a killed run goes on; 0: it starts again", ge=0)
    backend: str = option("auto", "how learned functions are computed, see kanformer.ops.use_backend", BACKENDS)
    threads: int = option(1, "CPU threads of each run", ge=1)
    workers: int = option(1, "runs at a time, each in a process of its own", ge=1)
    time_rounds: int = option(30, "timed steps of each arm, taken in turns with its baseline's, before the grid", ge=3)
    dry_run: bool = option(False, "print the plan and start nothing")
    report_only: bool = option(False, "write the report of the runs that are finished and start nothing")
    docs_dir: str | None = option(None, "folder that gets the report's table, figure and CSV too; a page pretraining.md in it gets the table")
    disable_tqdm: bool = option(False, "no progress bar")


@dataclass
class RunArguments(LoopArguments, ModelArguments):
    """One run, as written to run.json in its folder."""

    data_dir: str = option("", "folder of the tokenized text")
    data_digest: str = option("", "what the text and its vocabulary were, see `text.digest`")
    arm: str = option("", "feed-forward block")
    width: int = option(0, "its hidden width", ge=1)
    eval_blocks: int = option(800, "held-out blocks to evaluate on", ge=1)
    backend: str = option("auto", "how learned functions are computed", BACKENDS)
