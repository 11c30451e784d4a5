"""What a user can get wrong, through the command line's own entry: one line, a status that is not zero."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train
from tenslora.harness.app import run_app
from tests.conftest import ROOT
from tests.running import SHORT


def refused(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The line that `python train.py <words>` ends with."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        run_app(train.main, "config")
    assert isinstance(ended.value.code, str), "a string as the code is printed to stderr and means status 1"
    assert ended.value.code.startswith("error: ")
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tensor_mode=nope"], "tensor_mode=nope: must be one of att, att_depth"),
        (["dataset=imagenet"], "dataset=imagenet: must be one of cifar10, cola"),
        (["rank_strategy=explicit", "rank_strategy.ranks=[4,4]"], "ranks=[4, 4]: tensor_mode qkv_depth needs 4"),
        (["rank_strategy=explicit"], "rank_strategy.ranks=None: tensor_mode qkv_depth needs 4 integers"),
        (["rank_strategy=explicit", "rank_strategy.ranks=[65,4,3,4]"], "the rank 65 of d_in must be from 1 to 64"),
        (["rank_strategy.rank=0"], "rank_strategy.rank=0: must be from 1 to 64"),
        (["optimizer.lr=-0.001"], "optimizer.lr=-0.001: must be at least 0"),
        (["optimizer.min_lr=1"], "optimizer.min_lr=1.0: must be at least 0 and at most 0.001"),
        (["optimizer.lr=fast"], "optimizer.lr: Value 'fast' of type 'str' could not be converted to Float"),
        (["optimizer.learning_rate=1"], "Could not override 'optimizer.learning_rate'"),
        (["trainer.batch_size=0"], "trainer.batch_size=0: must be at least 1"),
        (["trainer.precision=fp8"], "trainer.precision=fp8: must be one of fp32, bf16"),
        (["trainer.device=cuda:77"], "trainer.device=cuda:77: this machine has"),
        (["adapter.init=zeros"], "adapter.init=zeros: must be one of orthogonal, normal, kaiming_uniform"),
        (["dataset=dtd", "model=minilm"], "model=minilm: takes texts, and dataset=dtd holds images"),
        (["dataset=cola", "model=vit_base"], "model=vit_base: takes images, and dataset=cola holds texts"),
        (["dataset=dtd", "dataset.root=missing"], "dataset.root=missing: no such folder; it should hold dtd"),
        (["dataset=cola", "dataset.root=missing"], "dataset.root=missing: no such folder"),
        (["model.checkpoint=missing"], "model.checkpoint=missing: no such file"),
        (["model.geometry.layers=6", "rank_strategy=isorank"], "layers=6: the backbone that was loaded has 4"),
        (["model.options.num_heads=5"], "do not make a vit_tiny_patch16_224 (dim should be divisible by num_heads)"),
        (["tensor_mode"], "missing EQUAL"),
        (["optimizer=null"], "Config group override must be a string"),
        (["dataset=dtd", "model=deit_tiny_timm", "dataset.root=missing", "model.image_size=0"], "model.image_size=0"),
    ],
)
def test_a_wrong_setting_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert message in refused(monkeypatch, *SHORT[:1], f"hydra.run.dir={tmp_path}", *words)
    assert not (tmp_path / "result.json").exists()


def test_a_line_of_text_that_is_broken_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = "gj04\t1\t\tIt is fine.\n"
    (tmp_path / "train.tsv").write_text(good * 3 + "gj04\t1\tno fourth column\n")
    (tmp_path / "dev.tsv").write_text(good)
    words = ["dataset=cola", f"dataset.root={tmp_path}", "model.pretrained=false", f"hydra.run.dir={tmp_path}"]
    assert f"{tmp_path}/train.tsv:4: 3 tab-separated columns where there should be 4" in refused(monkeypatch, *words)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("River", "Sea"):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(folder / f"{name}_{number}.jpg")
    broken = tmp_path / "eurosat" / "2750" / "Sea" / "Sea_2.jpg"
    broken.write_bytes(b"not an image")
    words = ["dataset=eurosat", "model=vit_digits", f"dataset.root={tmp_path}", "trainer.device=cpu"]
    line = refused(monkeypatch, *words, f"trainer.workers={workers}", f"hydra.run.dir={tmp_path}")
    assert line.startswith(f"error: {broken}: not a readable image")


def test_another_models_checkpoint_and_a_damaged_one_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other, damaged = tmp_path / "other.safetensors", tmp_path / "damaged.safetensors"
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, other)
    damaged.write_bytes(other.read_bytes()[:-2])
    words = [f"hydra.run.dir={tmp_path}", *SHORT]
    assert f"model.checkpoint={other}: is not a checkpoint of vit_digits" in refused(
        monkeypatch, *words, f"model.checkpoint={other}"
    )
    assert f"model.checkpoint={damaged}: damaged" in refused(monkeypatch, *words, f"model.checkpoint={damaged}")


def test_resuming_from_a_damaged_checkpoint_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    line = refused(monkeypatch, *SHORT, "resume=true", f"hydra.run.dir={tmp_path}")
    assert f"{tmp_path}/checkpoint.safetensors: not a readable safetensors file" in line


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_record_that_was_there(tmp_path: Path) -> None:
    # A real limit of the kernel's, on the size of any file that the process writes; it counts like a full disk.
    (tmp_path / "result.json").write_text('{"old": true}')

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "train.py", *SHORT, f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {tmp_path}/checkpoint.safetensors: cannot be written (File too large)")
    assert (tmp_path / "result.json").read_text() == '{"old": true}'
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full_ends_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.decode().strip()}")
    try:
        line = refused(monkeypatch, *SHORT, "tensor_mode=lora", "rank_strategy.rank=16", f"hydra.run.dir={disk}")
        assert f"{disk}/checkpoint.safetensors: cannot be written (No space left on device)" in line
        assert not (disk / "result.json").exists()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # the run's log file is still open


def test_the_process_itself_ends_with_status_1_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "optimizer.lr=-1", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: optimizer.lr=-1.0: must be at least 0 and finite\n")


def test_the_traceback_comes_on_request(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "optimizer.lr=-1", f"hydra.run.dir={tmp_path}"]
    environment = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "TensLoRAError: optimizer.lr=-1.0: must be at least 0" in done.stderr


def test_a_multirun_goes_on_past_a_job_that_fails(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "train.py",
        "-m",
        *SHORT,
        "trainer.epochs=1",
        "optimizer.lr=-1,1e-3",
        f"hydra.sweep.dir={tmp_path}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(list(tmp_path.rglob("result.json"))) == 1
    assert done.stderr.splitlines()[-1] == "error: optimizer.lr=-1.0: must be at least 0 and finite"


def test_an_output_folder_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file" in refused(monkeypatch, *SHORT, f"hydra.run.dir={tmp_path}/file/run")
