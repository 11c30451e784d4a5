from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from tenslora.errors import TensLoRAError
from tenslora.files import read_json, read_safetensors, write_bytes, write_json, write_safetensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.float16), "n": torch.tensor(3)}
HEADER = {"construction": "qkv_depth", "ranks": [4, 4, 3, 4], "alpha": 4.0}


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["replace", "fsync"])
@pytest.mark.parametrize("before", [b"old", None], ids=["old file", "no old file"])
def test_a_failed_write_leaves_the_old_file(
    broken: str, before: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(os, broken, no_space)
    with pytest.raises(TensLoRAError, match=r"result\.json: cannot be written \(No space left on device\)"):
        write_bytes(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == (
        [] if before is None else [("result.json", before)]
    )


def test_a_link_that_leads_nowhere_and_a_file_in_the_place_of_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "file").touch()
    for name, reason in (
        ("link", "link is a link to gone, which does not exist"),
        ("file", "is a file; must be a fol"),
    ):
        with pytest.raises(TensLoRAError, match=rf"/{name}/x: cannot be written \(\S*{reason}"):
            write_bytes(tmp_path / name / "x", b"new")


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"second and longer", b""):
        write_bytes(path, content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


def test_threads_that_write_one_file_leave_it_complete(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(4)]
    barrier = threading.Barrier(4, timeout=10)

    def write(content: bytes) -> None:
        for _ in range(5):
            barrier.wait()
            write_bytes(tmp_path / "file", content)
            assert (tmp_path / "file").read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_in_the_midst_of_a_write_leaves_both_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def interrupted(file: int) -> None:  # as by a signal, whose handler writes the same file
        fsync(file)
        monkeypatch.setattr(os, "fsync", fsync)
        write_bytes(tmp_path / "file", b"handler")
        assert (tmp_path / "file").read_bytes() == b"handler"

    monkeypatch.setattr(os, "fsync", interrupted)
    write_bytes(tmp_path / "file", b"loop")
    assert (tmp_path / "file").read_bytes() == b"loop"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_is_open_elsewhere_keeps_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old content")
    with open(path, "rb") as reader:
        write_bytes(path, b"new")
        assert reader.read() == b"old content"


@pytest.mark.parametrize("below", ["file", "folder/file"])
def test_a_folder_that_cannot_be_created_is_reported_in_one_line(below: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(TensLoRAError, match=r"taken/\S*: cannot be written \(") as caught:
        write_bytes(tmp_path / "taken" / below, b"")
    assert "\n" not in str(caught.value)


def test_a_folder_with_the_files_name_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(TensLoRAError, match="file: cannot be written"):
        write_bytes(tmp_path / "file", b"")
    assert os.listdir(tmp_path) == ["file"]


def test_json_comes_back_and_ends_in_a_newline(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"text": "é\u2028"}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == value
    assert text.endswith("}\n")


def test_safetensors_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    write_safetensors(path, {**TENSORS, "t": TENSORS["b"].T, "p": torch.nn.Parameter(torch.ones(2))}, HEADER)
    header, tensors = read_safetensors(path)
    assert header == HEADER
    assert tensors.keys() == {*TENSORS, "t", "p"}
    for name, tensor in {**TENSORS, "t": TENSORS["b"].T}.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    with safe_open(path, framework="pt") as file:  # any safetensors reader can
        assert torch.equal(file.get_tensor("t"), TENSORS["b"].T)


def test_equal_tensors_and_headers_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one", TENSORS, HEADER)
    copies = {name: tensor.clone() for name, tensor in reversed(TENSORS.items())}
    write_safetensors(tmp_path / "two", copies, dict(reversed(HEADER.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_bytes_do_not_depend_on_the_order_in_which_safetensors_writes_a_header(tmp_path: Path) -> None:
    header = {f"key{number}": "value" for number in range(9)}
    assert len({save(TENSORS, metadata=header) for _ in range(20)}) > 1  # each time it takes an order of its own
    assert len({write_safetensors(tmp_path / "file", TENSORS, header).read_bytes() for _ in range(20)}) == 1


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_from_elsewhere_has_an_empty_header(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "file", metadata=metadata)
    header, tensors = read_safetensors(tmp_path / "file")
    assert header == {}
    assert tensors.keys() == {"w"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no such file"),
        ("file/below", "no such file"),
        ("link", "is a link to /gone/file, which does not exist"),
        (".", "must be a file, not a folder"),
        ("pipe", "must be a file, not a pipe or a device"),
        ("x" * 300, r"cannot be read \(File name too long\)"),
        ("a\0b", r"cannot be read \(embedded null byte\)"),
    ],
)
def test_what_is_no_file_is_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/gone/file")
    for read in (read_safetensors, read_json):
        with pytest.raises(TensLoRAError, match=rf"^{tmp_path}\S*: {message}$"):
            read(tmp_path / name)


def test_a_process_that_may_open_no_more_files_says_so(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS, HEADER)
    read_safetensors(path)  # imports what it needs
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(path, os.O_RDONLY))
        for _ in range(2):  # none is left, then one
            with pytest.raises(TensLoRAError, match=r"a\.safetensors: not a readable .*Too many open files"):
                read_safetensors(path)
            os.close(held.pop())
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_file_takes_the_place_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")  # as /dev/stdout is one
    for name in ("pipe", "link"):
        with pytest.raises(TensLoRAError, match=rf"/{name}: cannot be written \(is a pipe or a device; must be a file"):
            write_bytes(tmp_path / name, b"")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("path", ["", "/"])
def test_a_path_that_names_no_file_is_not_written_to(path: str) -> None:
    with pytest.raises(TensLoRAError, match=r"cannot be written \(is not the name of a file\)$"):
        write_bytes(Path(path), b"")


def test_a_path_with_a_character_that_no_path_can_have_is_not_written_to(tmp_path: Path) -> None:
    for path in (tmp_path / "a\0b", tmp_path / "a\0b" / "c"):
        with pytest.raises(TensLoRAError, match=r"cannot be written \(embedded null byte\)"):
            write_bytes(path, b"")
    assert not os.listdir(tmp_path)


def test_a_tensor_without_numbers_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"file: cannot be written \(w is on the device meta and has no numbers\)$"):
        write_safetensors(tmp_path / "file", {"w": torch.zeros(2, device="meta")}, {})
    assert not os.listdir(tmp_path)


def test_a_sparse_tensor_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"file: cannot be written \(w is sparse, which safetensors cannot hold\)$"):
        write_safetensors(tmp_path / "file", {"w": torch.eye(2).to_sparse()}, {})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "damage", ["empty", "cut in the header", "cut in the data", "no brace", "text", "pickle", "other header"]
)
def test_a_damaged_file_is_named_in_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    write_safetensors(path, TENSORS, {**HEADER, "note": "long " * 300})
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")  # of the header
    if damage == "pickle":
        torch.save(TENSORS, path)
    elif damage == "other header":
        save_file(TENSORS, path, metadata={"tenslora": "{not json"})
    else:
        cut = {
            "empty": b"",
            "cut in the header": content[:40],
            "cut in the data": content[:-8],
            "no brace": content[:8]
            + content[24:end]
            + b" " * 16
            + content[end:],  # safetensors then quotes the whole header
            "text": b"hello\n" * 99,
        }
        path.write_bytes(cut[damage])
    with pytest.raises(TensLoRAError, match=r"adapter\.safetensors: not a readable safetensors file") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", ["", "{", "[" * 99999, "\xff", "9" * 9999])
def test_a_file_that_is_no_json_is_named_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "value.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(TensLoRAError, match=r"value\.json: not a readable JSON file") as caught:
        read_json(tmp_path / "value.json")
    assert "\n" not in str(caught.value)


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    error = TensLoRAError("a\nb\x1b[2J\u2028\ud800é =")
    assert str(error) == r"a\nb\x1b[2J\u2028\ud800é ="
