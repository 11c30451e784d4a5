"""Files of a run that are not as this project writes them: nothing behind the door meets a wrong form.

With --hypothesis-profile=large each door takes 5,000 examples.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from torch import nn

from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors, write_safetensors
from tenslora.harness.forms import check_score_names
from tenslora.harness.predictions import Predictions, to_arrays
from tenslora.harness.results.csv import to_csv
from tenslora.harness.results.markdown import to_markdown
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Table
from tenslora.harness.run_folder import RunFolder
from tenslora.harness.run_record import describe_run
from tenslora.harness.sweeping.jobs import Job, State
from tenslora.harness.sweeping.plan import announcements, cost, plan
from tenslora.harness.training.checkpoint import Course, Start, TrainingState, load_checkpoint, save_checkpoint
from tests.mutations import as_bytes, damaged, json_like, other_tensors
from tests.records import finished
from tests.running import configured
from tests.sweeps import planned

EARLIER = Path(__file__).parent / "earlier_outputs"
SETTINGS = ("tensor_mode=att_qkv_depth", "rank_strategy=isorank", "seed=0")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return planned(tmp_path_factory.mktemp("outputs"), *SETTINGS)


def one_line(error: TensLoRAError, path: Path) -> None:
    assert str(error).startswith(f"{path}: ")
    assert str(error).isprintable()
    assert len(str(error)) < 1000


@cache
def records() -> list[dict[str, Any]]:
    """Records of this version, of one stage and of two, and of earlier ones."""
    paths = sorted(EARLIER.rglob("result.json"))
    one = {"schema": 1, **finished(configured(*SETTINGS))}
    two = {**one, "geometry": [one["geometry"]] * 2, "ranks": [one["ranks"]] * 2, "ranks_by_epoch": [[[4] * 5] * 2]}
    return [one, two, *(json.loads(path.read_text()) for path in paths)]


def test_records_of_this_version_and_of_earlier_ones_are_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for record in records():
        folder.result.write_bytes(as_bytes(record))
        assert folder.read_record().items() >= record.items()
    assert len(records()) == 12


@given(data=st.data())
def test_a_changed_record_is_refused_in_one_line_or_serves_all_that_read_it(job: Job, data: st.DataObject) -> None:
    record = data.draw(st.sampled_from(records()))
    text = json_like(record).map(as_bytes)
    job.folder.path.mkdir(parents=True, exist_ok=True)
    job.folder.result.write_bytes(data.draw(st.one_of(text, text, text, damaged(as_bytes(record)))))
    look = job.look()
    table = Table("name", "A title", (job.in_table(look),))
    plan(table, {job: look}), announcements({job: look}), cost([job])
    try:
        read = job.folder.read_record()
    except TensLoRAError as error:
        one_line(error, job.folder.result)
        assert (look.state, look.record, look.problem) == (State.FAILED, None, str(error))
        return
    json.dumps(read, allow_nan=False)
    describe_run(read)
    assert (look.record is None) == (read["digest"] != job.digest)
    if look.record:
        summary = summarize(table)
        assert "nan" not in to_csv(summary).split(",")
        assert "nan" not in to_markdown(summary).split()
        assert (read["seed"], read["model"], read["dataset"]) == (0, "vit_digits", "digits")
        assert read["status"] == "diverged" or 0 <= read["metrics"]["last"] <= 1


def test_settings_that_are_not_those_of_the_runs_digest_are_refused(job: Job, tmp_path: Path) -> None:
    record = finished(job.run)
    config = record["config"]
    for changed, message in (
        ({"seed": 1}, "seed=1: the run's is 0"),
        ({"adapter": None}, "adapter: must be a group of settings"),
        ({"adapter": {**config["adapter"], "alpha": "4"}}, 'adapter.alpha="4": the run\'s is 4'),
        ({"optimizer": {**config["optimizer"], "lr": 10**400}}, "optimizer.lr=10"),
    ):
        folder = RunFolder(tmp_path)
        folder.result.write_text(json.dumps({"schema": 1, **record, "config": {**config, **changed}}))
        with pytest.raises(TensLoRAError, match=rf"result\.json: not a readable record \(config\.{message}"):
            folder.read_record()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed=1: the run's is 0"),
        ({"model": "vit_base"}, "model=vit_base: the run's is vit_digits"),
        ({"dataset": "dtd"}, "dataset=dtd: the run's is digits"),
        ({"tensor_mode": "qkv"}, "tensor_mode=qkv: the run's is att_qkv_depth"),
        ({"digest": "0123456789ab"}, "digest=0123456789ab: is not that of its settings"),
        ({"status": "diverged"}, "failure: does not fit status=diverged"),
        ({"ranks": [4, 4]}, r"ranks=\[4, 4\]: must be 5"),
        ({"classes": 5}, "classes=5: "),
        ({"classes": ["cat", "cat"]}, r'classes=\["cat", "cat"\]: must be different names'),
        ({"device": None}, "device=null: "),
        ({"scored_on": "validation"}, "scored_on=validation: the run's is test"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_record({**records()[0], **changes})
    with pytest.raises(TensLoRAError, match=rf"^{folder.result}: not a readable record \({message}"):
        folder.read_record()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last": 1.5, "best": 1.5}, "accuracy=1.5: must be from 0 to 1"),
        ({"last": 0.25}, "metrics.last: is not the score of the last epoch"),
        ({"best": 0.25}, "metrics.best=0.25: is worse than the last"),
        ({"best": 0.75}, "metrics.best=0.75: is not the score of its epoch"),
        ({"best_epoch": 2}, "metrics.best_epoch=2: is after the last"),
        ({"name": "f1"}, "history: epoch 1: must have the test loss and"),
        ({"name": "blue"}, "blue: there is no such metric"),
        ({"history": []}, "metrics.history: must have an epoch"),
        ({"last": None}, "metrics.last=None: does not fit the history"),
    ],
)
def test_scores_that_cannot_be_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder, record = RunFolder(tmp_path), finished(configured(*SETTINGS))
    if changes.get("last") == 1.5:
        record["metrics"]["history"][0]["accuracy"] = 1.5
    folder.write_record({**record, "metrics": {**record["metrics"], **changes}})
    with pytest.raises(TensLoRAError, match=message):
        folder.read_record()


@pytest.mark.parametrize("words", [["dataset.validation=0.2"], ["dataset=vtab/kitti", "dataset.test_split=val200"]])
def test_a_run_may_be_scored_on_a_validation_split(words: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_record(finished(configured(*words)))
    assert folder.read_record()["scored_on"] == "validation"


@pytest.mark.parametrize("name", ["epoch", "step", "lr", "train_loss", "test_loss", "accuracy"])
def test_a_score_has_a_name_of_its_own(name: str) -> None:
    check_score_names(["accuracy", "validation_loss"], "test")
    with pytest.raises(TensLoRAError, match=f"^dataset.metrics: a score must not be called {name}, because each epoch"):
        check_score_names(["accuracy", name], "test")


def test_a_loss_of_hundreds_of_digits_is_refused(tmp_path: Path) -> None:
    folder, record = RunFolder(tmp_path), finished(configured(*SETTINGS))
    record["metrics"]["history"][0]["test_loss"] = 10**400
    folder.write_record(record)
    with pytest.raises(TensLoRAError, match=r"history: epoch 1: test_loss=10+\.\.\.: must be a number"):
        folder.read_record()


@given(content=st.one_of(json_like({"error": "no space"}).map(as_bytes), damaged(b'{"error": "no space"}')))
def test_a_changed_reason_is_one_line_and_the_job_runs_again(job: Job, content: bytes) -> None:
    job.folder.path.mkdir(parents=True, exist_ok=True)
    job.folder.result.unlink(missing_ok=True)
    job.folder.failure.write_bytes(content)
    look = job.look()
    job.folder.failure.unlink()
    assert (look.state, look.record) == (State.FAILED, None)
    assert look.problem is not None
    (line,) = announcements({job: look})
    assert line.isprintable()


# Checkpoints

START = Start("of then", [1.0, 2.0], [0.5, -0.5])
COURSE = Course(steps_per_epoch=2, steps=5, evaluate_every=1, scores=("accuracy",), scored_on="test", start=START)


def small(seed: int) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)


SHAPES = {"core": (3, 2), "head": (4,)}


def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoint.safetensors"
    parameters, optimizer = small(0)
    for _ in range(4):
        step(parameters, optimizer)
    epochs = [
        {"epoch": epoch, "step": 2 * epoch, "lr": 0.1, "train_loss": 1.0, "test_loss": 1.5, "accuracy": 0.5}
        for epoch in (1, 2)
    ]
    save_checkpoint(path, "0123456789ab", TrainingState(2, 4, epochs, start=START), parameters, optimizer)
    return path


@given(data=st.data())
def test_a_changed_checkpoint_is_refused_in_one_line_or_trains_on(checkpoint: Path, data: st.DataObject) -> None:
    header, tensors = read_safetensors(checkpoint)
    path = checkpoint.with_name("changed.safetensors")
    kind = data.draw(st.sampled_from(["header", "tensors", "bytes"]))
    if kind == "bytes":
        path.write_bytes(data.draw(damaged(checkpoint.read_bytes())))
    else:
        changed = data.draw(json_like(header)) if kind == "header" else header
        write_safetensors(path, data.draw(other_tensors(tensors)) if kind == "tensors" else tensors, changed)
    parameters, optimizer = small(1)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        state = load_checkpoint(path, "0123456789ab", COURSE, parameters, optimizer)
    except TensLoRAError as error:
        one_line(error, path)
        assert all(torch.equal(before[name], parameters[name]) for name in before)
        assert not optimizer.state
        return
    assert (state.epochs, state.steps) in ((1, 2), (2, 4), (3, 5))
    assert [entry["epoch"] for entry in state.history] == list(range(1, state.epochs + 1))
    assert all(math.isfinite(seconds) for seconds in state.seconds.values())
    step(parameters, optimizer)
    assert {name: tuple(parameter.shape) for name, parameter in parameters.items()} == SHAPES
    for moments in optimizer.state.values():
        assert moments["step"] == state.steps + 1


# Predictions

CLASSES = Predictions(np.array([0, 2, 1, 2]), np.eye(4, 3, dtype=np.float32))
VALUES = Predictions(np.array([0.5, -1.0, 2.0]), np.array([[0.25], [-1.5], [1.0]], np.float32))


@given(data=st.data())
def test_changed_predictions_are_refused_in_one_line_or_are_predictions(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    arrays = to_arrays({"test": data.draw(st.sampled_from([CLASSES, VALUES])), "mismatched": CLASSES})
    folder = RunFolder(tmp_path_factory.getbasetemp())
    if data.draw(st.booleans()):
        folder.predictions.write_bytes(data.draw(damaged(save(arrays))))
    else:
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        write_safetensors(folder.predictions, data.draw(other_tensors(tensors)), {})
    try:
        read = folder.read_predictions()
    except TensLoRAError as error:
        one_line(error, folder.predictions)
        return
    for split in read.values():
        assert np.isfinite(split.outputs).all()
        assert len(split.predicted) == len(split.labels) == len(split.outputs) > 0
        if not split.is_regression:
            classes = split.outputs.shape[1]
            np.bincount(split.labels * classes + split.predicted, minlength=classes**2).reshape(classes, classes)
