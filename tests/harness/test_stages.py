"""Runs on a backbone whose layers come in stages of different sizes: a small Swin with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tenslora.errors import TensLoRAError
from tenslora.harness import analyse
from tenslora.harness.export import export
from tenslora.harness.load_run import load_run
from tenslora.harness.results.csv import read_runs, to_csv
from tenslora.harness.results.summary import summarize
from tenslora.harness.run_record import describe_run
from tests.harness.conftest import TINY_SWIN
from tests.harness.training.test_rank_schedule import Stopped, stop_after
from tests.running import CONF, accuracy_of, configured, record, run
from tests.sweeps import planned
from tests.tables import make_table


def test_a_run_has_the_ranks_of_each_stage_and_the_parameters_of_all(staged_run: Path) -> None:
    found, settings = record(staged_run), configured(*TINY_SWIN)
    assert settings.geometries is not None
    assert [stage["d_in"] for stage in found["geometry"]] == [8, 16]
    resolved = [settings.rank_strategy.resolve("qkv_depth", each, "tucker") for each in settings.geometries]
    assert found["ranks"] == list(map(list, resolved))
    saved = load_file(staged_run / "adapter.safetensors")
    assert found["adapter_parameters"] == sum(tensor.numel() for tensor in saved.values())
    assert found["lora_parameters"] == 4 * (2 * 3 * 16 + 2 * 3 * 32)
    # LoRA's is 4 sqrt(r d_out / 3) in each matrix, and both stages have six.
    assert found["lora_first_step"] == pytest.approx(4 * ((4 * 8 / 3 + 4 * 16 / 3) / 2) ** 0.5)
    ranks = "; ".join(f"d_in {a}, d_out {b}, projection {c}, depth {d}" for a, b, c, d in found["ranks"])
    assert f"ranks (isoparameters): {ranks}\n" in describe_run(found)
    assert accuracy_of(load_run(staged_run)) == pytest.approx(found["metrics"]["last"])


def test_a_stopped_run_goes_on_and_one_with_equal_first_steps_has_loras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY_SWIN, "adapter.scaling=first_step", "rank_schedule=prune", "rank_schedule.epochs=[1]"]
    run(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Stopped):
            run(tmp_path / "broken", *words)
    run(tmp_path / "broken", *words, "resume=true")
    whole = record(tmp_path / "whole")
    assert whole["first_step"] == pytest.approx(whole["lora_first_step"])
    assert record(tmp_path / "broken")["ranks_by_epoch"] == whole["ranks_by_epoch"]
    for file in ("adapter.safetensors", "head.safetensors", "predictions.safetensors"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_table_plans_what_the_run_then_has_and_is_read_back(staged_run: Path, tmp_path: Path) -> None:
    job = planned(tmp_path, *TINY_SWIN)
    before = job.in_table(job.look())
    shutil.copytree(staged_run, job.folder.path)
    after = job.in_table(job.look())
    assert after.record is not None
    assert before.size.parameters == after.size.parameters == record(staged_run)["adapter_parameters"]
    assert before.size.ranks == after.size.ranks == tuple(map(tuple, record(staged_run)["ranks"]))
    assert before.size.relative_step == pytest.approx(after.size.relative_step)
    table = tmp_path / "tables" / "staged"
    table.mkdir(parents=True)
    (table / "table.csv").write_text(to_csv(summarize(make_table([after]))))
    (again,) = read_runs(table)
    assert (again.ranks, again.record) == (after.size.ranks, after.record)


def test_a_run_starts_from_a_lora_that_covers_all_stages(staged_run: Path, tmp_path: Path) -> None:
    export(staged_run, "peft", tmp_path / "lora")
    found = run(tmp_path / "run", *TINY_SWIN, f"warm_start={tmp_path / 'lora'}", "trainer.max_steps=1")
    assert found["warm_start"]["error"] == pytest.approx(0, abs=1e-3)  # the LoRA has the ranks of the new adapter


def test_each_stage_is_analysed_by_itself(staged_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analyse.main([str(staged_run), "--out", str(tmp_path)])
    first, second = json.loads((tmp_path / "spectra.json").read_text())
    assert (len(first["d_in"]), len(second["d_in"])) == (8, 16)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("stage")] == [
        ["stage", "0", "size"],
        ["stage", "1", "size"],
    ]
    assert lines[-1] == str(tmp_path / "spectra_1.svg")


def test_ranks_that_fit_one_stage_alone_are_refused() -> None:
    with pytest.raises(TensLoRAError, match=r"ranks=\[9, 3, 3, 2\]: the rank 9 of d_in .*, in stage 0 of the model$"):
        configured(*TINY_SWIN, "rank_strategy=explicit", "rank_strategy.ranks=[9,3,3,2]")


@pytest.mark.parametrize("preset", [path.stem for path in sorted((CONF / "preset").glob("*.yaml"))])
def test_every_preset_trains_all_stages(preset: str, tmp_path: Path) -> None:
    found = run(tmp_path, *TINY_SWIN, f"preset={preset}", "rank_strategy.rank=4", "trainer.max_steps=2")
    assert found["status"] == "completed"
    saved = load_file(tmp_path / "adapter.safetensors")
    assert {name.split(".")[1] for name in saved} == {"0", "1"}
    starting = {name.rpartition(".")[2] for name, value in saved.items() if not value.any()}
    assert not starting, "what starts at zero has moved in every stage"
