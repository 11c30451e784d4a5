"""Config files of a user's own that Hydra would read wrongly, or refuse without their name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import yaml
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, ListConfig

from tenslora.errors import TensLoRAError, first_line
from tenslora.harness.commands import takes_one


def name_files_at_fault() -> None:
    """Let Hydra's loader of files name the file, and what is wrong with it."""
    Plugins.instance()  # imports the module of the loader anew
    source = SourcesRegistry.instance().resolve("file")
    if source.load_config is not _load:
        _OF_HYDRA[:] = [source.load_config]
        source.load_config = _load  # type: ignore[method-assign, assignment]


_OF_HYDRA: list[Callable[[ConfigSource, str], ConfigResult]] = []


def _load(source: ConfigSource, config_path: str) -> ConfigResult:
    file = os.path.join(source.path, config_path)
    file += "" if file.endswith((".yaml", ".yml")) else ".yaml"
    if source.is_config(config_path):
        try:
            with open(file, encoding="utf-8") as opened:
                text = opened.read()
        except UnicodeDecodeError as error:
            raise TensLoRAError(f"{file}: must be text in UTF-8 ({first_line(error)})") from error
        if text.startswith("\ufeff"):  # behind which Hydra does not see the line @package
            raise TensLoRAError(f"{file}: begins with a byte order mark; save it as UTF-8 without one")
        if late := re.match(r"\s*---.*\n(?:\s*\n)*#\s*@package\b.*", text):
            raise TensLoRAError(f"{file}: {late[0].splitlines()[-1]}: must be the first line, before ---")
    try:
        loaded = _OF_HYDRA[0](source, config_path)
    except (HydraException, yaml.YAMLError):  # whose messages name the file
        raise
    except Exception as error:
        raise TensLoRAError(f"{file}: {first_line(error)}") from error
    _require_one_option_each(loaded, file)
    return loaded


def _require_one_option_each(loaded: ConfigResult, file: str) -> None:
    if not isinstance(loaded.config, DictConfig) or not isinstance(chosen := loaded.config.get("defaults"), ListConfig):
        return
    for words, options in (item for each in chosen if isinstance(each, DictConfig) for item in each.items()):
        group = str(words).split()[-1].lstrip("/").partition("@")[0]  # of override /tensor_mode@adapter, tensor_mode
        if isinstance(options, ListConfig) and len(options) > 1 and takes_one(group):
            raise TensLoRAError(f"{file}: {words!s}: must be one option, and is {list(options)}")
