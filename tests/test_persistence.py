"""Saving and loading through stock transformers, in fresh processes, and what happens without kanformer or with damaged files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import kanformer
from kanformer.errors import CheckpointError, KanformerError
from kanformer.surgery.saving.loading import load_model
from layer_cases import BASES
from model_cases import BY_NAME, blocks, disturb, each_case, each_dtype, one_case_of_each, same_state, snapshot

_PLAIN = {"shared": {}, "full": {"edges": "full", "grid_size": 3}, "mlp": {"edges": "mlp"}}


def saved(case, folder: Path, dtype=torch.float32, shard: str = "50GB", **settings):
    model = disturb(kanformer.patch_model(case.build(dtype), **settings))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@each_dtype
@each_case
def test_a_saved_model_comes_back_bit_for_bit(case, dtype, tmp_path):
    model = saved(case, tmp_path, dtype, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = getattr(tf, case.auto_class).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same_state(snapshot(loaded), snapshot(model))
    assert torch.equal(case.logits(loaded.eval(), dtype), case.logits(model, dtype))
    assert {block.kan_functions.kan_grid.dtype for block in blocks(loaded).values()} == {torch.float32}
    # An ordinary model again: no quantizer left behind, a second round trip, stock casts.
    assert getattr(loaded, "hf_quantizer", None) is None and not getattr(loaded, "is_quantized", False)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert same_state(snapshot(getattr(tf, case.auto_class).from_pretrained(again)), snapshot(model))
    loaded.half()


@pytest.mark.parametrize("settings", _PLAIN.values(), ids=_PLAIN)
def test_every_kind_of_edge_and_a_pruned_width_come_back(settings, tmp_path):
    case = BY_NAME["llama"]
    batches = [{"input_ids": torch.randint(3, 99, (4, 12))} for _ in range(3)]
    model = disturb(kanformer.patch_model(case.build(), init="prune", param_ratio=0.6, calibration=batches, **settings))
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert next(iter(blocks(loaded).values())).hidden_features < 48
    assert torch.equal(case.logits(loaded.eval()), case.logits(model))


@each_dtype
@pytest.mark.parametrize("edges", ["shared", "full"])
@pytest.mark.parametrize("basis", BASES.values(), ids=BASES)
def test_every_basis_starts_exact_and_comes_back_bit_for_bit(basis, edges, dtype, tmp_path):
    case = BY_NAME["bert"]
    before = case.logits(case.build(dtype), dtype)
    model = kanformer.patch_model(case.build(dtype), edges=edges, grid_size=3, **basis)
    assert torch.equal(case.logits(model, dtype), before)
    disturb(model).save_pretrained(tmp_path)
    loaded = getattr(tf, case.auto_class).from_pretrained(tmp_path)
    assert same_state(snapshot(loaded), snapshot(model)) and not torch.equal(case.logits(model, dtype), before)
    assert torch.equal(case.logits(loaded.eval(), dtype), case.logits(model, dtype))


_FRESH = """
import sys, torch, transformers
import kanformer
from safetensors.torch import load_file
torch.set_num_threads(1)
for folder, reference, auto_class in zip(*[iter(sys.argv[1:])] * 3):
    expected = load_file(reference)
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    state = model.state_dict()
    inputs = {name[3:]: tensor for name, tensor in expected.items() if name.startswith("in.")}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected["logits"]), "outputs differ"
    names = [name for name in expected if name.startswith("st.")]
    assert {name[3:] for name in names} <= set(state) and all(torch.equal(state[name[3:]], expected[name]) for name in names), "state differs"
    print("bit-equal")
"""


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_fresh_process_loads_the_same_bits(name, tmp_path):
    case, words = BY_NAME[name], []
    for dtype in (torch.float32, torch.bfloat16):
        folder, expected = tmp_path / str(dtype), tmp_path / f"{dtype}.safetensors"
        model = saved(case, folder, dtype, shard="30KB")
        tensors = {f"in.{key}": value for key, value in case.inputs(dtype).items()} | {"logits": case.logits(model, dtype)}
        save_file(tensors | {f"st.{key}": value.clone().contiguous() for key, value in model.state_dict().items()}, expected)
        words += [str(folder), str(expected), case.auto_class]
    done = subprocess.run([sys.executable, "-c", _FRESH, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("bit-equal") == 2, done.stderr[-2000:]


def test_without_kanformer_loading_fails_loudly(tmp_path):
    names = ("bert", "opt", "gpt2", "llama")
    code = "import sys, transformers\nfor folder, name in zip(sys.argv[1::2], sys.argv[2::2]):\n    try:\n"
    code += "        getattr(transformers, name).from_pretrained(folder)\n    except RuntimeError as error:\n"
    code += "        print('ignore_mismatched_sizes' in str(error))\n    else:\n        print('loaded')"
    words = []
    for name in names:
        saved(BY_NAME[name], tmp_path / name)
        words += [str(tmp_path / name), BY_NAME[name].auto_class]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["True"] * len(names), done.stderr[-2000:]


def test_the_base_model_loads_from_a_language_model_and_back(tmp_path):
    case = BY_NAME["llama"]
    model = saved(case, tmp_path / "lm")
    base = tf.AutoModel.from_pretrained(tmp_path / "lm")
    assert list(blocks(base)) == ["layers.0.mlp", "layers.1.mlp"]
    hidden = base.eval()(**case.inputs()).last_hidden_state
    assert torch.equal(hidden, model.model(**case.inputs()).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert list(blocks(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))) == ["model.layers.0.mlp", "model.layers.1.mlp"]


@one_case_of_each
def test_half_precision_and_device_maps_give_the_same_bits(case, tmp_path):
    model = saved(case, tmp_path, torch.float16)
    auto = getattr(tf, case.auto_class)
    for options in ({}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"dtype": torch.float16}):
        loaded = auto.from_pretrained(tmp_path, **options)
        assert same_state(snapshot(loaded), snapshot(model)), options
        assert torch.equal(case.logits(loaded, torch.float16), case.logits(model, torch.float16)), options
    # In another dtype the numbers are the rounded ones; the grids stay in float32.
    wide, state = auto.from_pretrained(tmp_path, dtype=torch.float32), model.state_dict()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, state[name].float()) for name, tensor in wide.state_dict().items())
    narrow = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    grids = {name: tensor for name, tensor in narrow.state_dict().items() if name.endswith("kan_grid")}
    assert grids and all(tensor.dtype == torch.float32 and torch.equal(tensor, state[name]) for name, tensor in grids.items())
    assert all(torch.equal(parameter, state[name].to(torch.bfloat16)) for name, parameter in narrow.named_parameters())


@one_case_of_each
def test_the_model_without_its_head_and_another_head_hold_the_same_blocks(case, tmp_path):
    model = saved(case, tmp_path / "head")
    body = tf.AutoModel.from_pretrained(tmp_path / "head")
    body.save_pretrained(tmp_path / "body")
    again = getattr(tf, case.auto_class).from_pretrained(tmp_path / "body")
    for loaded in (body, again):
        found = [snapshot(block) for block in blocks(loaded).values()]
        assert len(found) == len(blocks(model)) and all(map(same_state, found, (snapshot(block) for block in blocks(model).values())))
    assert list(blocks(again)) == list(blocks(model))


def test_a_family_whose_native_weights_are_fused_on_saving(tmp_path):
    small = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    model = disturb(kanformer.patch_model(tf.GteModel(tf.GteConfig(**small)).eval()))
    model.save_pretrained(tmp_path)
    assert any("up_gate_proj" in name for name in load_file(tmp_path / "model.safetensors"))  # the sentinel, called gate_proj in the model
    assert same_state(snapshot(tf.GteModel.from_pretrained(tmp_path)), snapshot(model))


def test_an_own_spec_travels_with_the_checkpoint(tmp_path):
    case = BY_NAME["llama"]
    spec = kanformer.FFNSpec(name="mine", owner="LlamaMLP", gate="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
    model = kanformer.patch_model(case.build(), specs=[spec], layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert list(blocks(loaded)) == ["model.layers.1.mlp"] and torch.equal(case.logits(loaded), case.logits(model))


def test_weights_given_to_save_pretrained_are_the_ones_saved(tmp_path):
    model = saved(BY_NAME["bert"], tmp_path / "a")
    loaded = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
    changed = {name: tensor + 1 for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "b", state_dict=changed)
    name = "bert.encoder.layer.0.intermediate.kan_up.weight"
    assert torch.equal(load_file(tmp_path / "b" / "model.safetensors")[name], model.state_dict()[name] + 1)


def test_initialising_again_leaves_the_blocks_alone(tmp_path):
    model = saved(BY_NAME["llama"], tmp_path)
    state = {name: tensor for name, tensor in snapshot(model).items() if "kan_" in name}
    model.init_weights()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


class TestDamage:
    def _folder(self, tmp_path) -> Path:
        saved(BY_NAME["bert"], tmp_path)
        return tmp_path

    def _config(self, folder: Path, change) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    def test_a_file_cut_short(self, tmp_path):
        path = self._folder(tmp_path) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"model\.safetensors\): got a file of [\d,]+ bytes that is damaged or cut short"):
            load_model(str(tmp_path))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.update(version=99), "version 99"),
            (lambda c: c.update(version="x"), "version 'x'"),
            (lambda c: c["configs"][0].update(schema_version=9), "schema_version"),
            (lambda c: c["configs"][0].update(surprise=1), "surprise"),
            (lambda c: c.update(surprise=1), "surprise"),
            (lambda c: c.update(sites=[]), "sites"),
            (lambda c: c["sites"][0].pop("hidden"), "hidden"),
            (lambda c: c["sites"][0].update(hidden="48"), "wrong values"),
            (lambda c: c["sites"][0].update(spec=7), "wrong values"),
            (lambda c: c["sites"][0].update(config=1), "wrong values"),
            (lambda c: c["sites"][0].update(config=True), "wrong values"),
            (lambda c: c["sites"][0].pop("config"), "'config'"),
            (lambda c: c.update(configs=[]), "configs"),
            (lambda c: c.update(version=1), "version 1"),
            (lambda c: c["sites"][0].update(path="encoder.layer.9.intermediate"), "no module at"),
            (lambda c: c["sites"][0].update(mlp_hidden=47), "width"),
            (lambda c: c["specs"][0].update(down="output.nothing"), "has no output.nothing"),
        ],
    )
    def test_a_config_that_does_not_fit(self, tmp_path, change, message):
        folder = self._folder(tmp_path)
        self._config(folder, change)
        with pytest.raises(KanformerError, match=message):
            tf.AutoModelForMaskedLM.from_pretrained(folder)

    def test_missing_tensors(self, tmp_path):
        path = self._folder(tmp_path) / "model.safetensors"
        tensors = load_file(path)
        del tensors["bert.encoder.layer.0.intermediate.kan_functions.kan_coef"]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="kan_coef"):
            load_model(str(tmp_path))

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such folder"):
            load_model(str(tmp_path / "nothing"))


def test_importing_kanformer_after_transformers_adds_only_itself():
    code = (
        "import sys, transformers.modeling_utils; before = set(sys.modules); import kanformer;"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} & {'datasets', 'sympy', 'matplotlib', 'triton', 'accelerate'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_kanformer_alone_loads_nothing_heavy():
    heavy = ["torch", "transformers", "accelerate", "datasets", "sympy", "matplotlib", "triton", "numpy"]
    code = f"import sys, kanformer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
