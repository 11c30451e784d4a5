"""The command that asks a finished run's model, against the model itself."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from tenslora.harness.data import load_dataset
from tenslora.harness.load_run import load_run
from tenslora.harness.predict import main, read_rows, write_json_lines, write_table
from tenslora.harness.run_folder import RunFolder

SENTENCES = ["the cat sat 3 times", 'the "dog", it sat', "the bird"]


@pytest.fixture
def digits(tmp_path: Path, digits_run: Path) -> list[Path]:
    """The first test images of the digits, as files."""
    run = load_run(digits_run).run
    images = load_dataset(run.dataset, run.seed).test.inputs
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, image in zip(files, images, strict=False):
        image.save(file)
    return files


def test_images_get_the_classes_that_the_run_gave_them(
    digits_run: Path, digits: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(digits_run), *map(str, digits), "--format", "jsonl"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = RunFolder(digits_run).read_predictions()["test"]
    classes = RunFolder(digits_run).read_record()["classes"]
    powers = np.exp(kept.outputs[:3].astype(np.float64))
    for row, file, predicted, expected in zip(
        rows, digits, kept.predicted, powers / powers.sum(-1, keepdims=True), strict=False
    ):
        assert row["image"] == str(file)
        assert row["prediction"] == classes[predicted]
        assert list(row["probabilities"]) == classes
        np.testing.assert_allclose(list(row["probabilities"].values()), expected, atol=1e-3)


def test_the_table_shows_the_likeliest_classes(
    digits_run: Path, digits: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(digits_run), "--device", "cpu", str(digits[0])])  # options may come first
    (prediction,) = load_run(digits_run).predict(digits[:1])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["image", "prediction", "probabilities"]
    assert f"{prediction.answer} {max(prediction.probabilities.values()):.4f}" in row


def test_the_table_does_nothing_to_the_terminal() -> None:
    out = io.StringIO()
    write_table([{"te\x1bxt": "a\x1b[2J", "prediction": "\x9b1m", "probabilities": {"\x9b1m": 1.0}}], out)
    header, row = out.getvalue().splitlines()
    assert header.split() == ["te\\x1bxt", "prediction", "probabilities"]
    assert row.split() == ["a\\x1b[2J", "\\x9b1m", "\\x9b1m", "1.0000"]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_a_file_of_sentences_keeps_its_other_columns(form: str, sentences_run: Path, tmp_path: Path) -> None:
    table = pandas.DataFrame({"id": [7, 8, 9], "sentence": SENTENCES})
    given, out = tmp_path / f"in.{form}", tmp_path / "out.csv"
    if form == "jsonl":
        table.to_json(given, orient="records", lines=True)
    elif form == "parquet":
        table.to_parquet(given)
    else:
        table.to_csv(given, index=False, sep="\t" if form == "tsv" else ",")
    main([str(sentences_run), "--file", str(given), "--out", str(out)])
    with out.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    expected = load_run(sentences_run).predict(SENTENCES)
    assert [row["id"] for row in rows] == ["7", "8", "9"]
    for row, sentence, prediction in zip(rows, SENTENCES, expected, strict=True):
        assert row["sentence"] == sentence
        assert row["prediction"] == prediction.answer
        for name, probability in prediction.probabilities.items():
            assert float(row[f"probability_{name}"]) == pytest.approx(probability, abs=1e-6)


def test_a_file_of_images_names_them_relative_to_itself(digits_run: Path, digits: list[Path], tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("\n".join(["picture", *(file.name for file in digits)]))
    main(
        [
            str(digits_run),
            "--file",
            str(tmp_path / "in.csv"),
            "--columns",
            "picture",
            "--out",
            str(tmp_path / "o.jsonl"),
        ]
    )
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    expected = load_run(digits_run).predict([Image.open(file) for file in digits])
    assert [row["prediction"] for row in rows] == [each.answer for each in expected]


def test_a_name_that_is_not_utf8_comes_back_as_it_was(digits_run: Path, digits: list[Path], tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")
    shutil.copy(digits[0], name)
    main([str(digits_run), name, "--out", str(tmp_path / "o.csv")])
    assert os.fsencode(name) in (tmp_path / "o.csv").read_bytes()


def test_a_path_that_is_too_long_is_one_line(digits_run: Path) -> None:
    long = "y" * 300
    with pytest.raises(SystemExit, match=r"^error: y{300}: no such folder$"):
        main([long, "a.png"])
    for words in ([digits_run, long], [digits_run, "--file", f"{long}.csv"]):
        with pytest.raises(SystemExit, match=r"^error: .*y(\.csv)?: cannot be (read|used) \(File name too long\)$"):
            main(list(map(str, words)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.png"], "a.png: the run's model takes sentences; give them with --text or --file"),
        ([], "give images, --text or --file, and one of them only"),
        (["--text", "The", "cat"], "cat: is one word too many; a text with blanks needs quotes, as in --text 'T"),
        (["--text", "The", "cat", "--text", "A", "dog"], "cat: is one word too many; a text with blanks needs quotes$"),
        (["--file", "my", "in.csv"], "in.csv: is one word too many; a path with blanks needs quotes, as in --file 'my"),
        (["--text", "a", "--file", "in.csv"], "give images, --text or --file, and one of them only"),
        (["--text", "a", "--text", "b", "--text_pair", "c"], "--text_pair: must be given as often as --text, which is"),
        (["--text", "a", "--text_pair", "b"], r"2 sentences for each input: must be 1, as in .* \(sentence\)"),
        (["--text", "a", "--out", "out.txt"], "--out out.txt: must end in one of .csv, .tsv, .jsonl"),
        (["--text", "a", "--out", "out.csv", "--format", "jsonl"], "--format jsonl: is for printing; the end of --out"),
        (["--file", "{}.number.jsonl"], "row 1 must have a text in the column sentence, not 5"),
        (["--text", "a", "--columns", "text"], "--columns text: needs --file"),
        (["--file", "{}", "--columns", ""], "--columns : has no column ; the columns are id, text"),
        (["--file", "in.csv", "--text_pair", "a"], "--text_pair: needs --text"),
        (["--text", "a\udcff"], r"'a\\udcff': must be text in UTF-8"),
        (["--text", "a", "--device", "abacus"], "--device=abacus: must be auto, cpu, cuda or cuda:<index>"),
        (["--text", "a", "--batch_size", "0"], "batch_size=0: must be at least 1"),
        (["--file", "in.xls"], "--file in.xls: must end in one of .csv, .tsv, .jsonl"),
        (["--file", "in.csv"], "--file in.csv: no such file"),
        (["--file", "{}.parts.csv"], "parts.csv: must be a file, not a folder"),
        (["--file", "{}"], "has no column sentence; the columns are id, text; name the input's with --columns"),
        (["--file", "{}", "--columns", "words"], "--columns words: has no column words; the columns are id, text"),
        (["--file", "{}.wide.csv"], r"the columns are a0, .*, a11 and 88 more; name the input's"),
        (["--file", "{}.ragged.csv"], "cannot be read .Error tokenizing data.*line 3"),
        (["--file", "{}.empty.csv"], "row 2 has no text in the column sentence"),
        (["--file", "{}.answered.csv"], "has a column prediction, which the answer would replace"),
        (["--out", "{}.pipe.csv"], r"pipe.csv: cannot be written \(is a pipe or a device; must be a file\)$"),
        (["--file", "{}.share.csv", "--out", "{}"], "has a column probability_acceptable, which the answer"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words: list[str], message: str, sentences_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text("id,text\n1,the cat\n")
    Path(f"{file}.wide.csv").write_text("\n".join([",".join(f"a{n}" for n in range(100)), ",".join("x" * 100)]))
    Path(f"{file}.ragged.csv").write_text("id,sentence\n1,the cat\n2,the cat, again\n")
    Path(f"{file}.empty.csv").write_text("id,sentence\n1,the cat\n2,\n")
    Path(f"{file}.answered.csv").write_text("sentence,prediction\nthe cat,yes\n")
    Path(f"{file}.number.jsonl").write_text('{"sentence": 5}\n')
    os.mkfifo(f"{file}.pipe.csv")
    Path(f"{file}.parts.csv").mkdir()  # as programs for many machines write a table
    Path(f"{file}.share.csv").write_text("sentence,probability_acceptable\nthe cat,yes\n")
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        main([str(sentences_run), *(word.format(file) for word in words)])
    assert "\n" not in str(caught.value)


def test_images_have_one_column(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("image,note\na.png,b.png\n")
    with pytest.raises(SystemExit, match=r"--columns image,note: must be one column, with the images' paths$"):
        main([str(digits_run), "--file", f"{tmp_path}/in.csv", "--columns", "image,note"])


def test_blanks_between_the_names_of_columns_mean_nothing(
    regression_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text("a,b, b\nx,y,z\n")
    answers = []
    for columns in ("a,b", " a , b", "a, b"):  # the last one is there as it is
        main([str(regression_run), "--file", f"{tmp_path}/in.csv", "--columns", columns, "--format", "jsonl"])
        answers.append(json.loads(capsys.readouterr().out)["prediction"])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_lines_are_json_in_any_encoding(encoding: str) -> None:
    content = io.BytesIO()
    out = io.TextIOWrapper(content, encoding=encoding, errors="backslashreplace")
    write_json_lines([{"text": "Le café 漢"}], out)
    out.flush()
    text = content.getvalue().decode()
    assert json.loads(text) == {"text": "Le café 漢"}
    assert text.isascii() == (encoding != "utf-8")


@pytest.mark.parametrize("lines", [False, True])
def test_a_date_in_json_stays_the_text_that_it_was(lines: bool, tmp_path: Path) -> None:
    rows = [
        {"day": "2024-01-02", "text": "a", "at": "2024-01-02T03:04:05"},
        {"day": None, "text": "b", "at": "2024-01-02"},
    ]
    file = tmp_path / ("in.jsonl" if lines else "in.json")
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    assert read_rows(file) == rows


def test_only_the_first_of_several_processes_answers(
    digits_run: Path, digits: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tenslora.harness.predict.predict", lambda _: [{"image": "a", "prediction": "b"}])
    for rank, expected in (("1", ""), ("0", "image  prediction\na      b\n")):
        monkeypatch.setenv("RANK", rank)
        main([str(digits_run), str(digits[0])])
        assert capsys.readouterr().out == expected


def test_a_number_that_json_has_not_is_named(sentences_run: Path, tmp_path: Path) -> None:
    columns = {"sentence": ["a", "b"], "x": [1.0, float("nan")]}
    pyarrow: Any = importlib.import_module("pyarrow")  # it has no types
    parquet: Any = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")  # pandas would write a null
    with pytest.raises(SystemExit, match=r"^error: row 2 holds a NaN or an infinity, which JSON has not"):
        main([str(sentences_run), "--file", f"{tmp_path}/in.parquet", "--out", f"{tmp_path}/out.jsonl"])
    assert not (tmp_path / "out.jsonl").exists()


def test_an_image_that_cannot_be_read_is_named(digits_run: Path, digits: list[Path]) -> None:
    digits[1].write_bytes(digits[1].read_bytes()[:40])
    with pytest.raises(SystemExit, match=rf"^error: {digits[1]}: not a readable image"):
        main([str(digits_run), *map(str, digits)])
    with pytest.raises(SystemExit, match=r"^error: --text: the run's model takes images; give their paths"):
        main([str(digits_run), "--text", "seven"])
    with pytest.raises(SystemExit, match=r"^error: image=https://b/a\.png: must be a path on disk, not an address$"):
        main([str(digits_run), "https://b/a.png"])
