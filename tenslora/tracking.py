"""Weights & Biases, or nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tenslora.config import LoggerConfig
from tenslora.errors import TensLoRAError


class Tracker:
    """What watches a run; this one watches nothing."""

    def epoch(self, entry: dict[str, Any]) -> None:
        """Take note of one epoch's entry of the history."""

    def finish(self, record: dict[str, Any], adapter: Path | None) -> None:
        """Take note of the finished record, and of the adapter's file if there is one."""

    def abandon(self) -> None:
        """The run broke off and will leave no record."""


class WandbTracker(Tracker):
    """One W&B run, its files in `folder`.

    Logs the resolved settings, the parameter counts, every metric of every epoch under its own name with the
    optimizer step as the x axis, and the adapter as an artifact of type model.
    """

    def __init__(self, config: LoggerConfig, folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        mode = config.mode if config.mode != "auto" else ("online" if _has_key() else "offline")
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                tags=list(config.tags),
                name=f"{facts['dataset']}-{facts['model']}-{facts['tensor_mode']}-seed{facts['seed']}",
                id=None,
                job_type="train",
                config={**facts, **settings},
                dir=str(folder),
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(silent=True),
                reinit="finish_previous",
            )
        except wandb.errors.Error as error:
            raise TensLoRAError(
                f"logger.mode={config.mode}: Weights & Biases refused the run ({error}); use logger.mode=offline and "
                f"`wandb sync` later"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def epoch(self, entry: dict[str, Any]) -> None:
        self._run.log(entry)

    def finish(self, record: dict[str, Any], adapter: Path | None) -> None:
        metrics = record["metrics"]
        self._run.summary.update({"last": metrics["last"], "best": metrics["best"], "status": record["status"]})
        if adapter is not None:
            artifact = self._wandb.Artifact(
                f"adapter-{record['digest']}", type="model", metadata={"ranks": record["ranks"]}
            )
            artifact.add_file(str(adapter))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if record["status"] == "completed" else 1)

    def abandon(self) -> None:
        self._run.finish(exit_code=1)


def start_tracker(
    config: LoggerConfig, folder: Path, settings: dict[str, Any], facts: dict[str, Any], watch: bool = True
) -> Tracker:
    """The tracker that a logger config asks for; W&B is imported only for it.

    settings: the resolved configuration. facts: names and parameter counts of the run. watch: false on all but one
    of the processes that share a run. Raises TensLoRAError if
    the service refuses the run.
    """
    if not watch or config.name == "none" or config.mode == "disabled":
        return Tracker()
    return WandbTracker(config, folder, settings, facts)


def _has_key() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
