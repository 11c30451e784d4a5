"""Tab completion of options that lie in folders, such as experiment=paper/dtd, which Hydra's own leaves out."""

from __future__ import annotations

from hydra.plugins.completion_plugin import CompletionPlugin

from tenslora.harness.config.spelling import options_of


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
