"""A run's folder: its record, the reason why there is none, and who carries out the run."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from tenslora.errors import TensLoRAError
from tenslora.harness.run_folder import RunFolder
from tests.records import finished
from tests.running import configured
from tests.sweeps import claimed_by_a_process


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_the_path_of_a_folder_may_be_text(tmp_path: Path) -> None:
    assert RunFolder(str(tmp_path)) == RunFolder(tmp_path)  # type: ignore[arg-type]
    assert RunFolder(str(tmp_path)).read_predictions() == {}  # type: ignore[arg-type]
    with pytest.raises(TensLoRAError, match=r"^path: must be text or a Path, and is None$"):
        RunFolder(None)  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written(folder: RunFolder) -> None:
    record = finished(configured())
    assert folder.write_record(record) == folder.result
    read = folder.read_record()
    assert read | record == read
    assert (read["schema"], read["task"]) == (1, "classification"), "earlier records have no task"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a readable record"),
        ('{"schema": 1, "half', "not a readable record"),
        ("[1]", "not a readable record"),
        ('{"schema": 99, "status": "completed"}', r"not a readable record \(schema=99: "),
    ],
)
def test_a_record_that_cannot_be_read_is_named(content: str | None, message: str, folder: RunFolder) -> None:
    folder.path.mkdir()
    if content is not None:
        folder.result.write_text(content)
    with pytest.raises(TensLoRAError, match=f"^{folder.result}: {message}"):
        folder.read_record()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_read(make: Callable[[Path], None], folder: RunFolder) -> None:
    folder.path.mkdir()
    make(folder.result)
    make(folder.failure)
    with pytest.raises(TensLoRAError, match=rf"^{folder.result}: not a readable record \(it is no file\)$"):
        folder.read_record()
    assert folder.read_failure() == f"{folder.failure}: not a readable reason (it is no file)"


@pytest.mark.parametrize(
    "name", ["result.json", "adapter.safetensors", "head.safetensors", "checkpoint.safetensors", "steps.csv"]
)
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_run(name: str, folder: RunFolder) -> None:
    (folder.path / name).mkdir(parents=True)
    with pytest.raises(TensLoRAError, match=rf"^\S+/{name}: cannot be written \(Is a directory\)$"), folder.claim():
        raise AssertionError("the run has begun")
    assert not folder.is_claimed()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TensLoRAError("dataset.root=x: no such folder"), "dataset.root=x: no such folder"),
        (RuntimeError("shapes\n  differ"), "RuntimeError: shapes differ"),
        (KeyError("blocks"), "KeyError: 'blocks'"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(error: Exception, reason: str, folder: RunFolder) -> None:
    assert folder.read_failure() is None
    folder.write_failure(error)
    assert folder.read_failure() == reason


def test_a_failure_that_cannot_be_written_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = RunFolder(tmp_path / "file" / "run")
    folder.write_failure(TensLoRAError("no room"))
    assert folder.read_failure() is None


def test_beginning_anew_leaves_nothing_but_the_checkpoint(folder: RunFolder) -> None:
    folder.write_failure(TensLoRAError("older"))
    folder.result.touch()
    folder.checkpoint.touch()
    folder.begin_anew()
    assert list(folder.path.iterdir()) == [folder.checkpoint]


def test_a_claim_is_for_one_at_a_time_and_ends_with_its_context(folder: RunFolder) -> None:
    assert not folder.is_claimed()
    assert not folder.path.exists(), "looking leaves nothing behind"
    with folder.claim() as ours:
        assert ours
        assert folder.is_claimed()
        with folder.claim() as another:
            assert not another
        assert folder.is_claimed()
    assert not folder.is_claimed()
    assert folder.lock.exists(), "the file stays; what counts is its lock"


def test_a_claim_removes_what_killed_writes_have_left(folder: RunFolder) -> None:
    folder.path.mkdir()
    names = ["result.json", "checkpoint.safetensors", "head.safetensors", "model.safetensors", "metrics.csv"]
    for name in names:
        (folder.path / f".{name}.4711.tmp").touch()
    mine = folder.path / ".notes.txt.1.tmp"
    mine.touch()
    with folder.claim():
        assert sorted(folder.path.iterdir()) == [folder.lock, mine]


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.csv", "events.out.tfevents.1.host"])
def test_a_folder_that_holds_no_run_keeps_its_files(name: str, folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / name).touch()
    for _ in range(2):
        with pytest.raises(TensLoRAError, match=rf"/{name}: lies in a folder where no run has begun"), folder.claim():
            pass
    assert [file.name for file in folder.path.iterdir()] == [name]
    folder.checkpoint.touch()
    with folder.claim() as ours:
        assert ours


def test_a_lock_that_is_a_link_is_named(folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.lock.symlink_to(folder.path / "cache")
    with pytest.raises(TensLoRAError, match=rf"^{folder.lock}: cannot be written \("), folder.claim():
        pass


def test_a_claim_ends_when_its_process_is_killed(folder: RunFolder) -> None:
    with claimed_by_a_process(folder) as holder:
        assert folder.is_claimed()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not folder.is_claimed()


def test_a_look_at_the_claim_does_not_prevent_a_claim(folder: RunFolder) -> None:
    folder.path.mkdir()
    looking = FileLock(folder.lock, thread_local=False)
    looking.acquire()
    threading.Timer(0.2, looking.release).start()
    with folder.claim() as ours:
        assert ours


def test_only_one_of_many_simultaneous_claims_succeeds(folder: RunFolder) -> None:
    answers: list[bool] = []
    together = threading.Barrier(4)

    def claim() -> None:
        together.wait()
        with folder.claim() as ours:
            answers.append(ours)
            while len(answers) < 4:  # so that nobody lets go before all have asked
                time.sleep(0.01)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False, False, False, True]


@pytest.mark.parametrize("content", [None, b"a: &a [*a]\n", b"a: [\n", b"\xff\n"])
def test_settings_that_cannot_be_read_are_named(content: bytes | None, folder: RunFolder) -> None:
    file = folder.path / ".hydra" / "config.yaml"
    file.parent.mkdir(parents=True)
    if content is None:
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    with pytest.raises(TensLoRAError, match=rf"^{file}: (cannot be read|must be a file, not a pipe)"):
        folder.read_composed()


def test_predictions_of_a_type_that_numpy_has_not_are_named(folder: RunFolder) -> None:
    folder.path.mkdir()
    tensors = {"test/labels": torch.zeros(2, dtype=torch.int32), "test/logits": torch.zeros(2, 2)}
    save_file({**tensors, "test/logits": tensors["test/logits"].to(torch.float8_e5m2)}, folder.predictions)
    with pytest.raises(TensLoRAError, match=rf"^{folder.predictions}: not a readable file of predictions"):
        folder.read_predictions()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line(
    number: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    line = (
        rf"^{folder.lock}: cannot be locked \({os.strerror(number)}\); the folder of outputs must be on a file system"
    )
    with pytest.raises(TensLoRAError, match=line), folder.claim():
        pass
    assert folder.lock.is_file()
    assert not folder.is_claimed()
