"""The command line. Every command is a dataclass of settings and a function; both are imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from kanformer import __version__
from kanformer.errors import did_you_mean


@dataclass(frozen=True)
class Command:
    """`settings` and `work` are "module:name"; `positional` names the setting that a bare first word fills."""

    summary: str
    settings: str
    work: str
    example: str
    positional: str | None = None


_COMMANDS = {
    "calibrate": Command(
        "gather what pruning needs to know of the data, and each block's numbers",
        "kanformer.training.settings:CalibrateArguments",
        "kanformer.training.calibrate:calibrate",
        "kanformer calibrate gpt2 --text text.txt --out gpt2-calibration",
        "model",
    ),
    "patch": Command(
        "replace a model's feed-forward blocks and save it",
        "kanformer.commands.patch:PatchArguments",
        "kanformer.commands.patch:patch",
        "kanformer patch gpt2 --out gpt2-kan",
        "model",
    ),
    "compare": Command(
        "count a patched model against its MLPs",
        "kanformer.commands.compare:CompareArguments",
        "kanformer.commands.compare:compare",
        "kanformer compare gpt2-kan",
        "model",
    ),
    "distill": Command(
        "train patched blocks against the original's",
        "kanformer.training.settings:DistillArguments",
        "kanformer.training.distill:distill",
        "kanformer distill --config configs/distill_minilm.yaml",
    ),
    "finetune": Command(
        "fine-tune a patched model",
        "kanformer.training.settings:FinetuneArguments",
        "kanformer.training.finetune:finetune",
        "kanformer finetune --config configs/finetune_causal_lm.yaml",
    ),
    "evaluate": Command(
        "measure a patched model against the original",
        "kanformer.evaluation.settings:EvaluateArguments",
        "kanformer.evaluation.run:evaluate",
        "kanformer evaluate --config configs/evaluate_minilm.yaml --train_file text.txt",
    ),
    "study": Command(
        "compare KANs with pruned, random and linear controls at equal parameters",
        "kanformer.study.settings:StudyArguments",
        "kanformer.study.run:study",
        "kanformer study --config configs/study_minilm.yaml --dry_run",
    ),
    "pretrain": Command(
        "train small language models from scratch and compare their blocks",
        "kanformer.pretraining.settings:PretrainArguments",
        "kanformer.pretraining.grid:pretrain",
        "kanformer pretrain --config configs/pretrain_char.yaml",
    ),
    "plot": Command(
        "draw the learned functions of every layer",
        "kanformer.commands.plot:PlotArguments",
        "kanformer.commands.plot:plot",
        "kanformer plot gpt2-kan --out figures --text text.txt",
        "model",
    ),
    "scores": Command(
        "score every edge by what it is worth to the loss, and say how much of the original the model is",
        "kanformer.commands.scores:ScoresArguments",
        "kanformer.commands.scores:scores",
        "kanformer scores gpt2-kan --text text.txt --out scores --original gpt2 --truth 50",
        "model",
    ),
    "prune": Command(
        "take out the edges or hidden channels that are worth least",
        "kanformer.commands.prune:PruneArguments",
        "kanformer.commands.prune:prune",
        "kanformer prune gpt2-kan --text text.txt --out gpt2-pruned --loss_budget 0.01",
        "model",
    ),
    "diff": Command(
        "compare the learned functions of two models",
        "kanformer.commands.diff:DiffArguments",
        "kanformer.commands.diff:diff",
        "kanformer diff gpt2-kan --other gpt2-kan-tuned --text text.txt --out diff",
        "model",
    ),
    "symbolic": Command(
        "find formulas for the learned functions, and put them in their place",
        "kanformer.commands.symbolic:SymbolicArguments",
        "kanformer.commands.symbolic:symbolic",
        "kanformer symbolic gpt2-kan --text text.txt --out formulas --snap --loss_budget 0.01",
        "model",
    ),
    "benchmark": Command(
        "time KAN-FFNs against the MLP that was there",
        "kanformer.benchmark.run:BenchmarkArguments",
        "kanformer.benchmark.run:benchmark",
        "kanformer benchmark --section ffn",
    ),
    "demo": Command("the whole job on a real checkpoint", "kanformer.demo.settings:DemoArguments", "kanformer.demo.run:demo", "kanformer demo"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `kanformer` command. Exits with 2 on bad input and 3 when a training diverged."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if words[0] == "--version":
        print(__version__)
        return
    name, *rest = words
    if name not in _COMMANDS:
        print(f"error: unknown command {name!r}. {did_you_mean(name, _COMMANDS)} See kanformer --help.", file=sys.stderr)
        raise SystemExit(2)
    _run(name, rest)


def _run(name: str, words: list[str]) -> None:
    from kanformer.training.entry import run

    command = _COMMANDS[name]
    if command.positional and words and not words[0].startswith("-"):
        words = [f"--{command.positional}", *words]
    run(
        _load(command.settings),
        lambda settings: _load(command.work)(settings),
        words,
        f"kanformer {name}",
        f"{command.summary.capitalize()}. Example: {command.example}",
    )


def _load(reference: str):
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _overview() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: kanformer COMMAND [--setting value ...]",
            "",
            "Feed-forward blocks of transformers as Kolmogorov-Arnold networks.",
            "",
            *lines,
            "",
            "kanformer COMMAND --help lists a command's settings.",
        ]
    )


if __name__ == "__main__":
    main()
