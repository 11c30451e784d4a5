from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.cuda._utils import _get_device_index

from tenslora.errors import TensLoRAError
from tenslora.harness.training.processes import Processes


def test_one_process_is_the_plain_case() -> None:
    processes = Processes("cpu")
    model = torch.nn.Linear(2, 2)
    assert (processes.is_main, processes.count, processes.device.type) == (True, 1, "cpu")
    assert processes.wrap(model) is model
    assert processes.gather([1, 2]) == [1, 2]
    assert processes.mean(torch.tensor(3.0)) == 3.0
    assert processes.name
    assert processes.peak_memory_bytes() > 10_000_000


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(TensLoRAError, match=rf"trainer\.device={device}: "):
        Processes(device)


def test_the_current_gpu_is_taken_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda _: None)
    # As torch.cuda.set_device does it, which takes no device without a number.
    monkeypatch.setattr("torch.cuda.set_device", lambda device: chosen.append(_get_device_index(device)))
    for name in ("auto", "cuda"):
        assert Processes(name).device == torch.device("cuda")
    assert not chosen
    assert Processes("cuda:1").device == torch.device("cuda:1")
    assert chosen == [1]


def test_far_more_threads_than_processors_are_refused() -> None:
    most = 4 * (os.cpu_count() or 1)
    with pytest.raises(TensLoRAError, match=rf"^trainer\.threads={most + 1}: must be at most {most}, "):
        Processes("cpu", most + 1)


def test_processes_without_a_group_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    of_an_earlier_group = SimpleNamespace(device=torch.device("cpu"), state=SimpleNamespace(destroy_process_group=None))
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: of_an_earlier_group)
    with pytest.raises(TensLoRAError, match=r"^WORLD_SIZE=2: the program has destroyed the process group, so that its"):
        Processes("cpu")


def test_a_process_that_waits_for_one_that_has_ended_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(*_: Any, **__: Any) -> None:
        raise RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1\nmore")

    processes = Processes("cpu")
    processes._accelerator = SimpleNamespace(reduce=reset)
    monkeypatch.setattr("accelerate.utils.gather_object", reset)
    for wait in (lambda: processes.gather([1]), lambda: processes.mean(torch.ones(()))):
        with pytest.raises(TensLoRAError, match=r"^another process has ended, or does not answer \(.*by peer.*:1\)$"):
            wait()
    with pytest.raises(RuntimeError, match="shapes"), processes.answered():
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed: must be the same in all processes that share a run, and is 0 in one and 1 in another"),
        ({"trainer": {"clip_norm": None, "epochs": 1}}, "trainer.epochs: must be the same .* is 2 in one and 1 in "),
        ({"files": ["run"]}, r"files: must be .* is \[run, result.json\] in one and \[run\] in another"),
        ({}, None),
    ],
)
def test_processes_that_do_not_carry_out_the_same_run_are_refused(
    other: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, values = Processes("cpu"), {"seed": 0, "trainer": {"epochs": 2}, "files": ["run", "result.json"]}
    monkeypatch.setattr(processes, "gather", lambda items: [*items, {**values, **other}])
    with pytest.raises(TensLoRAError, match=f"^{message}") if message else contextlib.nullcontext():
        processes.require_same(values)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "abc"}, "RANK=abc: must be a number below WORLD_SIZE=1; "),
        ({"RANK": "1"}, "RANK=1: must be a number below WORLD_SIZE=1; "),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: must be a number of processes; "),
        ({"WORLD_SIZE": "9" * 5001}, r"WORLD_SIZE=9+\S*: must be a number of processes; "),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: needs MASTER_ADDR too; "),
        ({"LOCAL_RANK": "abc"}, "LOCAL_RANK=abc: must be a number; "),
        ({"MASTER_PORT": ""}, "MASTER_PORT=: must be a number; "),
    ],
)
def test_an_environment_that_no_launcher_makes_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TensLoRAError, match=f"^{message}torchrun and accelerate launch set it$"):
        Processes("cpu")
