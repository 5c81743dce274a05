"""Patching: exact, complete or not at all, and undone bit for bit."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import kanformer
from kanformer.errors import ConfigError, DataError, NoFeedForwardError, SurgeryError
from kanformer.layers import KANFeedForward
from kanformer.surgery.folding import fold_paths
from kanformer.surgery.modules import get_path
from kanformer.surgery.planning.patterns import fits
from kanformer.surgery.replacing import apply
from model_cases import BY_NAME, blocks, disturb, each_case, each_dtype, one_case_of_each, same_state, snapshot


@each_dtype
@each_case
def test_exact_patch_changes_no_bit_and_is_undone(case, dtype):
    model = case.build(dtype)
    before, state = case.logits(model, dtype), snapshot(model)
    count = len(kanformer.plan_surgery(model).blocks)
    assert kanformer.patch_model(model) is model
    after = case.logits(model, dtype)
    if case.conv1d:
        scale = before.float().abs().max()
        assert float((after - before).float().abs().max() / scale) <= (1e-6 if dtype == torch.float32 else 2e-2)
    else:
        assert torch.equal(before, after)
    assert len(blocks(model)) == count == (4 if case.name in ("bart", "mbart", "pegasus", "marian") else 2)
    assert not torch.equal(case.logits(disturb(model), dtype), before), "the learned functions must reach the output"
    kanformer.unpatch_model(model)
    assert torch.equal(case.logits(model, dtype), before)
    assert same_state(snapshot(model), state)
    assert getattr(model.config, "quantization_config", None) is None


@one_case_of_each
@pytest.mark.parametrize("edges", ["full", "mlp"])
def test_other_edges_start_at_the_mlp_too(case, edges):
    model = case.build()
    before = case.logits(model)
    kanformer.patch_model(model, edges=edges, grid_size=3)
    after = case.logits(model)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@one_case_of_each
def test_the_plan_changes_nothing_and_tells_all(case):
    model = case.build()
    state, modules = snapshot(model), [type(module) for module in model.modules()]
    plan = kanformer.plan_surgery(model, grid_size=5)
    assert same_state(snapshot(model), state) and [type(module) for module in model.modules()] == modules
    text = str(plan)
    for path, count in fold_paths(block.path for block in plan.blocks):
        alike = [block for block in plan.blocks if fits(re.sub(r"{.*?}", "*", path), block.path)]
        assert len(alike) == count and {block.structure for block in alike} == {case.structure}
        row = next(line for line in text.splitlines() if line.startswith(path + "  "))
        assert f"  {count}  " in row and row.endswith(f"{sum(block.kan_parameters for block in alike):,}")
    kanformer.patch_model(model, grid_size=5)
    found = blocks(model)
    assert list(found) == [block.path for block in plan.blocks]
    for block in plan.blocks:
        assert sum(parameter.numel() for parameter in found[block.path].parameters()) == block.kan_parameters
    assert all(len(line) <= 100 for line in text.splitlines())


def test_bart_moves_its_inner_dropout_into_the_block():
    case = BY_NAME["bart"]
    model = kanformer.patch_model(case.build())
    layer = model.get_encoder().layers[0]
    assert layer.activation_dropout == 0.0
    assert layer.fc1.hidden_dropout.p == pytest.approx(0.1)
    kanformer.unpatch_model(model)
    assert layer.activation_dropout == pytest.approx(0.1)


def test_gpt2_keeps_its_output_dropout():
    model = kanformer.patch_model(BY_NAME["gpt2"].build())
    assert next(iter(blocks(model).values())).output_dropout.p == pytest.approx(0.1)


def test_training_mode_and_frozen_weights_are_kept():
    model = BY_NAME["llama"].build().train()
    model.model.layers[0].mlp.requires_grad_(False)
    kanformer.patch_model(model)
    first, second = blocks(model).values()
    assert all(block.training for block in (first, second))
    assert not first.kan_up.weight.requires_grad and second.kan_up.weight.requires_grad
    assert first.kan_functions.kan_coef.requires_grad


def test_hooks_on_a_block_stay():
    model = BY_NAME["llama"].build()
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    kanformer.patch_model(model)
    BY_NAME["llama"].logits(model)
    assert len(seen) == 1
    handle.remove()
    BY_NAME["llama"].logits(model)
    assert len(seen) == 1


def test_meta_models_are_patched_without_memory():
    with torch.device("meta"):
        model = BY_NAME["llama"].config(**BY_NAME["llama"].values)
        import transformers

        model = transformers.AutoModelForCausalLM.from_config(model)
    kanformer.patch_model(model, keep_original=False)
    assert all(tensor.is_meta for block in blocks(model).values() for tensor in (*block.parameters(), *block.buffers()))


def test_unpatching_follows_a_model_that_moved():
    model = BY_NAME["opt"].build()
    kanformer.patch_model(model).to(torch.float64)
    kanformer.unpatch_model(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    BY_NAME["opt"].logits(model)


def test_deepcopy_of_a_patched_model_is_independent():
    case = BY_NAME["bert"]
    model = kanformer.patch_model(case.build())
    before = case.logits(model)
    twin = disturb(copy.deepcopy(model))
    assert torch.equal(case.logits(model), before) and not torch.equal(case.logits(twin), before)
    assert torch.equal(case.logits(kanformer.unpatch_model(twin)), before)


def test_gradients_match_the_mlp_at_the_exact_start():
    case = BY_NAME["llama"]
    plain, patched = case.build(), kanformer.patch_model(case.build())
    for model in (plain, patched):
        model(**case.inputs()).logits.square().mean().backward()
    ours = next(iter(blocks(patched).values()))
    theirs = plain.model.layers[0].mlp
    torch.testing.assert_close(ours.kan_gate.weight.grad, theirs.gate_proj.weight.grad)
    torch.testing.assert_close(ours.kan_down.weight.grad, theirs.down_proj.weight.grad)
    assert ours.kan_functions.kan_coef.grad.abs().sum() > 0


class TestSelection:
    def test_by_layer_by_glob_by_expression_and_by_exclusion(self):
        for choice in (
            {"layers_to_transform": [1]},
            {"target_modules": ["*.layers.1.mlp"]},
            {"target_modules": r".*\.1\.mlp"},
            {"exclude_modules": ["layers.0.mlp"]},
        ):
            model = kanformer.patch_model(BY_NAME["llama"].build(), **choice)
            assert list(blocks(model)) == ["model.layers.1.mlp"], choice

    @pytest.mark.parametrize("choice", [{"layers_to_transform": [7]}, {"target_modules": ["*.mpl"]}, {"target_modules": "nothing"}, {"exclude_modules": ["*"]}])
    def test_a_selection_that_matches_nothing_is_an_error(self, choice):
        model = BY_NAME["llama"].build()
        state = snapshot(model)
        with pytest.raises(NoFeedForwardError):
            kanformer.patch_model(model, **choice)
        assert same_state(snapshot(model), state)


class Strange(nn.Module):
    """A block that a spec describes wrongly: it adds its input."""

    def __init__(self, extra: bool) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.extra = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), extra

    def forward(self, x):
        out = self.fc2(self.act(self.fc1(x)))
        return out + x if self.extra else out


def _own(extra: bool = False) -> tuple[nn.Module, list[kanformer.FFNSpec]]:
    model = nn.ModuleDict({"a": Strange(False), "b": Strange(extra)})
    return model, [kanformer.FFNSpec(name="strange", owner="Strange", up="fc1", activation="act", down="fc2")]


class Foreign(nn.Module):
    """A block without an activation to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(torch.sin(self.fc1(x)))


class TestRefusals:
    def test_unknown_model_says_what_was_looked_for_and_how_to_give_a_spec(self):
        with pytest.raises(NoFeedForwardError) as error:
            kanformer.patch_model(nn.ModuleDict({"a": Foreign()}))
        text = str(error.value)
        assert "Foreign" in text and "fc1" in text and "FFNSpec(" in text and "Bert" in text

    def test_without_a_spec_a_plain_block_is_found_by_its_parts(self):
        model, _ = _own()
        kanformer.patch_model(model)
        assert len(blocks(model)) == 2

    def test_an_own_spec_is_enough(self):
        model, specs = _own()
        x = torch.randn(3, 8)
        before = model["a"](x)
        kanformer.patch_model(model, specs=specs)
        assert torch.equal(model["a"](x), before) and len(blocks(model)) == 2

    def test_a_block_that_does_more_than_its_spec_is_refused_and_nothing_is_patched(self):
        model, specs = _own(extra=True)
        state = snapshot(model)
        plan = kanformer.plan_surgery(nn.ModuleDict({"b": model["b"]}), specs=specs)
        assert not plan.blocks and "does more" in plan.refusals[0].reason and "does more" in str(plan)
        with pytest.raises(NoFeedForwardError, match="does more"):
            kanformer.patch_model(nn.ModuleDict({"b": model["b"]}), specs=specs)
        assert same_state(snapshot(model), state) and not blocks(model)

    def test_patching_twice(self):
        model = kanformer.patch_model(BY_NAME["bert"].build())
        state = snapshot(model)
        with pytest.raises(SurgeryError, match="patched already"):
            kanformer.patch_model(model)
        assert same_state(snapshot(model), state)

    def test_unpatching_what_is_not_patched_or_was_not_kept(self):
        with pytest.raises(SurgeryError, match="not patched"):
            kanformer.unpatch_model(BY_NAME["bert"].build())
        with pytest.raises(SurgeryError, match="no originals"):
            kanformer.unpatch_model(kanformer.patch_model(BY_NAME["bert"].build(), keep_original=False))

    def test_tied_weights_are_not_broken(self):
        model = BY_NAME["llama"].build()
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(NoFeedForwardError, match="tied"):
            kanformer.patch_model(model)
        assert not blocks(model)

    def test_a_quantized_model(self):
        model = BY_NAME["llama"].build()
        model.config.quantization_config = {"quant_method": "other"}
        with pytest.raises(SurgeryError, match="other"):
            kanformer.patch_model(model)

    def test_a_linear_map_of_another_class(self):
        model = BY_NAME["llama"].build()

        class LoraLinear(nn.Linear):
            pass

        model.model.layers[0].mlp.up_proj.__class__ = LoraLinear
        with pytest.raises(NoFeedForwardError, match="LoraLinear"):
            kanformer.patch_model(model)
        assert not blocks(model)

    def test_no_model_at_all(self):
        with pytest.raises(SurgeryError, match="torch.nn.Module"):
            kanformer.patch_model("gpt2")

    def test_unknown_setting(self):
        with pytest.raises(ConfigError, match="grid_size"):
            kanformer.patch_model(BY_NAME["bert"].build(), gridsize=3)


@one_case_of_each
def test_a_failure_in_the_middle_of_the_swap_leaves_the_model_as_it_was(case, monkeypatch):
    model = case.build()
    before, state = case.logits(model), snapshot(model)
    owners = []

    def fail_in_the_second_block(root, path):
        owners.append(root)
        if owners[0] is not root and len(set(map(id, owners))) == 2 and owners.count(root) == 1:
            raise RuntimeError("power cut")
        return get_path(root, path)

    monkeypatch.setattr(apply, "get_path", fail_in_the_second_block)
    with pytest.raises(RuntimeError, match="power cut"):
        kanformer.patch_model(model)
    assert not blocks(model) and same_state(snapshot(model), state) and torch.equal(case.logits(model), before)


class TestPruning:
    def batches(self, case, count=4):
        return [{"input_ids": torch.randint(3, 99, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)} for _ in range(count)]

    @pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "llama"])
    @pytest.mark.parametrize("edges", ["shared", "full", "mlp"])
    def test_the_budget_is_kept_and_used(self, name, edges):
        case = BY_NAME[name]
        model = kanformer.patch_model(case.build(), init="prune", param_ratio=0.5, edges=edges, grid_size=2, spline_order=1, calibration=self.batches(case))
        ratio = kanformer.compare(model).to_dict()["feed_forward"]["parameters_ratio"]
        assert 0.5 - 0.12 < ratio <= 0.5
        assert torch.isfinite(case.logits(model)).all()

    def test_ratio_one_of_the_control_is_the_mlp(self):
        case = BY_NAME["bert"]
        model = case.build()
        before = case.logits(model)
        kanformer.patch_model(model, init="prune", param_ratio=1.0, edges="mlp", ridge=0.0, calibration=self.batches(case, 20))
        torch.testing.assert_close(case.logits(model), before, rtol=1e-3, atol=1e-3)

    def test_padding_is_ignored(self):
        case = BY_NAME["bert"]
        ids = torch.randint(3, 99, (4, 12))
        padded = torch.cat([ids, torch.full((4, 5), 7)], 1)
        mask = torch.cat([torch.ones(4, 12), torch.zeros(4, 5)], 1).long()
        plain = kanformer.patch_model(case.build(), init="prune", param_ratio=0.4, calibration=[{"input_ids": ids}])
        masked = kanformer.patch_model(case.build(), init="prune", param_ratio=0.4, calibration=[{"input_ids": padded, "attention_mask": mask}])
        for left, right in zip(blocks(plain).values(), blocks(masked).values(), strict=True):
            torch.testing.assert_close(left.kan_down.weight, right.kan_down.weight, rtol=1e-2, atol=1e-4)

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "no tokens"),
            ([{"input_ids": torch.full((2, 5), 4), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}], "no tokens"),
            ([{"inputs_embeds": torch.full((2, 5, 32), float("nan"))}], "NaN"),
            (["text"], "mapping"),
            ([{"wrong": torch.ones(1)}], "wrong"),
        ],
    )
    def test_bad_calibration_leaves_the_model_untouched(self, batches, message):
        model = BY_NAME["bert"].build()
        state = snapshot(model)
        with pytest.raises(DataError, match=message):
            kanformer.patch_model(model, init="prune", param_ratio=0.5, calibration=batches)
        assert same_state(snapshot(model), state) and not blocks(model)
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_prune_without_calibration_or_with_a_hopeless_budget(self):
        with pytest.raises(ConfigError, match="calibration"):
            kanformer.patch_model(BY_NAME["bert"].build(), init="prune", param_ratio=0.5)
        with pytest.raises(ConfigError, match="budget"):
            kanformer.plan_surgery(BY_NAME["bert"].build(), init="prune", param_ratio=0.001)

    def test_calibration_moves_the_grids_to_the_data(self):
        case = BY_NAME["llama"]
        model = case.build()
        before = case.logits(model)
        kanformer.patch_model(model, calibration=self.batches(case))
        lo, hi = next(iter(blocks(model).values())).kan_functions.grid_bounds
        assert lo.unique().numel() > 10 and bool((lo < hi).all()) and float(hi.max()) < 4.0
        assert torch.equal(case.logits(model), before)


def test_random_init_with_matched_width():
    model = kanformer.patch_model(BY_NAME["llama"].build(), init="random", width="match", edges="full", grid_size=3)
    totals = kanformer.compare(model).to_dict()["feed_forward"]
    assert 0.8 < totals["parameters_ratio"] <= 1.0
    assert isinstance(next(iter(blocks(model).values())), KANFeedForward)
