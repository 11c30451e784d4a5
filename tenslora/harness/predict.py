"""Asks a finished run's model about images or sentences.

    python -m tenslora.harness.predict <run> a.jpg b.png
    python -m tenslora.harness.predict <run> --text "The cat sat." --text "The sat cat."
    python -m tenslora.harness.predict <run> --text "Is it raining?" --text_pair "Where is my umbrella?"
    python -m tenslora.harness.predict <run> --file in.csv --out out.csv

A file (.csv, .tsv, .jsonl, .json or .parquet) has a row for each input: one or two columns of
sentences, or a column of images' paths, which are relative to the file's folder. The answer keeps the other columns.
"""

from __future__ import annotations

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("error: must be started as python -m tenslora.harness.predict")
    import tenslora.harness.early  # catches Ctrl-C from here on

    tenslora.harness.early.start_command()

import argparse
import codecs
import csv
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tenslora.errors import TensLoRAError, printable, require_path
from tenslora.files import require_file, require_no_device, write_bytes
from tenslora.harness.commands import add_run_arguments, command_parser, mistakes_in_one_line, path_argument

Row = Mapping[str, Any]
"""A row of a table, by the names of the columns."""

IMAGE_COLUMNS = ("image", "path", "file")
"""The columns of a file in which images' paths are looked for, in this order."""

_PROBABILITY = "probability_"
# A class's column in .csv and .tsv files begins with this.

LIKELIEST = 3
"""The number of classes of which the printed table shows the probability."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read a table with the names of the columns.

    Args:
        file: the file, with a suffix in `FILES`.

    Returns:
        The rows. The cells of .csv and .tsv files are strings.

    Raises:
        TensLoRAError: if the file cannot be read, or has no rows.
    """
    from tenslora.harness.data.text_files import FILES, read_tables, reason_of

    if file.suffix.lower() not in FILES:
        raise TensLoRAError(f"--file {file}: must end in one of {', '.join(FILES)}")
    try:
        require_file(file)
    except TensLoRAError as error:
        raise TensLoRAError(f"--file {error}") from error
    try:
        rows: list[dict[str, Any]] = read_tables([file]).to_list()
    except Exception as error:  # OSError, and the types of the datasets library, of pandas and of pyarrow
        raise TensLoRAError(f"--file {file}: cannot be read ({reason_of(error)})") from error
    if not rows:
        raise TensLoRAError(f"--file {file}: has no rows")
    return rows


def write_table(rows: Sequence[Row], out: TextIO) -> None:
    """Write a table for people, with the probabilities of the likeliest classes.

    Args:
        rows: the inputs and their answers, as `answered` gives them.
        out: the stream to write to.
    """
    shown = [name for name in rows[0] if name != "probabilities"]
    lines = [shown + (["probabilities"] if rows[0].get("probabilities") else [])]
    for row in rows:
        likeliest = sorted(row.get("probabilities", {}).items(), key=lambda item: -item[1])[:LIKELIEST]
        lines.append([_shortened(row[name]) for name in shown] + [f"{name} {share:.4f}" for name, share in likeliest])
    lines = [[printable(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
    for line in lines:
        out.write("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip() + "\n")


def write_json_lines(rows: Sequence[Row], out: TextIO) -> None:
    """Write a JSON object for each row.

    Args:
        rows: the inputs and their answers, as `answered` gives them.
        out: the stream to write to.

    Raises:
        TensLoRAError: before anything is written, if a cell holds a number that JSON has not.
    """
    lines = []
    # Where the output is not UTF-8, JSON's own escapes are: Python's would not be JSON.
    is_utf8 = codecs.lookup(out.encoding or "utf-8").name == "utf-8"
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(json.dumps(row, ensure_ascii=not is_utf8, default=str, allow_nan=False) + "\n")
        except ValueError as error:
            raise TensLoRAError(f"row {number} holds a NaN or an infinity, which JSON has not; write a .csv") from error
    out.writelines(lines)


def _write_delimited(rows: Sequence[Row], out: TextIO, delimiter: str) -> None:
    flat = [
        {name: value for name, value in row.items() if name != "probabilities"}
        | {_PROBABILITY + name: share for name, share in row.get("probabilities", {}).items()}
        for row in rows
    ]
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in flat for name in row)), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(flat)


FORMATS: Mapping[str, Callable[[Sequence[Row], TextIO], None]] = {"table": write_table, "jsonl": write_json_lines}
"""The forms in which the command prints."""

WRITERS: Mapping[str, Callable[[Sequence[Row], TextIO], None]] = {
    ".csv": lambda rows, out: _write_delimited(rows, out, ","),
    ".tsv": lambda rows, out: _write_delimited(rows, out, "\t"),
    ".jsonl": write_json_lines,
}
"""The forms in which the command writes a file, by the end of its name."""


def _shortened(cell: Any, most: int = 60) -> str:
    text = f"{cell:.6g}" if isinstance(cell, float) else " ".join(str(cell).split())
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def _given_rows(given: argparse.Namespace, modality: str) -> list[dict[str, Any]]:
    """The inputs on the command line as rows, with the columns "image" or "text" and "text_pair"."""
    if given.images and modality == "text" and (given.text or given.file):
        option, kind, before = ("--text", "text", given.text) if given.text else ("--file", "path", [str(given.file)])
        typed = f", as in {option} {shlex.quote(' '.join([*before, *given.images]))}" if len(before) == 1 else ""
        raise TensLoRAError(f"{given.images[0]}: is one word too many; a {kind} with blanks needs quotes{typed}")
    if sum(map(bool, (given.images, given.text, given.file))) != 1:
        raise TensLoRAError("give images, --text or --file, and one of them only")
    if given.columns is not None and not given.file:
        raise TensLoRAError(f"--columns {given.columns}: needs --file")
    if given.text_pair and not given.text:
        raise TensLoRAError("--text_pair: needs --text")
    if given.file:
        return read_rows(given.file)
    if bool(given.images) != (modality == "image"):
        asked = given.images[0] if given.images else "--text"
        wanted = "images; give their paths" if modality == "image" else "sentences; give them with --text or --file"
        raise TensLoRAError(f"{asked}: the run's model takes {wanted}")
    if given.images:
        return [{"image": path} for path in given.images]
    if not given.text_pair:
        return [{"text": text} for text in given.text]
    if len(given.text) != len(given.text_pair):
        raise TensLoRAError(
            f"--text_pair: must be given as often as --text, which is {len(given.text)}, not {len(given.text_pair)}"
        )
    return [{"text": text, "text_pair": pair} for text, pair in zip(given.text, given.text_pair, strict=True)]


def _inputs(given: argparse.Namespace, rows: Sequence[Row], known: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The cells with each row's input: in the columns asked for, or else in the first of those known that are there."""
    if given.file is None:
        return [tuple(row.values()) for row in rows]
    present = list(rows[0])
    if given.columns is None:
        choices = known
    else:  # a blank after the comma means nothing, unless a name has one
        names = given.columns.split(",")
        choices = [names] if set(names).issubset(present) else [[name.strip() for name in names]]
    columns = next((names for names in choices if set(names).issubset(present)), None)
    if columns is None:
        missing = f"--file {given.file}" if given.columns is None else f"--columns {given.columns}"
        looked_for = " or ".join(", ".join(names) for names in choices)
        from tenslora.harness.data.examples import shortened

        hint = "" if given.columns is not None else "; name the input's with --columns"
        raise TensLoRAError(f"{missing}: has no column {looked_for}; the columns are {shortened(present)}{hint}")
    for number, row in enumerate(rows, start=1):
        for name in columns:
            if row[name] is not None and not isinstance(row[name], str):
                raise TensLoRAError(
                    f"--file {given.file}: row {number} must have a text in the column {name}, not "
                    f"{_shortened(row[name])}"
                )
            if not row[name] or not row[name].strip():
                raise TensLoRAError(f"--file {given.file}: row {number} has no text in the column {name}")
    return [tuple(row[name] for name in columns) for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends the process with status 1 and one line."""
    parser = command_parser("tenslora.harness.predict", __doc__)
    add_run_arguments(parser)
    parser.add_argument("images", nargs="*", help="images, for a run on images")
    parser.add_argument(
        "--text", action="append", help="a sentence, or the first of a pair; may be given several times"
    )
    parser.add_argument("--text_pair", action="append", help="the second sentence of a pair, once for each --text")
    parser.add_argument(
        "--file", type=path_argument, help="a .csv, .tsv, .jsonl, .json or .parquet file with a row for each input"
    )
    parser.add_argument("--columns", help="the columns of --file with the input: one, or two with a comma between them")
    parser.add_argument("--out", type=path_argument, help="a .csv, .tsv or .jsonl file to write; default: print")
    parser.add_argument("--format", choices=FORMATS, help="how to print; default: table")
    parser.add_argument("--batch_size", type=int, help="inputs per batch; default: as the run's tests")
    given = parser.parse_intermixed_args(arguments)
    with mistakes_in_one_line():
        if given.out and given.out.suffix not in WRITERS:
            raise TensLoRAError(f"--out {given.out}: must end in one of {', '.join(WRITERS)}")
        if given.out and given.format:
            raise TensLoRAError(f"--format {given.format}: is for printing; the end of --out {given.out} says its form")
        if given.out:
            require_no_device(given.out)
        rows = predict(given)
        if os.environ.get("RANK", "0") != "0":  # started by torchrun; the first process answers
            return
        if given.out:
            content = io.StringIO(newline="")
            WRITERS[given.out.suffix](rows, content)
            # An image's name may hold bytes that are not UTF-8, and the table holds them too.
            write_bytes(given.out, content.getvalue().encode(errors="surrogateescape"))
        if given.out:
            print(given.out)
        else:
            FORMATS[given.format or "table"](rows, sys.stdout)


def predict(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Carry out the command.

    Args:
        given: the parsed command line.

    Returns:
        The rows of the input, each with its "prediction" and, in a classification, the "probabilities".

    Raises:
        TensLoRAError: for a run or an input that cannot be used.
    """
    from tenslora.harness.load_run import load_run

    loaded = load_run(given.run, given.checkpoint)
    modality = loaded.run.model.modality
    rows = _given_rows(given, modality)
    if clash := {"prediction", "probabilities"}.intersection(rows[0]):
        raise TensLoRAError(f"--file {given.file}: has a column {min(clash)}, which the answer would replace")
    known = [[name] for name in IMAGE_COLUMNS] if modality == "image" else [loaded.text_columns]
    inputs: list[Any] = _inputs(given, rows, known)
    if modality == "image":
        if len(inputs[0]) > 1:
            raise TensLoRAError(f"--columns {given.columns}: must be one column, with the images' paths")
        folder = given.file.parent if given.file else Path()
        inputs = [folder / require_path("image", path) for path, *_ in inputs]
    if given.out and given.out.suffix != ".jsonl":  # where each class has a column
        for name in loaded.classes:
            if _PROBABILITY + name in rows[0]:
                raise TensLoRAError(
                    f"--file {given.file}: has a column {_PROBABILITY}{name}, which the answer would replace"
                )
    predictions = loaded.predict(inputs, device=given.device, batch_size=given.batch_size, shared=True)
    return [
        {**row, "prediction": each.answer, **({"probabilities": each.probabilities} if each.probabilities else {})}
        for row, each in zip(rows, predictions, strict=True)
    ]


if __name__ == "__main__":
    with tenslora.harness.early.undone():
        main()
