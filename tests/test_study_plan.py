"""The grid: equal budgets for all methods, equal tokens, what is printed, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kanformer.bases import make_basis
from kanformer.cli import main
from kanformer.config import KANConfig
from kanformer.conversion.widths import kan_parameters, mlp_parameters, width_within
from kanformer.errors import ConfigError
from kanformer.study.methods import functions_within, make_arms
from kanformer.study.plan import make_plan, tokens_of
from kanformer.study.run import study
from kanformer.study.settings import METHODS, checked_stages
from kanformer.surgery.compare import compare
from kanformer.surgery.replacing.apply import patch_model
from kanformer.training.arguments import to_yaml
from study_cases import DISTILL, settings
from training_cases import checkpoint, write_text

RATIOS = [1.0, 0.75, 0.5, 0.25, 0.1]


def minilm(**changes) -> nn.Module:
    """A model with all-MiniLM-L6-v2's blocks, on no device."""
    values = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 12, "vocab_size": 50, **changes}
    with torch.device("meta"):
        return tf.BertModel(tf.BertConfig(**values))


def test_all_methods_stay_within_the_budget_and_kan_and_mlp_are_equal():
    arms = {(arm.method, arm.ratio): arm for arm in make_arms(minilm(), METHODS, RATIOS, {"grid_size": 6})}
    for ratio in RATIOS:
        kan, mlp, random = (arms[name, ratio] for name in ("kan", "mlp", "random_mlp"))
        assert kan.parameters == pytest.approx(mlp.parameters, rel=3e-3) and random.parameters == mlp.parameters and random.hidden == mlp.hidden
        assert all(arm.reached == pytest.approx(ratio, rel=3e-3) and arm.reached <= ratio + 1e-5 for arm in (kan, mlp))
        assert arms["kan_full", ratio].reached <= ratio
        if ratio < 1:
            (groups,) = (values["groups"] for values in kan.configs)
            assert kan.hidden <= 16 * groups and kan.hidden % groups == 0
    assert (arms["kan", 1.0].training, arms["mlp", 1.0].training, arms["random_mlp", 1.0].training) == ("none", "none", "steps")


def test_a_full_linear_map_is_one_run_and_lower_ratios_have_lower_ranks():
    full, *low = make_arms(minilm(), ["linear"], [1.0, 0.5, 0.125, 0.05], {})
    assert [arm.ratio for arm in (full, *low)] == [0.5, 0.125, 0.05]
    assert set(full.ranks.values()) == {None} and full.parameters == 2 * (384 * 384 + 384)
    for arm in low:
        (rank,) = set(arm.ranks.values())
        assert 0 < rank < 384 and arm.parameters == 2 * (rank * 768 + 384) <= arm.ratio * arm.original
        assert arm.parameters + 2 * 768 > arm.ratio * arm.original


@pytest.mark.parametrize("method", ["kan", "mlp", "random_mlp", "kan_full"])
def test_blocks_of_different_forms_get_a_budget_each_and_the_plan_counts_right(method):
    model = tf.BertModel(tf.BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=50))
    wide = model.encoder.layer[1]
    wide.intermediate.dense, wide.output.dense = nn.Linear(32, 96), nn.Linear(96, 32)
    (arm,) = make_arms(model, [method], [0.5], {"grid_size": 3})
    assert len(arm.configs) == 2
    configs = [KANConfig.from_dict(values) for values in arm.configs]
    patched = patch_model(model, configs, calibration=[{"input_ids": torch.randint(0, 50, (8, 32))}])
    costs = compare(patched)
    assert costs.to_dict()["feed_forward"]["kan_parameters"] == arm.parameters and costs.to_dict()["feed_forward"]["mlp_parameters"] == arm.original
    assert all(0.35 < block.parameter_ratio <= 0.5 for block in costs.blocks)
    narrow, wider, _ = (block.kan_hidden for block in costs.blocks)
    assert wider > narrow and costs.blocks[2].kan_hidden == narrow


@given(st.integers(4, 40), st.integers(300, 6000), st.booleans())
def test_functions_are_as_many_as_the_widest_block_with_one_per_16_channels_has_room_for(d, budget, gated):
    form = {"gated": gated, "up_bias": True, "down_bias": True}
    config = KANConfig(grid_size=3)
    each = make_basis("bspline", 3, 3).n_basis
    fitting = [
        (hidden, groups)
        for hidden in range(1, budget)
        if mlp_parameters(d, hidden, **form) <= budget
        for groups in range(1, hidden + 1)
        if hidden % groups == 0 and groups * 16 >= hidden and mlp_parameters(d, hidden, **form) + groups * each <= budget
    ]
    if not fitting:
        with pytest.raises(ConfigError):
            functions_within(budget, d, config, **form)
        return
    hidden, groups = max(fitting)
    assert functions_within(budget, d, config, **form) == groups
    chosen = config.replace(groups=groups)
    assert width_within(budget, d, chosen, **form) == hidden and kan_parameters(d, hidden, chosen, **form) <= budget


def test_every_channel_has_a_function_of_its_own_if_asked_for():
    (arm,) = make_arms(minilm(), ["kan"], [0.5], {"grid_size": 6, "groups": None})
    assert arm.configs[0]["groups"] is None and arm.hidden == 758 and arm.reached <= 0.5


def test_selected_blocks_and_ridge_hold_for_all_methods_and_the_kans_settings_for_kans():
    arms = make_arms(minilm(), METHODS, [0.5], {"grid_size": 5, "ridge": 1e-3, "layers_to_transform": [1]})
    assert len({arm.original for arm in arms}) == 1 and arms[0].original < 1.2e6
    for arm in arms:
        for values in arm.configs:
            assert values["ridge"] == 1e-3 and ("grid_size" in values) == arm.method.startswith("kan")


def test_the_plan_says_runs_parameters_and_tokens_and_writes_nothing(tmp_path, capsys):
    arguments = settings(tmp_path, methods=["kan", "mlp", "random_mlp", "linear"], ratios=[1.0, 0.5], seeds=[3, 5])
    plan = make_plan(arguments)
    assert len(plan.runs) == 2 + 1 + 2 * 4 and [run.seed for run in plan.runs] == [None] * 3 + [3] * 4 + [5] * 4
    assert plan.tokens.keys() == {3, 5} and all(4 * 16 <= count <= 4 * 16 * 12 for count in plan.tokens.values())
    (tmp_path / "study.yaml").write_text(to_yaml(dataclasses.replace(arguments, dry_run=True)))
    main(["study", "--config", str(tmp_path / "study.yaml")])
    shown = capsys.readouterr().out
    assert str(plan) in shown and "11 runs" in shown and not (tmp_path / "study").exists()


def test_tokens_are_counted_in_the_order_of_the_training(tmp_path):
    arguments = settings(tmp_path, distill={**DISTILL, "max_steps": 40})
    plan = make_plan(arguments)
    (stage,) = checked_stages(arguments, seed=0)
    every = sum(map(len, plan.examples))
    assert tokens_of(dataclasses.replace(stage, max_steps=15), plan.examples) == every  # 60 texts, once
    assert tokens_of(dataclasses.replace(stage, max_steps=30), plan.examples) == 2 * every


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods [kan,mpl]", "methods): got 'mpl'. Did you mean 'mlp'"),
        ("--methods []", "an empty list"),
        ("--methods [kan,kan]", "the same twice"),
        ("--ratios [0.5,0]", "ratios): got 0, expected numbers in (0, 1]"),
        ("--ratios [2]", "ratios): got 2, expected numbers in (0, 1]"),
        ("--ratios [half]", "ratios): got 'half'"),
        ("--seeds [0,-1]", "seeds): got -1"),
        ("--seeds 0", "seeds): got an empty list"),
        ("--ratios [0.001]", "parameters, expected at least"),
        ("--distill.output_dir x", "'output_dir', which the study sets"),
        ("--distill.max_step 3", "unknown key 'max_step'. Did you mean 'max_steps'"),
        ("--distill.max_steps 0", "max_steps): got 0"),
        ("--distill.hidden_weight 0", "stages without a loss"),
        ("--distill.per_device_train_batch_size 64", "got 60 texts, expected at least the 64 of one step"),
        ("--kan.init exact", "'init', which the study sets"),
        ("--kan.grid_sise 3", "unknown key 'grid_sise'"),
        ("--goals.half 0.9", "numbers by ratio"),
        ("--teacher_name_or_path {tmp}/none", "no such folder"),
        ("--teacher_name_or_path {patched}", "a teacher that is patched"),
        ("--max_length 65", "with 64 positions"),
        ("--train_file {tmp}/none.txt", "none.txt"),
        ("--validation_file {train}", "got 0 texts that are not in the training text"),
        ("--second_file {short}", "second text): got 3 texts"),
        ("--output_dir", "--output_dir without a value"),
        ("--output_dir {train}/x", "no folder that can be written to"),
        ("--report_only", "Run the study first"),
        ("--rations [1]", "Did you mean 'ratios'"),
    ],
)
def test_bad_input_ends_with_one_line_and_leaves_nothing(words, message, tmp_path, capsys):
    arguments = settings(tmp_path)
    (tmp_path / "study.yaml").write_text(to_yaml(arguments))
    names = {"tmp": tmp_path, "train": arguments.train_file, "short": write_text(tmp_path / "short.txt", 3, seed=9)}
    names["patched"] = checkpoint(tmp_path / "patched", patch={}) if "patched" in words else ""
    with pytest.raises(SystemExit) as leaving:
        main(["study", "--config", str(tmp_path / "study.yaml"), *words.format(**names).split()])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert leaving.value.code == 2 and message in line and not (tmp_path / "study").exists()


def test_no_output_dir_and_an_encoder_decoder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no output_dir"):
        study(settings(tmp_path, output_dir=""))
    config = tf.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="an encoder-decoder model"):
        make_plan(settings(tmp_path, teacher_name_or_path=str(tmp_path / "t5")))


def test_experts_are_refused_with_the_setting_that_leaves_them_out():
    values = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    with pytest.raises(ConfigError, match="experts: exclude"):
        make_arms(tf.MixtralForCausalLM(tf.MixtralConfig(**values, num_local_experts=3)), ["kan"], [0.5], {})
