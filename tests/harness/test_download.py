"""The commands that download models and datasets, from a server that stands in for the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value

from tests.commands import Command, Commands, Ended
from tests.harness.backbones.tiny_models import SENTENCES, TEXT, VIT, trained_tokenizer
from tests.harness.data.image_folders import TINY_DTD, write_dtd
from tests.hub_server import repository

TIMM = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SIZES = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
RUNS = {
    "vit_base": [
        "tensor_mode=qkv_depth",
        "dataset=dtd",
        "model.image_size=8",
        "model.geometry=null",
        "+model.options.patch_size=4",
    ],
    "roberta_base": ["dataset=cola", "model.geometry=null"],
    TIMM: [
        "dataset=dtd",
        "model=timm",
        f"model.architecture={TIMM}",
        *(f"+model.options.{name}={size}" for name, size in SIZES.items()),
    ],
}
"""The settings of a run by its model's name."""


def fill(hub: Path) -> None:
    """Make small models with random weights, and two sentences of CoLA, into repositories of the hub."""
    torch.manual_seed(0)
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=1000))
    vit.save_pretrained(repository(hub, "models", "google/vit-base-patch16-224"))

    roberta = repository(hub, "models", "FacebookAI/roberta-base")
    settings = transformers.RobertaConfig(**TEXT["roberta"], vocab_size=len(trained_tokenizer()))
    transformers.RobertaForMaskedLM(settings).save_pretrained(roberta)
    trained_tokenizer().save_pretrained(roberta)

    from_timm = timm.create_model(TIMM, pretrained=False, **SIZES)
    timm.models.save_for_hf(from_timm, str(repository(hub, "models", f"timm/{TIMM}")), safe_serialization=True)

    glue = repository(hub, "datasets", "nyu-mll/glue")
    columns = {
        "sentence": Value("string"),
        "label": ClassLabel(names=["unacceptable", "acceptable"]),
        "idx": Value("int32"),
    }
    rows = {"sentence": [first for first, _ in SENTENCES], "label": [0, 1, 1], "idx": [0, 1, 2]}
    for split in ("train", "validation"):
        Dataset.from_dict(rows, Features(columns)).to_parquet(str(glue / "cola" / f"{split}-00000-of-00001.parquet"))
    files = "".join(f"  - split: {split}\n    path: cola/{split}-*\n" for split in ("train", "validation"))
    (glue / "README.md").write_text(f"---\nconfigs:\n- config_name: cola\n  data_files:\n{files}---\n")


@pytest.fixture(scope="module")
def downloads(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Ended, Path]]]:
    """For each run, how it ended with the hub and then without it, and its folders."""
    fill(commands.hub.folder)
    root = tmp_path_factory.mktemp("downloads")
    write_dtd(root / "dtd", TINY_DTD)
    ends: dict[str, list[tuple[Ended, Path]]] = {name: [] for name in RUNS}
    for place, environment in (("online", {}), ("offline", {"HF_HUB_OFFLINE": "1"})):
        asked = []
        for name, words in RUNS.items():
            if name == TIMM and environment:  # its weights come by the same client as the others'
                continue
            folder = root / place / name
            folder.mkdir(parents=True)
            data = [f"dataset.root={root / 'dtd'}"] if "dataset=dtd" in words else []
            words = [*words, *data, "trainer.epochs=1", "trainer.device=cpu", "hydra.run.dir=run"]
            asked.append((name, Command("train.py", words, folder, environment=environment)))
        before = len(commands.hub.requests)
        for (name, command), ended in zip(asked, commands.run_together([one for _, one in asked]), strict=True):
            ends[name].append((ended, command.folder / "run"))
    assert len(commands.hub.requests) == before, "offline commands asked the hub"
    return ends


@pytest.mark.parametrize("name", RUNS)
def test_a_model_and_a_dataset_are_downloaded_once(name: str, downloads: dict[str, list[tuple[Ended, Path]]]) -> None:
    records = []
    for place, (ended, folder) in zip(("online", "offline"), downloads[name], strict=False):
        assert ended.status == 0, ended.err
        lines = ended.err.splitlines()
        if place == "online":  # the datasets library shows how far it is, unless an earlier test has filled its cache
            lines = [line for line in lines if line and not line.startswith("Generating ")]
        assert len(lines) <= 2, ended.err  # the datasets library says that it uses its cache
        records.append(json.loads((folder / "result.json").read_text()))
        log = (folder / "train.log").read_text()
        assert "HTTP" not in log
        assert log.count("\n") <= 14, log
    assert records[0]["model"] == name
    assert all(record["digest"] == records[0]["digest"] for record in records)
    assert all(record["metrics"] == records[0]["metrics"] for record in records)


def test_a_repository_that_is_not_there(commands: Commands, tmp_path: Path) -> None:
    write_dtd(tmp_path, TINY_DTD)
    words = ["dataset=dtd", f"dataset.root={tmp_path}", "model=hf_image", "model.checkpoint=nobody/nothing"]
    ended = commands.run(Command("train.py", words, tmp_path))
    assert ended.status == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("error: model.checkpoint=nobody/nothing: there is no such folder, and it cannot be loaded")
