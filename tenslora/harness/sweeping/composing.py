"""The jobs that a sweep's command line stands for, and the settings of each of them.

Hydra takes a quarter of a second to compose a config, and most jobs of a sweep differ only in some values and in
options whose files do nothing but fill a group of their own. So Hydra composes one config for all jobs that differ in
nothing else:

- A job's values are set in the composed config by Hydra's own code.
- An option is exchanged by putting the content of its file in the other's place. `_Base.fills` says where that is all
  that Hydra would do.

Hydra composes every other job alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, permutations, product
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, RangeSweep
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict

from tenslora.errors import TensLoRAError
from tenslora.harness.config import RunConfig, validate
from tenslora.harness.sweeping.jobs import Composed

MOST_JOBS = 10_000
"""How many jobs a sweep can have."""


def words_of_jobs(loader: ConfigLoader, words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The overrides of each job of a sweep: every combination of the values that are given.

    Args:
        loader: Hydra's.
        words: the overrides of the sweep, some with several values. A later value of a setting replaces an earlier one.

    Returns:
        For each job its words, in the order in which the settings were first given.

    Raises:
        TensLoRAError: for a setting without a value, for an interval, or for more than `MOST_JOBS` jobs.
    """
    values: dict[str, list[str]] = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(words)):
        key = override.get_key_element()
        if override.is_sweep_override():
            values[key] = [f"{key}={value}" for value in values_of(override)]
        else:
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
    count = 1
    for key, given in values.items():
        count *= len(given)
        if count > MOST_JOBS:
            raise TensLoRAError(f"{key}: with all its values the sweep has more than {MOST_JOBS:,} jobs; divide it")
    return product(*values.values())


def values_of(override: Override) -> list[str]:
    """The values that a word of the command line gives a setting.

    Args:
        override: the word, which has several.

    Raises:
        TensLoRAError: for no value, for an interval, or for more than `MOST_JOBS`.
    """
    line = override.input_line
    if not override.is_discrete_sweep():
        raise TensLoRAError(f"{line}: must be a list of values or a range")
    try:
        sweep = override.value()
        if isinstance(sweep, RangeSweep) and len(list(islice(sweep.range(), MOST_JOBS + 1))) > MOST_JOBS:
            raise TensLoRAError(f"{line}: must be at most {MOST_JOBS:,} values, because each is a job at least")
        values = list(override.sweep_string_iterator())
    except TensLoRAError:
        raise
    except ValueError as error:  # a step of zero
        raise TensLoRAError(f"{line}: {error}") from error
    if not values:
        raise TensLoRAError(f"{line}: must be at least one value")
    return values


class Composer:
    """Composes the settings of jobs as Hydra does.

    Args:
        loader: Hydra's.
        config: the config of the sweep, which Hydra composed without the settings that vary.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        self._loader = _Loader(loader.get_search_path())
        self._sweep = config
        self._parsed: dict[str, Override] = {}
        self._groups: dict[str, bool] = {}
        self._bases: dict[tuple[str, ...], _Base] = {}
        self._runs: dict[tuple[str, ...], RunConfig] = {}
        self._configs: dict[tuple[str, ...], DictConfig] = {}

    def composed(self, words: tuple[str, ...]) -> Composed:
        """One job, with its checked settings.

        Args:
            words: the job's overrides.

        Raises:
            HydraException: for a word that Hydra cannot use.
            TensLoRAError: for an invalid setting.
        """
        return Composed(words, self.run(words), lambda: self.config(words))

    def run(self, words: tuple[str, ...]) -> RunConfig:
        """The checked settings of one job.

        Args:
            words: the job's overrides.
        """
        # Runs that differ in the seed alone are validated once.
        others = tuple(word for word in words if not word.startswith("seed="))
        seed = next((self._parse(word).value() for word in words if word.startswith("seed=")), None)
        if others in self._runs and type(seed) is int:
            return self._runs[others].with_seed(seed)
        config = self._shared(words)
        if config is None:
            return validate(self.alone(words))
        run = self._runs[others] = validate(config)
        return run

    def config(self, words: tuple[str, ...]) -> DictConfig:
        """The config of one job, which may lack Hydra's own settings. Jobs that differ in the seed alone share one.

        Args:
            words: the job's overrides.
        """
        others = tuple(word for word in words if not word.startswith("seed="))
        if others not in self._configs:
            shared = self._shared(words)
            self._configs[others] = self.alone(words) if shared is None else copy.deepcopy(shared)
        return self._configs[others]

    def alone(self, words: Sequence[str]) -> DictConfig:
        """The config as Hydra composes it.

        Args:
            words: the job's overrides.
        """
        return self._loader.load_sweep_config(self._sweep, list(words))

    def _shared(self, words: Sequence[str]) -> DictConfig | None:
        """The config of one job, which the next call may change; None for a job that has to be composed alone."""
        overrides = list(map(self._parse, words))
        if not all(map(_is_plain, overrides)):
            return None
        # Hydra takes all options first and sets all values afterwards, in whatever order the words stand.
        options = [each for each in overrides if self._is_group(each.key_or_group)]
        values = [each for each in overrides if not self._is_group(each.key_or_group)]
        chosen = {each.key_or_group: option for each in options if isinstance(option := each.value(), str)}
        keys = [each.key_or_group for each in values]
        if len(chosen) < len(options) or any(a.startswith(f"{b}.") for a, b in permutations(keys, 2)):
            return None
        base = self._base(chosen)
        return base.config(chosen, values) if base else None

    def _base(self, chosen: Mapping[str, str]) -> _Base | None:
        words = tuple(f"{group}={option}" for group, option in chosen.items())
        if words not in self._bases:
            base = next((base for base in self._bases.values() if base.becomes(chosen)), None)
            self._bases[words] = base or _Base(self._loader, self.alone(words), self._loader.defaults, chosen)
        base = self._bases[words]
        return base if base.is_literal else None

    def _is_group(self, key: str) -> bool:
        if key not in self._groups:
            self._groups[key] = self._loader.repository.group_exists(key)
        return self._groups[key]

    def _parse(self, word: str) -> Override:
        if word not in self._parsed:
            [self._parsed[word]] = OverridesParser.create().parse_overrides([word])
        return self._parsed[word]


class _Base:
    """A config that jobs share which choose the same options, or options that only fill their groups.

    Args:
        loader: loads the files.
        config: the config as Hydra composed it.
        defaults: the files that it was composed of.
        chosen: the option of each group that was chosen on the command line.
    """

    def __init__(
        self, loader: _Loader, config: DictConfig, defaults: Sequence[ResultDefault], chosen: Mapping[str, str]
    ) -> None:
        self.loader = loader
        with open_dict(config):
            config.pop("hydra")
        self.original = config
        self.chosen = dict(chosen)
        files = [loader.repository.read(each.config_path) for each in defaults if each.config_path]
        # Another interpolation may refer to anything, also to Hydra's own settings.
        self.is_literal = all(
            "${" not in text or text.startswith("${unless_generic:") for text in _texts(OmegaConf.to_container(config))
        )
        names_choices = any(file and "${" in repr(file.defaults_list) for file in files)
        self.fillable = set() if names_choices else {group for group in chosen if self._only_fills(group, defaults)}
        self.copies: dict[tuple[str, ...], tuple[DictConfig, dict[str, str]]] = {}

    def _only_fills(self, group: str, defaults: Sequence[ResultDefault]) -> bool:
        """Whether the content of a group is the content of its option's file, and no other file has a part in it."""
        touching = [each for each in defaults if group in self.loader.groups_in(each)]
        return (
            "/" not in group
            and [(each.override_key, each.config_path) for each in touching]
            == [(group, f"{group}/{self.chosen[group]}")]
            and self.loader.fills(group, self.chosen[group])
        )

    def becomes(self, chosen: Mapping[str, str]) -> bool:
        """Whether the config becomes that of these options by exchanging the content of groups."""
        return chosen.keys() == self.chosen.keys() and all(
            option == self.chosen[group] or (group in self.fillable and self.loader.fills(group, option))
            for group, option in chosen.items()
        )

    def config(self, chosen: Mapping[str, str], values: Sequence[Override]) -> DictConfig:
        """The config with these options and values, in place of those of the last call for the same settings."""
        keys = tuple(each.key_or_group for each in values)
        if keys not in self.copies:
            self.copies[keys] = copy.deepcopy(self.original), dict(self.chosen)
        config, has = self.copies[keys]
        for group, option in chosen.items():
            if option != has[group]:
                loaded = self.loader.repository.load_config(f"{group}/{option}")
                assert loaded is not None
                with open_dict(config):
                    config[group] = loaded.config
                has[group] = option
        self.loader.set(config, values)
        return config


class _Loader(ConfigLoaderImpl):
    """Hydra's loader of configs, which reads each file once.

    Args:
        path: the folders and packages in which the files are.
    """

    def __init__(self, path: ConfigSearchPath) -> None:
        super().__init__(path)
        self.repository: _Repository = _Repository(path)
        self.defaults: list[ResultDefault] = []
        """The files of the config that was composed last."""
        self._groups: dict[tuple[str | None, str | None], set[str]] = {}

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        self.defaults = defaults
        return super()._compose_config_from_defaults_list(defaults, repo)

    def groups_in(self, default: ResultDefault) -> set[str]:
        """The groups, and the settings outside of groups, in which one file of a composed config has a part."""
        key = (default.config_path, default.package)
        if key not in self._groups:
            config = self._load_single_config(default, self.repository).config
            assert isinstance(config, DictConfig)
            self._groups[key] = set(map(str, config))
        return self._groups[key]

    def fills(self, group: str, option: str) -> bool:
        """Whether an option's file holds values for its group and does nothing else."""
        loaded = self.repository.read(f"{group}/{option}")
        return loaded is not None and not loaded.defaults_list and loaded.header["package"] is None

    def set(self, config: DictConfig, values: Sequence[Override]) -> None:
        """Set values in a config as Hydra sets those of a command line."""
        self._apply_overrides_to_config(list(values), config)


class _Repository(ConfigRepository):
    """Hydra's repository of config files, which reads each file once."""

    def __init__(self, path: ConfigSearchPath) -> None:
        self.loaded: dict[str, ConfigResult | None] = {}
        super().__init__(path)

    def __deepcopy__(self, memo: object) -> _Repository:  # Hydra copies it for each config
        return self

    def load_config(self, config_path: str) -> ConfigResult | None:
        return copy.deepcopy(self.read(config_path))  # because what is composed of it is changed later

    def read(self, config_path: str) -> ConfigResult | None:
        """One config file, which is not to be changed; None if there is no such file."""
        if config_path not in self.loaded:
            self.loaded[config_path] = super().load_config(config_path)
        return self.loaded[config_path]


def _is_plain(override: Override) -> bool:
    """Whether an override gives an existing setting of the app a literal value, or a group an option."""
    return (
        override.type is OverrideType.CHANGE
        and override.package is None
        and not override.is_hydra_override()
        and not isinstance(override.value(), dict)
        and not any("${" in text for text in _texts([override.value()]))
    )


def _texts(value: Any) -> Iterator[str]:
    # Yields every text in a container, at any depth.
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
