"""Weights & Biases, or nothing."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from tenslora.config import LoggerConfig
from tenslora.errors import TensLoRAError


class Tracker:
    """What watches a run; this one watches nothing. A context, so that it learns of a run that broke off."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def epoch(self, entry: dict[str, Any]) -> None:
        """Take note of one epoch's entry of the history."""

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        """Take note of the finished record, and of the files with the trained weights."""

    def abandon(self) -> None:
        """The run broke off and will leave no record."""


class WandbTracker(Tracker):
    """One W&B run, its files in `folder`.

    Logs the resolved settings, the parameter counts, every metric of every epoch under its own name with the
    optimizer step as the x axis, and the trained weights (adapter and head) as one artifact of type model.
    """

    def __init__(self, config: LoggerConfig, folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        mode = config.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or (
                "online" if _has_key(wandb.setup().settings.base_url) else "offline"
            )
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                tags=list(config.tags),
                name=f"{facts['dataset']}-{facts['model']}-{facts['tensor_mode']}-seed{facts['seed']}",
                job_type="train",
                config={**facts, **settings},
                dir=str(folder),
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(silent=True),
                reinit="finish_previous",
            )
        except (wandb.errors.Error, ValueError) as error:  # ValueError: pydantic's, for a tag too long and the like
            raise TensLoRAError(
                f"logger.mode={mode}: Weights & Biases refused the run ({' '.join(str(error).split())}); "
                f"logger.mode=offline needs no service, and `wandb sync` uploads later"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def epoch(self, entry: dict[str, Any]) -> None:
        self._run.log(entry)

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        metrics = record["metrics"]
        self._run.summary.update({"last": metrics["last"], "best": metrics["best"], "status": record["status"]})
        if files:
            artifact = self._wandb.Artifact(
                f"adapter-{record['digest']}", type="model", metadata={"ranks": record["ranks"]}
            )
            for file in files:
                artifact.add_file(str(file))
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


def _has_key(base_url: str) -> bool:
    # Where W&B itself looks: the environment, then the netrc file under the service's host, which has had two names.
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlsplit(base_url).hostname in known or "api.wandb.ai" in known
