"""What TensorBoard's event files hold, as TensorBoard's own reader tells it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status

FACTS = {"adapter_parameters": 100, "lora_parameters": 400, "scores": ["matthews", "accuracy"]}
"""What a tracker needs to know of a run."""


@dataclass(frozen=True)
class Events:
    """A run as TensorBoard shows it.

    Args:
        scalars: (step, value) of each scalar, by its tag.
        hyperparameters: the run's hyperparameters by name.
        status: how the run ended, in TensorBoard's word; None while it runs.
    """

    scalars: dict[str, list[tuple[int, float]]]
    hyperparameters: dict[str, Any]
    status: str | None


def read_events(folder: Path) -> Events:
    """Read all event files in a folder as TensorBoard does for one run."""
    accumulator = EventAccumulator(str(folder)).Reload()
    plugin = accumulator.PluginTagToContent(metadata.PLUGIN_NAME)
    started = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    status = None
    if (end := plugin.get(metadata.SESSION_END_INFO_TAG)) is not None:
        status = Status.Name(metadata.parse_session_end_info_plugin_data(end).status)
    return Events(
        scalars={
            tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]
        },
        hyperparameters={name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()},
        status=status,
    )
