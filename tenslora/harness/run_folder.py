"""The folder of a run: every file in it, who writes it and who reads it.

| file | written by | read by |
|---|---|---|
| result.json | train.py, as the last file | sweeps, tables, load_run, export |
| adapter.safetensors | train.py, of a run with an adapter | load_run, export, analyse |
| head.safetensors | train.py, of a run that froze its backbone: head and running statistics | load_run, export |
| model.safetensors | train.py, of full fine-tuning: every weight and statistic | load_run, export |
| predictions.safetensors | train.py, of a completed run: labels and logits of the last epoch's test | the report |
| checkpoint.safetensors | the training loop, after every epoch | the loop with resume=true; sweeps, if it exists |
| metrics.csv, steps.csv | the logger csv, after every epoch | people; steps.csv also the logger of a resumed run |
| events.out.tfevents.* | the logger tensorboard | TensorBoard |
| profile.txt, profile.json.gz | debug=profile: a table and a trace of the first epoch | people; a browser |
| failure.json | a sweep, of a job that left no record | sweeps |
| .lock | train.py or a sweep, held while it carries out the run | other processes |
| train.log, .hydra/ | Hydra | people; train.py, of an unfinished run of another length |
| wandb/ | Weights & Biases | `wandb sync` |
| peft/, merged/ | export | other libraries |
| spectra.json, spectra.png, spectra.svg | analyse | people |

Every file that this project writes is complete or absent (`tenslora.files`). Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from tenslora.errors import TensLoRAError, first_line, os_reason, require_path
from tenslora.files import (
    ADAPTER_FILE,
    HEAD_FILE,
    read_header,
    require_file,
    sha256_of,
    write_bytes,
    write_json,
    write_safetensors,
)
from tenslora.harness.forms import SCHEMA, Checkpoint, Failure, Record, read_form

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from tenslora.harness.predictions import Predictions


_TRIAL_BYTES = 1 << 20

_CLAIMED_FILES = (
    ADAPTER_FILE, "result.json", "failure.json", "predictions.safetensors", "checkpoint.safetensors", "metrics.csv",
    "steps.csv", "profile.txt", "profile.json.gz",
)  # fmt: skip
"""With the weights, the files that only the process writes that has claimed the folder."""


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, and that its disk has space for a small one.

    Args:
        folder: the folder, which is made if it is missing.

    Raises:
        TensLoRAError: if they cannot.
    """
    trial = folder / f".trial.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(bytes(_TRIAL_BYTES))
    except OSError as error:
        raise TensLoRAError(f"{folder}: cannot be written ({os_reason(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()


class OtherRun(TensLoRAError):
    """The error for a file of a run with other settings.

    Args:
        path: the file.
        digest: the digest of the settings of its run.
        wanted: the digest of the settings of the run that was looked for.
    """

    def __init__(self, path: Path, digest: str, wanted: str) -> None:
        super().__init__(
            f"{path}: is of a run with other settings (its digest is {digest}, this run's {wanted}); choose another "
            f"folder, or overwrite=true"
        )


class UnusableCheckpoint(TensLoRAError):
    """The error for a checkpoint from which its run cannot go on."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Args:
        path: the folder, which need not exist. Text becomes a path.

    Raises:
        TensLoRAError: for what is no path.
    """

    path: Path

    def __post_init__(self) -> None:
        if not isinstance(self.path, Path):
            object.__setattr__(self, "path", require_path("path", self.path))

    @property
    def result(self) -> Path:
        """result.json, the record."""
        return self.path / "result.json"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / ADAPTER_FILE

    @property
    def predictions(self) -> Path:
        """The labels and the outputs of the last epoch's test."""
        return self.path / "predictions.safetensors"

    @property
    def checkpoint(self) -> Path:
        """The state after the last complete epoch."""
        return self.path / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        """metrics.csv, a line for each epoch; only of a run with logger=csv."""
        return self.path / "metrics.csv"

    @property
    def steps(self) -> Path:
        """steps.csv, a line for each optimizer step; only of a run with logger=csv."""
        return self.path / "steps.csv"

    @property
    def profile_table(self) -> Path:
        """profile.txt, the costliest operations of the first epoch; only of a run with debug=profile."""
        return self.path / "profile.txt"

    @property
    def profile_trace(self) -> Path:
        """profile.json.gz, the first epoch as a trace; only of a run with debug=profile."""
        return self.path / "profile.json.gz"

    @property
    def failure(self) -> Path:
        """failure.json, why a job of a sweep left no record."""
        return self.path / "failure.json"

    @property
    def lock(self) -> Path:
        """The file that a process locks while it carries out the run."""
        return self.path / ".lock"

    def weights(self, tensor_mode: str) -> Path:
        """The file of the trained weights other than the adapter: the head's, or all weights after full fine-tuning.

        Args:
            tensor_mode: the run's tensor_mode.
        """
        return self.path / ("model.safetensors" if tensor_mode == "full" else HEAD_FILE)

    def write_weights(self, tensor_mode: str, weights: Mapping[str, Tensor]) -> Path:
        """Write the trained weights other than the adapter.

        Args:
            tensor_mode: the run's tensor_mode.
            weights: the weights by their names in the model.

        Returns:
            The file.

        Raises:
            TensLoRAError: if the file cannot be written.
        """
        return write_safetensors(self.weights(tensor_mode), weights, {})

    def require_written(self, path: Path, record: Mapping[str, Any]) -> None:
        """Check that a file of weights is the one that the run wrote: the head of another run may fit just as well.

        Args:
            path: the file.
            record: the run's record, which of an earlier version does not know its files.

        Raises:
            TensLoRAError: if it is another file, or if it cannot be read.
        """
        written = record["sha256"].get(path.name)
        if written and written != sha256_of(path):
            raise TensLoRAError(f"{path}: is not the file that the run wrote; its SHA-256 is not that in result.json")

    def write_predictions(self, splits: Mapping[str, Predictions]) -> Path:
        """Write predictions.safetensors.

        Args:
            splits: the last epoch's predictions for each split that the run was scored on.

        Returns:
            The file.

        Raises:
            TensLoRAError: if the file cannot be written.
        """
        from safetensors.numpy import save

        from tenslora.harness.predictions import to_arrays

        write_bytes(self.predictions, save(to_arrays(splits)))
        return self.predictions

    def read_predictions(self) -> dict[str, Predictions]:
        """Read predictions.safetensors.

        Returns:
            The predictions for each split that the run was scored on: that of the record's `scored_on`, "test" or
            "validation", and by their names further splits. Logits are relative to each example's largest. Empty for a
            run that has not written the file, as runs of earlier versions have not.

        Raises:
            TensLoRAError: if the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        from tenslora.harness.predictions import from_arrays

        if not self.predictions.is_file():
            return {}
        try:
            return from_arrays(load_file(self.predictions))
        # An AttributeError for a type that numpy has not, such as one of 8 bits.
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = first_line(error)
            raise TensLoRAError(f"{self.predictions}: not a readable file of predictions ({reason})") from error

    def write_record(self, record: Mapping[str, Any]) -> Path:
        """Write result.json.

        Args:
            record: the record without its schema number, which is added.

        Returns:
            The file.

        Raises:
            TensLoRAError: if the file cannot be written.
        """
        write_json(self.result, {"schema": SCHEMA, **record})
        return self.result

    def read_record(self) -> dict[str, Any]:
        """Read result.json.

        Returns:
            The record.

        Raises:
            TensLoRAError: if there is no record, or if this version cannot read it.
        """
        if self.result.exists() and not self.result.is_file():  # a named pipe would be read for ever
            raise TensLoRAError(f"{self.result}: not a readable record (it is no file)")
        try:
            content = self.result.read_bytes()
        except OSError as error:
            raise TensLoRAError(f"{self.result}: not a readable record ({error.strerror})") from error
        return read_form(Record, content, self.result, "record")

    def check_record(self, record: Mapping[str, Any]) -> None:
        """Check that a record can be written, and then read again, so that no run trains in vain.

        Args:
            record: the record without its schema number.

        Raises:
            TensLoRAError: if it cannot.
        """
        read_form(Record, {"schema": SCHEMA, **record}, self.result, "record")

    def record_of(self, digest: str) -> dict[str, Any] | None:
        """The record of a run.

        Args:
            digest: the digest of the run's settings.

        Returns:
            The record; None if there is none.

        Raises:
            TensLoRAError: if the record cannot be read, or if it is of a run with other settings.
        """
        if not os.path.exists(self.result):
            return None
        record = self.read_record()
        if record["digest"] != digest:
            raise OtherRun(self.result, record["digest"], digest)
        return record

    def finished_record(self, digest: str) -> dict[str, Any] | None:
        """The record of a completed run; None if there is none, or if the run has diverged.

        Args:
            digest: the digest of the run's settings.

        Raises:
            TensLoRAError: if the record cannot be read, or if it is of a run with other settings.
        """
        record = self.record_of(digest)
        return record if record and record["status"] == "completed" else None

    def checkpoint_digest(self) -> str | None:
        """The digest of the settings of the run whose checkpoint is here; None if there is no readable checkpoint."""
        with contextlib.suppress(TensLoRAError):
            header = read_form(Checkpoint, read_header(self.checkpoint), self.checkpoint, "checkpoint")
            return str(header["digest"])
        return None

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.csv.

        Args:
            history: the entries of all epochs so far, which have the same names.

        Raises:
            TensLoRAError: if the file cannot be written.
        """
        _write_lines(self.metrics, history)

    def remove_metrics(self) -> None:
        """Remove metrics.csv.

        Raises:
            TensLoRAError: if it cannot be removed.
        """
        _remove(self.metrics)

    def write_steps(self, steps: Mapping[int, tuple[float, float]]) -> None:
        """Write steps.csv.

        Args:
            steps: by the number of the optimizer step, from 1, its learning rate and its loss; at least one step.

        Raises:
            TensLoRAError: if the file cannot be written.
        """
        lines = [{"step": step, "lr": rate, "train_loss": loss} for step, (rate, loss) in sorted(steps.items())]
        _write_lines(self.steps, lines)

    def read_steps(self) -> dict[int, tuple[float, float]]:
        """Read steps.csv.

        Returns:
            What `write_steps` was given; empty if there is no such file or if it is damaged.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, csv.Error):
            lines = list(csv.DictReader(io.StringIO(self.steps.read_text(encoding="utf-8"))))
            return {int(line["step"]): (float(line["lr"]), float(line["train_loss"])) for line in lines}
        return {}

    def read_composed(self) -> DictConfig:
        """Read .hydra/config.yaml, the settings with which the run was last started.

        Returns:
            The config that Hydra composed.

        Raises:
            TensLoRAError: if the file cannot be read.
        """
        from omegaconf import DictConfig, OmegaConf
        from yaml import YAMLError

        file = self.path / ".hydra" / "config.yaml"
        require_file(file)
        try:
            config = OmegaConf.load(file)
            return config if isinstance(config, DictConfig) else DictConfig({})
        except (OSError, ValueError, YAMLError, RecursionError) as error:  # RecursionError of a list within itself
            raise TensLoRAError(f"{file}: cannot be read ({error})") from error

    def write_failure(self, error: BaseException) -> None:
        """Write the reason why the run has no record, for the table and the next sweep.

        A full disk raises no error here, because the reason is also in the log.

        Args:
            error: the error that ended the run.
        """
        reason = " ".join(str(error).split())
        if not isinstance(error, TensLoRAError):
            reason = ": ".join(filter(None, (type(error).__name__, reason)))
        with contextlib.suppress(TensLoRAError):
            write_json(self.failure, {"error": str(TensLoRAError(reason))})  # without characters that are not printable

    def read_failure(self) -> str | None:
        """The reason why the last attempt left no record; None if no attempt left a reason."""
        if self.failure.exists() and not self.failure.is_file():
            return f"{self.failure}: not a readable reason (it is no file)"
        try:
            return str(read_form(Failure, self.failure.read_bytes(), self.failure, "reason")["error"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return f"{self.failure}: cannot be read ({error.strerror})"
        except TensLoRAError as error:
            return str(error)

    def begin_anew(self, keep_checkpoint: bool = True) -> None:
        """Remove the failure and the record of an earlier attempt.

        Args:
            keep_checkpoint: whether the checkpoint stays, so that the next attempt can go on from it.

        Raises:
            TensLoRAError: if a file cannot be removed.
        """
        for file in (self.failure, self.result, *([] if keep_checkpoint else [self.checkpoint])):
            _remove(file)

    def remove_logs(self, events: bool) -> None:
        """Remove what the loggers csv, tensorboard and profile have written of an earlier run.

        Args:
            events: whether to remove TensorBoard's files too. Its own logger tells a reader which of them are obsolete.

        Raises:
            TensLoRAError: if a file cannot be removed.
        """
        profile = self.profile_table, self.profile_trace
        for file in (self.metrics, self.steps, *profile, *(self.path.glob("events.out.tfevents.*") if events else ())):
            _remove(file)

    def remove_results(self) -> None:
        """Remove what an earlier run left at its end, its record first.

        The files of one run have other names than those of another: an adapter that stays beside a later run's head
        would be loaded with it.

        Raises:
            TensLoRAError: if a file cannot be removed.
        """
        for file in (self.result, self.adapter, self.weights(""), self.weights("full"), self.predictions):
            _remove(file)

    @contextlib.contextmanager
    def claim(self) -> Iterator[bool]:
        """A context in which this process, and no other, carries out the run.

        The kernel releases the lock when the process dies, however it dies. A shared file system has to support flock
        (NFS from version 4, Lustre, GPFS).

        Yields:
            True if the claim succeeded, False if another process carries out the run.

        Raises:
            TensLoRAError: if the folder cannot be written, or if it holds no run and a run would replace files there.
        """
        foreign = self._foreign_file()
        lock = FileLock(self.lock)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=1)  # not 0: `is_claimed` holds the lock for an instant
        except Timeout:
            yield False
            return
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise TensLoRAError(
                    f"{self.lock}: cannot be locked ({os_reason(error)}); the folder of outputs must be on a file "
                    f"system that supports flock"
                ) from error
            at_fault = self.lock if self.lock.is_symlink() else self.path
            raise TensLoRAError(f"{at_fault}: cannot be written ({os_reason(error)})") from error
        try:
            if foreign:
                self.lock.unlink()
                raise TensLoRAError(
                    f"{foreign}: lies in a folder where no run has begun, and a run there would replace it; move it "
                    f"away, or choose another folder"
                )
            self._remove_leftovers()
            for name in self._claimed_files():
                if (self.path / name).is_dir():  # the run would train, and then fail to write it
                    raise TensLoRAError(f"{self.path / name}: cannot be written (Is a directory)")
            yield True
        finally:
            lock.release()

    def _claimed_files(self) -> tuple[str, ...]:
        return (*_CLAIMED_FILES, self.weights("").name, self.weights("full").name)

    def _foreign_file(self) -> Path | None:
        # A file that a run would replace, in a folder where no run has begun: a downloaded model, or an exported table.
        if any(os.path.lexists(file) for file in (self.lock, self.result, self.checkpoint, self.failure)):
            return None
        candidates = (*(self.path / name for name in self._claimed_files()), *self.path.glob("events.out.tfevents.*"))
        return next((file for file in candidates if file.is_file()), None)

    def _remove_leftovers(self) -> None:
        # A write that is killed leaves its file under a temporary name. Only the owner of the claim writes these files.
        for file in self._claimed_files():
            for leftover in self.path.glob(f".{file}.*.tmp"):
                with contextlib.suppress(OSError):
                    leftover.unlink()

    def is_claimed(self) -> bool:
        """Whether a process carries out the run; False also where this process may not ask."""
        if not self.lock.is_file():
            return False
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except OSError:  # somebody else's outputs, or a file system without flock
            return False
        lock.release()
        return False


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise TensLoRAError(f"{file}: cannot be removed ({error.strerror})") from error


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines that all have the same names as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_bytes(path, text.getvalue().encode())
