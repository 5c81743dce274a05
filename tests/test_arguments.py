"""Settings from YAML and the command line: types, limits, strict keys, and a help that loads nothing heavy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kanformer.cli import _COMMANDS
from kanformer.errors import ConfigError
from kanformer.evaluation.settings import EvaluateArguments
from kanformer.pretraining.settings import PretrainArguments
from kanformer.study.settings import StudyArguments
from kanformer.training.arguments import option, parse_arguments, to_yaml
from kanformer.training.settings import CalibrateArguments, DistillArguments, FinetuneArguments
from training_cases import ROOT, python

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@dataclasses.dataclass
class Settings:
    """One field of every kind."""

    name: str = option("", "a text")
    path: str | None = option(None, "a text or nothing")
    rate: float = option(0.1, "a number, 50 % or not", ge=0)
    share: float = option(0.5, "a limited number", gt=0, le=1)
    free: float = option(0.0, "a number without limits")
    steps: int = option(3, "a whole number", ge=1)
    keep: int | None = option(2, "a whole number or nothing", ge=1)
    fast: bool = option(False, "a switch")
    kind: str = option("red", "a choice", ("red", "green"))
    kan: dict | list = option({"init": "prune", "param_ratio": 0.5}, "a mapping, or several")
    more: dict | None = option(None, "a mapping or nothing")


def parse(*words: str, yaml: str | None = None, folder: Path | None = None, cls: type = Settings):
    if yaml is not None:
        assert folder is not None
        (folder / "config.yaml").write_text(yaml, encoding="utf-8")
        words = ("--config", str(folder / "config.yaml"), *words)
    return parse_arguments(cls, words, "prog", "does something")


def test_without_arguments_all_defaults_hold():
    assert parse() == Settings() and parse().kan is not parse().kan


def test_the_command_line_wins_over_the_file_wherever_the_file_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("rate: 0.2\nsteps: 7\n", encoding="utf-8")
    for words in (("--rate", "0.3", "--config", str(tmp_path / "c.yaml")), (f"--config={tmp_path / 'c.yaml'}", "--rate=0.3")):
        found = parse(*words)
        assert (found.rate, found.steps, found.share) == (0.3, 7, 0.5)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (("--rate", "1e-3"), "rate", 0.001),
        (("--rate", "1"), "rate", 1.0),
        (("--free", "-2.5"), "free", -2.5),
        (("--steps", "12"), "steps", 12),
        (("--keep", "null"), "keep", None),
        (("--keep", "None"), "keep", None),
        (("--path", "None"), "path", None),
        (("--name", "007"), "name", "007"),
        (("--name", "yes"), "name", "yes"),
        (("--name=a=b",), "name", "a=b"),
        (("--fast",), "fast", True),
        (("--fast", "--steps", "4"), "fast", True),
        (("--fast", "false"), "fast", False),
        (("--kind", "green"), "kind", "green"),
        (("--kan", "{init: exact}"), "kan", {"init": "exact"}),
        (("--kan.param_ratio", "0.25"), "kan", {"init": "prune", "param_ratio": 0.25}),
        (("--kan.param_ratio", "25e-2"), "kan", {"init": "prune", "param_ratio": 0.25}),
        (("--kan.groups", "null", "--kan.init", "exact"), "kan", {"init": "exact", "param_ratio": 0.5, "groups": None}),
        (("--kan.init", "[1"), "kan", {"init": "[1", "param_ratio": 0.5}),
        (("--more.grid-range", "[-3, 3]"), "more", {"grid_range": [-3, 3]}),
    ],
)
def test_a_value_arrives_in_its_fields_type(words, name, value):
    found = getattr(parse(*words), name)
    assert found == value and type(found) is type(value)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    found = parse(yaml="rate: 1e-3\nshare: 1\n", folder=tmp_path)
    assert found.rate == 0.001 and found.share == 1.0 and type(found.share) is float


def test_a_dotted_override_changes_one_key_of_the_files_mapping(tmp_path):
    assert parse("--kan.b", "2", yaml="kan: {a: 1, b: 1}", folder=tmp_path).kan == {"a": 1, "b": 2}
    assert parse("--kan.b", "2", yaml="kan: [{a: 1, b: 1}, {a: 3}]", folder=tmp_path).kan == [{"a": 1, "b": 2}, {"a": 3, "b": 2}]
    with pytest.raises(ConfigError, match="kan.*got 5, expected dict"):
        parse("--kan.b", "2", yaml="kan: [{a: 1}, 5]", folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stpes", "3"), "unknown key 'stpes'.*Did you mean 'steps'"),
        (("--kna.init", "exact"), "unknown key 'kna'.*Did you mean 'kan'"),
        (("steps", "3"), "got 'steps', expected --name value"),
        (("-s", "3"), "got '-s'"),
        (("--steps",), "--steps without a value"),
        (("--steps", "--fast"), "--steps without a value"),
        (("--config",), "--config without a value"),
        (("--steps", "2.5"), "steps.*got 2.5, expected int"),
        (("--steps", "many"), "steps.*got 'many', expected int"),
        (("--steps", "true"), "steps.*got True, expected int"),
        (("--steps", "0"), "steps.*got 0, expected a number >= 1"),
        (("--keep", "0"), "keep.*got 0, expected a number >= 1"),
        (("--rate", "fast"), "rate.*got 'fast', expected float"),
        (("--rate", "-1"), "rate.*got -1.0, expected a number >= 0"),
        (("--rate", "true"), "rate.*got True"),
        (("--share", "0"), "share.*got 0.0, expected a number > 0 and <= 1"),
        (("--share", "1.5"), "share.*got 1.5"),
        (("--fast", "3"), "fast.*got 3, expected bool"),
        (("--name", "null"), "name.*got None, expected str"),
        (("--kind", "gren"), "kind.*got 'gren', expected one of red, green.*Did you mean 'green'"),
        (("--kan", "5"), "kan.*got 5, expected dict"),
        (("--steps.x", "1"), "got --steps.x, expected --steps value"),
        (("--kan.", "1"), "got --kan., expected --kan value"),
        (("--kan", "5", "--kan.init", "exact"), "kan.*got 5, expected dict"),
    ],
)
def test_a_wrong_word_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(*words)


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf", ".inf", ".nan", "1e999"])
@pytest.mark.parametrize("name", ["rate", "share", "free"])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}.*got"):
        parse(f"--{name}", value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 3", "config.yaml.*unknown key 'stpes'.*Did you mean 'steps'"),
        ("3: 4", "unknown key '3'"),
        ("steps: [", "config.yaml"),
        ("- steps", "got list, expected a mapping"),
        ("steps: '3'", "steps.*got '3', expected int"),
        ("kan: 5", "kan.*got 5, expected dict or list"),
        ("rate: .nan", "rate.*got nan"),
    ],
)
def test_a_wrong_file_is_refused_on_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(yaml=text, folder=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"name: \xff\xfe"], ids=["missing", "not-utf8"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        parse("--config", str(tmp_path / "c.yaml"))


def test_an_empty_file_changes_nothing(tmp_path):
    assert parse(yaml="# nothing\n", folder=tmp_path) == Settings()


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_config_of_the_project_is_valid(path):
    kinds = {
        "calibrate": CalibrateArguments,
        "distill": DistillArguments,
        "evaluate": EvaluateArguments,
        "finetune": FinetuneArguments,
        "pretrain": PretrainArguments,
        "study": StudyArguments,
    }
    cls = kinds[path.name.partition("_")[0]]
    found = parse("--config", str(path), cls=cls)
    folder = found.out if cls is CalibrateArguments else found.output_dir
    assert folder.startswith("runs/") and path.stem.removeprefix("finetune_") in (getattr(found, "task", None) or path.stem, path.stem)


def test_there_are_configs():
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize(
    "settings",
    [Settings(rate=1e-5, name="007", path="ä: #", fast=True, keep=None, more={"a": [1, 2.5e-8]}), DistillArguments(), FinetuneArguments(kan={"init": "exact"})],
    ids=lambda settings: type(settings).__name__,
)
def test_to_yaml_is_read_back_unchanged(tmp_path, settings):
    assert parse(yaml=to_yaml(settings), folder=tmp_path, cls=type(settings)) == settings


def test_help_names_every_setting_with_its_default_and_choices(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--steps", "5", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for field in dataclasses.fields(Settings):
        assert f"--{field.name} " in text
    assert "a number, 50 % or not (default: 0.1)" in text and "red|green" in text and "does something" in text


def test_help_of_no_command_imports_torch_or_transformers():
    code = """
import contextlib, io, sys
from kanformer import cli
for name in cli._COMMANDS:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            cli.main([name, "--help"])
        except SystemExit as leaving:
            assert leaving.code == 0, name
    assert f"kanformer {name}" in text.getvalue(), name
print(sorted({"torch", "transformers", "accelerate", "datasets", "matplotlib", "numpy", "sympy"} & set(sys.modules)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]" and len(_COMMANDS) == 13
