"""What a patch keeps of a model, what comes back, and what is refused or said: devices, modes, hooks, shared modules, wrappers, optimizers."""

from __future__ import annotations

import gc
import warnings

import accelerate
import peft
import pytest
import torch
import transformers as tf
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.parametrizations import weight_norm

import kanformer
from kanformer.errors import NoFeedForwardError, SurgeryError
from kanformer.surgery.replacing.state import HOOKS
from model_cases import BY_NAME, blocks, disturb, one_case_of_each

_ALBERT = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}


def portrait(model: nn.Module) -> dict:
    """Everything that is to come back: the very same objects, their modes, hooks, tensors and flags, and plain attributes that are functions or numbers."""
    found: dict = {"config": model.config.to_dict()}
    for path, module in model.named_modules(remove_duplicate=False):
        hooks = [(name, list(getattr(module, name).items())) for name in (*HOOKS, "_state_dict_hooks")]
        tensors = [
            (name, id(tensor), tensor.clone(), tensor.requires_grad)
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str) or callable(value)}
        found[path] = (id(module), module.training, module._is_full_backward_hook, hooks, tensors, {**plain, "_is_hf_initialized": None})
    return found


def same(left: dict, right: dict) -> bool:
    def equal(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)


def refused(model: nn.Module, error: type, *messages: str) -> None:
    """Both functions say why, and nothing changes."""
    before = [(path, id(module)) for path, module in model.named_modules()]
    for message in messages:
        with pytest.raises(error, match=message):
            kanformer.patch_model(model)
    assert [(path, id(module)) for path, module in model.named_modules()] == before


@one_case_of_each
def test_the_original_comes_back_object_for_object(case):
    model = case.build().train()
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.Dropout):
            module.train(index % 2 == 0)
    next(model.parameters()).requires_grad_(False)
    owners = [model.get_submodule(block.path) for block in kanformer.plan_surgery(model).blocks]
    if case.structure == "module":
        owners[0].register_forward_hook(lambda *_: None)
        owners[1].register_full_backward_hook(lambda *_: None)
    before = portrait(model)
    kanformer.patch_model(model)
    assert not same(portrait(model), before)
    kanformer.unpatch_model(disturb(model))
    assert same(portrait(model), before)


@one_case_of_each
@pytest.mark.parametrize("after", [True, False], ids=["train", "eval"])
def test_the_original_follows_the_training_mode(case, after):
    model = kanformer.patch_model(case.build().train(not after)).train(after)
    kanformer.unpatch_model(model)
    assert {module.training for module in model.modules()} == {after}


def test_a_dropout_that_is_switched_off_stays_off():
    model = BY_NAME["gpt2"].build().train()
    model.transformer.h[0].mlp.dropout.eval()
    kanformer.patch_model(model)
    first, second = blocks(model).values()
    assert (first.output_dropout.training, second.output_dropout.training, first.training) == (False, True, True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_every_kind_of_hook_of_a_block_runs_before_and_after_and_its_handle_removes_it(name):
    case = BY_NAME[name]
    model, seen = case.build(), []
    block = model.get_submodule(kanformer.plan_surgery(model).blocks[0].path)
    handles = [
        block.register_forward_pre_hook(lambda *_: seen.append("pre")),
        block.register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True, always_call=True),
        block.register_full_backward_pre_hook(lambda *_: seen.append("backward pre")),
        block.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]

    def run() -> set[str]:
        seen.clear()
        model(**case.inputs()).logits.float().square().sum().backward()
        return set(seen)

    everything = run()
    assert everything == {"pre", "forward", "backward pre", "backward"}
    model.zero_grad()
    kanformer.patch_model(model)
    assert run() == everything
    handles.pop().remove()
    assert run() == everything - {"backward"}
    handles.append(next(iter(blocks(model).values())).register_full_backward_hook(lambda *_: seen.append("later")))
    kanformer.unpatch_model(model)
    assert run() == {"pre", "forward", "backward pre", "later"}
    for handle in handles:
        handle.remove()
    assert run() == set()


@one_case_of_each
@pytest.mark.parametrize("settings", [{}, {"edges": "full", "grid_size": 2}], ids=["shared", "full"])
def test_a_model_on_the_meta_device_is_planned_and_patched_as_a_real_one_and_stays_there(case, settings):
    real = kanformer.plan_surgery(case.build(), **settings)
    with torch.device("meta"):
        model = getattr(tf, case.auto_class).from_config(case.config(**case.values))
    plan = kanformer.plan_surgery(model, **settings)
    assert [(block.path, block.kan_parameters) for block in plan.blocks] == [(block.path, block.kan_parameters) for block in real.blocks]
    assert {block.device for block in plan.blocks} == {"meta"}
    kanformer.patch_model(model, **settings)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    kanformer.unpatch_model(model)
    assert not blocks(model) and all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("frozen", ["everything", "blocks", "nothing"])
def test_what_is_frozen_stays_frozen(frozen):
    model = BY_NAME["bart"].build()
    plan = kanformer.plan_surgery(model)
    if frozen != "nothing":
        model.requires_grad_(frozen != "everything")
        for site in plan.sites:
            for linear in site.linears.values():
                linear.requires_grad_(False)
    others = {name: p.requires_grad for name, p in model.named_parameters() if ".fc" not in name}
    kanformer.patch_model(model)
    assert {name: p.requires_grad for name, p in model.named_parameters() if ".fc" not in name} == others
    for block in blocks(model).values():
        learned = {id(p) for p in block.spline_parameters()}
        assert all(p.requires_grad == (id(p) in learned or frozen == "nothing") for p in block.parameters())


def test_alberts_one_block_stays_one_in_all_layers():
    torch.manual_seed(0)
    model = tf.AlbertModel(tf.AlbertConfig(**_ALBERT)).eval()
    ids = torch.randint(3, 99, (2, 7))
    out, before = model(ids).last_hidden_state, portrait(model)
    kanformer.patch_model(model)
    assert len(blocks(model)) == 1 and torch.equal(model(ids).last_hidden_state, out)
    calls = []
    next(iter(blocks(model).values())).register_forward_hook(lambda *_: calls.append(1))
    assert not torch.equal(disturb(model)(ids).last_hidden_state, out) and len(calls) == 4
    kanformer.unpatch_model(model)
    assert same(portrait(model), before) and torch.equal(model(ids).last_hidden_state, out)


def test_a_block_that_hangs_in_two_places_is_replaced_in_both_by_one():
    case = BY_NAME["llama"]
    model = case.build()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    out, before = case.logits(model), portrait(model)
    kanformer.patch_model(model)
    assert model.model.layers[0].mlp is model.model.layers[1].mlp and len(blocks(model)) == 1 and torch.equal(case.logits(model), out)
    kanformer.unpatch_model(model)
    assert same(portrait(model), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "vit"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_blocks_are_refused_with_the_reason(name, where, tmp_path):
    model, device = BY_NAME[name].build(), torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=device)
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=device)
    refused(model, NoFeedForwardError, "any of the 2 .*offloaded by accelerate; load the model without offloading")


def test_accelerates_hooks_that_only_move_inputs_go_over_to_the_block():
    case = BY_NAME["llama"]
    model = case.build()
    out = case.logits(model)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    hooks = [layer.mlp._hf_hook for layer in model.model.layers]
    kanformer.patch_model(model)
    assert [block._hf_hook for block in blocks(model).values()] == hooks and torch.equal(case.logits(model), out)
    assert not torch.equal(case.logits(disturb(model)), out)
    assert torch.equal(case.logits(kanformer.unpatch_model(model)), out)


def test_partitioned_weights_are_refused():
    for name in ("llama", "opt", "bert"):
        model = BY_NAME[name].build()
        for parameter in model.parameters():  # what deepspeed.zero.Init leaves of them
            parameter.ds_id, parameter.data = 0, torch.empty(0)
        refused(model, SurgeryError, r"partitioned by DeepSpeed \(ZeRO 3\).*Patch it first")


def test_a_config_that_a_patched_model_has_too_is_refused_by_what_it_is():
    config = BY_NAME["llama"].config(**BY_NAME["llama"].values)
    first, second = (tf.LlamaForCausalLM(config) for _ in range(2))
    kanformer.patch_model(first)
    refused(second, SurgeryError, r"comes from a patched model: .*copy.deepcopy\(config\); del")


class _Engine(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.compile, "compiled by torch.compile"),
        (nn.DataParallel, "wrapped in DataParallel"),
        (type("DistributedDataParallel", (_Engine,), {}), "DistributedDataParallel"),
        (type("FullyShardedDataParallel", (_Engine,), {}), "FSDP"),
        (type("DeepSpeedEngine", (_Engine,), {}), "DeepSpeed"),
        (lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])), r"patch_model\(model.get_base_model\(\)\)"),
    ],
)
def test_a_wrapped_model_is_refused_and_says_what_to_do_instead(wrap, message):
    refused(wrap(BY_NAME["llama"].build()), SurgeryError, message)


def test_a_layer_that_is_compiled_or_sharded_is_refused_by_its_path():
    model = BY_NAME["llama"].build()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    refused(model, SurgeryError, "torch.compile .at model.layers.1.")
    model = BY_NAME["llama"].build()
    layer = model.model.layers[0]
    layer.__class__ = type("FSDPLayer", (FSDPModule, type(layer)), {"__init__": type(layer).__init__, "__new__": type(layer).__new__})
    refused(model, SurgeryError, r"FSDP2\) .at model.layers.0.")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "vit", "phi"])
def test_adapters_and_parametrizations_inside_a_block_are_refused_even_in_one_layer(name):
    model = BY_NAME[name].build()
    (first, *_) = kanformer.plan_surgery(model).sites
    up, path = first.up, f"{first.owner_path}.{first.spec.up}"
    peft.get_peft_model(model, peft.LoraConfig(target_modules=[path], r=2, fan_in_fan_out=name == "gpt2"))
    refused(model, NoFeedForwardError, f"all of the 2 .*{first.spec.up} carries an adapter .*merge_and_unload")
    if isinstance(up, nn.Linear):
        model = BY_NAME[name].build()
        weight_norm(model.get_submodule(path))
        refused(model, NoFeedForwardError, f"all of the 2 .*{first.spec.up} is parametrized")


class _Unknown(nn.Module):
    """A block that no spec describes: it is found by its parts, also where one of them is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class _Halves(nn.Module):
    """The same in two halves, as BERT's layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense, self.intermediate.intermediate_act_fn, self.output.dense = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)


@pytest.mark.parametrize(("block", "path"), [(_Unknown, "fc1"), (_Unknown, "fc2"), (_Halves, "intermediate.dense"), (_Halves, "output.dense")])
def test_a_hidden_map_of_an_unknown_class_is_refused_too_and_not_passed_over(block, path):
    for kind in ("carries an adapter", "is parametrized"):
        model = nn.ModuleDict({"a": block(), "b": block()})
        assert len(kanformer.plan_surgery(model).blocks) == 2 or block is _Halves
        if kind == "is parametrized":
            weight_norm(model["a"].get_submodule(path))
        else:
            peft.get_peft_model(model, peft.LoraConfig(target_modules=[f"a.{path}"], r=2))
        plan = kanformer.plan_surgery(model)
        assert any(f"{path} {kind}" in refusal.reason for refusal in plan.refusals), plan


def test_an_adapter_on_the_attention_and_a_patch_go_together(tmp_path):
    case = BY_NAME["llama"]
    adapted = peft.get_peft_model(case.build(), peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    before = case.logits(adapted)
    kanformer.patch_model(adapted.get_base_model())
    assert torch.equal(case.logits(adapted), before) and not torch.equal(case.logits(disturb(adapted)), before)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(case.logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()), case.logits(merged))


class _Quantized(torch.Tensor):
    """Stands for the tensor subclasses of torchao."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: nn.Parameter(torch.zeros(weight.shape, dtype=torch.int8), requires_grad=False), r"up_proj.weight is quantized \(int8\)"),
        (lambda weight: nn.Parameter(weight.detach().as_subclass(_Quantized)), r"up_proj.weight is quantized or of another kind \(_Quantized\)"),
    ],
)
def test_a_weight_that_is_no_plain_tensor_is_refused(change, message):
    model = BY_NAME["llama"].build()
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = change(linear.weight)
    refused(model, NoFeedForwardError, f"all of the 2 .*model.layers.0.mlp .*{message}")


class TestSaid:
    def said(self, model: nn.Module, **settings) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kanformer.patch_model(model, **settings)
        assert all(warning.filename == __file__ for warning in caught), "the warning is the caller's"
        return [str(warning.message) for warning in caught]

    def test_an_optimizer_that_holds_a_replaced_parameter(self):
        model = BY_NAME["llama"].build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert self.said(model, layers_to_transform=0) == [
            "parameters of the replaced MLPs are in an optimizer (SGD) made before: it will not train the KAN-FFNs; make it after patching"
        ]
        del optimizer

    def test_no_word_of_an_optimizer_of_something_else_or_one_that_nobody_uses(self):
        model = BY_NAME["llama"].build()
        other = torch.optim.AdamW(model.lm_head.parameters())
        gone = torch.optim.AdamW(model.parameters())
        gone.itself = gone  # only the garbage collector can take it
        gc.disable()
        try:
            del gone
            assert self.said(model) == []
        finally:
            gc.enable()
        assert len(other.param_groups) == 1

    def test_gradients_that_are_lost(self):
        case = BY_NAME["gpt2"]
        model = case.build()
        model(**case.inputs()).logits.sum().backward()
        assert self.said(model) == ["the gradients of transformer.h.{0,1}.mlp are lost with the MLPs: patch before training, or after optimizer.zero_grad()"]

    @pytest.mark.parametrize("part", ["", "model.layers.1", "model.layers.1.mlp"])
    def test_code_that_was_compiled_in_place_and_it_is_made_again(self, part):
        case = BY_NAME["llama"]
        model = case.build()
        model.get_submodule(part).compile(backend="eager")
        before = case.logits(model)
        (message,) = self.said(model)
        assert message.startswith(f"{part or 'the model'} was compiled in place")
        assert torch.equal(case.logits(model), before) and not torch.equal(case.logits(disturb(model)), before)

    def test_compiled_parts_that_have_nothing_to_do_with_it_are_not_mentioned(self):
        model = BY_NAME["llama"].build()
        model.model.layers[0].self_attn.compile(backend="eager")
        assert self.said(model) == []

    @pytest.mark.parametrize(
        ("name", "part"), [("llama", "model.layers.0.mlp.up_proj"), ("opt", "model.decoder.layers.1.fc2"), ("bert", "bert.encoder.layer.0.intermediate")]
    )
    def test_hooks_on_parts_that_are_taken_out_and_they_come_back(self, name, part):
        case, seen = BY_NAME[name], []
        model = case.build()
        model.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
        (message,) = self.said(model)
        assert message.startswith(f"the hooks on {part} do not run")
        case.logits(model)
        assert not seen
        case.logits(kanformer.unpatch_model(model))
        assert seen == [1]
