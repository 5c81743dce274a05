"""`kanformer demo`: the stages of the main job, each with what it found."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kanformer.config import KANConfig
from kanformer.conversion.widths import free_groups
from kanformer.demo.children import accelerate_launch, call, fast_bf16, save
from kanformer.demo.corpus import Corpus, own_text, standard_library
from kanformer.demo.measure import Bench, cosine, is_causal_lm, last_hidden_state
from kanformer.demo.settings import DemoArguments, minilm_path
from kanformer.errors import ConfigError
from kanformer.interpret import plot_model
from kanformer.surgery.calibrating.calibrate import calibrate
from kanformer.surgery.compare import compare
from kanformer.surgery.folders import replace_file
from kanformer.surgery.planning.plan import plan_surgery
from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.saving.loading import load_model, load_tokenizer, quiet_transformers
from kanformer.training.arguments import to_yaml
from kanformer.training.data import pad_token, tokenize
from kanformer.training.distill import store_states
from kanformer.training.settings import DistillArguments
from kanformer.training.teacher_states import remove_teacher_states

_MARKER = "demo.json"
_CALIBRATION_TEXTS = 1024
_EVAL_TEXTS = 64  # for the per-block errors of the training script; the embeddings are compared on all held-out texts
_ARMS = {"KAN": "shared", "MLP control": "mlp"}


class Demo:
    """One run. `results` is what ends in demo.json."""

    def __init__(self, arguments: DemoArguments) -> None:
        self.arguments, self.started = arguments, time.time()
        self.out = Path(arguments.out)
        self.source = arguments.model or minilm_path()
        self.steps = arguments.steps or (600 if fast_bf16() else 300)
        self.results: dict[str, Any] = {"settings": asdict(arguments), "steps": self.steps, "bf16_training": fast_bf16()}
        self.states = self.out / "teacher-states.bin"
        self.arms: dict[str, nn.Module] = {}
        self.peak = 0.0

    def run(self) -> dict[str, Any]:
        """All stages; raises KanformerError with a one-line reason when something is wrong with the input."""
        self._open()
        self._exact()
        self._calibrate()
        for name, edges in _ARMS.items():
            self._shrink(name, edges)
        del self.calibration  # the children need the memory
        self._teach()
        self._distil()
        self._look(self.arms["KAN"])
        self._verify(self.arms["KAN"])
        self._sum_up()
        return self.results

    def _open(self) -> None:
        self._say(f"model and text: {self.source}")
        _check_folder(self.out)
        self.attention = None if torch.cuda.is_available() else "eager"  # the fastest for short texts on a CPU
        self.original = load_model(self.source, attn_implementation=self.attention)
        if getattr(self.original.config, "is_encoder_decoder", False):  # type: ignore[union-attr]
            raise ConfigError("run the demo", subject=self.source, got="an encoder-decoder model", expected="an encoder or a causal language model")
        plan_surgery(self.original)  # nothing is written for a model that cannot be patched
        self.bench = Bench(load_tokenizer(self.source), self.arguments.max_length)
        self.corpus = own_text(self.arguments.text) if self.arguments.text else standard_library()
        self.held, self.second = self.corpus.held_out[: self.arguments.held_out], self.corpus.second
        self.causal = is_causal_lm(self.original)
        _prepare_folder(self.out)
        replace_file(self.out / "train.txt", "\n".join(self.corpus.train) + "\n")
        replace_file(self.out / "held-out.txt", "\n".join(self.held) + "\n")
        self.embeddings = {name: self.bench.embeddings(self.original, texts) for name, texts in self._parts().items()}
        parameters = sum(p.numel() for p in self.original.parameters())
        self._tell(f"{type(self.original).__name__}, {parameters:,} parameters; {_counts(self.corpus, self.held)}")
        if self.causal:
            self.results["original"] = {"perplexity": self.bench.perplexity(self.original, self.held)}

    def _exact(self) -> None:
        self._say("patch exactly")
        patched = patch_model(copy.deepcopy(self.original))
        batch = next(self.bench.batches(self.held))
        with torch.no_grad():
            difference = (last_hidden_state(patched, batch) - last_hidden_state(self.original, batch)).abs().max()
        self.results["exact_max_difference"] = float(difference)
        self._tell(f"max |patched - original| on {tuple(batch['input_ids'].shape)} tokens: {float(difference)}")
        self._tell(compare(patched))

    def _calibrate(self) -> None:
        self._say(f"calibrate on {min(_CALIBRATION_TEXTS, len(self.corpus.train)):,} texts")
        self.calibration = calibrate(self.original, self.bench.batches(self.corpus.train[:_CALIBRATION_TEXTS]))

    def _shrink(self, name: str, edges: str) -> None:
        """Prunes and refits one arm, measures it and saves it."""
        self._say(f"{name}: shrink the feed-forward blocks to {self.arguments.param_ratio:g} of their parameters and refit")
        model = copy.deepcopy(self.original)
        settings = {"init": "prune", "edges": edges, "param_ratio": self.arguments.param_ratio, "grid_size": self.arguments.grid_size}
        patch_model(model, groups=self._groups(edges), calibration=self.calibration, keep_original=False, **settings)
        costs = compare(model)
        self.results[name] = {"parameters": costs.to_dict()["feed_forward"], "before": self._measure(model)}
        self._tell(costs)
        self._tell(f"before training: {_line(self.results[name]['before'], self.corpus)}")
        save(model, self.bench.tokenizer, self.out / edges / "pruned")

    def _groups(self, edges: str) -> int | None:
        """As many learned functions as cost no hidden channel, so that both arms have the same widths; None where the blocks are not alike."""
        blocks = plan_surgery(self.original).blocks
        forms = {(block.in_features, block.mlp_parameters, block.gated, block.up_bias) for block in blocks}
        if edges != "shared" or len(forms) > 1:
            return None
        width, parameters, gated, up_bias = forms.pop()
        config = KANConfig(grid_size=self.arguments.grid_size)
        return free_groups(int(self.arguments.param_ratio * parameters), width, config, gated=gated, up_bias=up_bias, down_bias=True)

    def _teach(self) -> None:
        """The original's hidden states of the training texts, once for both arms."""
        self._say("run the original over the training texts")
        examples = tokenize(self.bench.tokenizer, self.corpus.train, self.arguments.max_length)
        with torch.autocast(next(self.original.parameters()).device.type, torch.bfloat16, enabled=fast_bf16()):
            store_states(self.states, self.original, examples, pad_token(self.bench.tokenizer))

    def _distil(self) -> None:
        """Both arms at the same time, half of the cores each, through accelerate."""
        self._say(f"distil both for {self.steps} steps")
        commands = [self._command(edges, position) for position, edges in enumerate(_ARMS.values())]
        self._tell("\n".join(f"accelerate launch -m kanformer.training.distill --config {self.out / edges / 'distill.yaml'}" for edges in _ARMS.values()))
        self.peak = max(self.peak, call(commands))
        remove_teacher_states(self.states)
        for name, edges in _ARMS.items():
            results = self.out / edges / "distilled" / "all_results.json"
            self.results[name]["distillation"] = json.loads(results.read_text(encoding="utf-8"))
            self.arms[name] = load_model(str(self.out / edges / "distilled" / "model"), attn_implementation=self.attention)
            self.results[name]["after"] = self._measure(self.arms[name])
            self._tell(f"{name} after training: {_line(self.results[name]['after'], self.corpus)}")

    def _command(self, edges: str, position: int) -> list[str]:
        arguments, folder = self.arguments, self.out / edges
        settings = DistillArguments(
            model_name_or_path=str(folder / "pruned"),
            teacher_name_or_path=self.source,
            train_file=str(self.out / "train.txt"),
            validation_file=str(self.out / "held-out.txt"),
            output_dir=str(folder / "distilled"),
            teacher_states=str(self.states),
            attn_implementation=self.attention,
            max_length=arguments.max_length,
            max_eval_samples=_EVAL_TEXTS,
            max_steps=self.steps,
            per_device_train_batch_size=arguments.batch_size,
            new_module_learning_rate=arguments.learning_rate,
            spline_learning_rate=arguments.spline_learning_rate,
            local_weight=0.0,
            hidden_weight=1.0,
            seed=arguments.seed,
            progress_position=position,
        )
        replace_file(folder / "distill.yaml", to_yaml(settings))
        return accelerate_launch("kanformer.training.distill", folder / "distill.yaml", threads=max(1, (os.cpu_count() or 1) // len(_ARMS)))

    def _measure(self, model: nn.Module) -> dict[str, float]:
        found = {name: cosine(self.bench.embeddings(model, texts), self.embeddings[name]) for name, texts in self._parts().items()}
        return {**found, "perplexity": self.bench.perplexity(model, self.held)} if self.causal else found

    def _parts(self) -> dict[str, list[str]]:
        return {"held_out": self.held, "second": self.second}

    def _look(self, model: nn.Module) -> None:
        self._say("draw the learned functions of every layer")
        self.figures = plot_model(model, self.bench.batches(self.held), self.out / "figures", y="free", progress=self._tell)
        self.results["figures"] = [str(path) for path in self.figures]

    def _verify(self, model: nn.Module) -> None:
        from safetensors.torch import save_file

        self._say("save, load in a fresh process, compare bit for bit")
        folder = self.out / "model"
        save(model, self.bench.tokenizer, folder)
        batch = next(self.bench.batches(self.held))
        with torch.no_grad():
            hidden = last_hidden_state(model, batch)
        state = {f"state.{name}": tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
        reference = self.out / "reference.safetensors"
        save_file({**batch, **state, "hidden": hidden.contiguous(), "threads": torch.tensor(torch.get_num_threads())}, reference)
        self.peak = max(
            self.peak, call([[sys.executable, "-m", "kanformer.demo.verify", str(folder), str(reference), *([self.attention] if self.attention else [])]])
        )
        reference.unlink()
        self.results["reload_bit_equal"] = True

    def _sum_up(self) -> None:
        self._say("result")
        seconds = time.time() - self.started
        peak = max(self.peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        self.results |= {"seconds": round(seconds, 1), "peak_gib": round(peak, 2)}
        replace_file(self.out / _MARKER, json.dumps(self.results, indent=2))
        for name in _ARMS:
            row = self.results[name]
            before, after = (_line(row[when], self.corpus) for when in ("before", "after"))
            self._tell(f"{name}, {row['parameters']['parameters_ratio']:.3f} x the parameters: {before} before, {after} after distillation")
        if self.causal:
            self._tell(f"perplexity of the original on held-out text: {self.results['original']['perplexity']:.3f}")
        places = {"model": self.out / "model", "figures": self.out / "figures", "numbers": self.out / _MARKER}
        for name, path in places.items():
            self._tell(f"{name}: {path}")
        self._tell(f"{seconds:.0f} s, at most {peak:.2f} GiB in all processes together")

    def _say(self, text: str) -> None:
        print(f"\n[{time.time() - self.started:5.0f} s] {text}", flush=True)

    def _tell(self, text: object) -> None:
        print("  " + str(text).replace("\n", "\n  "), flush=True)


def _line(measured: dict[str, float], corpus: Corpus) -> str:
    text = f"cosine {measured['held_out']:.4f} ({corpus.second_name}: {measured['second']:.4f})"
    return text + (f", perplexity {measured['perplexity']:.3f}" if "perplexity" in measured else "")


def _counts(corpus: Corpus, held: list[str]) -> str:
    return f"{corpus.name}: {len(corpus.train):,} texts to train on, {len(held):,} held out; {len(corpus.second):,} of {corpus.second_name}"


def _check_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ".kanformer-demo").exists())):
        raise ConfigError("write the demo's results", subject=f"out={out}", got="something that no demo wrote", hint="Choose another folder: --out DIR.")


def _prepare_folder(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    replace_file(out / ".kanformer-demo", "")


def demo(arguments: DemoArguments) -> None:
    """Runs the demo; see `DemoArguments`."""
    quiet_transformers()
    Demo(arguments).run()
