"""TensorBoard: the history of a run as curves, and its settings as hyperparameters."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from tenslora.errors import TensLoRAError
from tenslora.files import write_bytes
from tenslora.harness.config import RunConfig
from tenslora.harness.results.table import Row, percent_of_lora
from tenslora.harness.tracking.tracker import SCORE, Tracker


class TensorBoardTracker(Tracker):
    """Writes a run as TensorBoard's event file into the run's folder, which is the run's name in TensorBoard.

    Every metric of every epoch is a scalar under its own name, and the headline metric also as `score`, at the
    optimizer's step. The settings, the number of parameters and `row` (construction and strategy) are hyperparameters.

    The event file of an earlier attempt is emptied: a tracker always sees the whole history, and TensorBoard would go
    on showing that the earlier attempt failed. The empty file stays, because a TensorBoard that is open meanwhile would
    wait for ever at a file that has disappeared.

    Args:
        run: the settings.
        folder: the run's folder.
        facts: names, ranks and parameter counts of the run.

    Raises:
        TensLoRAError: if the event file cannot be written.
    """

    def __init__(self, run: RunConfig, folder: Path, facts: dict[str, Any]) -> None:
        self._folder, self._headline = folder, facts["scores"][0]
        hyperparameters = {
            "row": Row(run.tensor_mode, run.row_strategy).label,
            "adapter_parameters": facts["adapter_parameters"],
            "percent_of_lora": percent_of_lora(facts["adapter_parameters"], facts["lora_parameters"]),
            **dict(_flat(run.settings())),
        }
        # TensorBoard's own list of hyperparameters would be that of one run. Without one it collects those of all runs.
        known = {name: value for name, value in hyperparameters.items() if value is not None}
        _, start, _ = hparams(known, {})  # type: ignore[no-untyped-call]
        with self._writing():
            for file in folder.glob("events.out.tfevents.*"):
                write_bytes(file, b"")  # not emptied in place: a backup may share the file by a hard link
            # A TensorBoard that is open meanwhile forgets everything that it has read from this step on.
            self._writer = SummaryWriter(str(folder), purge_step=0)
            self._write(start)

    def epoch(self, entry: dict[str, Any]) -> None:
        scalars = {name: value for name, value in entry.items() if name not in ("epoch", "step")}
        with self._writing():
            for name, value in {**scalars, SCORE: entry[self._headline]}.items():
                self._writer.add_scalar(name, value, entry["step"])
            self._writer.flush()

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:  # noqa: ARG002
        self._end(completed=record["status"] == "completed")

    def abandon(self) -> None:
        with contextlib.suppress(TensLoRAError):  # what ended the run may be that the file cannot be written
            self._end(completed=False)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TensLoRAError(f"{self._folder}: TensorBoard's file cannot be written ({error.strerror})") from error

    def _end(self, completed: bool) -> None:
        status = Status.Value("STATUS_SUCCESS" if completed else "STATUS_FAILURE")
        content = HParamsPluginData(
            session_end_info=SessionEndInfo(status=status), version=metadata.PLUGIN_DATA_VERSION
        )
        plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=SummaryMetadata(plugin_data=plugin))
        with self._writing():
            self._write(Summary(value=[value]))
            self._writer.close()

    def _write(self, summary: Summary) -> None:
        assert self._writer.file_writer is not None  # None only after `close`
        self._writer.file_writer.add_summary(summary)
        self._writer.flush()


def _flat(settings: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by their names on the command line, without the loggers' own; lists are written as text."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and group + name != "logger":
            yield from _flat(value, f"{group}{name}.")
        elif group + name != "logger":
            yield group + name, value if isinstance(value, bool | int | float | str | None) else str(value)


def _hide_errors_of_its_thread() -> None:
    # TensorBoard raises them anew where it is asked to write. Before that, Python would print each with a traceback.
    show = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            show(args)

    threading.excepthook = hook


_hide_errors_of_its_thread()
