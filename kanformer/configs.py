"""One KANConfig or several: a block gets the first that selects it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kanformer.config import KANConfig
from kanformer.errors import ConfigError

Configs = KANConfig | Sequence[KANConfig] | None


def make_configs(config: Configs, overrides: Mapping[str, Any]) -> tuple[KANConfig, ...]:
    """One config or several as a tuple, with the overrides in each.

    Raises:
        ConfigError: something else than configs, none at all, or configs that differ in what holds for the whole model.
    """
    given = (KANConfig(),) if config is None else (config,) if isinstance(config, KANConfig) else config
    if not isinstance(given, Sequence) or isinstance(given, str) or not given or not all(isinstance(each, KANConfig) for each in given):
        kinds = sorted({type(each).__name__ for each in given}) if isinstance(given, list | tuple) else type(given).__name__
        raise ConfigError("read the configuration", got=kinds or "an empty list", expected="kanformer.KANConfig, a list of them, or None")
    configs = tuple(each.replace(**overrides) if overrides else each for each in given)
    if len({each.keep_original for each in configs}) > 1:
        raise ConfigError("use these configurations together", got="keep_original=True and False", expected="one value: it holds for the whole model")
    return configs


def configs_from(values: Mapping[str, Any] | Sequence[Mapping[str, Any]], **overrides: Any) -> tuple[KANConfig, ...]:
    """The configs of a mapping of settings or of a list of them, as a YAML file has them; `overrides` win.

    Raises:
        ConfigError: as `KANConfig.from_dict`, or an entry that is no mapping.
    """
    entries = [values] if isinstance(values, Mapping) else list(values)
    wrong = next((entry for entry in entries if not isinstance(entry, Mapping)), None)
    if wrong is not None or not entries:
        raise ConfigError("read the KAN settings", got=repr(wrong) if entries else "an empty list", expected="a mapping of KANConfig values, or a list of them")
    return make_configs([KANConfig.from_dict({**entry, **overrides}) for entry in entries], {})
