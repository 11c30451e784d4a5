"""Finds the word of a command line that names a setting or an option that does not exist, and the nearest that does."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from tenslora.errors import TensLoRAError
from tenslora.harness.config.checks import did_you_mean, no_such_setting, shown


@contextlib.contextmanager
def reading(conf: Path, own: str | None = None) -> Iterator[ConfigLoader]:
    """A context in which Hydra composes configs from a folder, and from a user's own one behind it.

    Args:
        conf: the folder of the config files.
        own: the folder that --config-dir names; None if there is none.

    Returns:
        Hydra's loader of the config files.
    """
    with initialize_config_dir(str(conf), version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        if own is not None:
            path = loader.get_search_path()
            path.prepend("command-line", f"file://{Path(own).absolute()}", anchor="schema")  # which has to be the last
            loader.repository = ConfigRepository(path)
        yield loader


def misspelt(words: Sequence[str], conf: Path, config_name: str, own: str | None = None) -> str | None:
    """Answer the first word of a command line that Hydra could not use.

    Hydra's own answers do not say what the word should have been. Where a word at fault stands beside a sweep over
    several values, Hydra even blames the sweep.

    Args:
        words: the overrides of the command line.
        conf: the folder of the config files.
        config_name: the name of the main config file.
        own: the folder of a user's own config files; None if there is none.

    Returns:
        The line for the user; None if every word names something that exists, or if the words cannot be parsed.
    """
    try:
        with reading(conf, own) as of_files:
            loader: Any = of_files
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(words))
            loader._process_config_searchpath(config_name, overrides, loader.repository)
            groups = [override for override in overrides if options_of(loader, override.key_or_group)]
            choices = []
            for override in groups:
                for value in _values(override):
                    if line := _not_an_option(loader, override.key_or_group, value):
                        file = Path(own or "", override.key_or_group, f"{value}.yml")
                        is_own = own is not None and file.is_file()
                        return f"{override.key_or_group}={value}: {file} must end in .yaml" if is_own else line
                choices += [override.input_line or ""] if not override.is_sweep_override() else []
            composed = compose(config_name, choices, return_hydra_config=True)
    except Exception:  # of the files too, which Hydra's own error is about
        return None
    settings = list(_settings(composed))
    for override in overrides:
        key = override.key_or_group
        if override in groups or override.is_add() or key in settings:
            continue
        of_hydra = key.partition(".")[0] == "hydra"
        return no_such_setting(key, [other for other in settings if (other.partition(".")[0] == "hydra") == of_hydra])
    return None


def wrong_file(error: BaseException) -> str | None:
    """The line for a config file that is no YAML, or that chooses options in a way in which Hydra does not.

    Args:
        error: what Hydra says.

    Returns:
        The line; None for any other error.
    """
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name}, line {mark.line + 1}: is not YAML ({error.problem})"
    if isinstance(error, RecursionError):
        return "a config file's defaults name the file itself; look at the options that were chosen last"
    found = re.match(r"In '([\w.-]+)/(.+)': Could not override '([^'@]+)(@?).*'\.\nDid you mean to over", str(error))
    if found is None:
        return None
    group, option, other, is_relative = found.groups()
    if is_relative:  # the option of the other group would be a part of this group
        return (
            f"{group}/{option}.yaml: must begin with the line # @package _global_, with nothing before it, to choose "
            f"an option of {other}"
        )
    elsewhere = "" if group == "experiment" else "; a file in experiment/ can"
    return f"{group}/{option}.yaml: cannot choose an option of {other}, which is chosen after {group}{elsewhere}"


def parsed(word: str) -> Override | None:
    """A setting on the command line as Hydra reads it; None if it cannot be read.

    Args:
        word: the setting with its value.
    """
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def in_quotes(word: str) -> str | None:
    """A setting whose value is one text, as it has to be typed in a shell; None if the value has quotes of its own.

    >>> print(in_quotes("dataset.root=reviews (copy).csv"))
    'dataset.root="reviews (copy).csv"'

    Args:
        word: the setting with its value, which may be one that Hydra cannot read, or takes for several.
    """
    key, _, value = word.partition("=")
    for quote in "\"'" if value[:1] not in ("'", '"') else ():
        typed = f"{key}={quote}{value.replace(quote, chr(92) + quote)}{quote}"
        if (override := parsed(typed)) and override.value() == value:
            return shlex.quote(typed)
    return None


def unreadable(word: str) -> str:
    """The line for a setting whose value Hydra cannot read, with the words to type in its place.

    Args:
        word: the setting with its value.
    """
    typed = in_quotes(word)
    line = f"{word}: is not a value that Hydra can read; other characters need quotes{f', as in {typed}' * bool(typed)}"
    return str(TensLoRAError(line))


def options_of(loader: ConfigLoader, group: str) -> list[str]:
    """The options of a group, with those in its folders, such as paper/dtd. Files in base/ are no options.

    Args:
        loader: Hydra's loader of the config files.
        group: the group's name, such as experiment.
    """
    options = [option for option in loader.get_group_options(group) if option != "base"]
    for folder in loader.list_groups(group):
        if folder != "base":
            options += [f"{folder}/{option}" for option in options_of(loader, f"{group}/{folder}")]
    return options


def _values(override: Override) -> Iterator[Any]:
    if override.is_delete():
        return
    value = override.value()
    if override.is_sweep_override():
        yield from override.sweep_string_iterator()
    elif isinstance(value, list):  # chooses several options
        yield from value
    else:
        yield value


def _not_an_option(loader: ConfigLoader, group: str, value: Any) -> str | None:
    name = str(value)
    folder, _, option = name.rpartition("/")
    options = options_of(loader, group)
    beside = loader.get_group_options(f"{group}/{folder}" if folder else group)
    if isinstance(value, str) and option in beside and "base" not in folder.split("/"):
        return None
    hint = "; leave it out for none of them" if value is None and group in ("experiment", "debug") else ""
    if group in ("hydra/launcher", "hydra/sweeper"):
        hint = "; another one is there once its plugin of Hydra is installed"
    return f"{group}={shown(value)}: must be one of {', '.join(options)}{did_you_mean(name, options)}{hint}"


def _settings(config: DictConfig, group: str = "") -> Iterator[str]:
    for name in config:
        yield f"{group}{name!s}"
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _settings(node, f"{group}{name!s}.")
