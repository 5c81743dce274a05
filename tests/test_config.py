"""KANConfig: strict values, strict keys, and JSON that gives the same config back."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanformer.config import SCHEMA_VERSION, KANConfig
from kanformer.errors import ConfigError

globs = st.none() | st.text(max_size=8) | st.lists(st.text(max_size=8), max_size=3).map(tuple)


@st.composite
def configs(draw) -> KANConfig:
    edges, init = draw(st.sampled_from(["shared", "full", "mlp"])), draw(st.sampled_from(["exact", "prune", "random"]))
    numbers = st.floats(-1e6, 1e6) | st.integers(-1000, 1000)
    lo, hi = draw(st.tuples(numbers, numbers).filter(lambda pair: pair[0] != pair[1]).map(sorted))
    return KANConfig(
        edges=edges,
        groups=draw(st.none() | st.integers(1, 4096)) if edges == "shared" else None,
        grid_size=draw(st.integers(1, 64)),
        spline_order=draw(st.integers(0, 7)),
        grid_range=(lo, hi),
        init=init,
        param_ratio=draw(st.floats(0, 1, exclude_min=True)) if init == "prune" else None,
        width=draw(st.none() | st.just("match") | st.integers(1, 9999)) if init == "random" else None,
        ridge=draw(st.floats(0, 1)),
        target_modules=draw(globs),
        exclude_modules=draw(globs),
        layers_to_transform=draw(st.none() | st.lists(st.integers(-99, 99) | st.sampled_from(["0-5", "4-", "-3--1"]), max_size=4).map(tuple)),
        layers_pattern=draw(st.none() | st.lists(st.text(max_size=4), max_size=2).map(tuple)),
        towers=draw(st.none() | st.lists(st.sampled_from(["encoder", "text"]), max_size=2).map(tuple)),
        experts=draw(st.sampled_from(["include", "only", "exclude"])),
        keep_original=draw(st.booleans()),
    )


@given(configs())
def test_json_gives_the_same_config_back(config):
    again = KANConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)


@given(configs())
def test_the_dictionary_holds_json_values_only_and_all_fields(config):
    values = config.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {"schema_version", *(field.name for field in dataclasses.fields(KANConfig))}


def test_the_default_is_the_exact_shared_cubic():
    config = KANConfig()
    assert (config.edges, config.init, config.basis, config.spline_order, config.param_ratio) == ("shared", "exact", "bspline", 3, None)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"basis": "bsplines"}, "basis"),
        ({"basis": None}, "basis"),
        ({"edges": "Shared"}, "edges"),
        ({"edges": ["shared"]}, "edges"),
        ({"init": "exakt"}, "init"),
        ({"grid_size": 0}, "grid_size"),
        ({"grid_size": 8.0}, "grid_size"),
        ({"grid_size": "8"}, "grid_size"),
        ({"grid_size": True}, "grid_size"),
        ({"spline_order": -1}, "spline_order"),
        ({"spline_order": None}, "spline_order"),
        ({"grid_range": (1.0, 1.0)}, "grid_range"),
        ({"grid_range": (2.0, -2.0)}, "grid_range"),
        ({"grid_range": (0.0, float("inf"))}, "grid_range"),
        ({"grid_range": (float("nan"), 1.0)}, "grid_range"),
        ({"grid_range": (0.0, 1.0, 2.0)}, "grid_range"),
        ({"grid_range": 4.0}, "grid_range"),
        ({"grid_range": ("a", "b")}, "grid_range"),
        ({"groups": 0}, "groups"),
        ({"groups": 2.0}, "groups"),
        ({"groups": 4, "edges": "full"}, "groups"),
        ({"ridge": -1e-9}, "ridge"),
        ({"ridge": float("nan")}, "ridge"),
        ({"ridge": "small"}, "ridge"),
        ({"init": "prune"}, "param_ratio"),
        ({"init": "prune", "param_ratio": 0}, "param_ratio"),
        ({"init": "prune", "param_ratio": -0.5}, "param_ratio"),
        ({"init": "prune", "param_ratio": 1.5}, "param_ratio"),
        ({"init": "prune", "param_ratio": float("nan")}, "param_ratio"),
        ({"init": "prune", "param_ratio": "half"}, "param_ratio"),
        ({"init": "exact", "param_ratio": 0.5}, "param_ratio"),
        ({"init": "random", "param_ratio": 0.5}, "param_ratio"),
        ({"width": "match"}, "width"),
        ({"init": "random", "width": 0}, "width"),
        ({"init": "random", "width": "wide"}, "width"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": [1, 2]}, "target_modules"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules"),
        ({"layers_to_transform": 1.5}, "layers_to_transform"),
        ({"layers_to_transform": True}, "layers_to_transform"),
        ({"layers_to_transform": [0, None]}, "layers_to_transform"),
        ({"layers_to_transform": ""}, "layers_to_transform"),
        ({"layers_to_transform": "0-5-9"}, "layers_to_transform"),
        ({"layers_to_transform": "5-2"}, "layers_to_transform"),
        ({"layers_to_transform": ["-1--3"]}, "layers_to_transform"),
        ({"layers_to_transform": "first"}, "layers_to_transform"),
        ({"layers_pattern": 3}, "layers_pattern"),
        ({"towers": ["encoder", "image"]}, "towers"),
        ({"towers": 1}, "towers"),
        ({"experts": True}, "experts"),
        ({"experts": "none"}, "experts"),
        ({"keep_original": "no"}, "keep_original"),
        ({"keep_original": 1}, "keep_original"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [lambda values: KANConfig(**values), KANConfig.from_dict], ids=["constructor", "from_dict"])
def test_a_wrong_value_is_named_with_what_would_be_right(make, values, name):
    with pytest.raises(ConfigError) as caught:
        make(values)
    assert f"({name}=" in str(caught.value) and "expected" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("values", "hint"), [({"basis": "bsplines"}, "'bspline'"), ({"edges": "shard"}, "'shared'"), ({"init": "exakt"}, "'exact'")])
def test_a_misspelt_choice_names_the_near_one(values, hint):
    with pytest.raises(ConfigError, match=f"Did you mean {hint}"):
        KANConfig(**values)


@pytest.mark.parametrize("make", [KANConfig.from_dict, lambda values: KANConfig().replace(**values)], ids=["from_dict", "replace"])
def test_an_unknown_key_names_the_near_one(make):
    with pytest.raises(ConfigError, match=r"unknown key 'gridsize'.*Did you mean 'grid_size'"):
        make({"gridsize": 5})


def test_version_1_of_the_schema_is_still_read():
    values = {key: value for key, value in KANConfig(grid_size=5).to_dict().items() if key not in ("layers_pattern", "towers", "experts")}
    assert KANConfig.from_dict({**values, "schema_version": 1}) == KANConfig(grid_size=5)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, "1", True, None])
def test_another_schema_version_is_refused_before_its_keys_are_read(version):
    with pytest.raises(ConfigError, match="schema_version"):
        KANConfig.from_dict({"schema_version": version, "a_key_of_the_future": 1})


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null"])
def test_text_that_is_not_a_json_object_is_refused(text):
    with pytest.raises(ConfigError, match="read a KAN configuration"):
        KANConfig.from_json(text)


def test_lists_and_single_numbers_become_tuples():
    config = KANConfig(target_modules=["*.mlp"], exclude_modules=["*.0.*"], layers_to_transform=range(2), grid_range=[-1, 1])  # type: ignore[arg-type]
    assert (config.target_modules, config.exclude_modules, config.layers_to_transform, config.grid_range) == (("*.mlp",), ("*.0.*",), (0, 1), (-1, 1))
    assert KANConfig(layers_to_transform=3).layers_to_transform == (3,)  # type: ignore[arg-type]
    assert KANConfig(layers_to_transform="0 - 2, 5,-1").layers_to_transform == ("0-2", 5, -1)  # type: ignore[arg-type]
    assert (KANConfig(towers="text").towers, KANConfig(layers_pattern="blocks").layers_pattern) == (("text",), ("blocks",))  # type: ignore[arg-type]


def test_replace_changes_a_copy_and_checks_it():
    config = KANConfig()
    assert config.replace(grid_size=3).grid_size == 3 and config.grid_size == 8
    with pytest.raises(ConfigError, match="grid_size"):
        config.replace(grid_size=0)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KANConfig().grid_size = 3  # type: ignore[misc]


def test_reading_leaves_the_given_dictionary_alone():
    values = KANConfig().to_dict()
    before = dict(values)
    KANConfig.from_dict(values)
    assert values == before
