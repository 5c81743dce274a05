"""Patched mixtures: calibration, pruning, grids, generation, training, frozen experts, every layout of the stacked weights."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import kanformer
from kanformer.errors import DataError, SurgeryError
from kanformer.layers import KANExperts
from kanformer.surgery.record import get_record
from kanformer.training.models import teacher_sites
from model_cases import blocks, disturb, same_state, snapshot

IDS = torch.randint(3, 99, (4, 24), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[2:, 15:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "mixtral": lambda: tf.MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=4),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: tf.GptOssConfig(**SMALL, intermediate_size=48, num_local_experts=4),
    "llama4": lambda: tf.Llama4TextConfig(**SMALL, intermediate_size=48, num_local_experts=4, interleave_moe_layer_step=1, pad_token_id=0),
    "nemotron_h": lambda: tf.NemotronHConfig(**SMALL, layers_block_type=["moe", "attention"], n_routed_experts=4, moe_intermediate_size=24),
}


def built(name="mixtral", dtype=torch.float32):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(MODELS[name](), dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, KANExperts)]


@pytest.mark.parametrize("edges", ["shared", "full", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_patched_exactly_saved_and_undone(name, edges, tmp_path):
    model = built(name)
    before, state = logits(model), snapshot(model)
    kanformer.patch_model(model, edges=edges)
    assert (logits(model) - before).abs().max() <= 1e-6 * before.abs().max() and mixtures(model)
    changed = logits(disturb(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()), changed)
    counts = kanformer.compare(model).to_dict()["model"]
    assert counts["parameters_before"] == sum(parameter.numel() for parameter in built(name).parameters())
    kanformer.unpatch_model(model)
    assert torch.equal(logits(model), before) and same_state(snapshot(model), state)


def test_bf16_comes_back_bit_by_bit(tmp_path):
    model = disturb(kanformer.patch_model(built(dtype=torch.bfloat16)))
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(loaded), logits(model)) and same_state(snapshot(loaded), snapshot(model))


def test_calibration_counts_the_tokens_that_the_router_gave_to_each_expert():
    model, routed = built(), []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: routed.append(args[1]))
    seen = kanformer.calibrate(model, [BATCH], gram=False).statistics
    kept = MASK.reshape(-1).bool()
    expected = [int(((routed[0] == expert).any(1) & kept).sum()) for expert in range(4)]
    assert [seen[f"model.layers.0.mlp.experts.kan_experts.{expert}"].tokens for expert in range(4)] == expected and sum(expected) == 2 * int(kept.sum())


def test_pruned_experts_keep_the_budget_and_the_function():
    model = built()
    before = logits(model)
    kanformer.patch_model(model, init="prune", param_ratio=0.6, edges="mlp", calibration=[BATCH])
    ratio = kanformer.compare(model).to_dict()["feed_forward"]["parameters_ratio"]
    assert 0.5 < ratio <= 0.6
    kanformer.unpatch_model(model)
    assert torch.equal(logits(model), before)
    kanformer.patch_model(model, init="random", edges="mlp", width=28)
    far = (logits(model) - before).square().mean()
    kanformer.unpatch_model(model)
    kanformer.patch_model(model, init="prune", param_ratio=0.6, edges="mlp", calibration=[BATCH])
    assert (logits(model) - before).square().mean() < 0.5 * far


class Blind(nn.Module):
    """A router that sends every token to the first two experts."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        index = torch.tensor([[0, 1]]).expand(len(tokens), 2)
        return torch.zeros(len(tokens), 4), torch.full(index.shape, 0.5), index


def test_experts_without_tokens_are_said_and_keep_their_grids():
    model = built()
    model.model.layers[0].mlp.gate = Blind()
    with pytest.warns(UserWarning, match=r"reached 2 of 8 blocks: .*layers\.0\.mlp\.experts\.kan_experts\.2"):
        kanformer.patch_model(model, calibration=[BATCH])
    bounds = [block.kan_functions.grid_bounds[0] for block in mixtures(model)[0].kan_experts]
    assert not torch.all(bounds[0] == -4) and torch.all(bounds[2] == -4) and torch.all(bounds[3] == -4)
    kanformer.unpatch_model(model)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="no calibration token"), pytest.raises(DataError, match=r"kan_experts\.2"):
        kanformer.patch_model(model, init="prune", param_ratio=0.5, calibration=[BATCH])
    assert not blocks(model) and same_state(snapshot(model), before)


def test_grids_move_and_are_refined():
    model = kanformer.patch_model(built())
    before = logits(model)
    kanformer.update_grids(model, [BATCH])
    fractions = kanformer.outside_fractions(model, [BATCH])
    assert len(fractions) == 8 and max(fractions.values()) < 0.05
    kanformer.refine_grids(disturb(model), 16)
    assert all(block.kan_functions.basis.grid_size == 16 for block in blocks(model).values()) and not torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_generation_with_every_cache(name):
    model = disturb(kanformer.patch_model(built(name)))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(IDS[:, :7], **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(IDS[:, :7], cache_implementation="static", disable_compile=True, **options), dynamic)


def test_frozen_experts_stay_frozen_and_others_train():
    model = built()
    for parameter in model.model.layers[0].mlp.experts.parameters():
        parameter.requires_grad_(False)
    kanformer.patch_model(model)
    first, second = mixtures(model)
    assert not any(block.kan_up.weight.requires_grad or block.kan_down.weight.requires_grad for block in first.kan_experts)
    model.train()(**BATCH, labels=IDS).loss.backward()
    assert all(block.kan_functions.kan_coef.grad is not None for block in first.kan_experts)
    used = [block for block in second.kan_experts if block.kan_up.weight.grad is not None]
    assert used and all(block.kan_up.weight.grad.any() for block in used)
    assert not any(parameter.requires_grad for name, parameter in second.named_parameters() if not name.startswith("kan_"))


def test_gradients_are_those_of_the_mixture():
    old = built().double()
    old.set_experts_implementation("eager")  # the only one that takes float64
    new = kanformer.patch_model(copy.deepcopy(old))
    for model in (old, new):
        model(**BATCH, labels=IDS).loss.backward()
    left, right = new.model.layers[1].mlp.experts, old.model.layers[1].mlp.experts
    pairs = [(block.kan_down.weight.grad, right.down_proj.grad[i]) for i, block in enumerate(left.kan_experts)]
    pairs += [(block.kan_gate.weight.grad, right.gate_up_proj.grad[i, :48]) for i, block in enumerate(left.kan_experts)]
    pairs += [(new.model.layers[1].mlp.gate.weight.grad, old.model.layers[1].mlp.gate.weight.grad)]
    for got, expected in pairs:
        assert expected.any() and torch.allclose(got, expected, rtol=1e-8, atol=1e-14)


def test_the_plan_counts_all_experts_and_folds_the_layers():
    plan = kanformer.plan_surgery(built(), experts="only")
    assert [block.experts for block in plan.blocks] == [4, 4]
    assert "model.layers.{0,1}.mlp.experts" in str(plan) and "4 experts" in plan.text(140)
    shared = kanformer.plan_surgery(built("nemotron_h"), experts="exclude")
    assert all(block.path.endswith("shared_experts") for block in shared.blocks)


def test_distillation_says_that_it_does_not_take_experts():
    teacher = built()
    student = kanformer.patch_model(copy.deepcopy(teacher))
    with pytest.raises(SurgeryError, match="experts of a mixture.*experts='exclude'"):
        teacher_sites(teacher, student, get_record(student, "distil"))
