"""Several configs in one patch: the first that selects a block wins, each block keeps its own through saving, and old files still load."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf

import kanformer
from kanformer import KANConfig
from kanformer.configs import configs_from
from kanformer.errors import ConfigError, NoFeedForwardError
from kanformer.surgery.record import get_record
from model_cases import BY_NAME, blocks, disturb, same_state, snapshot

FULL_FIRST = [KANConfig(edges="full", grid_size=3, layers_to_transform=[0]), KANConfig(basis="rbf")]


def _kinds(model) -> list[tuple[str, str]]:
    return [(path, block.edges) for path, block in blocks(model).items()]


def test_a_block_gets_the_first_config_that_selects_it_and_the_rest_stay_mlps():
    case = BY_NAME["bart"]
    model, configs = case.build(), [*FULL_FIRST[:1], KANConfig(edges="mlp", target_modules=["*encoder*"])]
    before, plan = case.logits(model), kanformer.plan_surgery(model, configs)
    assert [block.config for block in plan.blocks] == [configs[0], configs[1], configs[0]]
    kanformer.patch_model(model, configs)
    assert _kinds(model) == [("model.encoder.layers.0.fc1", "full"), ("model.encoder.layers.1.fc1", "mlp"), ("model.decoder.layers.0.fc1", "full")]
    assert [sum(p.numel() for p in block.parameters()) for block in blocks(model).values()] == [block.kan_parameters for block in plan.blocks]
    torch.testing.assert_close(case.logits(model), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(case.logits(kanformer.unpatch_model(model)), before)


def test_overrides_apply_to_every_config():
    model = kanformer.patch_model(BY_NAME["llama"].build(), FULL_FIRST, grid_size=2, basis="bspline")
    assert [{site.config.grid_size, site.config.basis} for site in get_record(model, "test").sites] == [{2, "bspline"}] * 2


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_several_configs_come_back_bit_for_bit(name, tmp_path):
    case = BY_NAME[name]
    model = disturb(kanformer.patch_model(case.build(), FULL_FIRST))
    model.save_pretrained(tmp_path)
    loaded = getattr(tf, case.auto_class).from_pretrained(tmp_path)
    assert same_state(snapshot(loaded), snapshot(model)) and torch.equal(case.logits(loaded.eval()), case.logits(model))
    assert [site.config for site in get_record(loaded, "test").sites] == FULL_FIRST
    assert len(json.loads((tmp_path / "config.json").read_text())["quantization_config"]["configs"]) == 2


def test_only_pruned_blocks_need_gram_matrices_and_each_kind_starts_in_its_own_way():
    case = BY_NAME["llama"]
    batches = [{"input_ids": torch.randint(3, 99, (4, 12))} for _ in range(3)]
    configs = [KANConfig(init="prune", param_ratio=0.5, layers_to_transform=[0]), KANConfig(init="exact")]
    model = kanformer.patch_model(case.build(), configs, calibration=kanformer.calibrate(case.build(), batches))
    pruned, exact = blocks(model).values()
    assert pruned.hidden_features < exact.hidden_features == 48
    with pytest.raises(ConfigError, match="no calibration data"):
        kanformer.patch_model(case.build(), configs)
    without = kanformer.calibrate(case.build(), batches, gram=False)
    with pytest.raises(ConfigError, match="Gram"):
        kanformer.patch_model(case.build(), configs, calibration=without)
    kanformer.patch_model(case.build(), configs[1], calibration=without)


def test_refining_grids_keeps_each_config_apart(tmp_path):
    model = kanformer.patch_model(BY_NAME["llama"].build(), [*FULL_FIRST[:1], KANConfig(edges="mlp")])
    kanformer.refine_grids(model, 6)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_state(snapshot(loaded), snapshot(model)) and [edges for _, edges in _kinds(loaded)] == ["full", "mlp"]


@pytest.mark.parametrize(
    ("configs", "error", "message"),
    [
        ([], ConfigError, "empty list"),
        ([KANConfig(), {"edges": "full"}], ConfigError, "KANConfig, a list of them"),
        ("exact", ConfigError, "got str"),
        ([KANConfig(), KANConfig(keep_original=False)], ConfigError, "keep_original"),
        ([KANConfig(), KANConfig(layers_to_transform=[1])], NoFeedForwardError, "config 1.*earlier configs took all 1 .*layers.1.mlp"),
        ([KANConfig(layers_to_transform=[0]), KANConfig(layers_to_transform=[7])], NoFeedForwardError, "7"),
    ],
)
def test_configs_that_do_not_go_together_leave_the_model_alone(configs, error, message):
    model = BY_NAME["llama"].build()
    state = snapshot(model)
    with pytest.raises(error, match=message):
        kanformer.patch_model(model, configs)
    assert same_state(snapshot(model), state) and not blocks(model)


def test_settings_of_a_yaml_file_are_a_mapping_or_a_list():
    assert configs_from({"grid_size": 5}, keep_original=False) == (KANConfig(grid_size=5, keep_original=False),)
    assert configs_from([{"edges": "full"}, {}]) == (KANConfig(edges="full"), KANConfig())
    for wrong in ([], [3]):
        with pytest.raises(ConfigError, match="mapping of KANConfig values, or a list"):
            configs_from(wrong)


def _as_version_1(folder) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    record = config["quantization_config"]
    (record["config"],) = record.pop("configs")
    record["version"] = 1
    for site in record["sites"]:
        del site["config"]
    path.write_text(json.dumps(config))


def test_a_file_of_version_1_loads_bit_for_bit_and_is_saved_as_version_2(tmp_path):
    case = BY_NAME["bert"]
    model = disturb(kanformer.patch_model(case.build(), grid_size=5))
    model.save_pretrained(tmp_path / "old")
    _as_version_1(tmp_path / "old")
    loaded = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "old")
    assert same_state(snapshot(loaded), snapshot(model)) and torch.equal(case.logits(loaded.eval()), case.logits(model))
    loaded.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]["version"] == 2
    assert same_state(snapshot(tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "new")), snapshot(model))
