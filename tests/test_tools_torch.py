"""Whole patched models in torch's machinery: checkpointed, compiled, exported, copied, pickled, cast, and their state dicts."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers as tf

import kanformer
from model_cases import BY_NAME, blocks, one_case_of_each, same_state, snapshot
from tool_cases import kan_state, reload, trained


def short(name):
    """The family's model with one layer."""
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    return dataclasses.replace(BY_NAME[name], values={**BY_NAME[name].values, layers: 1})


FAMILIES = {name: short(name) for name in ("bert", "gpt2", "opt", "llama")}
each_family = pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
each_graph = pytest.mark.parametrize(("name", "edges"), [("bert", "shared"), ("gpt2", "full"), ("opt", "full"), ("llama", "shared")])


def gradients(model, case) -> dict[str, torch.Tensor]:
    torch.manual_seed(6)  # for the dropouts
    model(**case.inputs()).logits.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@each_family
def test_activation_checkpointing_changes_no_gradient(case, reentrant):
    plain, model = trained(case.build()).train(), trained(case.build()).train()
    plain.config.use_cache = model.config.use_cache = False  # as checkpointing would have it; GPT-2 rounds otherwise with a cache
    calls = {"plain": 0, "model": 0}
    for name, each in (("plain", plain), ("model", model)):
        next(iter(blocks(each).values())).register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    want, found = gradients(plain, case), gradients(model, case)
    assert calls == {"plain": 1, "model": 2}, "the block must run once more in the backward pass"
    assert same_state(found, want)


@each_graph
def test_compiled_as_one_graph(name, edges):
    torch._dynamo.reset()
    case = FAMILIES[name]
    plain, model = trained(case.build(), edges=edges), trained(case.build(), edges=edges)
    want = gradients(plain, case)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(whole, case)
    assert set(found) == {f"_orig_mod.{name}" for name in want}
    for name, gradient in want.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-9)
    torch.testing.assert_close(case.logits(whole), case.logits(plain), rtol=1e-5, atol=1e-6)


@each_graph
def test_exported_for_any_number_of_texts(name, edges):
    case = FAMILIES[name]
    model = trained(case.build(), edges=edges)
    model.config.use_cache = False
    inputs = case.inputs()
    free = {name: {0: torch.export.Dim("texts", min=2, max=64)} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=free)
    assert not any("kanformer" in str(node.target) for node in program.graph.nodes), "an operator that only kanformer knows"
    more = {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}
    for each in (inputs, more):
        torch.testing.assert_close(program.module()(**each).logits, model(**each).logits, rtol=1e-5, atol=1e-6)


@one_case_of_each
def test_copied_and_pickled_models_are_whole_and_independent(case, tmp_path):
    model = trained(case.build())
    want = case.logits(model)
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt", weights_only=False)]
    for number, twin in enumerate(copies):
        assert torch.equal(case.logits(twin), want) and same_state(snapshot(twin), snapshot(model))
        assert torch.equal(case.logits(reload(twin, tmp_path / str(number))), want)
        assert kanformer.compare(twin) == kanformer.compare(model)
        assert same_state(snapshot(kanformer.unpatch_model(twin)), snapshot(case.build()))
    assert torch.equal(case.logits(model), want) and len(blocks(model)) > 0


@one_case_of_each
def test_a_loaded_model_can_be_copied_and_pickled_too(case, tmp_path):
    loaded = reload(trained(case.build()), tmp_path)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(case.logits(reload(twin, tmp_path / "again")), case.logits(loaded))


@one_case_of_each
def test_a_state_dict_goes_into_a_model_that_was_patched_the_same_way(case, tmp_path):
    model, other = trained(case.build()), kanformer.patch_model(case.build())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert not torch.equal(case.logits(other), case.logits(model))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(case.logits(other), case.logits(model))
    with pytest.raises(RuntimeError, match="kan_up"):
        case.build().load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="kan_coef"):
        kanformer.patch_model(case.build(), grid_size=3).load_state_dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@one_case_of_each
def test_a_cast_model_keeps_its_grids_and_comes_back(case, dtype, tmp_path):
    exact = trained(case.build())
    model = trained(case.build()).to(dtype)
    block = next(iter(blocks(model).values()))
    assert block.kan_up.weight.dtype == block.kan_functions.kan_coef.dtype == dtype and block.kan_functions.kan_grid.dtype == torch.float32
    low, want = case.logits(model, dtype), case.logits(exact)
    assert low.dtype == dtype and float((low.float() - want).norm() / want.norm()) < (3e-2 if dtype == torch.bfloat16 else 4e-3)
    loaded = reload(model, tmp_path)
    assert loaded.dtype == dtype
    assert same_state(kan_state(loaded), kan_state(model))
    half = trained(case.build()).half()
    assert half.dtype == torch.float16 and half.float().dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_more_tokens_after_patching(name, tmp_path):
    case = BY_NAME[name]
    model = trained(case.build())
    want = case.logits(model)
    model.resize_token_embeddings(120)
    longer = case.logits(model)
    assert longer.shape[-1] == 120 and torch.equal(longer[..., :99], want)
    assert torch.equal(case.logits(reload(model, tmp_path, getattr(tf, case.auto_class))), longer)
