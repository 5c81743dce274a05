"""peft around a patched model: adapters on the attention, on the KAN-FFNs' linear maps and functions, whole blocks; saved, loaded, merged."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

import kanformer
from kanformer.errors import NoFeedForwardError, SurgeryError
from model_cases import BY_NAME, blocks, disturb, same_state, snapshot
from tool_cases import reload, trained

peft = pytest.importorskip("peft", reason="needs the package peft, which the extra [test] installs")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's use of transformers

CASE = BY_NAME["llama"]
BLOCK = {f"{name}.weight" for name in ("kan_gate", "kan_up", "kan_down")} | {"kan_functions.kan_coef"}
ADAPTERS = {
    "attention": ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
    "whole block": ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, {"q_proj", *(f"mlp.{name}" for name in BLOCK)}),
    "all linear maps": ({"target_modules": "all-linear"}, {"q_proj", "k_proj", "v_proj", "o_proj", "kan_gate", "kan_up", "kan_down"}),
    "parameters": ({"target_modules": [], "target_parameters": ["kan_up.weight", "kan_functions.kan_coef"]}, {"kan_up", "kan_functions"}),
}
each_adapter = pytest.mark.parametrize(("settings", "trainable"), ADAPTERS.values(), ids=ADAPTERS)


def adapted(model: nn.Module, settings: dict) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings)).eval()


def train(model: nn.Module) -> set[str]:
    """Moves every parameter that gets a gradient, as training would; their names."""
    model(**CASE.inputs(), labels=CASE.inputs()["input_ids"]).loss.backward()
    moved = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in moved.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return set(moved)


@each_adapter
def test_an_adapter_starts_exact_trains_and_comes_back(settings, trainable, tmp_path):
    before = CASE.logits(trained(CASE.build()))
    model = adapted(trained(CASE.build()), settings)
    assert torch.equal(CASE.logits(model), before)
    moved = train(model)
    assert all(any(f".{part}" in name.replace("modules_to_save.default.", "") for part in trainable) for name in moved)
    assert all(any(f".{part}" in name.replace("modules_to_save.default.", "") for name in moved) for part in trainable)
    want = CASE.logits(model)
    assert not torch.equal(want, before)
    model.save_pretrained(tmp_path / "adapter")
    base = reload(trained(CASE.build()), tmp_path / "base")
    for onto in (trained(CASE.build()), base):
        assert torch.equal(CASE.logits(peft.PeftModel.from_pretrained(onto, tmp_path / "adapter").eval()), want)


@each_adapter
def test_a_merged_adapter_is_an_ordinary_patched_model(settings, trainable, tmp_path):
    model = adapted(trained(CASE.build()), settings)
    train(model)
    want = CASE.logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is tf.LlamaForCausalLM and len(blocks(merged)) == 2
    torch.testing.assert_close(CASE.logits(merged), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert torch.equal(CASE.logits(reload(merged, tmp_path)), CASE.logits(merged))
    ratio = kanformer.compare(trained(CASE.build())).to_dict()["feed_forward"]["parameters_ratio"]
    assert kanformer.compare(merged).to_dict()["feed_forward"]["parameters_ratio"] == ratio


def test_auto_classes_of_peft_find_the_patched_base(tmp_path):
    trained(CASE.build()).save_pretrained(tmp_path / "base")
    model = adapted(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), ADAPTERS["attention"][0])
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(CASE.logits(again), CASE.logits(model)) and len(blocks(again)) == 2


def test_a_model_with_an_adapter_on_its_attention_can_be_patched(tmp_path):
    model = adapted(CASE.build(), ADAPTERS["attention"][0])
    train(model)
    before = CASE.logits(model)
    kanformer.patch_model(model.get_base_model())
    assert torch.equal(CASE.logits(model), before) and len(blocks(model)) == 2
    merged = disturb(model).merge_and_unload()
    assert torch.equal(CASE.logits(reload(merged, tmp_path)), CASE.logits(merged))
    assert not torch.equal(CASE.logits(merged), before)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": "all-linear"}, r"peft\.tuners\.lora\.layer\.Linear"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, "patch the model first"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]}, "patch the model first"),
    ],
    ids=["adapters in the block", "a copied block", "a copied layer"],
)
def test_blocks_that_peft_holds_already_are_refused(settings, reason):
    model = adapted(CASE.build(), settings)
    state = snapshot(model)
    with pytest.raises(NoFeedForwardError, match=reason):
        kanformer.patch_model(model.get_base_model())
    assert not blocks(model) and same_state(snapshot(model), state)


def test_restoring_the_mlps_under_an_adapter():
    model = adapted(kanformer.patch_model(CASE.build()), ADAPTERS["attention"][0])
    train(model)
    before = CASE.logits(model)
    assert torch.equal(CASE.logits(kanformer.unpatch_model(model)), before) and not blocks(model)
    held = adapted(kanformer.patch_model(CASE.build()), ADAPTERS["whole block"][0])
    with pytest.raises(SurgeryError, match="merge_and_unload"):
        kanformer.unpatch_model(held)
    assert torch.equal(CASE.logits(kanformer.unpatch_model(held.merge_and_unload())), CASE.logits(CASE.build()))
