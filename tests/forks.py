"""Work in a process of its own, which begins as a copy of the test's."""

from __future__ import annotations

import os
import resource
import select
import signal
import traceback
from collections.abc import Callable

MEMORY = 12 << 30
"""How many bytes of addresses the process may take."""


def in_a_process(work: Callable[[], str], seconds: float) -> str:
    """What a function returns in a process of its own, or what is wrong.

    Args:
        work: the function.
        seconds: how much of the processor's time it may take. By the clock it may take sixty times as long.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (round(seconds), round(seconds)))
        try:
            said = work()
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode(errors="backslashreplace")[-60_000:])
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], 60 * seconds)
    said = os.read(read, 65_536).decode() if ready else "it waits"
    os.close(read)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return said or f"it ended with status {os.waitstatus_to_exitcode(status)}"
