"""Tab completion of options that lie in folders, such as experiment=paper/dtd, which Hydra's own leaves out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.completion_plugin import CompletionPlugin

from tenslora.errors import TensLoRAError, require_one_of
from tenslora.harness.config.spelling import options_of

_WAYS = ("install", "uninstall", "query")


def check_completion(words: Sequence[str]) -> None:
    """Check what the command line asks of --shell-completion.

    Args:
        words: the words of the command line.

    Raises:
        TensLoRAError: unless it is one thing that Hydra can do, for a shell that Hydra knows.
    """
    asked = [word.partition("=") for word in words if word.partition("=")[0] in _WAYS]
    plugins: list[Any] = Plugins.instance().discover(CompletionPlugin)
    shells = sorted(plugin.provides() for plugin in plugins)
    if len(asked) != 1:
        raise TensLoRAError(
            f"--shell-completion: needs one of install=<shell>, uninstall=<shell> and query=<shell>, with "
            f"{', '.join(shells)} for <shell>"
        )
    way, _, shell = asked[0]
    require_one_of(way, shell, shells)
    if way == "query" and "COMP_LINE" not in os.environ:
        raise TensLoRAError(f"query={shell}: is for the shell, which sets COMP_LINE; install={shell} sets the shell up")


def complete_options_in_folders() -> None:
    """Let Hydra's completion of every shell offer the options in the folders of a group, too."""
    of_hydra = CompletionPlugin._query_config_groups

    def query(plugin: CompletionPlugin, word: str, config_name: str | None, words: list[str]) -> tuple[list[str], bool]:
        key, equals, _ = word.partition("=")
        options = options_of(plugin.config_loader, key.lstrip("+~")) if equals else []
        if not options:
            return of_hydra(plugin, word, config_name, words)
        return [f"{key}={option}" for option in options if f"{key}={option}".startswith(word)], True

    CompletionPlugin._query_config_groups = query  # type: ignore[assignment, method-assign]
