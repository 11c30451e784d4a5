"""Files that are never half written: each is written under another name, and renamed when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILE, HEAD_FILE = "adapter.safetensors", "head.safetensors"
"""The names of an adapter and of the head trained beside it, in a folder of `save_pretrained` and in that of a run."""

_HEADER = "tenslora"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically and durably.

    If the process is killed or the disk is full, an existing file at that path stays as it was.

    Args:
        path: the file's path; missing folders are created.
        content: the file's new content.

    Raises:
        TensLoRAError: if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TensLoRAError(
            f"{path}: cannot be written ({error.strerror}); a file that existed before stays as it was"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `write_bytes` does.

    Args:
        path: the file's path.
        value: anything that JSON can hold.

    Raises:
        TensLoRAError: if the file cannot be written.
        ValueError: if `value` contains NaN or infinity.
    """
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write a safetensors file as `write_bytes` does. Equal tensors and headers give equal bytes.

    Args:
        path: the file's path.
        tensors: the tensors by name.
        header: data to store with the tensors; anything that JSON can hold.

    Returns:
        The path.

    Raises:
        TensLoRAError: if the file cannot be written.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # The header is a single entry, because safetensors writes several in an order that changes between processes.
    write_bytes(path, save(plain, metadata={_HEADER: json.dumps(header, sort_keys=True)}))
    return path


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a safetensors file.

    Args:
        path: the file's path.

    Returns:
        The header that `write_safetensors` wrote, and the tensors by name. The header of any other safetensors file is
        empty.

    Raises:
        TensLoRAError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise TensLoRAError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise TensLoRAError(f"{path}: not a readable safetensors file ({error})") from error
