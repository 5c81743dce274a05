"""The settings of the training scripts; names as in transformers' TrainingArguments where they mean the same."""

from __future__ import annotations

from dataclasses import dataclass

from kanformer.training.arguments import option
from kanformer.training.tasks import available

REST = ("none", "norms", "all")
STAGES = ("local", "global")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt")
TASKS = available()
SAMPLING = ("random", "sequential")


@dataclass
class DataArguments:
    """Where the data come from, which columns are read, and how text is cut."""

    train_file: str | list | None = option(None, "text to train on: .txt (a text per line), .jsonl, .csv or .parquet; a file, a glob, or a list of them (YAML)")
    validation_file: str | list | None = option(None, "held-out text; absent: a part of the training text")
    train_dir: str | None = option(None, "images to train on: a folder with a folder for each class, or with images and a metadata.jsonl")
    validation_dir: str | None = option(None, "held-out images")
    dataset_name: str | None = option(None, "instead: a Hugging Face dataset, a folder of files, or one that save_to_disk wrote")
    dataset_config_name: str | None = option(None, "its configuration")
    dataset_revision: str | None = option(None, "its branch, tag or commit")
    train_split: str = option("train", "its part to train on")
    validation_split: str | None = option(None, "its held-out part; absent: validation or test if there is one, else a part of the training data")
    streaming: bool = option(False, "read the data while training, holding a window of them; how long is said by max_steps")
    shuffle_buffer_size: int = option(1000, "streaming: rows of that window, which is shuffled as a whole", ge=1)
    validation_samples: int = option(
        512, "streaming: rows held out, the first of the held-out data or, without them, of the stream, which starts after them", ge=1
    )
    text_column: str = option("text", "column that holds the text")
    label_column: str = option("label", "column that holds the class (classification)")
    validation_split_percentage: float = option(5.0, "held-out share in percent where no validation text is given", gt=0, le=50)
    max_length: int = option(128, "tokens per example; longer text is cut (or packed, for language models)", ge=2)
    attn_implementation: str | None = option(None, "attention of the models, as in from_pretrained; eager is the fastest for short texts on a CPU")
    max_train_samples: int | None = option(None, "use only the first so many texts", ge=1)
    max_eval_samples: int | None = option(None, "and only so many of the held-out ones", ge=1)


@dataclass
class LoopArguments:
    """How long, how fast, what is written."""

    output_dir: str = option("", "folder for the model, metrics.jsonl and checkpoints")
    max_steps: int = option(200, "optimizer steps", ge=1)
    num_train_epochs: float | None = option(None, "instead: passes over the training data (not for streams)", gt=0)
    train_sampling_strategy: str = option("random", "order of the examples: shuffled in every epoch, or as they come", SAMPLING)
    dry_run: bool = option(False, "print what would be trained, on how much, in how much memory, and stop; nothing is written")
    per_device_train_batch_size: int = option(16, "examples per process and micro-batch", ge=1)
    per_device_eval_batch_size: int = option(32, "examples per process in evaluation", ge=1)
    gradient_accumulation_steps: int = option(1, "micro-batches per step; the loss is weighted by tokens, so k x 1 = 1 x k", ge=1)
    learning_rate: float = option(1e-4, "of everything that is not a KAN block", ge=0)
    new_module_learning_rate: float = option(1e-3, "of the KAN blocks", ge=0)
    spline_learning_rate: float | None = option(None, "of the learned functions, if not that of the KAN blocks", ge=0)
    weight_decay: float = option(0.0, "on matrices; never on splines, biases and norms", ge=0)
    lr_scheduler_type: str = option("cosine", "after the warm-up (cosine: down to 5 %)", SCHEDULES)
    warmup_steps: float = option(0.05, "steps, or a share of max_steps if below 1", ge=0)
    kan_l1: float = option(0.0, "weight of the summed mean |phi| of all edges, see kanformer.regularize; a sum over millions: 1e-7 is much", ge=0)
    kan_entropy: float = option(0.0, "weight of the summed entropy of the edges' magnitudes, layer by layer", ge=0)
    kan_smoothness: float = option(0.0, "weight of the summed squared second derivatives of the learned functions", ge=0)
    max_grad_norm: float = option(1.0, "gradient clipping; 0 switches it off", ge=0)
    bf16: bool = option(False, "mixed precision, whatever accelerate launch says")
    fp16: bool = option(False, "the same with half precision and a gradient scaler; needs a GPU")
    logging_steps: int = option(10, "steps between lines of metrics.jsonl", ge=1)
    eval_steps: int = option(0, "steps between evaluations; 0: only at the end", ge=0)
    eval_on_start: bool = option(False, "evaluate before the first step too")
    metric_for_best_model: str | None = option(
        None, "what evaluations are compared by; absent: loss, in distillation fvu, or what its stage is about (kl, embedding_cosine)"
    )
    greater_is_better: bool | None = option(None, "whether more of it is better; absent: for accuracies, cosines, precision, recall, f1 and spearman")
    early_stopping_patience: int | None = option(None, "stop after so many evaluations in a row that are not better than the best before", ge=1)
    early_stopping_threshold: float = option(0.0, "by how much better they must be", ge=0)
    load_best_model_at_end: bool = option(False, "the final model is that of the best evaluation; its checkpoint is written then and kept")
    loss_watchdog_threshold: float | None = option(None, "a loss above it counts as diverging")
    loss_watchdog_patience: int = option(3, "steps in a row of such a loss that end the run with exit code 3", ge=1)
    save_steps: int = option(0, "steps between checkpoints; 0: only the final model", ge=0)
    save_total_limit: int | None = option(2, "checkpoints to keep", ge=1)
    resume: bool = option(False, "go on from the newest complete checkpoint in output_dir")
    seed: int = option(0, "of data order, dropout and new weights", ge=0, le=2**32 - 1)
    report_to: str | list = option(
        "none", "trackers that get the metrics too: tensorboard, wandb, trackio, several with commas, all that are installed, or none"
    )
    project: str = option("kanformer", "its name in the trackers")
    run_name: str | None = option(None, "the run's name there; absent: that of output_dir")
    disable_tqdm: bool = option(False, "no progress bar")
    progress_position: int = option(0, "line of the progress bar, for runs side by side", ge=0)

    @property
    def order_seed(self) -> int | None:
        """What the order of the examples depends on; None: they stay as they come."""
        return self.seed if self.train_sampling_strategy == "random" else None


@dataclass
class DistillArguments(LoopArguments, DataArguments):
    """Settings of `scripts/distill.py`."""

    model_name_or_path: str | None = option(None, "patched checkpoint to train; absent: the teacher is patched with `kan`")
    teacher_name_or_path: str = option("", "the original model, a folder or hub id")
    tokenizer_name: str | None = option(None, "tokenizer, if not the teacher's")
    kan: dict | list = option(
        {"init": "prune", "param_ratio": 0.5}, "KANConfig values for patching the teacher, or a list: a block gets the first that selects it"
    )
    calibration_samples: int = option(1024, "texts for pruning and grids", ge=1)
    stage: str = option(
        "local",
        "weights that are not given: local_weight 1; or end to end, kl_weight 1 for language models, hidden_weight 1 and embedding_weight 0.1 else",
        STAGES,
    )
    local_weight: float | None = option(None, "of each block's error on the teacher's input; absent: by the stage, as all weights", ge=0)
    hidden_weight: float | None = option(None, "of the error of every layer's hidden state, the student running on its own", ge=0)
    embedding_weight: float | None = option(None, "of 1 - cosine of the texts' embeddings, means of their last hidden states", ge=0)
    kl_weight: float | None = option(None, "of KL(teacher || student) of the predicted tokens; needs models with a language-modelling head", ge=0)
    ce_weight: float | None = option(None, "of the cross-entropy with the text itself", ge=0)
    temperature: float = option(1.0, "of both models in the KL, which is multiplied by its square", gt=0)
    mlm_probability: float = option(0.15, "share of masked tokens (masked language models, where kl_weight or ce_weight is used)", gt=0, le=1)
    train_rest: str | None = option(
        None, "what else is trained, at learning_rate: norms, or all but embeddings and heads; absent: none in stage local, all in stage global", REST
    )
    teacher_states: str | None = option(
        None, "file of the teacher's hidden states of the training texts; made if absent, then read instead of running the teacher"
    )


@dataclass
class FinetuneArguments(LoopArguments, DataArguments):
    """Settings of `scripts/finetune.py`."""

    model_name_or_path: str = option("", "patched checkpoint, or a stock one to patch with `kan`")
    tokenizer_name: str | None = option(None, "tokenizer or image processor, if not the model's")
    task: str = option("causal_lm", "what to train for", TASKS)
    kan: dict | list | None = option(None, "KANConfig values, or a list of them, to patch a stock model before training")
    train_rest: bool = option(True, "train the rest of the model too, at learning_rate")
    packing: bool | None = option(None, "language models: blocks of max_length cut from all texts in a row, or a text each; absent: for causal_lm only")
    mlm_probability: float = option(0.15, "share of masked tokens (masked_lm)", gt=0, le=1)
    label_names: list | None = option(None, "names of the classes or tags in the order of their numbers; absent: as found in the data (streams do not say)")
    text_pair_column: str | None = option(None, "column of the second text: of a pair to classify, or the text that belongs to text_column's (embedding)")
    tokens_column: str = option("tokens", "column of the lists of words (token_classification)")
    tags_column: str = option("tags", "column of the lists of their tags (token_classification)")
    image_column: str = option("image", "column of the images or their paths (image_classification)")
    score_column: str | None = option(
        None, "embedding: column of the cosine that a pair shall have, in [-1, 1]; absent: other pairs of the batch are negatives"
    )
    similarity_scale: float = option(20.0, "embedding: factor of the cosines among the batch, one over the temperature", gt=0)
    calibration_samples: int = option(256, "training examples for pruning and grids, where `kan` is given", ge=1)


@dataclass
class CalibrateArguments:
    """Settings of `scripts/calibrate.py`."""

    model: str = option("", "folder or hub id of the original model")
    text: str = option("", "text to calibrate on, a text per line")
    out: str = option("", "folder for the calibration, for kanformer patch --calibration")
    calibration_samples: int = option(1024, "texts to calibrate on", ge=1)
    max_length: int = option(128, "tokens per text; longer text is cut", ge=2)
    batch_size: int = option(32, "texts per batch", ge=1)
    gram: bool = option(True, "gather Gram matrices, which pruning needs: (h, h) float64 per block")
    linear: bool = option(True, "measure each block's linear share")
    importance_batches: int = option(4, "batches to measure each block's importance on, running the model once per block; 0: none", ge=0)
    attn_implementation: str | None = option(None, "attention of the model, as in from_pretrained")
    save_steps: int = option(100, "batches between two states beside out, from which --resume goes on", ge=1)
    resume: bool = option(False, "go on from the newest state")
    dry_run: bool = option(False, "print the blocks, the data and the memory, and stop; nothing is written")
    json: bool = option(False, "print the numbers as JSON")
