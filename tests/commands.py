"""Commands that start at once, most of them train.py and sweep.py, and what may happen to them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.hub_server import HubServer


@dataclass(frozen=True)
class Command:
    """A command to carry out.

    Args:
        script: train.py, sweep.py, another file that ends in .py, or the name of a module.
        words: its arguments.
        folder: where it is started.
        accident: the signal that it gets (kill, interrupt or terminate) and where, counted over all that it does:
            "kill step 2", before the second optimizer step; "kill write result.json 1", inside the first write of a
            file of that name, with half of the bytes on disk; "kill rename result.json 1", when the file is complete
            but still has its temporary name.
        largest_file: the most bytes that it can write to a file, a limit of the kernel's that counts like a full disk.
        environment: variables in addition to the test's own.
    """

    script: str
    words: Sequence[str]
    folder: Path
    accident: str = ""
    largest_file: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (the signal's number, negative, if one killed it) and what it printed."""

    status: int
    out: str
    err: str


def interrupt_import(
    library: str, start: str, number: str = "SIGINT", then: str = "raise"
) -> subprocess.CompletedProcess[str]:
    """Start a program that gets a signal when it begins to import a library.

    Args:
        library: the library's name.
        start: the Python statement that starts the program.
        number: the signal's name; SIGINT is Ctrl-C.
        then: what the library makes of KeyboardInterrupt, a Python statement.
    """
    program = (
        "import runpy, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == '{library}':\n"
        "            try:\n"
        f"                signal.raise_signal(signal.{number})\n"
        "            except KeyboardInterrupt:\n"
        f"                {then}\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{start}\n"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


def started_by_torchrun(command: Command, processes: int) -> list[Command]:
    """The commands, to run together, as which torchrun and accelerate launch start a command in several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    number = str(processes)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [replace(command, environment={**command.environment, **shared, **each}) for each in own]


class Commands:
    """Carries out commands, in forks of the process that `tests.command_server` describes.

    Args:
        folder: for what the commands print.
        hub: what stands in for the Hugging Face hub; the commands keep what they download from it below `folder`.
    """

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder, self.hub = folder, hub
        self.count = 0
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "huggingface")}
        command = [sys.executable, "-m", "tests.command_server"]
        self.server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, command: Command) -> Ended:
        """Carry out one command."""
        (ended,) = self.run_together([command])
        return ended

    def run_together(self, commands: Sequence[Command]) -> list[Ended]:
        """Carry out commands at the same time."""
        assert self.server.stdin and self.server.stdout
        printed, requests = [], []
        for command in commands:
            self.count += 1
            files = [self.folder / f"{self.count}.{name}" for name in ("out", "err")]
            printed.append(files)
            request: dict[str, Any] = {**vars(command), "words": list(command.words), "folder": str(command.folder)}
            requests.append({**request, "files": list(map(str, files))})
        print(json.dumps(requests), file=self.server.stdin, flush=True)
        statuses = json.loads(self.server.stdout.readline())
        return [
            Ended(status, out.read_text(), err.read_text())
            for status, (out, err) in zip(statuses, printed, strict=True)
        ]

    def stop(self) -> None:
        """End the process."""
        assert self.server.stdin and self.server.stdout
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()  # or Python warns of it in whichever test comes last
