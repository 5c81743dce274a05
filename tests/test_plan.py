"""The formulas of docs/scaling.md against models that are built, patched, run and saved."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import kanformer
from kanformer.benchmark import full_width, plan, plan_tables
from kanformer.benchmark.full_width import Saved
from kanformer.benchmark.run import BenchmarkArguments, benchmark
from kanformer.config import KANConfig
from kanformer.layers import KANFeedForward

TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
COARSE = KANConfig(groups=8)


def tiny(**changes) -> tf.LlamaConfig:
    return tf.LlamaConfig(**{**TINY, "tie_word_embeddings": False, "_attn_implementation": "eager", **changes})


def build(config, **settings) -> tf.LlamaForCausalLM:
    return kanformer.patch_model(tf.LlamaForCausalLM(copy.deepcopy(config)), keep_original=False, **settings)


def numbers(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", plan.LLAMA)
def test_counts_are_those_of_the_model_that_transformers_builds(name):
    config, counts = plan.llama_config(name), plan.count(plan.llama_config(name))
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    assert numbers(model) == counts.teacher
    kanformer.patch_model(model)
    assert numbers(model) == counts.student
    assert sum(p.numel() for module in model.modules() if isinstance(module, KANFeedForward) for p in module.parameters()) == counts.blocks
    assert counts.grids * counts.layers == sum(buffer.nbytes for path, buffer in model.named_buffers() if path.endswith("kan_grid"))
    assert {"Llama-3.2-1B": 1.24, "Llama-3-8B": 8.03, "Llama-3-70B": 70.6}[name] == pytest.approx(counts.teacher / 1e9, abs=0.05)  # as the model cards say


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_counts_below_ratio_one_are_those_of_a_pruned_model(ratio):
    config = tiny()
    model = build(config, init="prune", param_ratio=ratio, calibration=[{"input_ids": torch.randint(0, 64, (8, 64))}])
    counts = plan.count(config, ratio)
    found = [module for module in model.modules() if isinstance(module, KANFeedForward)]
    assert {block.hidden_features for block in found} == {counts.width}
    assert sum(p.numel() for block in found for p in block.parameters()) == counts.blocks and numbers(model) == counts.student


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("stage", ["finetune", "kl", "local"])
def test_flops_are_those_that_torch_counts(stage):
    config, length = tiny(), 32
    model, teacher, counts = build(config, groups=8), tf.LlamaForCausalLM(tiny()), plan.count(config, kan=COARSE)
    ids = torch.randint(0, 64, (2, length))

    def run() -> None:
        if stage != "finetune":
            with torch.no_grad():
                teacher(input_ids=ids)
        if stage == "local":
            x = torch.randn(2, length, config.hidden_size)
            sum(module(x).sum() for module in model.modules() if isinstance(module, KANFeedForward)).backward()
        else:
            model(input_ids=ids).logits.sum().backward()

    # torch runs all pairs of the eager attention, the formula counts the causal half; and no GEMM reads the 88 numbers of a block's functions.
    passes = {"finetune": 3, "kl": 4, "local": 1}[stage]
    extra = passes * 2 * counts.layers * counts.d * length
    assert flops(run) / ids.numel() - extra == pytest.approx(plan.flops_per_token(counts, stage, length), rel=0.01)
    assert plan.flops_per_token(counts, "finetune", length, checkpointing=True) == pytest.approx(4 / 3 * plan.flops_per_token(counts, "finetune", length))


@pytest.mark.parametrize("heads", [2, 4])
def test_a_step_takes_the_bytes_of_the_formulas(heads):
    config = tiny(hidden_size=128, vocab_size=512, num_key_value_heads=heads, _attn_implementation="sdpa")
    predicted = full_width.predicted_step(plan.count(config), 4 * 64, full_width.saved_bytes(config, 64, dtype=torch.float32))
    real = full_width.real_step(config, 4, 64)
    assert predicted.keys() == real.keys()
    for name in ("weights", "gradients", "optimizer"):
        assert predicted[name] == real[name]
    assert predicted["activations"] == pytest.approx(real["activations"], rel=0.05)


def test_a_step_of_the_shape_of_minilm_takes_the_bytes_of_the_formulas():
    config = tf.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, vocab_size=500)
    model = kanformer.patch_model(tf.BertModel(config, add_pooling_layer=False), keep_original=False).eval()
    layer, x = model.encoder.layer[0], torch.randn(2, 32, 384, requires_grad=True)
    with Saved(layer) as one:
        layer(x)
    optimizer = torch.optim.AdamW(model.parameters())
    with Saved(model) as kept:
        loss = model(input_ids=torch.randint(0, 500, (2, 32))).last_hidden_state.sum()
    loss.backward()
    optimizer.step()
    there = [*model.parameters(), *(p.grad for p in model.parameters()), *(v for s in optimizer.state.values() for v in s.values() if v.dim())]
    assert sum(tensor.nbytes for tensor in there) == 16 * numbers(model) == 16 * kanformer.compare(model).model_parameters
    assert 6 * one.bytes == pytest.approx(kept.bytes, rel=0.05)


def test_saved_counts_each_storage_once_and_no_parameter():
    layer, x = torch.nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    with Saved(layer) as kept:
        y = layer(x).relu()
        (y * y).sum()
    assert kept.bytes == x.nbytes + y.nbytes


def test_bytes_per_gpu_follow_the_number_of_gpus_and_the_stage():
    counts, saved = plan.count(tiny()), {"layer": 1000.0, "block": 400.0, "head": 5000.0}
    one, four = (plan.memory(counts, "finetune", gpus, 100, saved) for gpus in (1, 4))
    assert one.weights + one.gradients + one.optimizer == 16 * counts.student + counts.layers * counts.grids
    assert four.gradients == one.gradients / 4 and four.optimizer == one.optimizer / 4 and four.activations == one.activations == 100 * (3 * 1000 + 5000)
    assert plan.memory(counts, "finetune", 1, 100, saved, checkpointing=True).activations == 100 * (3 * 2 * 64 + 1000 + 5000)
    local, shared = (plan.memory(counts, "local", 1, 100, saved, shared=shared) for shared in (False, True))
    assert (
        local.weights - shared.weights == 2 * (counts.student - counts.blocks) and local.optimizer == 8 * counts.blocks and local.teacher == 2 * counts.teacher
    )
    assert plan.memory(counts, "kl", 64, 100, saved, spread=True).teacher < plan.memory(counts, "kl", 64, 100, saved).teacher
    assert one.total == one.weights + one.gradients + one.optimizer + one.gathered + one.activations


def test_hours_and_calibration_are_arithmetic():
    assert plan.hours(1e9, 3.6e6, 2, 0.5, peak=1e12) == pytest.approx(1e9 * 3.6e6 / 1e12 / 3600)
    config = tiny()
    model, counts = tf.LlamaForCausalLM(config), plan.count(config)
    calibration = kanformer.calibrate(model, [{"input_ids": torch.randint(0, 64, (2, 16))}])
    (statistics, *_) = calibration.statistics.values()
    moments = sum(value.nbytes for value in vars(statistics.affine).values() if isinstance(value, torch.Tensor))
    block, everything = plan.calibration_bytes(counts)
    assert statistics.gram.nbytes == 8 * counts.h**2 and everything == 3 * block
    assert statistics.gram.nbytes + moments == pytest.approx(block, rel=0.02)


def test_checkpoints_have_the_size_of_the_formula(tmp_path):
    model, counts = build(tiny(), groups=8), plan.count(tiny(), kan=COARSE)
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    written = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    weights, adam = plan.checkpoint_bytes(counts, "finetune")
    assert written == pytest.approx(weights, rel=1e-3) and states == adam


def test_elimination_and_gram_are_timed_and_blocks_race_the_mlp():
    assert full_width.measure_elimination(64) >= 0 and full_width.measure_gram(64, 8, 1)[1] == 8 * 64 * 64
    rows = full_width.measure_block(32, 96, 16, torch.float32, 1, ("eager",))
    assert [row.variant for row in rows] == ["MLP", "shared spline", "shared rational"] and rows[0].ratio == 1


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(full_width, "free_bytes", lambda: 1000)
    assert full_width.measure_block(32, 96, 16, torch.float32, 1, ("eager",)) == []
    seconds, size = full_width.measure_gram(64, 8, 1)
    assert seconds != seconds and size == 8 * 64 * 64


def test_the_section_prints_every_table(monkeypatch, capsys):
    small = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    for module in (plan, plan_tables):
        monkeypatch.setattr(module, "LLAMA", {"Llama-3-8B": small})
    for name, value in {"SIZES": ((32, 96, 16),), "SMALL": {**small, "vocab_size": 50}, "GRAMS": (64,), "ELIMINATED": (32, 64)}.items():
        monkeypatch.setattr(plan_tables, name, value)
    benchmark(BenchmarkArguments(section="plan", dtype="float32", path="eager", rounds=1))
    said = capsys.readouterr().out
    for part in (
        "assumed:",
        "ratio",
        "B at r=0.5",
        "KAN-FFN alone",
        "gathered",
        "GFLOP/token",
        "all blocks'",
        "core-ms",
        "extrapolated with h^3",
        "shared rational",
    ):
        assert part in said
