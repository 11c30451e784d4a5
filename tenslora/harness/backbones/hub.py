"""One-line errors for everything that can go wrong while a model is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tenslora.errors import TensLoRAError, first_line
from tenslora.files import elsewhere
from tenslora.harness.config import ModelConfig
from tenslora.harness.console import at_least
from tenslora.hub import is_repository

log = logging.getLogger(__name__)


def folder_or_repository(config: ModelConfig) -> str:
    """The source that transformers loads: a folder, or a repository of the hub.

    It is `config.checkpoint`, or else the repository `config.architecture`. Only a generic model, which has no
    architecture of its own, may have a repository as its checkpoint; an existing folder of that name comes first.

    Args:
        config: the model's settings.

    Raises:
        TensLoRAError: if there is no such folder, whose path the libraries would take for the name of a repository, or
            if the folder holds no model.
    """
    if config.checkpoint is None:
        return str(config.architecture)
    if (folder := Path(config.checkpoint)).is_dir():
        if not (folder / "config.json").is_file():
            raise TensLoRAError(f"model.checkpoint={config.checkpoint}: {_in_place_of_a_model(folder)}")
        return config.checkpoint
    if config.architecture is not None:
        raise TensLoRAError(f"model.checkpoint={config.checkpoint}: no such folder")
    if Path(config.checkpoint).exists() or not is_repository(config.checkpoint):
        raise TensLoRAError(
            f"model.checkpoint={config.checkpoint}: no such folder, and not the name of a repository of the hub"
        )
    return config.checkpoint


def _in_place_of_a_model(folder: Path) -> str:
    """What a folder without config.json holds, for a message."""
    if (folder / "adapter_config.json").is_file():
        return (
            "holds an adapter of PEFT and no model; must be the folder of a model, such as the adapter's base model "
            "with the adapter merged into it"
        )
    # A Trainer's output has a folder for each of its checkpoints, a repository in the hub's cache one for each commit.
    found = elsewhere(folder / "config.json", folder / "snapshots" / "config.json")
    if not found and (folder / "result.json").is_file():
        return f"holds a run and no model; python -m tenslora.harness.export {folder} --format merged makes one of it"
    return f"has no config.json, and so no model of transformers{found}"


@cache
def _announce(name: str, repository: str) -> None:
    # Cached, because a model's settings, its tokenizer and its weights are fetched one after the other.
    log.info("%s: looking for %s", name, repository)


def source_setting(config: ModelConfig) -> str:
    """The setting and the value that say which model it is, for the beginning of a message."""
    if config.checkpoint is not None:
        return f"model.checkpoint={config.checkpoint}"
    # conf/model has a file for a named model; a generic one has the name of its architecture.
    generic = config.name == str(config.architecture).replace("/", "--")
    return f"model.architecture={config.architecture}" if generic else f"model={config.name}"


@contextmanager
def _without_retries() -> Iterator[None]:
    """A context in which the hub's client does not warn of its retries, which are over twenty lines in a minute.

    It does say how long it waits for a hub that limits its requests, which may be an hour.
    """

    def matters(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.getMessage().startswith("Rate limited")

    name = "huggingface_hub.utils._http"
    retries = logging.getLogger(name)
    retries.addFilter(matters)
    try:
        with at_least(logging.ERROR, "huggingface_hub"), at_least(logging.WARNING, name):
            yield
    finally:
        retries.removeFilter(matters)


@contextmanager
def fetching(config: ModelConfig) -> Iterator[None]:
    """A context for loading a model's files, from the hub or from `config.checkpoint`.

    Args:
        config: the model's settings.

    Raises:
        TensLoRAError: in place of any error in the context; the message says what to do. A TypeError of timm is about
            the options, and is left to `building`.
    """
    is_local = config.checkpoint is not None and Path(config.checkpoint).exists()
    repository = config.checkpoint or config.architecture
    if not is_local:
        _announce(config.name, str(repository))
    try:
        with _without_retries():
            yield
    except TensLoRAError:
        raise
    # The hub's clients raise OSError, ValueError, RuntimeError and the types of their HTTP libraries.
    except Exception as error:
        if isinstance(error, TypeError) and config.library == "timm":
            raise
        reason = first_line(error)
        if reason.startswith("Can't load") and error.__context__:  # transformers speaks of another folder of that name
            reason = first_line(error.__context__)
        if reason.startswith("Weights only load failed"):
            reason = (
                "its weights are a pickle of other things than tensors, such as a whole model; save its state_dict()"
            )
        if is_local:
            raise TensLoRAError(
                f"model.checkpoint={config.checkpoint}: is not a checkpoint of {config.name} ({reason})"
            ) from error
        if config.library == "timm":
            repository = f"timm/{repository}"
        elif config.checkpoint is not None:
            raise TensLoRAError(
                f"model.checkpoint={repository}: there is no such folder, and it cannot be loaded from the Hugging "
                f"Face hub ({reason})"
            ) from error
        raise TensLoRAError(
            f"{source_setting(config)}: {repository} cannot be downloaded from the Hugging Face hub ({reason}); "
            f"download that repository where there is a network and set model.checkpoint to the folder, or set "
            f"model.pretrained=false for random weights"
        ) from error


@contextmanager
def building(config: ModelConfig) -> Iterator[None]:
    """A context for building a model from `config.options`.

    Args:
        config: the model's settings.

    Raises:
        TensLoRAError: in place of the libraries' errors for invalid options.
    """
    try:
        yield
    except (TensLoRAError, OSError, MemoryError):
        raise
    except Exception as error:  # the libraries check some options with types of their own
        kind = config.architecture or f"model of {config.name}"
        raise TensLoRAError(f"model.options={config.options}: do not make a {kind} ({first_line(error)})") from error


def require_readable(checkpoint: str, *files: Path) -> None:
    """Check that this user may read a checkpoint's files. safetensors says of one that is not to be read: no such file.

    Args:
        checkpoint: the setting's value.
        files: the files.

    Raises:
        TensLoRAError: if one may not be read.
    """
    for file in files:
        if not os.access(file, os.R_OK):
            raise TensLoRAError(f"model.checkpoint={checkpoint}: {file} cannot be read (Permission denied)")


def wrong_checkpoint(config: ModelConfig, path: Path | str, difference: str) -> TensLoRAError:
    """The error for a checkpoint that can be read but belongs to another model.

    Args:
        config: the settings of the model that was asked for.
        path: the checkpoint's path.
        difference: one difference between the checkpoint and the model.

    Returns:
        The error, which the caller raises.
    """
    architecture = f" ({config.architecture})" if config.architecture is not None else ""
    return TensLoRAError(f"model.checkpoint={path}: is not a checkpoint of {config.name}{architecture}: {difference}")
