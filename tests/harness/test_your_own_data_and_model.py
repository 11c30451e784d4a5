"""Data and models of a user's own: one command trains and ends with a score, and one more predicts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import transformers

from tenslora.harness import predict
from tests.commands import Command, Commands
from tests.harness.backbones.tiny_models import TEXT, trained_tokenizer
from tests.harness.data.image_folders import paint
from tests.running import record

pytestmark = pytest.mark.slow

TINY_VIT = (
    "model=timm", "model.architecture=vit_tiny_patch16_224", "model.pretrained=false", "model.image_size=16",
    "+model.options.embed_dim=24", "+model.options.depth=1",
)  # fmt: skip
BERT = ("model=hf_text", "model.checkpoint=bert")
RANDOM_BERT = ("model=minilm", "model.pretrained=false", "model.geometry=null",
               "model.options={model_type:bert,hidden_size:16,num_hidden_layers:1,num_attention_heads:2}")  # fmt: skip

KINDS = {
    "folder": ("dataset=image_folder", "dataset.root=colours", "model=vit_digits"),
    "vit_tiny": ("dataset=image_folder", "dataset.root=colours", *TINY_VIT),
    "csv": ("dataset=text", "dataset.root=topics.csv", *RANDOM_BERT),
    "tsv": ("dataset=text", "dataset.root=pairs.tsv", *RANDOM_BERT),
    "save_to_disk": ("dataset=text", "dataset.root=saved", *RANDOM_BERT),
    "bert": ("dataset=text", "dataset.root=topics.csv", *BERT),
}
"""The words of train.py's command line for each kind of data and of model."""

ASKED = {
    "dataset.root=colours": ["colours/test/red/0.png"],
    "dataset.root=topics.csv": ["--text", "the soup was good"],
    "dataset.root=pairs.tsv": ["--text", "is it late?", "--text_pair", "it is."],
    "dataset.root=saved": ["--text", "the soup was good"],
}
"""What is asked of a run afterwards, by its data."""


def write_data(folder: Path) -> None:
    """Write images, texts and a BERT."""
    for split in ("train", "test"):
        for number in range(4):
            paint(folder / "colours" / split / ("red", "black")[number % 2] / f"{number}.png", 200 * (number % 2 == 0))
    topics = [(f"the {word} was good", topic) for topic, word in (("food", "soup"), ("sport", "race"), ("art", "film"))]
    lines = [f"{text},{topic}" for text, topic in topics * 4]
    (folder / "topics.csv").write_text("\n".join(["text,label", *lines]))
    lines = [f"is it {word}?\tit is.\t{score}" for word, score in (("late", 0.5), ("good", 2.0)) * 5]
    (folder / "pairs.tsv").write_text("\n".join(["question\tanswer\tscore", *lines]))
    rows = {"text": [text for text, _ in topics * 4], "label": [topic for _, topic in topics * 4]}
    saved = datasets.Dataset.from_dict(rows).class_encode_column("label")
    saved.train_test_split(test_size=3, seed=0).save_to_disk(folder / "saved")
    config = transformers.BertConfig(**TEXT["bert"], vocab_size=len(trained_tokenizer()))
    transformers.BertModel(config).save_pretrained(folder / "bert")
    trained_tokenizer().save_pretrained(folder / "bert")


def test_one_command_trains_and_one_more_predicts(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    common = ("trainer.epochs=1", "trainer.batch_size=4", "tensor_mode=depth", "rank_strategy=isorank")
    folders = [tmp_path / "runs" / kind for kind in KINDS]
    trained = commands.run_together(
        [
            Command("train.py", [*words, *common, f"hydra.run.dir={folder}"], tmp_path)
            for words, folder in zip(KINDS.values(), folders, strict=True)
        ]
    )
    monkeypatch.chdir(tmp_path)
    for (kind, words), folder, ended in zip(KINDS.items(), folders, trained, strict=True):
        assert ended.status == 0, f"{kind}: {ended.err}"
        score = re.search(r"(accuracy|pearson): last (\S+), best", ended.out + ended.err)
        assert score, kind
        saved = record(folder)
        assert float(score[2]) == round(saved["metrics"]["last"], 4)
        predict.main([str(folder), *ASKED[words[1]], "--format", "jsonl"])
        answer = json.loads(capsys.readouterr().out)["prediction"]
        assert answer in saved["classes"] if saved["classes"] else isinstance(answer, float), kind
