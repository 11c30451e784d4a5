"""Finished tables under several protocols, side by side, with the paper's claims judged under each.

    python -m tenslora.harness.compare <protocol>=<table's folder> ... --out <folder>

A protocol is any name, such as direct, first_step or tuned. It may be given several times, with a table for each
dataset. The command reads the tables' table.csv and their runs' records, runs nothing, and writes the files that a
sweep writes: table.md, table.tex, table.csv, against_lora.csv, claims.csv, report.html and figures.
"""

from __future__ import annotations

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("error: must be started as python -m tenslora.harness.compare")
    import tenslora.harness.early  # catches Ctrl-C from here on

    tenslora.harness.early.start_command()

import re
import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from tenslora.errors import TensLoRAError
from tenslora.harness.commands import command_parser, mistakes_in_one_line, path_argument
from tenslora.harness.results import write_results
from tenslora.harness.results.protocols import side_by_side

_MODULE = "tenslora.harness.compare"


def protocols_of(words: Sequence[str]) -> dict[str, list[Path]]:
    """The folders of each protocol's tables.

    >>> protocols_of(["direct=a", "tuned=b", "direct=c"])
    {'direct': [PosixPath('a'), PosixPath('c')], 'tuned': [PosixPath('b')]}

    Args:
        words: words of the form "protocol=folder".

    Returns:
        The folders by protocol, in the order in which they are given.

    Raises:
        TensLoRAError: if a word has another form.
    """
    protocols: dict[str, list[Path]] = {}
    for word in words:
        match = re.fullmatch(r"([\w.+-]+)=(.+)", word)
        if match is None:
            raise TensLoRAError(
                f"{word}: must be a protocol and a table's folder, such as direct=outputs/tables/digits"
            )
        protocols.setdefault(match[1], []).append(Path(match[2]))
    return protocols


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends the process with status 1 and one line."""
    parser = command_parser(_MODULE, __doc__)
    parser.add_argument("tables", nargs="+", metavar="protocol=folder", help="a protocol and the folder of a table")
    parser.add_argument(
        "--out", type=path_argument, required=True, help="the folder to write to; its name names the table"
    )
    given = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", _MODULE, *(sys.argv[1:] if arguments is None else arguments)])
    with mistakes_in_one_line():
        protocols = protocols_of(given.tables)
        for folder in chain(*protocols.values()):
            if folder.resolve() == given.out.resolve():
                raise TensLoRAError(f"--out {given.out}: must not be one of the tables, which it would replace")
        files = write_results(side_by_side(protocols, given.out.resolve().name, command), given.out)
        print(*files, sep="\n")


if __name__ == "__main__":
    with tenslora.harness.early.undone():
        main()
