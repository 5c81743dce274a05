"""FSDP2 by torch's own `fully_shard`, two processes on the CPU: a patched model trains, is measured and saved as in one process."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from torch import nn

import kanformer
from kanformer.training.sharding import all_finite, full_state_dict, load_full_state_dict, make_contiguous, no_split_modules
from model_cases import BY_NAME, CASES, blocks
from sharding_cases import EDGES, patched, two

CHILD = """
import copy, json, sys, warnings
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
import kanformer
from kanformer.layers import EdgeFunctions, KANLinear
from kanformer.training.sharding import full_optimizer_state, full_state_dict, load_full_optimizer_state, load_full_state_dict
from model_cases import BY_NAME, blocks
from sharding_cases import EDGES, join_two, leave, patched, shard

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
join_two(folder, rank)
found = {}
ids = torch.randint(3, 99, (4, 11), generator=torch.Generator().manual_seed(5))
mine = ids[2 * rank : 2 * rank + 2]

def loss_of(model, batch):
    logits = model(input_ids=batch).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), batch[:, 1:].flatten())

def gap(left, right):
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True))

def race(name, settings, dtype=torch.float64, recompute=False):
    one, both = (patched(name, dtype, **settings).train(recompute) for _ in range(2))  # no dropout, but transformers recomputes in training only
    shard(both)
    result = {"dtensors": all(isinstance(p, DTensor) for p in both.parameters()), "buffers": not any(isinstance(b, DTensor) for b in both.buffers())}
    result["units"] = sorted({type(m).__name__ for m in both.modules() if isinstance(m, FSDPModule)})
    result["uneven"] = any(p.shape[0] % 2 for p in both.parameters())
    seen = []
    for module in both.modules():
        if isinstance(module, EdgeFunctions | KANLinear):
            module.register_forward_hook(lambda module, args, output: seen.extend([type(module.kan_coef).__name__, type(output).__name__]))
    if recompute:
        both.gradient_checkpointing_enable()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one, both)]
    for step in range(2):
        whole, part = loss_of(one, ids), loss_of(both, mine)
        whole.backward()
        part.backward()
        total = part.detach().clone()
        dist.all_reduce(total)
        grads = [p.grad.full_tensor() for p in both.parameters()]
        result["grad"] = max(gap([p.grad for p in one.parameters()], grads), result.get("grad", 0.0))
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) for model in (one, both)]
        result["loss"] = abs(float(whole.detach()) - float(total) / 2)
        result["norm"] = abs(float(norms[0]) - float(norms[1].full_tensor()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    result["weights"] = gap(one.state_dict().values(), full_state_dict(both).values())
    result["types"] = sorted(set(seen))
    return result

for name, settings in EDGES.items():
    for family in ("llama", "gpt2") if name in ("groups", "full") else ("llama",):
        found[f"{name} {family}"] = race(family, settings)
found["rational bert"] = race("bert", EDGES["rational"])
for name in ("shared", "full"):
    found[f"{name} recomputed"] = race("llama", EDGES[name], recompute=True)

# Low precision: the same policy as accelerate's for mixed_precision=bf16, against a model that is bf16 itself.
low, mixed = patched("llama").bfloat16(), shard(patched("llama"), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16))
with torch.no_grad():
    exact = patched("llama")(input_ids=ids).logits
    found["mixed"] = {"gap": gap([exact], [mixed(input_ids=ids).logits]), "plain": gap([exact], [low(input_ids=ids).logits])}
loss_of(mixed.train(), mine).backward()
found["mixed"]["grads"] = all(bool(p.grad.to_local().isfinite().all()) for p in mixed.parameters())
found["mixed"]["dtypes"] = sorted({str(p.dtype) for p in mixed.parameters()} | {str(b.kan_functions.kan_grid.dtype) for b in blocks(mixed).values()})
whole_bf16 = shard(patched("llama", torch.bfloat16))
found["bf16"] = {"gap": gap([patched("llama", torch.bfloat16)(input_ids=ids).logits], [whole_bf16(input_ids=ids).logits])}

# Measuring: hooks run inside the units, the numbers are those of the plain model.
plain, sharded = patched("llama"), shard(patched("llama"))
batch = [{"input_ids": ids}]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    fractions = [kanformer.outside_fractions(model, batch) for model in (plain, sharded)]
    stats = [kanformer.collect(model, batch) for model in (plain, sharded)]
found["measured"] = {"outside": fractions[0] == fractions[1], "collect": [str(s) for s in stats[0].values()] == [str(s) for s in stats[1].values()]}
found["compare"] = kanformer.compare(sharded).to_dict()["model"]["parameters"] == kanformer.compare(plain).to_dict()["model"]["parameters"]

def refusal(call):
    try:
        call()
    except kanformer.KanformerError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

stock = shard(BY_NAME["llama"].build())
args = SimpleNamespace(logging_steps=1, logging_first_step=False, global_step=0, gradient_accumulation_steps=1, world_size=1)
args.average_tokens_across_devices = False
found["refused"] = {
    "patch": refusal(lambda: kanformer.patch_model(stock)),
    "calibrate": refusal(lambda: kanformer.calibrate(stock, batch)),
    "update": refusal(lambda: kanformer.update_grids(sharded, batch)),
    "refine": refusal(lambda: kanformer.refine_grids(sharded, 16)),
    "regularize": refusal(lambda: kanformer.regularize(sharded, l1=1.0).__enter__()),
    "callback": refusal(lambda: kanformer.KANCallback(l1=1.0).on_step_begin(args, args, args, model=sharded)),
    "still": gap([plain(input_ids=ids).logits.detach()], [sharded(input_ids=ids).logits.detach()]),
}

# Saving: whole tensors for save_pretrained, and torch's own sharded files.
with torch.no_grad():
    torch.save(sharded(input_ids=ids).logits, f"{folder}/logits.pt")
for module in sharded.modules():
    if isinstance(module, FSDPModule):
        module.reshard()
state = full_state_dict(sharded, keep=rank == 0)
found["dropped"] = rank == 0 or state == {}
if rank == 0:
    kept = dict(state)  # transformers empties what it is given
    sharded.save_pretrained(f"{folder}/model", state_dict=state)
    kanformer.save_pretrained(sharded, f"{folder}/card", state_dict=kept)
optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-2)
loss_of(sharded, mine).backward()
optimizer.step()
dcp.save({"model": get_model_state_dict(sharded)}, checkpoint_id=f"{folder}/sharded")
fresh = shard(patched("llama"))
for parameter in fresh.parameters():
    parameter.data.zero_()
target = {"model": get_model_state_dict(fresh)}
dcp.load(target, checkpoint_id=f"{folder}/sharded")
set_model_state_dict(fresh, target["model"])
files = list(Path(folder, "sharded").glob("*.distcp"))
found["dcp"] = {"files": len(files), "gap": gap(full_state_dict(sharded).values(), full_state_dict(fresh).values())}
again = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
load_full_optimizer_state(again, copy.deepcopy(full_optimizer_state(optimizer)))
kept = [value for values in again.state_dict()["state"].values() for value in values.values() if value.dim()]
found["optimizer"] = {"dtensors": all(isinstance(value, DTensor) for value in kept), "count": len(kept)}
for model, mover in ((sharded, optimizer), (fresh, again)):
    mover.zero_grad()
    loss_of(model, mine).backward()
    mover.step()
found["optimizer"]["gap"] = gap(full_state_dict(sharded).values(), full_state_dict(fresh).values())
# The same state steps a plain model.
plain_again = patched("llama")
load_full_state_dict(plain_again, full_state_dict(sharded))
single = torch.optim.AdamW(plain_again.parameters(), lr=1e-2)
load_full_optimizer_state(single, copy.deepcopy(full_optimizer_state(optimizer)))
for model, mover, part in ((sharded, optimizer, mine), (plain_again, single, ids)):
    mover.zero_grad()
    loss_of(model, part).backward()
    mover.step()
found["optimizer"]["plain"] = gap(full_state_dict(sharded).values(), plain_again.state_dict().values())
leave(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """(what both processes found, their folder)."""
    folder = tmp_path_factory.mktemp("sharded")
    return [json.loads(out.splitlines()[-1]) for out in two(CHILD, folder=folder)], folder


RACES = [f"{name} {family}" for name in EDGES for family in (("llama", "gpt2") if name in ("groups", "full") else ("llama",))]
RACES += ["rational bert", "shared recomputed", "full recomputed"]


@pytest.mark.parametrize("name", RACES)
def test_losses_gradients_norms_and_trained_weights_are_those_of_one_process(sharded, name):
    for found in (process[name] for process in sharded[0]):
        assert found["dtensors"] and found["buffers"] and len(found["units"]) == 2, found["units"]  # the layers and the whole
        assert found["uneven"]  # the vocabulary of 99: a process has a row more than the other
        assert found["types"] == ["Parameter", "Tensor"]  # the operators never see a DTensor
        assert found["loss"] < 1e-10 and found["grad"] < 1e-10 and found["norm"] < 1e-10 and found["weights"] < 1e-9, found


def test_low_precision_is_that_of_a_model_in_bf16(sharded):
    for found in sharded[0]:
        assert 0 < found["mixed"]["gap"] < 2 * found["mixed"]["plain"] < 0.1 and found["mixed"]["grads"] and found["mixed"]["dtypes"] == ["torch.float32"]
        assert found["bf16"]["gap"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EDGES)
def test_a_unit_has_parameters_of_one_dtype(name, dtype):
    model = patched("llama", dtype, **EDGES[name])
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for path, buffer in model.named_buffers() if path.endswith("kan_grid")} == {torch.float32}


def test_statistics_and_counts_are_those_of_the_plain_model(sharded):
    for found in sharded[0]:
        assert found["measured"] == {"outside": True, "collect": True} and found["compare"]


def test_what_would_need_whole_weights_is_refused_and_changes_nothing(sharded):
    for found in (process["refused"] for process in sharded[0]):
        assert "sharded by fully_shard (FSDP2)" in found["patch"] and "shard and make the optimizer afterwards" in found["patch"]
        assert "sharded" in found["calibrate"]
        for name in ("update", "refine"):
            assert found[name].startswith("ConfigError") and "sharded over processes (DTensor)" in found[name] and "before" in found[name]
        for name in ("regularize", "callback"):
            assert found[name].startswith("ConfigError") and "ddp.yaml" in found[name] and "model.layers.0.mlp" in found[name]
        assert found["still"] < 1e-6


@pytest.mark.parametrize("name", ["model", "card"])
def test_the_gathered_model_is_saved_and_gives_the_same_bits_in_a_fresh_process(sharded, name):
    found, folder = sharded
    assert all(process["dropped"] for process in found)
    ids = torch.randint(3, 99, (4, 11), generator=torch.Generator().manual_seed(5))
    model = tf.AutoModelForCausalLM.from_pretrained(folder / name).eval()
    assert len(blocks(model)) == 2
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, torch.load(folder / "logits.pt"))
    expected = patched("llama").state_dict()
    assert all(torch.equal(tensor, expected[path]) for path, tensor in model.state_dict().items())
    assert (folder / "card" / "README.md").is_file()


def test_sharded_files_and_optimizer_states_come_back(sharded):
    for found in sharded[0]:
        assert found["dcp"] == {"files": 2, "gap": 0.0}
        assert found["optimizer"]["dtensors"] and found["optimizer"]["count"] == 2 * len(list(patched("llama").parameters()))
        assert found["optimizer"]["gap"] == 0 and found["optimizer"]["plain"] < 1e-5


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_patched_model_keeps_its_units_and_every_block_lies_in_one(case):
    before = case.build()
    names, model = list(before._no_split_modules or ()), kanformer.patch_model(case.build())
    assert list(model._no_split_modules or ()) == names and (not names or no_split_modules(model) == no_split_modules(before))
    units = [module for module in model.modules() if type(module).__name__ in no_split_modules(model)]
    inside = {block for unit in units for block in blocks(unit).values()}
    assert set(blocks(model).values()) == inside and "KANFeedForward" not in no_split_modules(model)


def test_units_share_no_weight_with_what_is_outside_and_blocks_run_alone_are_units():
    model = kanformer.patch_model(BY_NAME["bert"].build())
    assert "BertEmbeddings" in (model.bert._no_split_modules or ()) and no_split_modules(model) == ["BertLayer"]
    both = nn.ModuleDict({"student": model, "blocks": nn.ModuleList(blocks(model).values())})
    assert no_split_modules(both) == ["BertLayer", "KANFeedForward"] and no_split_modules(both["blocks"]) == ["KANFeedForward"]


def test_turned_weights_are_laid_out_anew_without_a_change():
    model = patched("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not all(parameter.is_contiguous() for parameter in model.parameters())
    make_contiguous(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_plain_models_go_the_same_way():
    model, other = patched("gpt2"), BY_NAME["gpt2"].build()
    state = full_state_dict(model)
    assert state["lm_head.weight"] is state["transformer.wte.weight"] and state.keys() == model.state_dict().keys()
    assert full_state_dict(model, keep=False) == {} and all_finite(model.parameters())
    with pytest.raises(kanformer.KanformerError, match="cannot load the weights .GPT2LMHeadModel.: got .* tensors that do not fit"):
        load_full_state_dict(other, state)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    assert not all_finite(model.parameters())
