"""Blocks with more in them than maps and an activation: norms, bounds, trained activations, dropouts that serve twice, 1x1 convolutions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLDenseMLP
from transformers.models.poolformer.modeling_poolformer import PoolFormerOutput
from transformers.models.step3p7.modeling_step3p7 import Step3p7MLP

import kanformer
from kanformer import KANFeedForward
from kanformer.errors import ConfigError, NoFeedForwardError
from kanformer.surgery.finding.structure import structural_specs

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS_OF = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FUNNEL = {"vocab_size": 100, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}
KOSMOS = {"vocab_size": 100, "embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}
MODELS = {
    "bitnet": tf.BitNetConfig(**SMALL, **IDS_OF, num_key_value_heads=2),
    "roberta-prelayernorm": tf.RobertaPreLayerNormConfig(**SMALL),
    "funnel": tf.FunnelConfig(**FUNNEL, activation_dropout=0.3, hidden_dropout=0.2),
    "apertus": tf.ApertusConfig(**SMALL, **IDS_OF, num_key_value_heads=2),
}


class Holder(nn.Module):
    """A model of one block."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


def config(**values):
    return type("Config", (), {"hidden_size": 8, "intermediate_size": 12, "mlp_bias": False, "hidden_act": "silu", "swiglu_limit": 7.0, **values})()


def bounded_blocks():
    torch.manual_seed(0)
    yield "clamped", DeepseekV4MLP(config())
    yield "clamped_after", Step3p7MLP(config(swiglu_limits_shared=[5.0], share_expert_dim=12), layer_idx=0)
    yield "clamped_plus_one", MiniMaxM3VLDenseMLP(config(dense_intermediate_size=12, swiglu_alpha=1.702))


BOUNDED = list(bounded_blocks())


@pytest.mark.parametrize(("name", "block"), BOUNDED, ids=[name for name, _ in BOUNDED])
def test_bounds_on_the_factors_are_kept(name, block):
    """At the size of tokens after initialisation no bound is reached: only large inputs tell."""
    model, x = Holder(block).eval(), 40 * torch.randn(5, 8)
    before = model(x)
    kanformer.patch_model(model)
    assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max()
    gate = model.mlp.kan_gate(x)
    assert gate.max() > 7 and (model.mlp.kan_functions(gate).max() <= 7.01)  # the bound was reached
    specs = structural_specs("mlp", kanformer.unpatch_model(model).mlp)
    assert [spec.product for spec in specs] == [name]
    on_meta = structural_specs("mlp", copy.deepcopy(block).to("meta"))
    assert [spec.product for spec in on_meta] == [name]


class Hidden(nn.Module):
    """A block with a bound that nobody knows of."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU()

    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-30, 30))


def test_a_bound_that_nobody_describes_is_refused():
    with pytest.raises(NoFeedForwardError, match="does more than down"):
        kanformer.patch_model(Holder(Hidden()))


def built(name):
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS[name])
    model = tf.FunnelModel(config).eval() if name == "funnel" else tf.AutoModel.from_config(config).eval()
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # else a norm is hard to tell from none
    return model


@pytest.mark.parametrize("edges", ["shared", "full", "mlp"])
@pytest.mark.parametrize("name", ["bitnet", "roberta-prelayernorm", "funnel", "apertus"])
def test_norms_and_trained_activations_come_along(name, edges, tmp_path):
    model = built(name)
    before = model(input_ids=IDS)[0]
    kanformer.patch_model(model, edges=edges)
    blocks = [module for module in model.modules() if isinstance(module, KANFeedForward)]
    assert (model(input_ids=IDS)[0] - before).abs().max() <= 1e-6 * before.abs().max() and len(blocks) == (4 if name == "funnel" else 2)
    for block in blocks:
        for parameter in block.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    changed = model(input_ids=IDS)[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(tf.AutoModel.from_pretrained(tmp_path).eval()(input_ids=IDS)[0], changed) and not torch.equal(changed, before)
    report = kanformer.compare(model)
    assert report.to_dict()["model"]["parameters_before"] == sum(parameter.numel() for parameter in built(name).parameters())
    assert torch.equal(kanformer.unpatch_model(model)(input_ids=IDS)[0], before)


@pytest.mark.parametrize("edges", ["shared", "full"])
@pytest.mark.parametrize("name", ["bitnet", "apertus"])
def test_their_gradients_are_those_of_the_mlp(name, edges):
    old = built(name).double()
    new = kanformer.patch_model(copy.deepcopy(old), edges=edges)
    for model in (old, new):
        model(input_ids=IDS)[0].square().sum().backward()
    block, mlp = new.layers[0].mlp, old.layers[0].mlp
    if name == "bitnet":
        pairs = [(block.hidden_norm.weight, mlp.ffn_sub_norm.weight)]
    else:
        base = block.kan_functions.base if edges == "shared" else block.kan_down.base
        pairs = [(base.alpha_p, mlp.act_fn.alpha_p), (base.alpha_n, mlp.act_fn.alpha_n)]
    for left, right in [*pairs, (new.embed_tokens.weight, old.embed_tokens.weight)]:
        assert right.grad.any() and torch.allclose(left.grad, right.grad, rtol=1e-8, atol=1e-12)


def test_a_norm_over_the_hidden_channels_keeps_the_width():
    model = built("bitnet")
    for settings in ({"init": "random", "width": 24}, {"init": "prune", "param_ratio": 0.5}):
        with pytest.raises(ConfigError, match="norm between its maps"):
            kanformer.patch_model(model, **settings, calibration={"input_ids": IDS})
    assert not any(isinstance(module, KANFeedForward) for module in model.modules())


class Serving(nn.Module):
    """One probability, read between the maps and after them (RF-DETR)."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act, self.dropout = nn.Linear(64, 256), nn.Linear(256, 64), nn.ReLU(), 0.5

    def forward(self, x):
        h = self.act(self.fc1(x))
        h = nn.functional.dropout(h, p=self.dropout, training=self.training)
        h = self.fc2(h)
        h = nn.functional.dropout(h, p=self.dropout, training=self.training)
        return x + h


class Once(nn.Module):
    """A dropout module between the maps."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act, self.drop = nn.Linear(64, 256), nn.Linear(256, 64), nn.ReLU(), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.fc2(self.drop(self.act(self.fc1(x))))


class Twice(Once):
    """One dropout module, between the maps and after them (XLNet)."""

    def forward(self, x):
        h = self.drop(self.act(self.fc1(x)))
        return x + self.drop(self.fc2(h))


@pytest.mark.parametrize("block", [Serving, Once, Twice])
def test_dropouts_act_where_they_did(block):
    """With the same seed the same numbers fall out, so the outputs are equal in training too."""
    torch.manual_seed(0)
    model, x = Holder(block()), torch.randn(9, 64)
    wanted = []
    for _ in range(2):
        torch.manual_seed(1)
        wanted.append(model(x))
        if not any(isinstance(module, KANFeedForward) for module in model.modules()):
            kanformer.patch_model(model)
    assert torch.allclose(*wanted, rtol=1e-5, atol=1e-6) and not torch.allclose(wanted[0], model.eval()(x), rtol=0.1)


def test_a_probability_that_attention_reads_too_is_left_alone():
    class Shared(Serving):
        def forward(self, x):
            x = nn.functional.dropout(self.attend(x), p=self.dropout, training=self.training)
            h = nn.functional.dropout(self.act(self.fc1(x)), p=self.dropout, training=self.training)
            return x + self.fc2(h)

        def __init__(self):
            super().__init__()
            self.attend = nn.Linear(64, 64)

    assert structural_specs("0", Shared()) == []


def test_a_block_of_pointwise_convolutions(tmp_path):
    block = PoolFormerOutput(type("Config", (), {"hidden_act": "gelu"})(), 0.0, 6, 10)
    model, x = Holder(block).eval().double(), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    before = model(x)
    batch = [{"x": x}]
    kanformer.patch_model(model, calibration=batch)
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-14)
    seen = model.mlp.conv1.kan_up(x.movedim(1, -1))
    bounds = torch.stack(model.mlp.conv1.kan_functions.grid_bounds)
    inside = (seen >= bounds[0]) & (seen <= bounds[1])
    assert inside.float().mean() > 0.95 and math.isfinite(float(bounds.sum()))
    stats = kanformer.collect(model, batch)
    assert next(iter(stats.values())).tokens == 2 * 5 * 4


class Functional(nn.Module):
    """A block that calls its activation as a function, as a module of its own and gated."""

    def __init__(self, function, gated):
        super().__init__()
        self.up_proj, self.down_proj, self.function = nn.Linear(16, 24), nn.Linear(24, 16), function
        self.gate_proj = nn.Linear(16, 24) if gated else None

    def forward(self, x):
        h = self.function(self.up_proj(x) if self.gate_proj is None else self.gate_proj(x))
        return self.down_proj(h if self.gate_proj is None else h * self.up_proj(x))


FUNCTIONS = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: nn.functional.relu(x) ** 2,
    "mish": nn.functional.mish,
    "silu": nn.functional.silu,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_told_from_its_likes(name, dtype):
    torch.manual_seed(0)
    for block in (Functional(FUNCTIONS[name], False), Functional(FUNCTIONS[name], True)):
        nn.init.normal_(block.up_proj.weight, std=0.02)  # as small as after initialisation
        (spec,) = structural_specs("0", block.to(dtype))
        assert spec.activation == f"={name}", (spec.activation, block.gate_proj is not None)


def test_a_function_that_has_no_name_is_no_block():
    assert structural_specs("0", Functional(torch.sin, False)) == []


class Configured(nn.Module):
    """A block that asks its config which activation to call."""

    def __init__(self, config):
        super().__init__()
        self.up_proj, self.down_proj, self.config = nn.Linear(16, 24), nn.Linear(24, 16), config

    def forward(self, x):
        return self.down_proj(FUNCTIONS[self.config["act"]](self.up_proj(x)))


def test_what_is_known_of_one_model_is_not_believed_of_the_next():
    x = torch.randn(3, 16)
    for name in ("gelu", "mish", "quick_gelu"):
        model = Holder(Configured({"act": name}))
        before = model(x)
        assert torch.allclose(kanformer.patch_model(model)(x), before, rtol=1e-5, atol=1e-7)
