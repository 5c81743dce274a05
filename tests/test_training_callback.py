"""KANCallback: what plain transformers' Trainer minimises with it is what a loop with `kanformer.regularize` minimises, and its numbers are right."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import kanformer
from kanformer.conversion.batches import select_tokens
from kanformer.errors import ConfigError, NoFeedForwardError
from kanformer.layers import EdgeFunctions, KANLinear
from kanformer.layers.grids import GridModule
from kanformer.layers.magnitudes import edge_magnitudes, function_magnitudes
from kanformer.layers.regularization import entropy, smoothness
from model_cases import disturb, same_state, snapshot
from training_cases import ROOT, python

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
MODELS: dict[str, tuple[Any, Any, dict]] = {
    "gated": (tf.LlamaForCausalLM, tf.LlamaConfig, {**SMALL, "num_key_value_heads": 2}),
    "shared": (tf.BertForMaskedLM, tf.BertConfig, {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "full": (tf.OPTForCausalLM, tf.OPTConfig, {**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, "ffn_dim": 24, "dropout": 0.0}),
    "experts": (tf.MixtralForCausalLM, tf.MixtralConfig, {**SMALL, "num_key_value_heads": 2, "num_local_experts": 3, "num_hidden_layers": 1}),
}
WEIGHTS = {"l1": 1e-3, "entropy": 1e-2, "smoothness": 1e-6}


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    cls, config, values = MODELS[kind]
    return disturb(kanformer.patch_model(cls(config(**values)), edges="full" if kind == "full" else "shared", keep_original=False))


def rows(count: int = 10) -> list[dict]:
    """Texts of 4 to 9 tokens, padded to 9."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        ids, mask = torch.randint(3, 60, (9,), generator=generator), torch.ones(9, dtype=torch.long)
        mask[4 + number % 6 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


class Collator:
    """Keeps the batches that it makes."""

    def __init__(self) -> None:
        self.batches: list[dict] = []

    def __call__(self, examples: list[dict]) -> dict:
        self.batches.append({name: torch.stack([example[name] for example in examples]) for name in examples[0]})
        return dict(self.batches[-1])


def trainer_of(model: nn.Module, folder, callbacks: list, collator: Any = None, optimizer: Any = None, loss: Any = None, **options: Any) -> tf.Trainer:
    """Three steps of an epoch of five micro-batches, so of 2, 2 and 1 of them."""
    values = {"max_steps": 3, "gradient_accumulation_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **options}
    common = {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = tf.TrainingArguments(output_dir=str(folder), **{**common, **values})
    data = {"train_dataset": rows(), "eval_dataset": rows(4), "data_collator": collator or Collator()}
    return tf.Trainer(model, arguments, callbacks=callbacks, optimizers=(optimizer, None), compute_loss_func=loss, **data)


def by_hand(model: nn.Module, batches: list[dict], accepts: bool, weights: dict, loss=None) -> nn.Module:
    """The same three steps in a loop of one's own."""
    model.train()
    optimizer = kanformer.make_optimizer(model, learning_rate=1e-2, new_module_learning_rate=3e-2)
    for step in (batches[0:2], batches[2:4], batches[4:5]):
        shifted = slice(1, None) if "CausalLM" in type(model).__name__ else slice(None)
        items = sum(int((batch["labels"][:, shifted] != -100).sum()) for batch in step)
        for batch in step:
            with kanformer.regularize(model, **weights) as penalty:
                if loss is not None:
                    value = loss(model(**{name: tensor for name, tensor in batch.items() if name != "labels"}), batch["labels"], num_items_in_batch=items)
                elif accepts:
                    value = model(**batch, num_items_in_batch=items).loss
                else:
                    value = model(**batch).loss / len(step)
            (value + penalty() / len(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def farthest(left: nn.Module, right: nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return kanformer.make_optimizer(model, learning_rate=1e-2, new_module_learning_rate=3e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_the_steps_are_those_of_a_loop_with_regularize(tmp_path, kind):
    model, collator = built(kind), Collator()
    hand, plain = copy.deepcopy(model), copy.deepcopy(model)
    trainer = trainer_of(model, tmp_path, [kanformer.KANCallback(**WEIGHTS)], collator, optimizer_of(model))
    trainer.train()
    by_hand(hand, collator.batches, trainer.model_accepts_loss_kwargs, WEIGHTS)
    assert [len(batch["labels"]) for batch in collator.batches[:5]] == [2] * 5
    trainer_of(plain, tmp_path, [], None, optimizer_of(plain)).train()
    assert farthest(model, hand) < 1e-5 < 1e-3 < farthest(model, plain)


def weighted_loss(outputs, labels, num_items_in_batch=None):
    """A loss of one's own, which the model does not know."""
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.2) / num_items_in_batch


def test_a_loss_that_is_not_the_models_is_an_error_and_install_is_the_way(tmp_path):
    model, collator = built("gated"), Collator()
    hand = copy.deepcopy(model)
    with pytest.raises(ConfigError, match=r"a loss that is not the one that the model returns. Give the callback .*install\(trainer\)"):
        trainer_of(copy.deepcopy(model), tmp_path, [kanformer.KANCallback(l1=1e-3)], loss=weighted_loss).train()
    trainer = trainer_of(model, tmp_path, [], collator, optimizer_of(model), weighted_loss)
    kanformer.KANCallback(**WEIGHTS).install(trainer)
    trainer.train()
    assert farthest(model, by_hand(hand, collator.batches, True, WEIGHTS, weighted_loss)) < 1e-5


def test_a_loss_that_trainer_makes_of_the_logits_is_noticed_too(tmp_path):
    class Mine(tf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)  # returns a loss, which is not the one that is minimised
            return (outputs.logits.mean(), outputs) if return_outputs else outputs.logits.mean()

    trainer = trainer_of(built("gated"), tmp_path, [])
    mine = Mine(trainer.model, trainer.args, trainer.data_collator, trainer.train_dataset, callbacks=[kanformer.KANCallback(l1=1e-3)])
    with pytest.raises(ConfigError, match="install"):
        mine.train()


def test_the_losses_that_are_logged_are_without_penalty(tmp_path):
    model = built("gated")
    plain, start = copy.deepcopy(model), copy.deepcopy(model)
    options = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    trainer = trainer_of(model, tmp_path, [kanformer.KANCallback(l1=1.0, smoothness=1e-3)], **options)
    trainer.train()
    without = trainer_of(plain, tmp_path, [], **options)
    without.train()
    logs, expected = trainer.state.log_history, without.state.log_history
    assert logs[0]["loss"] == expected[0]["loss"] and logs[0]["grad_norm"] > 1.5 * expected[0]["grad_norm"]
    batch = Collator()(rows(4))
    with torch.no_grad():
        assert next(line["eval_loss"] for line in logs if "eval_loss" in line) == pytest.approx(float(model.eval()(**batch).loss), rel=1e-6)
    assert not same_state(snapshot(model), snapshot(start))


@torch.no_grad()
def brute_force(model: nn.Module, batch: dict) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers of a report from what the functions see and give, layer by layer."""
    seen: dict[str, tuple] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, KANLinear | EdgeFunctions):
            take = lambda module, args, y, path=path: seen.update({path: (module, select_tokens(args[0], batch), select_tokens(y, batch))})  # noqa: E731
            handles.append(module.register_forward_hook(take))
    model(**batch)
    for handle in handles:
        handle.remove()
    shares, outside, magnitudes = [], {}, []
    for path, (module, x, y) in seen.items():
        lo, hi = module.grid_bounds
        rest = module.base(x) if isinstance(module, EdgeFunctions) else F.linear(module.base(x), module.kan_base_weight)
        spline = module.spline(x).abs().sum()
        shares.append(float(spline / (spline + rest.abs().sum())))
        outside[path] = float(((x < lo) | (x > hi)).double().mean())
        down = model.get_submodule(path.rpartition(".")[0]).kan_down if not isinstance(module, KANLinear) and "bert" in path else None
        means = edge_magnitudes(module, x, None) if isinstance(module, KANLinear) else function_magnitudes(y).unsqueeze(0)
        magnitudes.append(means if down is None else down.weight.abs() * means)
    coef = torch.cat([module.kan_coef.flatten() for module in model.modules() if isinstance(module, GridModule)])
    numbers = {"kan_spline_share": sum(shares) / len(shares), "kan_l1": float(sum(layer.sum() for layer in magnitudes))}
    numbers |= {
        "kan_entropy": float(sum(entropy(layer) for layer in magnitudes)),
        "kan_smoothness": float(smoothness(model)),
        "kan_coef_norm": float(coef.norm()),
    }
    return {**numbers, "kan_outside_max": max(outside.values())}, outside


@pytest.mark.parametrize("kind", ["gated", "shared", "full"])
def test_the_numbers_are_right(tmp_path, kind):
    model, collator = built(kind), Collator()
    for module in model.modules():
        if isinstance(module, GridModule):  # a grid that values miss
            module.set_grid_range(*(torch.full((module.kan_grid.shape[0],), bound) for bound in (-0.02, 0.5)))
        if isinstance(module, KANLinear):
            nn.init.constant_(module.kan_bias, 0.3)
    start = copy.deepcopy(model).train()
    callback = kanformer.KANCallback(**WEIGHTS, nodes=None)
    with pytest.warns(UserWarning, match="of the values lie outside its grid") as caught:
        trainer = trainer_of(model, tmp_path, [callback], collator, gradient_accumulation_steps=1, max_grad_norm=0.5)
        trainer.train()
    assert sum("outside its grid" in str(warning.message) for warning in caught) == 1  # three reports, one warning
    numbers, outside = brute_force(start, collator.batches[0])
    numbers["kan_penalty"] = sum(weight * numbers[f"kan_{name}"] for name, weight in WEIGHTS.items())
    line = trainer.state.log_history[0]
    assert {name: line[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert {name.removeprefix("kan_outside/"): value for name, value in line.items() if "/" in name} == pytest.approx(outside, rel=1e-9) and outside
    assert 0.05 < numbers["kan_outside_max"] < 1 and 0 < numbers["kan_spline_share"] < 1
    with kanformer.regularize(start, **WEIGHTS, nodes=None) as penalty:
        loss = start(**collator.batches[0]).loss
    (loss + penalty()).backward()
    nn.utils.clip_grad_norm_(start.parameters(), 0.5)
    gradients = torch.cat([module.kan_coef.grad.flatten() for module in start.modules() if isinstance(module, GridModule)])
    assert line["kan_coef_grad_norm"] == pytest.approx(float(gradients.norm()), rel=1e-4)


def test_reports_come_when_they_are_due_and_may_look_at_other_data(tmp_path):
    model, batch = built("experts"), Collator()(rows(4))
    callback = kanformer.KANCallback(report_steps=2, outside_data=[batch], per_layer=False)
    trainer = trainer_of(model, tmp_path, [callback], max_steps=4, learning_rate=0.0)
    plain = trainer_of(copy.deepcopy(model), tmp_path, [], max_steps=4, learning_rate=0.0)
    trainer.train()
    plain.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert ["kan_l1" in line for line in lines] == [False, True, False, True] and not any("/" in name for line in lines for name in line)
    assert callback.outside == kanformer.outside_fractions(model, batch) and lines[1]["kan_outside_max"] == max(callback.outside.values())
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain.state.log_history if "loss" in line]  # only looked


class Recorder(tf.TrainerCallback):
    """What a tracker is told."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs or {}))


def test_with_install_trackers_are_told_the_numbers(tmp_path):
    recorder = Recorder()
    callback = kanformer.KANCallback(l1=1e-3)
    trainer = trainer_of(built("gated"), tmp_path, [recorder, callback])
    assert callback.install(trainer) is callback and trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert [line["kan_l1"] for line in recorder.lines if "loss" in line] == [line["kan_l1"] for line in trainer.state.log_history if "loss" in line]


def test_a_resumed_run_ends_where_the_straight_one_does(tmp_path):
    runs = []
    for name, resume in (("straight", None), ("resumed", str(tmp_path / "straight" / "checkpoint-2"))):
        model = built("gated")
        trainer = trainer_of(model, tmp_path / name, [kanformer.KANCallback(**WEIGHTS)], max_steps=5, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(
            (
                snapshot(model),
                [{key: value for key, value in line.items() if key.startswith(("kan", "loss", "step"))} for line in trainer.state.log_history[:5]],
            )
        )
    assert same_state(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1] and len(runs[0][1]) == 5


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_nothing_is_left_on_the_model(tmp_path):
    model = built("shared")
    before = hooks(model)
    trainer_of(model, tmp_path, [kanformer.KANCallback(l1=1e-3)]).train()
    assert hooks(model) == before

    class Breaks(tf.TrainerCallback):
        def on_substep_end(self, *words, **options):
            raise InterruptedError

    callback = kanformer.KANCallback(l1=1e-3)
    with pytest.raises(InterruptedError):
        trainer_of(model, tmp_path, [callback, Breaks()]).train()
    assert hooks(model) > before
    callback.close()
    assert hooks(model) == before


def test_bad_settings_and_models_without_functions_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="l1.*got -1"):
        kanformer.KANCallback(l1=-1)
    with pytest.raises(ConfigError, match="report_steps.*got 0"):
        kanformer.KANCallback(report_steps=0)
    cls, config, values = MODELS["gated"]
    with pytest.raises(NoFeedForwardError, match="no learned functions. Patch it first"):
        trainer_of(cls(config(**values)), tmp_path, [kanformer.KANCallback()]).train()


def test_importing_kanformer_does_not_import_trainers_parts():
    code = "import sys, kanformer; kanformer.KANConfig(); print('transformers.trainer_callback' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_optimizer_for_trainer(tmp_path):
    model = built("shared")
    optimizer = kanformer.make_optimizer(model, learning_rate=1e-4, new_module_learning_rate=1e-3, spline_learning_rate=1e-2, weight_decay=0.1)
    trainer = trainer_of(model, tmp_path, [], optimizer=optimizer, lr_scheduler_type="linear", max_steps=2, logging_steps=2)
    trainer.train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {(group["peak_lr"], group["weight_decay"]): {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert found[1e-2, 0.0] == {name for name in names.values() if name.endswith("kan_coef")}
    assert [group["initial_lr"] for group in optimizer.param_groups] == [group["peak_lr"] for group in optimizer.param_groups]
    assert not any("kan_grid" in name for group in found.values() for name in group)
    alone = nn.Sequential(KANLinear(3, 4), nn.Linear(4, 2))
    groups = [(group["lr"], group["weight_decay"]) for group in kanformer.make_optimizer(alone, weight_decay=0.1).param_groups for _ in group["params"]]
    assert sorted(groups) == [(1e-4, 0.0), (1e-4, 0.1), (1e-3, 0.0), (1e-3, 0.0), (1e-3, 0.1)]
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        kanformer.make_optimizer(model, lerning_rate=1e-3)
    with pytest.raises(ConfigError, match=r"weight_decay\): got -1"):
        kanformer.make_optimizer(model, weight_decay=-1)


TWO = """
import sys, torch
from test_training_callback import built, trainer_of, optimizer_of, WEIGHTS
import kanformer
for way in ("plain", "installed"):
    model, callback = built("gated"), kanformer.KANCallback(**WEIGHTS)
    callbacks = [callback] if way == "plain" else []
    trainer = trainer_of(model, sys.argv[1], callbacks, None, optimizer_of(model), max_steps=2, gradient_accumulation_steps=1)
    if way == "installed":
        callback.install(trainer)
    trainer.train()
    if trainer.args.process_index == 0:
        torch.save(trainer.model.state_dict(), f"{sys.argv[1]}/{way}.pt")
        print("processes", trainer.args.world_size)
"""


def test_two_processes_take_the_step_of_one_that_accumulates(tmp_path):
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "two.py"), str(tmp_path))
    assert done.returncode == 0 and done.stdout.count("processes 2") == 2, done.stderr[-2000:]
    model = built("gated")
    trainer_of(model, tmp_path, [kanformer.KANCallback(**WEIGHTS)], None, optimizer_of(model), max_steps=2).train()
    for way in ("plain", "installed"):
        two = torch.load(tmp_path / f"{way}.pt", weights_only=True)
        assert max(float((two[name] - tensor).abs().max()) for name, tensor in model.state_dict().items()) < 1e-5


def test_what_the_readme_shows_runs(tmp_path, monkeypatch):
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("**transformers' Trainer**")[1].split("```python\n")[1].split("```")[0]
    model = built("gated")
    arguments = tf.TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    names: dict[str, Any] = {"kanformer": kanformer, "Trainer": tf.Trainer, "model": model, "args": arguments, "dataset": rows()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(code, names)
    lines = [line for line in names["trainer"].state.log_history if "loss" in line]
    assert len(lines) == 2 and all(line["kan_l1"] > 0 for line in lines)
