"""Snapped models compute their formulas, stay within the budget, save, load and train; what was there can come back."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import kanformer
from kanformer.errors import CheckpointError, ConfigError, DataError, SurgeryError
from kanformer.interpret import collect
from kanformer.interpret.curves import pick
from kanformer.interpret.symbolic import fit_symbolic, register_function, snap, unregister_function, unsnap
from kanformer.layers import EdgeFunctions, KANLinear
from kanformer.layers.formulas import Formulas, make_formulas
from model_cases import BY_NAME, blocks, disturb, same_state, snapshot
from test_interpret import Toy, make_batches, make_block

_KINDS = {"shared": {}, "groups": {"groups": 12}, "full": {"edges": "full", "grid_size": 3}}


def batches_of(count: int = 3, labels: bool = False) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    found = [{"input_ids": torch.randint(3, 99, (4, 16), generator=generator), "attention_mask": torch.ones(4, 16, dtype=torch.long)} for _ in range(count)]
    return [{**batch, "labels": batch["input_ids"]} for batch in found] if labels else found


def fitted(name: str = "llama", dtype=torch.float32, top: int | None = 40, **settings):
    case = BY_NAME[name]
    model = disturb(kanformer.patch_model(case.build(dtype), **settings))
    data = [case.inputs(dtype)] if name == "vit" else batches_of()
    return case, model, fit_symbolic(model, collect(model, data), edges=top, tol_node=0.5, r2_min=0.5)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("part", [1.0, 0.4])
def test_layers_compute_their_formulas(kind, part):
    block = make_block(8, 12, **_KINDS[kind] if kind != "groups" else {"groups": 6})
    model, batches = Toy([block]), make_batches()
    model.embed = nn.Embedding(50, 8)
    fits = fit_symbolic(model, collect(model, batches), tol_node=9.0, r2_min=0.0)
    if part < 1:
        for one in fits.all_maps():
            one.outcome[torch.arange(len(one)) % 5 >= 2] = 4  # unsnappable
    done = snap(model, fits)
    for one in fits.all_maps():
        old, new = (getattr(each.layers[0], one.map) for each in (model, done.model))
        x = torch.randn(7, 3, new.grid_channels)
        wanted = old(x).double().detach().clone()
        accepted = one.accepted.nonzero().flatten().tolist()
        for place in accepted:
            i, o = int(one.input[place]), int(one.output[place])
            formula = one.formula(place)
            channels = [i] if isinstance(new, KANLinear) else range(i * (new.channels // new.groups), (i + 1) * (new.channels // new.groups))
            for channel in channels:
                value = _value(formula, new, x[..., channel].double())
                if isinstance(new, KANLinear):
                    curve = pick(old, torch.tensor([i]), torch.tensor([o])).learned(x[..., channel].reshape(-1, 1)).view(7, 3)
                    wanted[..., o] += value - curve
                else:
                    wanted[..., channel] = value
        assert torch.allclose(new(x).double(), wanted, atol=2e-4 * float(wanted.abs().max()) + 1e-5)
        assert len(new.kan_formulas) == len(accepted) == done.counts["layers.0"][one.map]
        shown = pick(new, one.input[accepted[:1]], one.output[accepted[:1]])
        points = torch.linspace(-1, 1, 9).unsqueeze(1)
        assert torch.allclose(shown.learned(points)[:, 0].double(), _value(one.formula(accepted[0]), new, points[:, 0].double()), atol=1e-4)
    assert all(module.kan_formulas is None for module in model.modules() if isinstance(module, EdgeFunctions | KANLinear))


def _value(formula, module, x):
    y = formula.e * x + formula.d
    if formula.family in ("base", "base_x"):
        return y + formula.c * module.base(x.float()).double()
    return formula.values(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", _KINDS)
def test_snapped_models_come_back_bit_for_bit(kind, trainable, dtype, tmp_path):
    case, model, fits = fitted("llama" if kind == "groups" else "bert", dtype, **_KINDS[kind])
    done = snap(model, fits, trainable=trainable)
    assert done.formulas > 0 and not torch.equal(case.logits(done.model, dtype), case.logits(model, dtype))
    done.model.save_pretrained(tmp_path)
    loaded, info = getattr(tf, case.auto_class).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and same_state(snapshot(loaded), snapshot(done.model))
    assert torch.equal(case.logits(loaded.eval(), dtype), case.logits(done.model, dtype))
    for block in blocks(loaded).values():
        for _, module in block.spline_modules():
            held = module.kan_formulas
            assert held is not None and held.kan_numbers.dtype == torch.float32 and isinstance(held.kan_numbers, nn.Parameter) == trainable
    back = unsnap(loaded)
    assert torch.equal(case.logits(back, dtype), case.logits(model, dtype)) and not any(isinstance(module, Formulas) for module in back.modules())
    back.save_pretrained(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]["version"] == 2


def test_a_fresh_process_loads_the_same_bits(tmp_path):
    case, model, fits = fitted("gpt2")
    done = snap(model, fits).model
    done.save_pretrained(tmp_path)
    torch.save({"inputs": case.inputs(), "logits": case.logits(done)}, tmp_path / "wanted.pt")
    code = (
        "import sys, torch, kanformer, transformers as tf; torch.set_num_threads(1); folder = sys.argv[1];"
        "wanted = torch.load(folder + '/wanted.pt', weights_only=True);"
        f"model = tf.{case.auto_class}.from_pretrained(folder).eval(); found = model(**wanted['inputs'])[0];"
        "print(torch.equal(found, wanted['logits']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"], done.stderr


def test_mixtures_of_experts_and_deltas(tmp_path):
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=2,
        pad_token_id=None,
    )
    base = tf.AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "base")
    model = disturb(kanformer.patch_model(copy.deepcopy(base)))
    fits = fit_symbolic(model, collect(model, batches_of()), edges=5, tol_node=0.5, r2_min=0.5)
    done = snap(model, fits).model
    inputs = batches_of(1)[0]
    done.save_pretrained(tmp_path / "whole")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert len(fits) == 2 and torch.equal(loaded(**inputs).logits, done(**inputs).logits)
    kanformer.save_delta(done, tmp_path / "delta", base_model=str(tmp_path / "base"))
    again = kanformer.load_delta(tmp_path / "delta", base_model=str(tmp_path / "base"))
    assert torch.equal(again(**inputs).logits, done(**inputs).logits)


def test_the_budget_is_kept_and_reverts_are_counted():
    _, model, fits = fitted("gpt2", top=None)
    batches = batches_of(labels=True)
    before = copy.deepcopy(snapshot(model))
    free = snap(model, fits, batches=batches)
    rise = free.losses[-1]["loss"] - free.losses[0]["loss"]
    assert free.loss_name == "the model's own loss" and free.reverted == 0 and abs(rise) > 0
    far = snap(model, fits, batches=batches, loss=_change_from(model, batches), loss_budget=None)
    kept = snap(model, fits, batches=batches, loss=_change_from(model, batches), loss_budget=far.loss / 4)
    assert 0 < kept.reverted < len(fits["transformer.h.0.mlp"]["kan_functions"]) * 2 and kept.formulas + kept.reverted == far.formulas
    assert kept.loss is not None and kept.loss <= kept.losses[0]["loss"] + far.loss / 4
    assert sum(len(module.kan_formulas or ()) for module in kept.model.modules() if isinstance(module, EdgeFunctions)) == kept.formulas
    nothing = snap(model, fits, batches=batches, loss=_change_from(model, batches), loss_budget=0.0)
    assert nothing.loss == 0.0 and "reverted" in str(kept)
    assert same_state(snapshot(model), before)
    plain = snap(model, fits, batches=batches_of())
    assert plain.loss_name == "cross-entropy of the next token" and plain.losses[0]["loss"] != plain.loss
    assert plain.loss == pytest.approx(free.loss, rel=1e-5)  # with labels that are the inputs it is the same loss


def _change_from(model, batches):
    with torch.no_grad():
        wanted = {batch["input_ids"].sum().item(): model(**batch).logits for batch in batches}
    return lambda outputs, batch: (outputs.logits - wanted[batch["input_ids"].sum().item()]).square().mean()


def test_the_worst_predicted_effect_goes_first():
    _, model, fits = fitted("vit", top=None)
    batches = [BY_NAME["vit"].inputs()]
    whole = snap(model, fits, batches=batches)
    assert whole.loss_name == "movement of the logits" and whole.losses[0]["loss"] == 0 < whole.loss
    kept = snap(model, fits, batches=batches, loss_budget=whole.loss / 3)
    effects = [one.effect for one in fits.all_maps()]
    held = [module.kan_formulas.kan_index[:, 0] for module in kept.model.modules() if isinstance(module, EdgeFunctions) and module.kan_formulas is not None]
    stays = torch.cat([effect[index] for effect, index in zip(effects, held, strict=True)])
    goes = torch.cat([effect[~torch.isin(torch.arange(len(effect)), index)] for effect, index in zip(effects, held, strict=True)])
    assert stays.max() <= goes.min()
    factors = {one.path: {one.map: torch.zeros(one.n_functions) if place else torch.ones(one.n_functions)} for place, one in enumerate(fits.all_maps())}
    turned = snap(model, fits, batches=batches, loss_budget=whole.loss / 3, sensitivity=factors)
    assert turned.formulas + turned.reverted == whole.formulas and turned.loss <= whole.loss / 3


@pytest.mark.parametrize("kind", _KINDS)
def test_snapped_models_train(kind):
    _, model, fits = fitted("llama", **_KINDS[kind])
    done = snap(model, fits, trainable=True).model.train()
    numbers = [module.kan_numbers for module in done.modules() if isinstance(module, Formulas)]
    before = [value.detach().clone() for value in numbers]
    optimizer = kanformer.make_optimizer(done, learning_rate=1e-2, new_module_learning_rate=1e-2)
    groups = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(groups[id(value)] == 0 for value in numbers)
    batch, losses = batches_of(1, labels=True)[0], []
    for _ in range(5):
        loss = done(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(not torch.equal(old, new) for old, new in zip(before, numbers, strict=True))
    frozen = snap(model, fits).model
    assert not any("kan_numbers" in name for name, _ in frozen.named_parameters())


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_and_compilers(shared):
    torch.manual_seed(0)
    module = EdgeFunctions(6, 3, grid_size=3, dtype=torch.float64) if shared else KANLinear(3, 2, grid_size=3, dtype=torch.float64)
    index = torch.tensor([[2], [0]]) if shared else torch.tensor([[0, 1], [2, 0], [1, 1]])
    names = ("const", "x", "tanh", "base_x", "cubic")
    codes = torch.tensor([2, 3] if shared else [4, 2, 3])
    module.kan_formulas = make_formulas(index, torch.randn(len(index), 5), codes, names, trainable=True)
    x = torch.randn(4, module.grid_channels, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    with torch.no_grad():
        y = module(x)
    assert torch.allclose(torch.compile(module, backend="eager", fullgraph=True)(x), y)
    program = torch.export.export(module, (x.detach(),))
    assert torch.allclose(program.module()(x.detach()), y)
    with kanformer.without_functions(module):
        assert torch.allclose(module(x), module.base(x) if shared else nn.functional.linear(module.base(x), module.kan_base_weight, module.kan_bias))
    assert torch.equal(module(x), y)


def test_bad_input_leaves_the_model_as_it_was(tmp_path):
    _, model, fits = fitted("bert")
    before = copy.deepcopy(snapshot(model))
    for error, message, settings in (
        (ConfigError, "loss_budget=-1", {"loss_budget": -1}),
        (ConfigError, "no batches", {"loss_budget": 1.0}),
        (DataError, "no batches", {"loss_budget": 1.0, "batches": []}),
        (DataError, "nan", {"loss_budget": 1.0, "batches": batches_of(), "loss": lambda outputs, batch: torch.tensor(float("nan")), "inplace": True}),
        (DataError, r"does not take \['wrong'\]", {"batches": [{"wrong": torch.ones(1)}], "inplace": True}),
    ):
        with pytest.raises(error, match=message):
            snap(model, fits, **settings)
        assert same_state(snapshot(model), before)
    other = kanformer.patch_model(BY_NAME["gpt2"].build())
    with pytest.raises(DataError, match="fits of another model"):
        snap(other, fits)
    done = snap(model, fits, inplace=True)
    assert done.model is model
    with pytest.raises(SurgeryError, match="unsnap"):
        snap(model, fits)
    with pytest.raises(ConfigError, match="unsnap"):
        fit_symbolic(model, collect(model, batches_of()))
    unsnap(model, inplace=True)
    assert same_state(snapshot(model), before)
    with pytest.raises(SurgeryError, match="without formulas"):
        unsnap(model)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    _, model, fits = fitted("bert")
    snap(model, fits).model.save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, text = load_file(path), config.read_text()
    name = next(key for key in tensors if key.endswith("kan_index"))
    for wrong in (tensors[name] + 10**6, tensors[name] * 0, -1 - tensors[name]):
        save_file({**tensors, name: wrong}, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="index that names no function, or one twice"):
            tf.AutoModel.from_pretrained(tmp_path)
    numbers = name.replace("kan_index", "kan_numbers")
    save_file({**tensors, numbers: tensors[numbers] * float("nan")}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        tf.AutoModel.from_pretrained(tmp_path)
    save_file(tensors, path, metadata={"format": "pt"})
    for change, message in (
        (lambda entry: entry["families"].update(nonsense=1), "nonsense"),
        (lambda entry: entry["families"].update(tanh=10**9), "at most"),
        (lambda entry: entry["families"].update(tanh=-1), "families with counts"),
        (lambda entry: entry.update(more=1), "families with counts"),
    ):
        values = json.loads(text)
        change(next(iter(values["quantization_config"]["sites"][0]["snapped"].values())))
        config.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=message):
            tf.AutoModel.from_pretrained(tmp_path)


def test_functions_of_ones_own_must_be_registered_before_loading(tmp_path):
    register_function("soft_step", lambda z: z / (1 + z * z).sqrt(), mirrored=False)
    try:
        case = BY_NAME["bert"]
        model = disturb(kanformer.patch_model(case.build()))
        fits = fit_symbolic(model, collect(model, batches_of()), edges=3, library=["soft_step"], tol_node=9, r2_min=0)
        for one in fits.all_maps():
            one.family[:] = one.families.index("soft_step")
        done = snap(model, fits).model
        done.save_pretrained(tmp_path)
        loaded = getattr(tf, case.auto_class).from_pretrained(tmp_path).eval()
        assert torch.equal(case.logits(loaded), case.logits(done))
    finally:
        unregister_function("soft_step")
    with pytest.raises(CheckpointError, match=r"soft_step.*register_function"):
        getattr(tf, case.auto_class).from_pretrained(tmp_path)
