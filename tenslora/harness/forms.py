"""The form of what a run leaves and the harness reads again: result.json, failure.json, the header of a checkpoint.

Whoever reads one of these reads it through `read_form`. What comes out has the declared form, and nobody has to check
it again. A field with a default is younger than the oldest records, which lack it. Nothing here needs torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import from_json, to_json

from tenslora.constructions import CONSTRUCTIONS, Geometry
from tenslora.errors import TensLoRAError
from tenslora.factorizations import FACTORIZATIONS
from tenslora.forms import shown
from tenslora.harness.config import REFERENCES
from tenslora.harness.config.identity import digest_of
from tenslora.harness.stages import stages_in_file
from tenslora.harness.training.metrics import metric_of
from tenslora.ranks import rank_limits

SCHEMA = 1
"""The version of result.json's layout that this code reads and writes."""

CHECKPOINT_FORMAT = "tenslora-checkpoint-1"
"""The format of a checkpoint's header that this code reads and writes."""

_ROUNDING = 1e-6  # a correlation may exceed 1 by a rounding error

Count = Annotated[int, Field(ge=0)]
Number = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
_GEOMETRY = TypeAdapter(Geometry)


def _check_printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line that can be printed")
    return value


def _check_different(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("must be different names")
    return names


def _check_ranks(value: Any) -> Any:
    for stage in stages_in_file(value) if value is not None else ():
        if not isinstance(stage, list) or not all(type(rank) is int and rank >= 1 for rank in stage):
            raise ValueError("must be a list of whole numbers from 1 up, or one such list for each stage")
    return value


Ranks = Annotated[Any, AfterValidator(_check_ranks)]
"""The ranks of a backbone's one stage, or of each of several, see `stages.as_in_files`."""

Line = Annotated[str, AfterValidator(_check_printable)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Form(BaseModel):
    """A JSON object of a declared form. Further fields may be there; later versions may write them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def _check_geometry(value: Any) -> Any:
    for stage in stages_in_file(value):
        if not isinstance(stage, dict):
            raise ValueError("must be an object, or a list of one for each stage")
        if unknown := stage.keys() - Geometry.__dataclass_fields__:
            raise ValueError(f"has no {min(unknown)}")
        _GEOMETRY.validate_python(stage)
    return value


class Epoch(Form):
    """An entry of a run's history. Its further fields are a loss and the scores."""

    epoch: Number
    step: Number
    lr: NonNegative
    train_loss: float


class Metrics(Form):
    """A run's scores, see `run_record.summarize_history`."""

    name: str
    last: float | None
    best: float | None
    best_epoch: Number | None
    others_last: dict[str, float]
    history: list[Epoch]


class Divergence(Form):
    """Where a run diverged."""

    message: Line
    step: Number
    lr: NonNegative


class Named(Form):
    """A group of settings with a name."""

    name: str


class Length(Form):
    """The settings of the trainer that say how long a run is."""

    epochs: Number
    max_steps: Number | None


class Identity(Form):
    """The settings that can change a run's result, see `config.identity`."""

    seed: Count
    model: Named
    dataset: Named
    tensor_mode: Named
    trainer: Length


class Environment(Form):
    """What a run ran on."""

    versions: dict[str, str]
    platform: str
    git: dict[str, str | bool] | None
    argv: list[str]


class Record(Form):
    """result.json, see `run_record.record_of`."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    status: Literal["completed", "diverged"]
    failure: Divergence | None
    digest: Digest
    model: str
    dataset: str
    tensor_mode: Literal[(*CONSTRUCTIONS, *REFERENCES)]  # type: ignore[valid-type]
    factorization: Literal[(None, "matrix", *FACTORIZATIONS)]  # type: ignore[valid-type]
    rank_strategy: Line | None
    ranks: Ranks
    ranks_by_epoch: list[Ranks] | None = None
    warm_start: dict[str, Any] | None
    seed: Count
    geometry: Annotated[Any, AfterValidator(_check_geometry)]
    image_input: dict[str, Any] | None = None
    backbone_answer: Annotated[list[float], Field(min_length=1)] | None = None
    adapter_parameters: Count
    lora_parameters: Number
    first_step: NonNegative | None = None
    lora_first_step: NonNegative | None = None
    head_parameters: Count
    trained_parameters: Count
    total_parameters: Count
    train_examples: Number
    scored_on: Literal["test", "validation"] = "test"
    test_examples: Count
    validation_examples: Count = 0
    more_test_examples: dict[str, Number] = {}
    data_digest: Line | None = None
    task: Literal["classification", "regression"] = "classification"
    scores: list[str] | None = None
    classes: Annotated[list[str], AfterValidator(_check_different)]
    text_columns: list[str] | None = None
    sha256: dict[str, Sha256] = {}
    processes: Number
    device: Line
    metrics: Metrics
    seconds: dict[str, NonNegative]
    steps_per_second: NonNegative | None
    peak_memory_bytes: Count | None
    environment: Environment
    identity: Identity
    config: dict[str, Any]

    @model_validator(mode="after")
    def _is_of_one_run(self) -> Self:
        identity = self.identity
        _check(self.digest == digest_of(identity.model_dump()), f"digest={self.digest}", "is not that of its settings")
        for name, setting in (
            ("seed", identity.seed),
            ("model", identity.model.name),
            ("dataset", identity.dataset.name),
            ("tensor_mode", identity.tensor_mode.name),
        ):
            _check(getattr(self, name) == setting, f"{name}={getattr(self, name)}", f"the run's is {setting}")
        dataset = identity.dataset.model_extra or {}
        is_held_out = dataset.get("validation") is not None or (  # as the config's scored_on has it
            dataset.get("source") == "vtab" and dataset.get("test_split") == "val200"
        )
        wanted = "validation" if is_held_out else "test"
        _check(self.scored_on == wanted, f"scored_on={self.scored_on}", f"the run's is {wanted}")
        for group, settings in identity.model_dump().items():
            own = self.config.get(group)
            if not isinstance(settings, dict):
                _check(own == settings, f"config.{group}={shown(own)}", f"the run's is {settings}")
                continue
            _check(isinstance(own, dict), f"config.{group}", "must be a group of settings")
            for name, value in settings.items():
                if (group, name) != ("trainer", "score_every"):  # `identity` calls evaluate_every so
                    found = own.get(name) if isinstance(own, dict) else None
                    _check(found == value, f"config.{group}.{name}={shown(found)}", f"the run's is {shown(value)}")
        return self

    @model_validator(mode="after")
    def _has_fitting_ranks(self) -> Self:
        if self.tensor_mode in REFERENCES:
            _check(self.ranks is None, f"ranks={self.ranks}", f"must be null, as tensor_mode is {self.tensor_mode}")
            return self
        factorization = "tucker" if self.factorization == "matrix" else self.factorization
        _check(factorization is not None, "factorization=null", f"tensor_mode {self.tensor_mode} has one")
        geometries = [Geometry(**stage) for stage in stages_in_file(self.geometry)]
        wanted = [len(rank_limits(self.tensor_mode, geometry, factorization or "")) for geometry in geometries]
        for ranks in (self.ranks, *(self.ranks_by_epoch or ())):
            lengths = [len(of_stage or ()) for of_stage in stages_in_file(ranks)]
            _check(lengths == wanted, f"ranks={ranks}", f"must be {' and '.join(map(str, wanted))} numbers")
        return self

    @model_validator(mode="after")
    def _has_fitting_scores(self) -> Self:
        metrics, is_completed = self.metrics, self.status == "completed"
        _check((self.failure is None) == is_completed, "failure", f"does not fit status={self.status}")
        _check(bool(metrics.history) or not is_completed, "metrics.history", "must have an epoch")
        names = [metrics.name, *metrics.others_last] if metrics.history else [metrics.name, *(self.scores or [])[1:]]
        for name in names:
            metric_of(name)
        _check(self.scores in (None, names), f"scores={self.scores}", f"metrics has {names}")
        check_history(metrics.history, names, self.scored_on)
        for which in ("last", "best"):
            score = getattr(metrics, which)
            _check((score is None) == (not metrics.history), f"metrics.{which}={score}", "does not fit the history")
            _check_score(f"metrics.{which}", metrics.name, score or 0.0)
        _check((metrics.best_epoch is None) == (not metrics.history), "metrics.best_epoch", "does not fit the history")
        if not metrics.history:
            return self
        end = metrics.history[-1].model_dump()
        last = {metrics.name: metrics.last, **metrics.others_last}
        _check(all(end[name] == last[name] for name in names), "metrics.last", "is not the score of the last epoch")
        sign = 1 if metric_of(metrics.name).larger_is_better else -1
        assert metrics.best is not None and metrics.last is not None and metrics.best_epoch is not None
        _check(sign * metrics.best >= sign * metrics.last, f"metrics.best={metrics.best}", "is worse than the last")
        _check(metrics.best_epoch <= end["epoch"], f"metrics.best_epoch={metrics.best_epoch}", "is after the last")
        of_best = [(e.model_extra or {})[metrics.name] for e in metrics.history if e.epoch == metrics.best_epoch]
        _check(of_best in ([], [metrics.best]), f"metrics.best={metrics.best}", "is not the score of its epoch")
        return self


class Failure(Form):
    """failure.json: why a job of a sweep left no record."""

    error: Line


class StartOfRun(Form):
    """What a run starts from, see `training.checkpoint.Start`."""

    data: Line
    weights: list[float]
    backbone: list[float] | None


class Checkpoint(Form):
    """The header of checkpoint.safetensors, see `training.checkpoint.TrainingState`."""

    format: Literal["tenslora-checkpoint-1"]
    digest: Digest
    epochs: Number
    steps: Number
    history: list[Epoch]
    seconds: dict[Literal["train", "wait", "evaluate"], NonNegative]
    ranks: list[Ranks] | None = None
    start: StartOfRun | None = None


def check_score_names(names: Sequence[str], scored_on: str) -> None:
    """Check that each score has a name of its own in an entry of a run's history.

    Args:
        names: the names of the run's scores.
        scored_on: the split whose loss every entry has, "test" or "validation".

    Raises:
        TensLoRAError: for the first name that is taken.
    """
    taken = {*Epoch.model_fields, f"{scored_on}_loss"}
    for name in names:
        if name in taken:
            raise TensLoRAError(
                f"dataset.metrics: a score must not be called {name}, because each epoch of a record has another value "
                f"of that name; give the metric another name"
            )
        taken.add(name)


def check_history(history: Iterable[Epoch], scores: Iterable[str], scored_on: str) -> None:
    """Check the entries of a history: their names, their scores, and that they follow one another.

    Args:
        history: the entries.
        scores: the names of the scores that every entry has.
        scored_on: the split whose loss every entry has, "test" or "validation".

    Raises:
        ValueError: for the first entry that does not fit.
    """
    names = list(scores)
    before = (0, 0)
    for entry in history:
        where, values = f"history: epoch {entry.epoch}", entry.model_extra or {}
        now = (entry.epoch, entry.step)
        _check(before[0] < now[0] and before[1] < now[1], where, "must come after the one before it")
        before = now
        _check(values.keys() == {f"{scored_on}_loss", *names}, where, f"must have the {scored_on} loss and {names}")
        for name, value in values.items():
            # An int may be too large for a float, and a comparison takes any.
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
                raise ValueError(f"{where}: {name}={shown(value)}: must be a number")
        for name in names:
            _check_score(where, name, values[name])


def read_form(form: type[Form], content: bytes | dict[str, Any], path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object that must have a declared form.

    Args:
        form: the form.
        content: the JSON text, or what has been read from it.
        path: the file, for the message.
        what: what the file should be, such as "record".

    Returns:
        The object, with the defaults of the fields that it lacks.

    Raises:
        TensLoRAError: if it has not the form. The message names the file and the first field at fault.
    """
    try:
        # NaN and lone surrogates are not JSON, and from_json refuses them. 1e999 is JSON, but it becomes infinite.
        value: Any = from_json(content if isinstance(content, bytes) else to_json(content), allow_inf_nan=False)
        json.dumps(value, allow_nan=False)
        checked = form.model_validate(value)
    except ValidationError as error:
        raise TensLoRAError(f"{path}: not a readable {what} ({_first(error)})") from error
    except (ValueError, TypeError) as error:
        raise TensLoRAError(f"{path}: not a readable {what} ({' '.join(str(error).split())})") from error
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in form.model_fields.items()
        if name not in checked.model_fields_set
    }
    return {**defaults, **value}


def _first(error: ValidationError) -> str:
    """The first complaint of pydantic's in one line."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    reason = str(cause) if cause else str(first["msg"])
    where = ".".join(map(str, first["loc"]))
    if where and first["type"] != "missing":
        where += f"={shown(first['input'])}"
    return " ".join(": ".join(filter(None, (where, reason))).split())


def _check(holds: bool, what: str, reason: str) -> None:
    if not holds:
        raise ValueError(f"{what}: {reason}")


def _check_score(where: str, name: str, score: float) -> None:
    metric = metric_of(name)
    if not metric.lowest - _ROUNDING <= score <= metric.highest + _ROUNDING:
        raise ValueError(f"{where}: {name}={score}: must be from {metric.lowest:g} to {metric.highest:g}")
