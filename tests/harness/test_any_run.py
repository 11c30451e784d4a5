"""Whole runs: any value in any setting, and any change of any file of a run, end well or in one line.

Each example has a process of its own, and 10 seconds of the processor's time. With --hypothesis-profile=large there are
200 of each kind.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import peft  # noqa: F401  these three here, because each example's process would spend its seconds on importing them
import pytest
import timm  # noqa: F401
import transformers  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors, write_safetensors
from tenslora.harness.config import RunConfig, validate
from tenslora.harness.export import export
from tenslora.harness.load_run import load_run
from tenslora.harness.run_folder import RunFolder
from tenslora.harness.sweeping.jobs import carry_out
from tests.forks import in_a_process
from tests.harness.config.test_any_value import is_one_line, settings_with_any_values
from tests.harness.conftest import TINY_BERT
from tests.mutations import LIMIT, as_bytes, damaged, json_like, other_tensors
from tests.running import SHORT, record
from train import train

LARGE = hypothesis.settings.get_current_profile_name() == "large"
budget = hypothesis.settings(max_examples=200 if LARGE else 3, phases=[hypothesis.Phase.generate])


def made_short(run: RunConfig) -> RunConfig:
    """A run of at most two steps on a few examples, and without a service outside this process."""
    trainer = replace(
        run.trainer,
        max_steps=min(run.trainer.max_steps or 2, 2),
        workers=min(run.trainer.workers, 1),
        compile=False,
    )
    dataset = replace(run.dataset, train_size=min(run.dataset.train_size or 16, 16))
    return replace(run, trainer=trainer, dataset=dataset, logger=replace(run.logger, wandb=False, profile=False))


def outcome(settings: dict[str, Any], folder: Path) -> str:
    """Carry out a run: "ended" if it ends with a record, "refused" if it ends in one line, or what is wrong."""
    try:
        run = made_short(validate(settings))
        train(run, folder, show_progress=False)
    except TensLoRAError as error:
        if not is_one_line(str(error)):
            return f"not one line: {error}"
        if RunFolder(folder).result.exists() and RunFolder(folder).read_record()["status"] != "diverged":
            return f"a record beside the error {error}"
        return "refused"
    record = RunFolder(folder).record_of(run.digest())
    if record is None or record["status"] != "completed":
        return f"ended with the record {record}"
    load_run(folder)
    return "ended"


@pytest.fixture(scope="module")
def bases(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ...]]:
    """The words of a command line for runs on images and on texts, one of which has been carried out."""
    lines = [f"the {('cat', 'dog', 'bird')[n % 3]} sat {n} times\t{n % 2}" for n in range(40)]
    texts = tmp_path_factory.mktemp("texts") / "texts.tsv"
    texts.write_text("\n".join(["text\tlabel", *lines]))
    assert digits_run.is_dir()
    return [
        tuple(SHORT),
        (*SHORT, "tensor_mode=att_site", "factorization=cp", "rank_strategy=isorank"),
        (*SHORT, "tensor_mode=full", "logger=csv"),
        ("dataset=text", f"dataset.root={texts}", *TINY_BERT),
    ]


@budget
@given(data=st.data())
def test_any_setting_gives_a_run_with_a_record_or_one_line(
    bases: list[tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    settings = data.draw(settings_with_any_values(bases))
    folder = tmp_path_factory.getbasetemp() / "any_run"
    shutil.rmtree(folder, ignore_errors=True)
    said = in_a_process(lambda: outcome(settings, folder), LIMIT)
    assert said in ("ended", "refused"), said
    assert not list(folder.rglob("*.tmp"))


def change(path: Path, data: st.DataObject) -> None:
    """Change a file in some way that its kind allows."""
    if data.draw(st.integers(0, 2)) == 0:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    elif path.suffix == ".json":
        path.write_bytes(data.draw(json_like(json.loads(path.read_text())).map(as_bytes)))
    else:
        header, tensors = read_safetensors(path)
        header = data.draw(st.one_of(st.just(header), json_like(header)))
        write_safetensors(path, data.draw(other_tensors(tensors)), header)


def used(folder: RunFolder, run: RunConfig) -> str:
    """Use a run's folder in every way: "used", or what is wrong."""

    def evaluated() -> None:
        evaluation = load_run(folder.path).evaluate()
        assert math.isfinite(evaluation.loss), evaluation.loss

    def exported() -> None:
        shutil.rmtree(folder.path / "exported", ignore_errors=True)
        export(folder.path, "peft", folder.path / "exported")

    for use in (evaluated, exported, folder.read_predictions):
        try:
            use()
        except TensLoRAError as error:
            if not is_one_line(str(error)):
                return f"not one line: {error}"
    carry_out(run, folder, "digits", lambda run, path: train(run, path, show_progress=False))
    record = folder.record_of(run.digest())
    return "used" if record and record["status"] == "completed" else f"it has the record {record}"


@budget
@given(data=st.data())
def test_a_run_with_a_changed_file_is_used_or_refused_in_one_line_and_goes_on(
    digits_run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = validate(record(digits_run)["config"])
    folder = RunFolder(tmp_path_factory.getbasetemp() / "changed_run")
    shutil.rmtree(folder.path, ignore_errors=True)
    shutil.copytree(digits_run, folder.path)
    names = sorted(file.name for file in digits_run.iterdir() if file.suffix in (".json", ".safetensors"))
    change(folder.path / data.draw(st.sampled_from(names)), data)
    if data.draw(st.booleans()):  # the run has not finished
        folder.result.unlink()
    said = in_a_process(lambda: used(folder, run), LIMIT)
    assert said == "used", said
    assert not list(folder.path.rglob("*.tmp"))
