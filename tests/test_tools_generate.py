"""`generate` on a patched model: the tokens of the plain one at the exact start, and the same with every cache."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import kanformer
from model_cases import BY_NAME
from tool_cases import loud, trained

WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 20},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def tokens(model, case, **options):
    """Eight new tokens; texts of decoders are padded on the left."""
    inputs = {name: tensor.flip(1) for name, tensor in case.inputs().items() if name in ("input_ids", "attention_mask")}
    torch.manual_seed(5)
    made = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **options)
    return made[:, -8:]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_the_tokens_are_those_of_the_plain_model(name, way):
    case = BY_NAME[name]
    want = tokens(case.build(), case, **way)
    assert torch.equal(tokens(kanformer.patch_model(case.build()), case, **way), want)
    assert not torch.equal(tokens(loud(trained(case.build())), case, **way), want), "other functions must give other tokens"


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("edges", ["shared", "full"])
def test_every_cache_gives_the_same_tokens(name, edges):
    case = BY_NAME[name]
    model = trained(case.build(), edges=edges)
    want = tokens(model, case, do_sample=False)
    for options in ({"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        assert torch.equal(tokens(model, case, do_sample=False, **options), want)


@pytest.mark.parametrize("edges", ["shared", "full"])
def test_a_static_cache_is_decoded_by_one_compiled_graph(edges):
    case = BY_NAME["llama"]
    model = trained(case.build(), edges=edges)
    want = tokens(model, case, do_sample=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = tf.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    settings._compile_all_devices = True  # else transformers compiles on accelerators only
    assert torch.equal(tokens(model, case, do_sample=False, cache_implementation="static", compile_config=settings), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
