"""Blocks that nobody described are found by running the model; what is proposed computes the same, and the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import kanformer
from kanformer import FFNSpec, KANFeedForward
from kanformer.errors import DataError, NoFeedForwardError, SurgeryError
from kanformer.surgery.finding.discover import find_sites
from kanformer.surgery.tracing.trial import Trial

BATCH = {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}


class Parts(nn.Module):
    """Maps under names that nobody else uses."""

    def __init__(self, halves=1):
        super().__init__()
        self.widen, self.narrow, self.fall, self.bend = nn.Linear(8, 12 * halves), nn.Linear(12, 8), nn.Dropout(0.3), nn.SiLU()


def through(x, *steps):
    """One after the other, in a way that the source does not show."""
    for step in steps:
        x = step(x)
    return x


class Module(Parts):
    def forward(self, x):
        return through(x, self.widen, self.bend, self.narrow, self.fall)


class Functional(Parts):
    def forward(self, x):
        return self.narrow(F.dropout(F.gelu(self.widen(x), approximate="tanh"), p=self.rate, training=self.training))

    def __init__(self):
        super().__init__()
        self.rate, self.other = 0.2, 0.4


class FunctionAsAttribute(Parts):
    def __init__(self):
        super().__init__()
        self.curve = lambda x: F.relu(x).square()

    def forward(self, x):
        return through(x, self.widen, self.curve, self.narrow)


class Transposed(Parts):
    def forward(self, x):
        return self.bend(x @ self.widen.weight.T + self.widen.bias) @ self.narrow.weight.t() + self.narrow.bias


class Gated(Parts):
    def __init__(self):
        super().__init__()
        self.valve = nn.Linear(8, 12, bias=False)

    def forward(self, x):
        return self.narrow(self.fall(self.widen(x) * self.bend(self.valve(x))))


class Bilinear(Gated):
    def forward(self, x):
        return self.narrow(self.widen(x) * self.valve(x))


class GateFirst(Parts):
    def __init__(self):
        super().__init__(halves=2)

    def forward(self, x):
        gate, up = self.widen(x).chunk(2, -1)
        return self.narrow(F.relu(gate) * up)


class UpFirst(GateFirst):
    def forward(self, x):
        return self.narrow(F.glu(self.widen(x)))


class Interleaved(GateFirst):
    def forward(self, x):
        h = self.widen(x)
        return self.narrow(self.bend(h[..., ::2]) * h[..., 1::2])


class AddsItself(Parts):
    def forward(self, x, stream):
        return stream + through(x, self.widen, self.bend, self.narrow, self.fall)


class Normed(Parts):
    def __init__(self):
        super().__init__()
        self.before, self.inside = nn.LayerNorm(8), nn.LayerNorm(12)

    def forward(self, x):
        return through(x, self.before, self.widen, self.bend, self.inside, self.narrow)


class Layer(nn.Module):
    """A layer with attention (of a kind), a norm and whatever block."""

    def __init__(self, block=None):
        super().__init__()
        self.look, self.even, self.block = nn.Linear(8, 8), nn.LayerNorm(8), block

    def attend(self, x):
        return x + (x @ x.mT).softmax(-1) @ self.look(x)

    def forward(self, x):
        x = self.attend(x)
        y = self.even(x)
        return self.block(y, x) if isinstance(self.block, AddsItself) else x + self.block(y)


class Inline(Layer):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Dropout(0.3), nn.Linear(12, 8))
        self.rate = 0.1

    def forward(self, x):
        x = self.attend(x)
        return x + F.dropout(self.net(self.even(x)), p=self.rate, training=self.training)


class InlineParts(Layer):
    def __init__(self):
        super().__init__()
        self.widen, self.narrow, self.curve, self.rate = nn.Linear(8, 12), nn.Linear(12, 8), F.relu, 0.3

    def forward(self, x):
        x = self.attend(x)
        return x + self.narrow(F.dropout(self.curve(self.widen(self.even(x))), self.rate, self.training))


class FirstHalf(Parts):
    def forward(self, x):
        return F.gelu(self.widen(x))


class SecondHalf(Parts):
    def forward(self, x, stream):
        return stream + self.fall(self.narrow(x))


class Split(Layer):
    def __init__(self):
        super().__init__()
        self.one, self.two = FirstHalf(), SecondHalf()

    def forward(self, x):
        x = self.attend(x)
        return self.two(self.one(self.even(x)), x)


class Model(nn.Module):
    def __init__(self, *layers, end=None):
        super().__init__()
        self.begin, self.layers, self.end = nn.Linear(8, 8), nn.ModuleList(layers), end or nn.Identity()

    def forward(self, x):
        x = self.begin(x)
        for layer in self.layers:
            x = layer(x)
        return self.end(x)


MAPS = {"up": "widen", "down": "narrow"}
PROPOSED = {  # by the layer: what its spec must say
    "module": (lambda: Layer(Module()), {**MAPS, "owner": "Module", "activation": "bend", "output_dropout": "fall"}),
    "functional": (lambda: Layer(Functional()), {**MAPS, "owner": "Functional", "activation": "=gelu_tanh", "hidden_dropout": "rate"}),
    "function as attribute": (lambda: Layer(FunctionAsAttribute()), {**MAPS, "activation": "curve"}),
    "weight.T": (lambda: Layer(Transposed()), {**MAPS, "owner": "Transposed", "activation": "bend"}),
    "gated": (lambda: Layer(Gated()), {**MAPS, "gate": "valve", "activation": "bend", "hidden_dropout": "fall", "fused": None}),
    "bilinear": (lambda: Layer(Bilinear()), {"activation": "=identity", "down": "narrow"}),
    "gate first": (lambda: Layer(GateFirst()), {**MAPS, "activation": "=relu", "fused": "gate_first", "gate": None}),
    "up first": (lambda: Layer(UpFirst()), {**MAPS, "activation": "=sigmoid", "fused": "up_first"}),
    "interleaved": (lambda: Layer(Interleaved()), {**MAPS, "activation": "bend", "fused": "interleaved"}),
    "residual": (lambda: Layer(AddsItself()), {**MAPS, "residual": "yes", "output_dropout": "fall"}),
    "norms": (lambda: Layer(Normed()), {**MAPS, "input_norm": "before", "hidden_norm": "inside", "activation": "bend"}),
    "inline sequence": (Inline, {"up": "net.0", "activation": "net.1", "down": "net.3", "slot": "net.0", "hidden_dropout": "net.2", "output_dropout": None}),
    "inline parts": (InlineParts, {**MAPS, "slot": "widen", "activation": "curve", "hidden_dropout": "rate", "identities": ("curve", "narrow")}),
    "split": (Split, {"up": "one.widen", "down": "two.narrow", "slot": "one", "activation": "=gelu", "identities": ("two.narrow",)}),
}


def snapshot(model):
    """Everything that discovering could leave behind."""
    modules = [(path, module, module.training, {k: v for k, v in vars(module).items() if not k.startswith("_")}) for path, module in model.named_modules()]
    hooks = [{k: dict(v) for k, v in vars(module).items() if k.endswith("_hooks") or "hooks_with" in k} for module in model.modules() if vars(module)]
    marks = [set(vars(module)) for module in model.modules()]
    numbers = {name: (tensor, tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    return modules, str(hooks), marks, numbers, str(getattr(model, "config", None)), torch.get_rng_state()


def assert_untouched(model, before):
    after = snapshot(model)
    assert [(path, id(module), flag) for path, module, flag, _ in after[0]] == [(path, id(module), flag) for path, module, flag, _ in before[0]]
    for (*_, new), (*_, old) in zip(after[0], before[0], strict=True):
        assert new.keys() == old.keys() and all(new[name] is old[name] for name in new)
    assert after[1] == before[1] and after[2] == before[2] and after[4] == before[4] and torch.equal(after[5], before[5])
    for name, (tensor, numbers, version) in before[3].items():
        now = after[3][name]
        assert now[0] is tensor and torch.equal(now[1], numbers) and now[2] == version, name


def kan_blocks(model):
    return [module for module in model.modules() if isinstance(module, KANFeedForward)]


@pytest.mark.parametrize("name", PROPOSED)
def test_a_block_of_each_structure_is_described_and_patched_by_what_is_pasted(name):
    build, wanted = PROPOSED[name]
    model = Model(build(), build()).train()
    state = snapshot(model)
    discovery = kanformer.discover(model, BATCH)
    assert_untouched(model, state)
    assert len(discovery.specs) == 1 and discovery.difference <= 1e-6, str(discovery)
    spec = discovery.specs[0]
    assert {key: getattr(spec, key) for key in wanted} == wanted
    model.eval()
    before = model(**BATCH)
    exec(str(discovery).split("\n\n")[1], {"kanformer": kanformer, "model": model})
    assert len(kan_blocks(model)) == 2 and (model(**BATCH) - before).abs().max() <= 1e-6 * before.abs().max()
    assert torch.equal(kanformer.unpatch_model(model)(**BATCH), before)


@pytest.mark.parametrize("name", [name for name in PROPOSED if name not in ("interleaved", "gate first", "up first")])
def test_dropouts_fall_where_they_fell(name):
    """With the same seed the same numbers fall out, so the outputs are equal in training too."""
    model = Model(PROPOSED[name][0]()).train()
    torch.manual_seed(1)
    before = model(**BATCH)
    kanformer.patch_model(model, specs=kanformer.discover(model, BATCH).specs)
    torch.manual_seed(1)
    assert torch.allclose(model(**BATCH), before, rtol=1e-5, atol=1e-6)


class Stuck(Layer):
    """Its activation is in the layer's forward, where nothing can be taken out."""

    def __init__(self):
        super().__init__()
        self.widen, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.narrow(F.relu(self.widen(self.even(x))))


class Bounded(Layer):
    """An inline block with a bound that the data does not reach."""

    def __init__(self):
        super().__init__()
        self.widen, self.narrow, self.bend = nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU()

    def forward(self, x):
        return x + self.narrow(self.bend(self.widen(self.even(x))).clamp(max=50.0))


class Twice(Parts):
    """Its bend serves the stream too: as an identity it would be missing there."""

    def __init__(self):
        super().__init__()
        self.even = nn.LayerNorm(8)

    def forward(self, x):
        x = self.bend(x)
        return x + through(self.even(x), self.widen, self.bend, self.narrow)


class OwnWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.slim = nn.Parameter(torch.randn(12, 8) / 3), nn.Parameter(torch.randn(8, 12) / 3)

    def forward(self, x):
        return F.gelu(x @ self.wide.T) @ self.slim.t()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Stuck, "Stuck itself computes relu between widen and narrow"),
        (Bounded, "more than its activation: clamp"),
        (Twice, "outputs change by"),
        (lambda: Layer(OwnWeights()), "wide is a parameter of OwnWeights itself"),
    ],
)
def test_a_block_that_cannot_be_replaced_is_named_with_the_reason(build, reason):
    model = Model(build(), Layer(Module())).eval()
    state = snapshot(model)
    discovery = kanformer.discover(model, BATCH)
    assert_untouched(model, state)
    refused = [finding for finding in discovery.findings if finding.verdict == "refused"]
    assert len(refused) == 1 and reason in refused[0].reason and reason in str(discovery)
    assert [spec.owner for spec in discovery.specs] == ["Module"]
    before = model(**BATCH)
    assert torch.equal(kanformer.patch_model(model, specs=discovery.specs, exclude_modules=discovery.exclude or None)(**BATCH), before)


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.less, self.more = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x):
        return x * torch.sigmoid(self.more(F.relu(self.less(x.mean(1, keepdim=True)))))


class RawGate(Squeeze):
    def forward(self, x):
        return x * self.more(F.relu(self.less(x)))


class Pooler(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.project = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.project(torch.tanh(self.dense(x[:, 0])))


class Head(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


class Boxes(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class Router(Squeeze):
    def forward(self, x):
        return x + self.more(F.relu(self.less(x))).softmax(-1).amax(-1, keepdim=True)


@pytest.mark.parametrize(
    ("layers", "end", "reason"),
    [
        ([Squeeze()], None, "its output goes through sigmoid"),
        ([RawGate()], None, "other values are multiplied by its output"),
        ([Router()], None, "its output goes through softmax"),
        ([], Pooler(), "a pooler or a head"),
        ([], Head(), "a head: its output is the model's"),
        ([], Boxes(), "its output goes through relu"),
    ],
)
def test_what_only_looks_like_a_block_is_left_alone(layers, end, reason):
    discovery = kanformer.discover(Model(*layers, end=end), BATCH)
    assert {finding.verdict for finding in discovery.findings} == {"left"} and not discovery.specs and discovery.difference is None
    assert reason in str(discovery) and "patch_model" not in str(discovery)


def test_attention_and_norms_are_no_blocks():
    class Attention(Layer):
        def forward(self, x):
            return self.attend(self.attend(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    discovery = kanformer.discover(Model(Attention(), Attention()), BATCH)
    assert discovery.findings == () and "0 feed-forward blocks" in str(discovery)


class OddMLP(LlamaMLP):
    """A LlamaMLP whose maps have other names."""

    def __init__(self, config):
        super().__init__(config)
        self.valve, self.widen, self.narrow = self.gate_proj, self.up_proj, self.down_proj
        del self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x):
        return self.narrow(self.act_fn(self.valve(x)) * self.widen(x))


class OddLlama(tf.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers[1:]:
            layer.mlp = OddMLP(config)


@pytest.fixture
def llama():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    return OddLlama(tf.LlamaConfig(**sizes)).eval(), {"input_ids": torch.randint(0, 50, (2, 6))}


def test_a_model_of_known_and_unknown_blocks_is_patched_saved_and_loaded(llama, tmp_path):
    model, batch = llama
    state, before = snapshot(model), model(**batch).logits
    discovery = kanformer.discover(model, batch)
    assert_untouched(model, state)
    assert [(finding.verdict, finding.paths) for finding in discovery.findings] == [
        ("known", ("model.layers.0.mlp",)),
        ("proposed", ("model.layers.1.mlp", "model.layers.2.mlp")),
    ]
    assert discovery.specs == (FFNSpec(name="odd-mlp", owner="OddMLP", gate="valve", up="widen", activation="act_fn", down="narrow"),)
    assert "model.layers.{1,2}.mlp (2 x OddMLP)" in str(discovery) and "not at all" in str(discovery) and discovery.difference == 0
    kanformer.patch_model(model, specs=discovery.specs)
    assert len(kan_blocks(model)) == 3 and torch.equal(model(**batch).logits, before)
    for block in kan_blocks(model):
        for parameter in block.spline_parameters():
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = OddLlama.from_pretrained(tmp_path).eval()
    assert len(kan_blocks(again)) == 3 and torch.equal(again(**batch).logits, model(**batch).logits)


def test_given_specs_come_first_and_the_known_ones_go_on(llama):
    model, batch = llama
    mine = FFNSpec(name="mine", owner="LlamaMLP", gate="up_proj", up="gate_proj", activation="act_fn", down="down_proj")  # the wrong way round
    odd = kanformer.discover(model, batch).specs[0]
    assert [site.spec.name for site in find_sites(model, [odd])] == ["llama", "odd-mlp", "odd-mlp"]
    assert [site.spec.name for site in find_sites(model, [mine])] == ["mine"]  # what a given spec describes is its own, known or not
    plan = kanformer.plan_surgery(model, specs=[odd], where=lambda block: block.family == "odd-mlp")
    assert [block.path for block in plan.blocks] == ["model.layers.1.mlp", "model.layers.2.mlp"] and plan.left == ("model.layers.0.mlp",)
    with pytest.raises(NoFeedForwardError, match="no module for 'mine' .owner OdMLP.*OddMLP"):
        kanformer.patch_model(model, specs=[odd, FFNSpec(name="mine", owner="OdMLP", up="a", activation="b", down="c")])
    assert not kan_blocks(model)


def test_two_blocks_of_one_layer_are_two_specs():
    class Macaron(Layer):
        def __init__(self):
            super().__init__()
            self.grow, self.shrink, self.widen, self.narrow, self.bow, self.bend = *(nn.Linear(*pair) for pair in ((8, 12), (12, 8)) * 2), nn.GELU(), nn.SiLU()

        def forward(self, x):
            x = self.attend(x + 0.5 * through(x, self.grow, self.bow, self.shrink))
            return x + 0.5 * through(x, self.widen, self.bend, self.narrow)

    model = Model(Macaron(), Macaron())
    discovery = kanformer.discover(model, BATCH)
    assert [(spec.up, spec.down) for spec in discovery.specs] == [("grow", "shrink"), ("widen", "narrow")] and len({spec.name for spec in discovery.specs}) == 2
    before = model(**BATCH)
    assert torch.equal(kanformer.patch_model(model, specs=discovery.specs)(**BATCH), before) and len(kan_blocks(model)) == 4


def test_a_model_that_is_known_needs_nothing():
    model = tf.BertModel(tf.BertConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)).eval()
    discovery = kanformer.discover(model, {"input_ids": torch.randint(0, 50, (2, 6))})
    assert [(finding.verdict, finding.owner) for finding in discovery.findings] == [("known", "BertLayer")] and discovery.specs == ()
    assert "2 of them known" in str(discovery) and str(discovery).endswith("kanformer.patch_model(model)")


def test_a_model_that_cannot_be_run_is_refused_and_left_as_it_was():
    model = Model(Layer(Module())).train()
    state = snapshot(model)
    with pytest.raises(DataError, match="does not take"):
        kanformer.discover(model, {"y": BATCH["x"]})
    assert_untouched(model, state)
    with pytest.raises(SurgeryError, match="meta device"):
        kanformer.discover(copy.deepcopy(model).to("meta"), BATCH)
    kanformer.patch_model(model, specs=kanformer.discover(model, BATCH).specs)
    with pytest.raises(SurgeryError, match="patched already"):
        kanformer.discover(model, BATCH)


def test_a_trial_sees_what_a_wrong_spec_does_and_takes_it_back():
    model = Model(Layer(Module()), Twice()).eval()
    state = snapshot(model)
    parts = {"up": "widen", "activation": "bend", "down": "narrow", "slot": "widen", "identities": ("bend", "narrow")}
    reason = Trial(model, BATCH).problem([FFNSpec(name="twice", owner="Twice", **parts)], {"layers.1.widen"})
    assert reason is not None and "outputs change" in reason
    assert_untouched(model, state)


def test_the_error_for_an_unknown_model_names_the_way():
    with pytest.raises(NoFeedForwardError, match=r"kanformer\.discover\(model, batch\)"):
        kanformer.patch_model(Model(Layer(Functional())))


class Leaky(Layer):
    """An inline block whose activation has a number of its own, so it takes its own dtype only."""

    def __init__(self):
        super().__init__()
        self.widen, self.narrow, self.bend = nn.Linear(8, 12), nn.Linear(12, 8), nn.PReLU()

    def forward(self, x):
        return x + through(self.even(x), self.widen, self.bend, self.narrow)


def test_other_dtypes():
    model, batch = Model(Leaky(), Layer(Gated())).double().eval(), {"x": BATCH["x"].double()}
    discovery = kanformer.discover(model, batch)
    assert [(spec.owner, spec.activation) for spec in discovery.specs] == [("Leaky", "bend"), ("Gated", "bend")] and discovery.difference <= 1e-12


def test_where_nothing_is_proposed_the_model_runs_once():
    model, runs = Model(Squeeze()), []
    model.register_forward_hook(lambda *_: runs.append(1))
    kanformer.discover(model, BATCH)
    assert runs == [1]
