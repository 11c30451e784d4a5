"""The command that scores a finished run again."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from tenslora.harness import predict
from tenslora.harness.evaluate import main, scores_of
from tenslora.harness.load_run import load_run
from tenslora.harness.run_folder import RunFolder
from tests.harness.data.image_folders import TINY_DTD, write_dtd, write_eurosat
from tests.running import SHORT, record, run


def scores(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, float]:
    main([*words, "--format", "jsonl"])
    printed = json.loads(capsys.readouterr().out)
    return {name: value for name, value in printed.items() if name not in ("dataset", "examples")}


@pytest.mark.parametrize("finished", ["digits_run", "sentences_run", "regression_run"])
def test_the_scores_are_those_of_the_record_to_the_last_digit(
    finished: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(finished)
    assert scores(capsys, str(folder)) == scores_of(RunFolder(folder).read_record())
    main([str(folder)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"{record(folder)['test_examples']} test examples" in first
    assert all(line.split()[1] == line.split()[-1] for line in lines)


@pytest.mark.parametrize(
    ("name", "write"), [("dtd", functools.partial(write_dtd, splits=TINY_DTD)), ("eurosat", write_eurosat)]
)
def test_the_scores_of_torchvisions_datasets_are_those_of_the_record(
    name: str, write: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path)
    run(tmp_path / "run", f"dataset={name}", f"dataset.root={root}", "model=vit_digits", "trainer.epochs=1")
    assert scores(capsys, str(tmp_path / "run")) == scores_of(record(tmp_path / "run"))


def test_a_validation_split_or_the_test_split_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *SHORT, "dataset.validation=0.3", "trainer.precision=bf16")
    assert scores(capsys, str(tmp_path)) == scores_of(record(tmp_path))
    on_test = scores(capsys, str(tmp_path), "dataset.validation=null")
    assert list(on_test) == ["test_loss", "accuracy"]
    for word in ("dataset.validation=0.2", "dataset.train_size=20"):
        with pytest.raises(SystemExit, match=f"^error: {word}: must be (0.3|50), as in the run; otherwise"):
            main([str(tmp_path), word])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dataset.root=/nowhere", "dataset.root=/nowhere: no such folder"),
        ("dataset.rot=x", "dataset.rot: there is no such setting; did you mean dataset.root"),
        ("optimizer.lr=1", "optimizer.lr=1: must be written as dataset.<setting>=<value>"),
        ("dataset=cola", "dataset=cola: must be written as dataset.<setting>=<value>"),
        ("dataset.root", "dataset.root: must be written as"),
        ("dataset.root=a (1).csv", r".*: is not a value .* need quotes, as in 'dataset\.root=\"a \(1\)\.csv\"'$"),
        ("dataset.root=a dataset.validation=null", ".*: is several settings in one word"),
        ("dataset.root=a,b", r".* is several values; .* text needs quotes, as in 'dataset\.root=\"a,b\"'$"),
        ("dataset.metrics=accuracy,f1", r".* a list needs brackets, as in 'dataset\.metrics=\[accuracy,f1\]', and"),
    ],
)
def test_a_mistake_is_one_line(word: str, message: str, sentences_run: Path) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main([str(sentences_run), word])


def test_other_images_need_no_training_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for index in range(40):
        red = (index % 3) * 100
        path = tmp_path / "images" / ("train" if index < 30 else "test") / ("a", "b", "c")[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 50, (8, 8, 3), np.uint8) + np.array([red, 0, 0], np.uint8)).save(path)
    folder = tmp_path / "run"
    words = ["model=vit_digits", "trainer.epochs=3", "trainer.batch_size=8", "optimizer.lr=0.02"]
    run(folder, "dataset=image_folder", f"dataset.root={tmp_path}/images", *words)
    for split in ("b", "c"):  # without the class a, the other classes have other numbers
        shutil.copytree(tmp_path / "images" / "train" / split, tmp_path / "others" / split)
    on_others = scores(capsys, str(folder), f"dataset.root={tmp_path}/others")
    images = sorted((tmp_path / "others").rglob("*.png"))
    predictions = load_run(folder).predict(images)
    right = [each.answer == image.parent.name for each, image in zip(predictions, images, strict=True)]
    assert on_others["accuracy"] == sum(right) / len(right)
    assert any(right)
    lines = [f"{path.relative_to(tmp_path / 'others')} {path.parent.name}" for path in images]
    (tmp_path / "others" / "new.txt").write_text("\n".join(lines))
    listed = [f"dataset.root={tmp_path}/others", "dataset.test_list=new.txt"]
    assert scores(capsys, str(folder), *listed) == on_others  # though the run has no list to train on
    shutil.copytree(tmp_path / "others" / "c", tmp_path / "unknown" / "d")
    with pytest.raises(SystemExit, match="error: dataset=images: the run has no class d; its classes are a, b, c"):
        main([str(folder), f"dataset.root={tmp_path}/unknown"])


@pytest.mark.parametrize("labels", [("low", "high", "none"), (0.5, 2.5, 1.0)])
def test_other_texts_need_no_training_examples(
    labels: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pandas.DataFrame({"text": [f"the {'cat' if n % 3 else 'dog'} sat {n} times" for n in range(30)]})
    table["label"] = [labels[n % 3] for n in range(30)]
    table.to_csv(tmp_path / "mine.csv", index=False)
    folder = tmp_path / "run"
    model = [f"model.{word}" for word in ("pretrained=false", "geometry=null")]
    sizes = "hidden_size:24,num_hidden_layers:2,num_attention_heads:3,intermediate_size:32"
    model += [f"model.options={{model_type:bert,{sizes}}}"]
    words = ["dataset=text", f"dataset.root={tmp_path}/mine.csv", "dataset.validation=0.2", "model=minilm", *model]
    run(folder, *words, "trainer.epochs=1", "trainer.batch_size=8", "tensor_mode=depth", "rank_strategy=isorank")
    assert scores(capsys, str(folder)) == scores_of(record(folder))
    respelt = f"dataset.root={tmp_path}/run/../mine.csv"
    assert scores(capsys, str(folder), respelt) == scores_of(record(folder)), "the run has trained on the other rows"
    with pytest.raises(SystemExit, match=r"^error: dataset\.validation=0\.3: must be 0\.2, as in the run"):
        main([str(folder), respelt, "dataset.validation=0.3"])
    moved = table.assign(text=[*table["text"][3:], *table["text"][:3]])  # within the same labels
    moved.to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(
        SystemExit, match=r"the run, which had other examples, or .* order, or another tokenizer; what is"
    ):
        main([str(folder)])
    table.to_csv(tmp_path / "mine.csv", index=False)
    others = table[table["label"] != labels[1]].sample(frac=1, random_state=0)
    others.to_json(tmp_path / "others.jsonl", orient="records", lines=True)
    main([str(folder), f"dataset.root={tmp_path}/others.jsonl", "--format", "jsonl"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["examples"] == 20
    predictions = load_run(folder).predict(list(others["text"]))
    answers = [each.answer for each in predictions]
    if isinstance(labels[0], str):
        assert printed["accuracy"] == (others["label"] == answers).mean()
        others.assign(label="huge").to_csv(tmp_path / "huge.csv", index=False)
        with pytest.raises(SystemExit, match="has labels that the run does not have: huge; the run has"):
            main([str(folder), f"dataset.root={tmp_path}/huge.csv"])
    else:
        assert printed["pearson"] == pytest.approx(others["label"].corr(pandas.Series(answers, others.index)), abs=1e-6)


def test_the_processes_of_a_command_share_the_work(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "0.png")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command, words in ((main, []), (predict.main, [f"{tmp_path}/0.png"])):
        with pytest.raises(SystemExit, match=r"^error: WORLD_SIZE=2: needs MASTER_ADDR too; "):
            command([str(digits_run), *words])
