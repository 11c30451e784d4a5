"""The Hugging Face hub: the names of its repositories, a download and an upload. Importing this needs no package."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenslora.errors import TensLoRAError, first_line

_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


def is_repository(name: str, *, with_owner: bool = False) -> bool:
    """Whether a repository of the hub may have this name. A path that begins with a dot, a slash or ~ is none.

    >>> is_repository("google/vit-base"), is_repository("gpt2"), is_repository("./vit"), is_repository("a/b/c")
    (True, True, False, False)

    Args:
        name: the name.
        with_owner: whether the name must have an owner (user/name), as all repositories but some old ones do.
    """
    return _NAME.fullmatch(name) is not None and ("/" in name or not with_owner)


def download(name: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Download files of a repository, or find them in the cache.

    Args:
        name: the repository, user/name.
        files: the names of the files; those that the repository lacks are left out.
        revision: a branch, a tag or a commit; None for the newest commit.

    Returns:
        The folder in the cache that holds the files.

    Raises:
        TensLoRAError: if huggingface_hub is not installed, or if there is no such repository.
    """
    client = _client(name)
    try:
        return Path(client.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the client raises OSError, ValueError and the types of its HTTP library
        raise TensLoRAError(f"{name}: no such folder, and not found on the hub ({_reason(error)})") from error


def upload(folder: Path, name: str, *, card: str, message: str, replaced: str, private: bool = False) -> str:
    """Upload a folder, with the account that is logged in on the hub.

    Args:
        folder: the folder.
        name: the repository, user/name; it is created if it is missing.
        card: the model card, which is uploaded as README.md unless the repository has one.
        message: the message of the commit.
        replaced: a pattern; files of the repository that match it and are not in the folder are deleted.
        private: whether a repository that is created can be seen by its owner alone.

    Returns:
        The address of the commit.

    Raises:
        TensLoRAError: if huggingface_hub is not installed, or if the hub refuses.
    """
    client = _client(name)
    try:
        client.create_repo(name, private=private, exist_ok=True)
        if not client.file_exists(name, "README.md"):
            (folder / "README.md").write_text(card, encoding="utf-8")
        commit = client.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message=message, delete_patterns=replaced
        )
    except Exception as error:  # the client raises OSError, ValueError and the types of its HTTP library
        raise TensLoRAError(f"repo_id={name}: the hub refuses ({_reason(error)})") from error
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):  # the login page of a network, say
        return "what answers under the hub's address is not the hub: its answer is no JSON"
    if isinstance(error, UnicodeDecodeError):
        return "the hub's cache holds a damaged file; delete the repository's folder there"
    return first_line(error)


def _client(name: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise TensLoRAError(f"{name}: the hub needs another package, pip install huggingface_hub") from error
    return huggingface_hub
