"""What train.py does around the training of a run: at most one process at a time carries it out, and only once."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tenslora.errors import TensLoRAError
from tenslora.harness.config import RunConfig, validate
from tenslora.harness.quick_start import pause_garbage_collection
from tenslora.harness.run_folder import OtherRun, RunFolder

log = logging.getLogger("train")


def carry_out_once(composed: DictConfig, train: Callable[[RunConfig, Path], Mapping[str, Any]]) -> float:
    """Carry out the run that Hydra has composed, unless its folder holds its record already.

    A finished run is trained anew only with `overwrite=true`. A run that has diverged is not finished. Of the processes
    that torchrun starts, the main one claims the folder for all.

    Args:
        composed: Hydra's config.
        train: carries out a run in a folder, and returns its record.

    Returns:
        The last epoch's headline score, which Hydra's sweepers can maximise: of the validation split with
        `dataset.validation`, otherwise of the test split. A metric of which smaller values are better is to be
        minimised.

    Raises:
        TensLoRAError: for invalid settings, if the folder holds a run with other settings, if another process is
            carrying out a run there, or from `train`.
    """
    pause_garbage_collection()
    run, folder = validate(composed), RunFolder(Path(HydraConfig.get().runtime.output_dir))
    for setting, place in (("model.checkpoint", run.model.checkpoint), ("warm_start", run.warm_start)):
        if place and Path(place).resolve() == folder.path.resolve():
            raise TensLoRAError(f"{setting}={place}: is the run's own folder, whose files a run writes; choose another")
    if run.resume and run.overwrite:
        raise TensLoRAError("overwrite=true: must be false with resume=true, which goes on where the run stopped")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _require_same(run, folder)
    if os.environ.get("RANK", "0") != "0":
        return _score(_finished(run, folder) or train(run, folder.path))
    with folder.claim() as ours:
        if not ours:
            raise TensLoRAError(f"{folder.path}: another process is carrying out a run there; wait for it, or stop it")
        if record := _finished(run, folder):
            from tenslora.harness.run_record import describe_run

            log.info(
                "%s\nrecord: %s\nnothing was done, because this run is finished; overwrite=true trains it anew",
                describe_run(record),
                folder.result,
            )
            return _score(record)
        if not folder.checkpoint.is_file():
            if run.resume:
                log.info("resume=true: there is no checkpoint in %s; the run starts from the beginning", folder.path)
            if earlier := _run_of_another_length(run, folder):
                log.info("%s", earlier)
        elif not run.overwrite and (digest := folder.checkpoint_digest()) not in (None, run.digest()):
            raise OtherRun(folder.checkpoint, str(digest), run.digest())
        return _score(train(run, folder.path))


def _require_same(run: RunConfig, folder: RunFolder) -> None:
    """Check that the processes that torchrun has started carry out the same run, from the same point on.

    They may not where a setting is taken from an environment variable such as RANK, or from the time.
    """
    from tenslora.harness.training.processes import Processes

    processes = Processes(run.trainer.device, run.trainer.threads)
    processes.require_same({**run.identity(), "resume": run.resume, "overwrite": run.overwrite})
    # The main process has written all files of an earlier run by now.
    files = (folder.result, folder.checkpoint)
    processes.require_same({"the run's folder": [folder.path.name, *(file.name for file in files if file.is_file())]})


def _finished(run: RunConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The record of the completed run; None if the run is to be trained, anew if its record cannot be read."""
    if run.overwrite:
        return None
    try:
        return folder.finished_record(run.digest())
    except OtherRun:
        raise
    except TensLoRAError as error:
        log.warning("%s; the run is trained anew", error)
        return None


def _score(record: Mapping[str, Any]) -> float:
    return float(record["metrics"]["last"])


def _run_of_another_length(run: RunConfig, folder: RunFolder) -> str | None:
    """A line on a run beside this one that differs only in its number of steps; None if there is none."""
    row, _, digest = folder.path.name.rpartition("-")
    if digest != run.digest():  # hydra.run.dir has put the run elsewhere
        return None
    for path in sorted(folder.path.parent.glob(f"{row}-*")):
        other = None if path == folder.path else _identity_of(RunFolder(path))
        if other is not None and _without_length(other) == _without_length(run.identity()):
            lengths = " ".join(
                f"trainer.{name}={'null' if value is None else value}"
                for name in ("epochs", "max_steps")
                if (value := other["trainer"][name]) != run.identity()["trainer"][name]
            )
            return (
                f"this is another run than {path}, which has {lengths}: the learning rate falls over the whole of a "
                f"run, so this one starts from the beginning and does not continue that one"
            )
    return None


def _identity_of(folder: RunFolder) -> dict[str, Any] | None:
    # A run without a record is known by the settings that Hydra left.
    with contextlib.suppress(TensLoRAError):
        if folder.result.is_file():
            return dict(folder.read_record()["identity"])
        digest = folder.checkpoint_digest() if folder.checkpoint.is_file() else None
        # A start that was refused, because the folder is another run's, has left its settings.
        if digest and (run := validate(folder.read_composed())).digest() == digest:
            return run.identity()
    return None


def _without_length(identity: Mapping[str, Any]) -> dict[str, Any]:
    trainer = {name: value for name, value in identity["trainer"].items() if name not in ("epochs", "max_steps")}
    return {**identity, "trainer": trainer}
