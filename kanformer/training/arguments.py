"""Settings from one YAML file and the command line: dataclass fields, strict keys, no heavy import."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kanformer.errors import ConfigError, did_you_mean

T = TypeVar("T")


def option(default: Any, text: str, choices: Sequence[str] | None = None, **limits: float) -> Any:
    """A dataclass field with a help text, allowed values and limits (`ge`, `gt`, `le`)."""
    metadata = {"help": text, "choices": choices, "limits": limits}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_arguments(cls: type[T], argv: Sequence[str], prog: str, description: str) -> T:
    """Builds `cls` from `--config FILE` and `--name value` overrides (`--name.key value` for a field that is a mapping, or for each of a list of them).

    Raises:
        ConfigError: an unknown key, a value of the wrong type or outside its limits, an unreadable file.
        SystemExit: after --help.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    if "-h" in argv or "--help" in argv:
        print(_help(fields, hints, prog, description))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    overrides: list[tuple[str, str]] = []
    for name, text in _pairs(argv, fields, hints):
        if name == "config":
            values.update(read_yaml(text, fields))
        else:
            overrides.append((name, text))
    for name, text in overrides:
        _override(values, name, text, fields, hints)
    return from_mapping(cls, values, "command line")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds `cls` from a mapping of settings; `where` says in an error which mapping it is.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or outside its limits.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    good = {}
    for name, value in values.items():
        _known(str(name), fields, where)
        good[name] = _convert(value, hints[name], name)
        _check(fields[name], good[name])
    return cls(**good)


def read_yaml(path: str, known: typing.Iterable[str]) -> dict[str, Any]:
    """The mapping in a YAML file, its keys checked against `known`."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("read the config file", subject=path, got=" ".join(str(error).split())) from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError("read the config file", subject=path, got=type(values).__name__, expected="a mapping of settings")
    for key in values:
        _known(str(key), known, path)
    return values


def to_yaml(arguments: Any) -> str:
    """The resolved settings, readable by `parse_arguments`."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(arguments), sort_keys=False)


def _known(name: str, known: typing.Iterable[str], where: str) -> None:
    if name not in set(known):
        raise ConfigError("read the settings", subject=where, got=f"unknown key {name!r}", hint=did_you_mean(name, known))


def _pairs(argv: Sequence[str], fields: dict, hints: dict) -> list[tuple[str, str]]:
    """--name value, --name=value, and a bare --flag for a boolean."""
    pairs, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError("read the command line", got=repr(word), expected="--name value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name != "config":
            _known(name.split(".")[0], fields, "command line")
        if not equals:
            flag = bool in _alternatives(hints.get(name, str))
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif flag:
                value = "true"
            else:
                raise ConfigError("read the command line", got=f"--{name} without a value")
        pairs.append((name, value))
    return pairs


def _override(values: dict[str, Any], name: str, text: str, fields: dict, hints: dict) -> None:
    import yaml

    root, dot, key = name.partition(".")
    if dot and not (key and dict in _alternatives(hints[root])):
        raise ConfigError("read the command line", got=f"--{name}", expected=f"--{root} value")
    try:
        value = text if str in _alternatives(hints[root]) and text != "null" else yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    value = None if text == "None" else value
    if dot:
        default = fields[root].default_factory() if fields[root].default_factory is not dataclasses.MISSING else {}
        mapping = values.get(root, default)
        if isinstance(mapping, list) and list in _alternatives(hints[root]):
            values[root] = [{**_convert(entry, dict, root), key: _number(value)} for entry in mapping]
        else:
            values[root] = {**_convert(mapping or {}, dict, root), key: _number(value)}
    else:
        values[root] = value


def _number(value: Any) -> Any:
    """1e-3, which YAML 1.1 reads as text, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """The value in its field's type; 1e-3 is read as a string by YAML 1.1 and means a number."""
    allowed = _alternatives(hint)
    for kind in allowed:
        plain = typing.get_origin(kind) or kind
        if kind is type(None):
            if value is None:
                return None
        elif plain is float and not isinstance(value, bool) and isinstance(value, int | float | str):
            try:
                return float(value)
            except ValueError:
                continue
        elif plain is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        elif isinstance(value, plain):
            return value
    raise ConfigError("read the settings", subject=name, got=repr(value), expected=" or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed))


def _check(field: dataclasses.Field, value: Any) -> None:
    choices, limits = field.metadata.get("choices"), field.metadata.get("limits") or {}
    if choices and value is not None and value not in choices:
        raise ConfigError(
            "read the settings", subject=field.name, got=repr(value), expected=f"one of {', '.join(choices)}", hint=did_you_mean(str(value), choices)
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        ge, gt, le = limits.get("ge", -math.inf), limits.get("gt", -math.inf), limits.get("le", math.inf)
        if not (math.isfinite(value) and ge <= value <= le and value > gt):
            text = " and ".join(f"{sign} {limit:.10g}" for sign, limit in ((">=", ge), (">", gt), ("<=", le)) if math.isfinite(limit))
            raise ConfigError("read the settings", subject=field.name, got=str(value), expected=f"a number {text}" if text else "a finite number")


def _help(fields: dict[str, dataclasses.Field], hints: dict[str, Any], prog: str, description: str) -> str:
    parser = argparse.ArgumentParser(prog=prog, description=description, add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; the command line wins")
    for name, field in fields.items():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory() if callable(field.default_factory) else None
        kind = "|".join(getattr(part, "__name__", str(part)) for part in _alternatives(hints[name]) if part is not type(None))
        choices = field.metadata.get("choices")
        parser.add_argument(
            f"--{name}", default=default, metavar="|".join(choices) if choices else kind.upper(), help=field.metadata.get("help", "").replace("%", "%%")
        )
    return parser.format_help()
