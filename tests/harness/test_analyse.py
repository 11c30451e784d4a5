from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.test_peft_files import saved

from tenslora.harness.analyse import main, rank_for
from tests.models import build
from tests.running import SHORT, run


def test_a_run_is_analysed_from_its_adapter_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *SHORT, "tensor_mode=qkv_depth", "rank_strategy=isorank")
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    ranks = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in lines[1:7]}
    # Ranks of 4 on modes of 64, 64, 3 and 4: no more can be needed.
    assert [ranks[axis][0] for axis in ("d_in", "d_out", "projection", "depth", "d_head", "head")] == [
        64,
        64,
        3,
        4,
        16,
        4,
    ]
    assert ranks["d_in"][2] <= 4
    assert ranks["d_out"][2] <= 4
    shares = json.loads((tmp_path / "spectra.json").read_text())
    assert sum(shares["d_in"][:4]) == pytest.approx(1, abs=1e-6)
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "spectra.svg").read_text()


def test_a_lora_of_peft_is_analysed_with_the_sizes_of_its_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("hf_bert").float()
    model.config.save_pretrained(tmp_path / "backbone")  # type: ignore[union-attr,operator]
    saved(model, tmp_path / "lora", r=2, target_modules=["query", "key", "value"])
    main([str(tmp_path / "lora"), "--model", str(tmp_path / "backbone"), "--out", str(tmp_path / "out")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("d_in"))
    assert line.split()[1] == "24"
    assert (tmp_path / "out" / "spectra.svg").is_file()


def test_the_rank_for_a_share_is_the_first_that_keeps_it() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2])
    assert [rank_for(shares, energy) for energy in (0.4, 0.5, 0.7, 0.9)] == [1, 1, 2, 3]


def test_a_folder_without_an_adapter_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*adapter\.safetensors: no such file"):
        main([str(tmp_path)])
