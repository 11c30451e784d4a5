"""The spectra of trained updates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tenslora import AdapterConfig, Geometry, RankStrategy
from tenslora.adapter import Adapter
from tenslora.files import write_json
from tenslora.harness.analyse import energy_by_rank, main, rank_for
from tenslora.harness.run_folder import RunFolder
from tests.conftest import ROOT
from tests.drawn import xy
from tests.models import build
from tests.peft.test_saved_lora import save_random_lora
from tests.records import finished
from tests.running import configured


def test_a_run_is_analysed_from_its_adapter_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AdapterConfig("qkv_depth", RankStrategy("isorank"))
    adapter = Adapter(config, Geometry(d_in=64, heads=4, d_head=16, layers=4))
    with torch.no_grad():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    adapter.save(tmp_path / "adapter.safetensors")
    main([str(tmp_path)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["axis", "size", "90", "%", "99", "%"]
    table = {line.split()[0]: [int(number) for number in line.split()[1:]] for line in lines[:6]}
    sizes = {axis: numbers[0] for axis, numbers in table.items()}
    assert sizes == {"d_in": 64, "d_out": 64, "projection": 3, "depth": 4, "d_head": 16, "head": 4}
    # A tensor of rank 4 along each of these axes needs no more.
    assert table["d_in"][2] <= 4
    assert table["d_out"][2] <= 4
    shares = json.loads((tmp_path / "spectra.json").read_text())
    assert sum(shares["d_in"][:4]) == pytest.approx(1, abs=1e-6)
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "spectra.svg").read_text()
    assert lines[6:] == [str(tmp_path / "spectra.png"), str(tmp_path / "spectra.svg")]
    # Beside a record, the adapter must be the one of that run.
    record = finished(configured("tensor_mode=qkv_depth"))
    RunFolder(tmp_path).write_record({**record, "sha256": {"adapter.safetensors": "0" * 64}})
    with pytest.raises(SystemExit, match=r"^error: \S*/adapter\.safetensors: is not the file that the run wrote; its"):
        main([str(tmp_path)])


def test_a_lora_of_peft_is_analysed_with_the_sizes_of_its_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("hf_bert").float()
    assert isinstance(model, PreTrainedModel)
    model.config.save_pretrained(tmp_path / "backbone")
    save_random_lora(model, tmp_path / "lora", r=2, target_modules=["query", "key", "value"])
    main([str(tmp_path / "lora"), "--model", str(tmp_path / "backbone"), "--out", str(tmp_path / "out")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("d_in"))
    assert line.split()[1] == "24"
    assert (tmp_path / "out" / "spectra.svg").is_file()
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(SystemExit, match=rf"^error: {config}: base_model_name_or_path={tmp_path}: must be .*; give an"):
        main([str(tmp_path / "lora")])
    with pytest.raises(SystemExit, match=rf"^error: --model {tmp_path}: must be .*\)$"):
        main([str(tmp_path / "lora"), "--model", str(tmp_path)])


def test_the_rank_for_a_share_is_the_first_that_keeps_it() -> None:
    assert [rank_for([0.5, 0.3, 0.2], energy) for energy in (0.4, 0.5, 0.7, 0.9)] == [1, 1, 2, 3]


def test_a_line_of_the_figure_rises_from_nothing_to_all_of_the_energy() -> None:
    shares = {"d_in": [0.5, 0.25, 0.125, 0.125], "head": [0.75, 0.25]}
    (axes,) = energy_by_rank(shares).axes
    _, d_in, head = axes.lines
    assert xy(d_in) == [[0, 0], [25, 50], [50, 75], [75, 87.5], [100, 100]]
    assert xy(head) == [[0, 0], [50, 75], [100, 100]]
    assert [str(line.get_label()) for line in (d_in, head)] == ["d_in (4)", "head (2)"]


def test_updates_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    Adapter(AdapterConfig("qkv_depth"), Geometry(d_in=24, heads=3, d_head=8, layers=2)).save(
        tmp_path / "adapter.safetensors"
    )
    with pytest.raises(SystemExit, match=r"error: .*: its updates are all zero"):
        main([str(tmp_path)])


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    problem = rf"^error: {tmp_path}: must hold a run's adapter\.safetensors, or the adapter_config\.json of a LoRA that"
    with pytest.raises(SystemExit, match=rf"{problem} PEFT saved$"):
        main([str(tmp_path)])
    write_json(tmp_path / "mine/adapter_config.json", {})  # as PEFT writes an adapter of that name
    with pytest.raises(SystemExit, match=rf"{problem} PEFT saved; there is {tmp_path}/mine/adapter_config\.json$"):
        main([str(tmp_path)])


def test_what_has_no_adapter_is_said_in_one_line(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_record(finished(configured("tensor_mode=head_only")))
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}: is a run of tensor_mode=head_only, which has no adap"):
        main([str(tmp_path)])
    # As a command of its own, as the libraries that it imports may write lines too.
    command = [sys.executable, "-m", "tenslora.harness.analyse", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: nowhere: no such folder\n")


@pytest.mark.parametrize("words", [["--model", "x"], ["--adapt", "all"]])
def test_an_option_for_a_lora_is_refused_for_a_run(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"^error: {' '.join(words)}: is only for a LoRA that PEFT saved"):
        main([str(tmp_path), *words])
