"""Runs that start with more parameters and cut their ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors, write_safetensors
from tenslora.harness.config import validate
from tenslora.harness.run_folder import RunFolder, UnusableCheckpoint
from tenslora.harness.training.checkpoint import save_checkpoint
from tenslora.ranks import parameter_count
from tests.running import SHORT, accuracy_of, configured, record, run

PRUNED = [*SHORT, "trainer.epochs=4", "rank_schedule=prune", "rank_schedule.epochs=[1,3]"]
DIGITS = Geometry(d_in=64, heads=4, d_head=16, layers=4)


class Stopped(Exception):
    """Stands in for the end of the process."""


def stop_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end once it has written the checkpoint of an epoch."""

    def saving(path: Path, digest: str, state: Any, *others: Any) -> None:
        save_checkpoint(path, digest, state, *others)
        if state.epochs == epochs:
            raise Stopped

    monkeypatch.setattr("tenslora.harness.training.loop.save_checkpoint", saving)


@pytest.mark.parametrize(
    "words", [["tensor_mode=qkv_depth"], ["tensor_mode=depth", "factorization=tensor_train"], ["tensor_mode=lora"]]
)
def test_a_pruned_run_meets_its_budget_and_its_record_has_the_ranks(tmp_path: Path, words: list[str]) -> None:
    from tenslora.harness.load_run import load_run

    settings = configured(*PRUNED, *words)
    left = run(tmp_path, *PRUNED, *words)
    start, ranks = settings.start_ranks(DIGITS), left["ranks_by_epoch"]
    assert start is not None and settings.adapter is not None
    factorization = settings.adapter.factorization
    fixed = settings.rank_strategy.resolve(settings.tensor_mode, DIGITS, factorization)
    counts = [parameter_count(settings.tensor_mode, DIGITS, each, factorization) for each in (start, *ranks, fixed)]
    assert 1.9 < counts[0] / counts[-1] < 2.1
    assert counts[1] == counts[2] <= round((counts[0] * counts[-1]) ** 0.5)
    assert counts[3] == counts[4] <= counts[-1]
    assert counts[4] > 0.8 * counts[-1]
    saved = load_file(tmp_path / "adapter.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == left["adapter_parameters"] == counts[4]
    assert left["ranks"] == ranks[-1]
    assert left["trained_parameters"] == counts[4] + left["head_parameters"]
    assert accuracy_of(load_run(tmp_path)) == pytest.approx(left["metrics"]["last"])


def test_a_run_that_is_stopped_before_or_after_a_cut_and_resumed_equals_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    run(whole, *PRUNED)
    for epochs in (1, 2):  # after a cut, and before one
        broken = tmp_path / f"broken{epochs}"
        with monkeypatch.context() as patch:
            stop_after(epochs, patch)
            with pytest.raises(Stopped):
                run(broken, *PRUNED)
        run(broken, *PRUNED, "resume=true")
        assert record(broken)["metrics"] == record(whole)["metrics"]
        assert record(broken)["ranks_by_epoch"] == record(whole)["ranks_by_epoch"]
        for file in ("adapter.safetensors", "head.safetensors", "predictions.safetensors"):
            assert (broken / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (None, r"ranks=null: does not fit rank_schedule"),
        ([[9, 9, 3, 4]], r"ranks: must have 2 entries, one for each epoch"),
        ([[9, 9, 3, 4], [900, 9, 3, 4]], r"ranks=\[900, 9, 3, 4\]: must be as many as \[9, 9, 3, 4\], none above it"),
        ([[9, 9, 3, 4], [9, 9, 3, 4]], r"has the shape"),
    ],
)
def test_a_checkpoint_with_other_ranks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: list[list[int]] | None, message: str
) -> None:
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            run(tmp_path, *PRUNED)
    path = RunFolder(tmp_path).checkpoint
    header, tensors = read_safetensors(path)
    write_safetensors(path, tensors, {**header, "ranks": ranks})
    with pytest.raises(UnusableCheckpoint, match=message):
        run(tmp_path, *PRUNED, "resume=true")


def test_equal_first_steps_are_those_of_the_start(tmp_path: Path) -> None:
    left = run(tmp_path, *PRUNED, "adapter.scaling=first_step")
    assert left["first_step"] == pytest.approx(left["lora_first_step"])


def test_the_schedule_is_a_part_of_the_identity_only_where_it_matters() -> None:
    plain, pruned = configured(), configured("rank_schedule=prune")
    assert "rank_schedule" not in plain.identity()
    assert pruned.identity()["rank_schedule"] == {"name": "prune", "start": 2, "epochs": [3, 6]}
    assert validate(pruned.settings()) == pruned
    assert (
        configured("tensor_mode=head_only", "rank_schedule=prune").digest()
        == configured("tensor_mode=head_only").digest()
    )
    lora = [
        configured("tensor_mode=lora", "rank_schedule=prune", f"adapter.scaling={s}").digest()
        for s in ("direct", "first_step")
    ]
    assert lora[0] != lora[1]  # a LoRA that starts with a higher rank has another first step


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["factorization=cp"], r"^factorization=cp: must be tucker or tensor_train with rank_schedule=prune$"),
        (["trainer.epochs=6"], r"^rank_schedule.epochs=\[3, 6\]: must be below 6, the last epoch$"),
        (
            ["rank_schedule.epochs=[6,3]"],
            r"^rank_schedule.epochs=\[6, 3\]: must be at least one epoch, in rising order$",
        ),
        (["rank_schedule.start=0.5"], r"^rank_schedule.start=0.5: must be at least 1"),
        (["trainer.compile=true"], r"^trainer.compile=true: must be false with rank_schedule=prune$"),
    ],
)
def test_what_does_not_fit_a_schedule_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        configured("rank_schedule=prune", *words)


def test_a_run_that_ends_before_its_last_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"^rank_schedule.epochs=\[1, 3\]: must be below 1, the last epoch$"):
        run(tmp_path, *PRUNED, "trainer.max_steps=2")
