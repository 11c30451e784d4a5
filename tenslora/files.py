"""Files that are never half written: each is written under another name, and renamed when it is complete."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError, first_line, os_reason
from tenslora.forms import shown

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
    if not path.name:
        raise TensLoRAError(f"{path}: cannot be written (is not the name of a file)")
    require_no_device(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # a ValueError for a character that no path can have
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        reason = os_reason(error) if isinstance(error, OSError) else error
        raise TensLoRAError(
            f"{path}: cannot be written ({reason}); a file that existed before stays as it was"
        ) from error


def temporary_path(path: Path) -> Path:
    """A path beside a file, hidden and with a name that nobody else takes.

    A process may write one file twice at once: in threads, or because a signal comes while it writes.

    Args:
        path: the file's path.

    Returns:
        A path at which nothing is yet. It ends in .tmp.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


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


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], finite: Container[str] = ()
) -> Path:
    """Write a safetensors file as `write_bytes` does. Equal tensors and headers give equal bytes.

    Args:
        path: the file's path.
        tensors: the tensors by name. Those that fully_shard has divided are put together, for which every process has
            to call this.
        header: data to store with the tensors; anything that JSON can hold.
        finite: the names of the tensors that must not hold a NaN or an infinity, because no reader would take them.

    Returns:
        The path.

    Raises:
        TensLoRAError: if the file cannot be written.
    """
    import torch
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise TensLoRAError(f"{path}: cannot be written ({name} is on the device meta and has no numbers)")
        if str(tensor.layout) != "torch.strided":
            raise TensLoRAError(f"{path}: cannot be written ({name} is sparse, which safetensors cannot hold)")
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = getattr(tensor.detach(), "full_tensor", tensor.detach)().cpu().contiguous()
        if type(own) is not torch.Tensor:
            raise TensLoRAError(
                f"{path}: cannot be written ({name} is a {type(own).__name__}, as after quantisation, and safetensors "
                f"holds plain tensors)"
            )
        if name in finite:
            require_finite(f"{path}: cannot be written: {name}", own)
        if (memory := own.untyped_storage().data_ptr()) in seen:  # safetensors refuses tensors that share memory
            own = own.clone()
        seen.add(memory)
        plain[name] = own
    # The header is a single entry, because safetensors writes several in an order that changes between processes.
    write_bytes(path, save(plain, metadata={_HEADER: json.dumps(header, sort_keys=True)}))
    return path


def require_no_device(path: Path) -> None:
    """Check that no named pipe and no device is at a path where a file is to be written, which would take its place.

    Args:
        path: the file's path.

    Raises:
        TensLoRAError: if there is one, also through a link.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # there is nothing, or the write says what is wrong
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise TensLoRAError(f"{path}: cannot be written (is a pipe or a device; must be a file)")


def require_file(path: Path) -> None:
    """Check that there is a file to read. A named pipe or a device is none: it could be read for ever.

    Args:
        path: the file's path.

    Raises:
        TensLoRAError: if there is nothing at that path, something else, or something out of reach.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():  # as DVC and git-annex leave what was not fetched
            raise TensLoRAError(f"{path}: is a link to {path.readlink()}, which does not exist") from error
        raise TensLoRAError(f"{path}: no such file{elsewhere(path)}") from error
    except (OSError, ValueError) as error:  # a ValueError for a character that no path can have
        raise TensLoRAError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(mode):
        other = "folder" if stat.S_ISDIR(mode) else "pipe or a device"
        raise TensLoRAError(f"{path}: must be a file, not a {other}")


def elsewhere(*paths: Path) -> str:
    """The end of a message that files are missing: where a file of such a name is, one folder further down.

    Args:
        paths: those of the missing files.

    Returns:
        One path after a semicolon; an empty text if there is no such file.
    """
    with contextlib.suppress(OSError, ValueError):
        found = sorted(each for path in paths for each in path.parent.glob(f"*/{glob.escape(path.name)}"))
        return f"; there is {found[0]}" if found else ""
    return ""


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: the file's path.

    Returns:
        What the file holds. Its form is not checked; `forms.from_json` does that.

    Raises:
        TensLoRAError: if the file is missing or not JSON.
    """
    require_file(path)
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TensLoRAError(f"{path}: not a readable JSON file ({first_line(error)})") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as the command sha256sum prints it.

    Args:
        path: the file.

    Raises:
        TensLoRAError: if it cannot be read.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TensLoRAError(f"{path}: cannot be read ({error.strerror})") from error


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file, and none of its tensors. It needs no torch.

    Args:
        path: the file's path.

    Returns:
        The header that `write_safetensors` wrote; empty for any other safetensors file.

    Raises:
        TensLoRAError: if the file is missing or damaged.
    """
    with _opened(path, "numpy") as (header, _):
        return header


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
    with _opened(path, "pt") as (header, file):
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_hashed_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Read a safetensors file, and the SHA-256 of what was read, also where another file takes its place meanwhile.

    Args:
        path: the file's path. It is read into memory whole.

    Returns:
        The header and the tensors, as from `read_safetensors`, and the SHA-256.

    Raises:
        TensLoRAError: if the file is missing or damaged.
    """
    from safetensors.torch import load

    require_file(path)
    with _readable(path):
        data = path.read_bytes()
        tensors = dict(sorted(load(data).items()))  # first, because it checks the length of what is before them
        before = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return _own_header(before.get("__metadata__")), tensors, hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _opened(path: Path, framework: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """The header of a safetensors file, and the open file."""
    from safetensors import safe_open

    require_file(path)
    with _readable(path):
        with open(path, "rb"):  # safe_open calls it a missing file where the process may open no more
            pass
        with safe_open(path, framework=framework) as file:
            yield _own_header(file.metadata()), file


def _own_header(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    header = json.loads((metadata or {}).get(_HEADER, "{}"))
    if not isinstance(header, dict):
        raise ValueError(f"its header must be an object, not {shown(header)}")
    return header


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:  # the last one torch's
        raise TensLoRAError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def require_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that a file holds tensors of the given names and shapes and no others, all with finite numbers.

    Args:
        tensors: the file's tensors by name, or whatever a program gives in their place.
        shapes: the name and the shape of each tensor that the file must hold.

    Raises:
        TensLoRAError: if it does not; the message names the first tensor at fault.
    """
    for name in shapes:
        if name not in tensors:
            raise TensLoRAError(f"lacks {name}")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise TensLoRAError(f"has {name}, which does not belong there")
        if (kind := unlike_a_files(tensor)) is not None:
            raise TensLoRAError(f"{name} is a {kind}; must be a dense torch.Tensor with numbers")
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise TensLoRAError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(shapes[name])}")
        require_finite(name, tensor)


def unlike_a_files(value: Any) -> str | None:
    """What a value is that no tensor of a safetensors file can be; None for a dense tensor with numbers."""
    import torch

    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_meta:
        return "tensor on the device meta"
    return None if value.layout == torch.strided else "sparse tensor"


def require_finite(name: str, tensor: Tensor) -> None:
    """Check that a tensor holds floating-point numbers that are finite, also in float32.

    Args:
        name: what the tensor is called, for the message.
        tensor: any tensor.

    Raises:
        TensLoRAError: if it does not.
    """
    import torch

    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if tensor.dtype not in floats:
        valid = ", ".join(str(dtype).removeprefix("torch.") for dtype in floats)
        raise TensLoRAError(f"{name} has the type {str(tensor.dtype).removeprefix('torch.')}; must be one of {valid}")
    if not torch.isfinite(tensor.detach().to(torch.float32)).all():
        raise TensLoRAError(f"{name} holds a NaN or an infinity")
