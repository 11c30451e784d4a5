"""One process or several: under torchrun or accelerate launch each takes its share of every batch."""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenslora.errors import TensLoRAError, first_line
from tenslora.harness.config.checks import shown

_THREADS = torch.get_num_threads()  # read before anything changes it


class Processes:
    """The processes that train one model together, and the device of this one.

    Args:
        device: auto (cuda if there is a GPU, otherwise cpu), cpu, cuda or cuda:<index>. If there are several processes
            on GPUs, each takes the GPU of its local rank.
        threads: the number of CPU threads; None to let torch choose.
        alone: whether this process works by itself, whatever torchrun says.

    Raises:
        TensLoRAError: for a device that this machine does not have, for far more threads than it has processors, or if
            the program has destroyed torch's process group.
    """

    def __init__(self, device: str, threads: int | None = None, *, alone: bool = False) -> None:
        if threads is not None and threads > (most := most_threads()):
            raise TensLoRAError(f"trainer.threads={threads}: must be at most {most}, four times the processors here")
        torch.set_num_threads(threads or _THREADS)
        self.index, self.count = (0, 1) if alone else _place_among_processes()
        self._accelerator: Any = None
        self.device = _device(device)
        if self.count > 1:
            from accelerate import Accelerator

            if self.device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
                raise TensLoRAError(f"trainer.device={device}: there are more processes than CUDA devices")
            # Accelerate would take a precision from the environment; the training loop applies autocast itself.
            self._accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
            if not torch.distributed.is_initialized():  # which accelerate does once in a process
                raise TensLoRAError(
                    f"WORLD_SIZE={self.count}: the program has destroyed the process group, so that its processes "
                    f"cannot share work any more"
                )
            self.device = self._accelerator.device
            atexit.register(self._accelerator.state.destroy_process_group)
        if self.device.type == "cuda":
            if self.device.index is not None:  # otherwise it is the current one, and set_device wants a number
                torch.cuda.set_device(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def name(self) -> str:
        """The device's name as its manufacturer gives it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        return platform.machine()

    def peak_memory_bytes(self) -> int:
        """The peak memory in bytes: of the run's tensors on a GPU, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and logs."""
        return self.index == 0

    def main_first(self) -> contextlib.AbstractContextManager[Any]:
        """A context that the main process of each machine leaves before the machine's other processes enter it.

        The main process downloads and prepares files, and the other processes read them.
        """
        return contextlib.nullcontext() if self._accelerator is None else self._accelerator.local_main_process_first()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that its gradients become the mean over the processes."""
        if self._accelerator is None:
            return model
        # Each process has loaded the same quantised weights, and torch cannot take torchao's apart to send them.
        quantised = [name for name, parameter in model.named_parameters() if type(parameter) is not nn.Parameter]
        ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, quantised)  # type: ignore[no-untyped-call]
        with self.answered():
            wrapped: nn.Module = self._accelerator.prepare_model(model)
        return wrapped

    def answered(self) -> contextlib.AbstractContextManager[None]:
        """A context in which this process exchanges something with the others. If one has ended, a line says so."""
        return contextlib.nullcontext() if self._accelerator is None else _answered()

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Check that all processes have the same values, without which they would wait for each other or train apart.

        Args:
            values: this process's values by their names, perhaps nested.

        Raises:
            TensLoRAError: if they differ. It names the first value that does.
        """
        first, *others = self.gather([dict(values)])
        for other in others:
            for name, one, another in _differences(first, other):
                raise TensLoRAError(
                    f"{name}: must be the same in all processes that share a run, and is {shown(one)} in one and "
                    f"{shown(another)} in another"
                )

    def local_gradients(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """A context in which a wrapped model adds up its gradients in this process and does not exchange them."""
        return contextlib.nullcontext() if self._accelerator is None else self._accelerator.no_sync(model)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes, on every process."""
        if self._accelerator is None:
            return value
        with self.answered():
            reduced: Tensor = self._accelerator.reduce(value, reduction="mean")
        return reduced

    def take_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the numbers that they have in the main process, in place.

        Args:
            tensors: as many on every process, of the same shapes.
        """
        if self._accelerator is not None:
            with self.answered():
                for tensor in tensors:
                    torch.distributed.broadcast(tensor, src=0)

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """The items of all processes, in process order, on every process."""
        if self._accelerator is None:
            return list(items)
        from accelerate.utils import gather_object

        with self.answered():
            return list(gather_object(list(items)))


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise TensLoRAError(f"another process has ended, or does not answer ({first_line(error)})") from error


def _differences(first: Mapping[str, Any], other: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in {**first, **other}:
        one, another = first.get(name), other.get(name)
        if isinstance(one, Mapping) and isinstance(another, Mapping):
            yield from _differences(one, another, f"{group}{name}.")
        elif one != another:
            yield group + name, one, another


def most_threads() -> int:
    """The largest number of threads that this machine is asked for: four times its processors."""
    return 4 * (os.cpu_count() or 1)


def _place_among_processes() -> tuple[int, int]:
    """This process's number and the number of processes, as torchrun and accelerate launch tell them."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    started = "torchrun and accelerate launch set it"
    if not (_is_count(size) and int(size)):
        raise TensLoRAError(f"WORLD_SIZE={size}: must be a number of processes; {started}")
    if not (_is_count(rank) and int(rank) < int(size)):
        raise TensLoRAError(f"RANK={rank}: must be a number below WORLD_SIZE={size}; {started}")
    if int(size) > 1 and "MASTER_ADDR" not in os.environ:
        raise TensLoRAError(f"WORLD_SIZE={size}: needs MASTER_ADDR too; {started}")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):  # which accelerate and torch read
        if not _is_count(value := os.environ.get(name, "0")):
            raise TensLoRAError(f"{name}={value}: must be a number; {started}")
    return int(rank), int(size)


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) < 10  # Python reads no number of more than 4,300 digits


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TensLoRAError(f"trainer.device={name}: must be auto, cpu, cuda or cuda:<index>") from error
    if device.type not in ("cpu", "cuda"):
        raise TensLoRAError(f"trainer.device={name}: must be auto, cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TensLoRAError(f"trainer.device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
