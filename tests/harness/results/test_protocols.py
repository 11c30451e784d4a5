"""Tables under several protocols side by side, from the files of tables whose outcome was made to order."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.errors import TensLoRAError
from tenslora.harness.config.identity import digest_of
from tenslora.harness.results import write_results
from tenslora.harness.results.csv import read_runs, to_csv
from tenslora.harness.results.markdown import to_markdown
from tenslora.harness.results.protocols import side_by_side
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Column, Run
from tenslora.harness.run_folder import RunFolder
from tests.conftest import ROOT
from tests.tables import COLA, DTD, STSB, make_run, make_table, tuned_table

NO_BETTER, TWO_BETTER = "no construction beats LoRA", "qkv_depth and att_qkv_depth beat LoRA on 4 of 4 datasets"
MODES = [mode for mode in PAPER_CONSTRUCTIONS if mode != "lora"]


_REAL = json.loads(next((ROOT / "tests/harness/earlier_outputs/digits").rglob("qkv_depth*/result.json")).read_text())


def identity_of(run: Run, made: str) -> dict[str, Any]:
    """Settings of a run, with a word that tells it from others."""
    groups = {"model": run.column.model, "dataset": run.column.dataset, "tensor_mode": run.row.tensor_mode}
    trainer = {"epochs": len(run.record["metrics"]["history"]) if run.record else 1, "max_steps": None}
    return {
        **{group: {"name": name} for group, name in groups.items()},
        "seed": run.seed,
        "trainer": trainer,
        "m": made,
    }


def whole_record(run: Run, made: str) -> dict[str, Any]:
    """The run's record with the fields that tests/tables.py leaves out, as no table shows them."""
    assert run.record
    identity = identity_of(run, made)
    return {
        **_REAL,
        **run.record,
        **{group: identity[group]["name"] for group in ("model", "dataset", "tensor_mode")},
        "environment": {"argv": [], **run.record["environment"]},
        "identity": identity,
        "config": OmegaConf.to_container(OmegaConf.merge(_REAL["config"], identity)),
        "digest": digest_of(identity),
        "seed": run.seed,
        "rank_strategy": run.row.strategy or "isorank",
        "factorization": "matrix" if run.row.is_lora else "tucker",
        # At equal first steps there is no figure of them, which takes seconds to draw.
        "first_step": run.record["lora_first_step"],
    }


def written(outputs: Path, name: str, runs: list[Run]) -> Path:
    """The folder of a finished table, and the folders of its runs, as a sweep leaves them."""
    named = []
    scores: dict[object, list[float | None]] = {}
    for run in runs:
        scores.setdefault((run.row, run.column), []).append(run.score("last"))
    for run in runs:
        record = run.record and whole_record(run, f"{run.row} {scores[run.row, run.column]}")
        digest = record["digest"] if record else digest_of(identity_of(run, "missing"))
        if record:
            folder = outputs / run.column.dataset / run.column.model / f"{run.row.tensor_mode}-{digest}"
            RunFolder(folder).write_record(record)
            record = RunFolder(folder).read_record()  # with the defaults of the fields that it lacks
        named.append(replace(run, digest=digest, record=record))
    folder = outputs / "tables" / name
    folder.mkdir(parents=True)
    (folder / "table.csv").write_text(to_csv(summarize(make_table(named))))
    return folder


def runs_of(above_lora: Mapping[str, float], column: Column = DTD) -> list[Run]:
    """LoRA at 0.7 and both strategies' constructions above it, with differences that seven tests can see."""
    runs = [make_run("lora", seed=seed, epochs=[0.7], column=column) for seed in range(5)]
    return runs + [
        make_run(mode, strategy, seed=seed, epochs=[0.7 + gain + 0.001 * seed], column=column)
        for strategy in ("isorank", "isoparameters")
        for mode, gain in above_lora.items()
        for seed in range(5)
    ]


BELOW, ABOVE = dict.fromkeys(MODES, -0.05), dict.fromkeys(MODES, 0.05)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with four tables."""
    folder = tmp_path_factory.mktemp("outputs")
    written(folder, "direct", runs_of(BELOW))
    written(folder, "first_step", runs_of(ABOVE))
    written(folder, "direct_cola", runs_of(BELOW, COLA))
    few = {mode: gain for mode, gain in ABOVE.items() if mode in ("att", "qkv_depth")}
    written(folder, "tuned", runs_of(few))
    return folder


def folders(outputs: Path, *names: str) -> dict[str, list[Path]]:
    return {name: [outputs / "tables" / name] for name in names}


def test_a_table_is_read_back_as_it_was_written(outputs: Path) -> None:
    runs = read_runs(outputs / "tables" / "direct")
    assert [run.score("last") for run in runs] == [run.score("last") for run in runs_of(BELOW)]
    table = make_table(runs)
    assert to_csv(summarize(table)) == (outputs / "tables" / "direct" / "table.csv").read_text()
    assert all(run.folder and run.folder.is_dir() for run in runs)


def test_runs_without_a_record_are_read_back_too(tmp_path: Path) -> None:
    runs = [
        make_run("lora", epochs=[0.5]),
        make_run("att", "isorank", problem="out of memory"),
        make_run("qkv", "isorank", variant=("a=1", "b=2")),
        make_run("head_only"),
    ]
    folder = written(tmp_path, "open", runs)
    lora, *others, head = read_runs(folder)
    assert {(run.row.label, run.status, run.problem) for run in others} == {
        ("att isorank", "failed", "out of memory"),
        ("qkv isorank a=1 b=2", "missing", "missing"),
    }
    assert (others[0].ranks, others[0].parameters) == (runs[1].ranks, runs[1].parameters)
    assert (lora.status, head.ranks) == ("completed", None)


def test_a_run_that_has_finished_since_has_its_record(tmp_path: Path) -> None:
    folder = written(tmp_path, "open", [make_run("lora")])
    (missing,) = read_runs(folder)
    finished = make_run("lora", epochs=[0.5])
    folder_of_run = RunFolder(tmp_path / "dtd" / "vit_base" / f"lora-{missing.digest}")
    folder_of_run.write_record(whole_record(finished, "missing"))
    assert [run.score("last") for run in read_runs(folder)] == [0.5]


def test_each_claim_is_judged_under_each_protocol_with_its_own_lora(outputs: Path) -> None:
    summary = summarize(side_by_side(folders(outputs, "direct", "first_step", "tuned"), "joint"))
    words = {(verdict.claim, verdict.protocol): verdict.verdict for verdict in summary.verdicts}
    assert [words[NO_BETTER, protocol] for protocol in summary.protocols] == ["holds", "does not hold", "does not hold"]
    assert [words[TWO_BETTER, protocol] for protocol in summary.protocols] == [
        "does not hold",
        "holds",
        "not decided by these runs",
    ]
    assert len(words) == 4 * 3
    alone = summarize(make_table(read_runs(outputs / "tables" / "direct")))
    assert [(v.claim, v.verdict, v.because) for v in alone.verdicts] == [
        (v.claim, v.verdict, v.because) for v in summary.verdicts if v.protocol == "direct"
    ]
    for against, single in zip(
        (c for c in summary.comparisons if "protocol=direct" in c.row.variant), alone.comparisons, strict=True
    ):
        assert against.difference == single.difference, "Holm's correction is for the rows of one protocol"


def test_a_claim_that_holds_on_fewer_datasets_is_not_decided(outputs: Path) -> None:
    tables = folders(outputs, "direct", "first_step")
    tables["direct"].append(outputs / "tables" / "direct_cola")
    verdicts = {(v.claim, v.protocol): v for v in summarize(side_by_side(tables, "joint")).verdicts}
    assert verdicts[NO_BETTER, "direct"].verdict == "holds"
    assert verdicts[NO_BETTER, "first_step"].verdict == "does not hold"
    assert verdicts[TWO_BETTER, "first_step"].verdict == "not decided by these runs"
    assert verdicts[TWO_BETTER, "first_step"].because.endswith("; not in this table: cola with minilm")


def test_every_form_has_the_verdicts_side_by_side(outputs: Path, tmp_path: Path) -> None:
    table = side_by_side(folders(outputs, "direct", "first_step"), "joint", command="python -m compare")
    write_results(table, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| claim | table | direct | first_step |" in text
    assert f"| {NO_BETTER} | isorank | holds | does not hold |" in text
    assert re.search(rf"\| {NO_BETTER} \| first_step \| isorank \| does not hold \| above LoRA: att isorank, ", text)
    assert "## dtd (vit_base) by protocol" in text
    assert rf"{NO_BETTER} & isorank & holds & does not hold \\" in (tmp_path / "table.tex").read_text().splitlines()
    html = (tmp_path / "report.html").read_text()
    of_claim = html[html.index(f">{NO_BETTER} ") :].partition("</li>")[0]
    assert re.findall(r"<span>(\w+)</span>\s*<span class=\"verdict (\w+)", of_claim) == [
        ("direct", "good"),
        ("first_step", "bad"),
    ]
    lines = list(csv.DictReader((tmp_path / "claims.csv").open()))
    assert [line["protocol"] for line in lines] == ["direct", "first_step"] * 4
    assert lines[0].items() >= {"claim": NO_BETTER, "table": "isorank", "verdict": "holds"}.items()
    assert (tmp_path / "figures" / "score_by_setting.svg").is_file()


def test_a_tuned_row_keeps_its_chosen_value(outputs: Path, tmp_path: Path) -> None:
    tuned = tuned_table()
    folder = written(tmp_path, "each_tuned", list(tuned.runs))
    digests = {(run.row, run.seed): run.digest for run in read_runs(folder)}
    runs = tuple(replace(run, digest=digests[run.row, run.seed]) for run in tuned.runs)
    (folder / "table.csv").write_text(to_csv(summarize(replace(tuned, runs=runs))))
    direct = {"direct": [outputs / "tables" / "direct"]}
    joint = summarize(side_by_side({**direct, "tuned": [folder]}, "joint"))
    main_table = to_markdown(joint).partition("\n## ")[0]
    lines = {line.split(" | ")[0].strip("| "): line for line in main_table.splitlines()}
    assert lines["construction"].endswith("| tuned |")
    assert lines["lora protocol=tuned"].endswith("| lr=0.004 |")
    assert lines["qkv isorank protocol=tuned"].endswith("| lr=0.001 (edge) |")
    assert lines["qkv isorank protocol=direct"].endswith("|  |")
    again = list(csv.DictReader(to_csv(joint).splitlines()))
    assert {(line["tuned"], line["at_edge"]) for line in again if line["variant"] == "protocol=tuned"} == {
        ("optimizer.lr=0.004", "False"), ("optimizer.lr=0.001", "True"), ("", "False"),
    }  # fmt: skip


def test_a_run_that_two_tables_of_a_protocol_share_counts_once(outputs: Path) -> None:
    direct = outputs / "tables" / "direct"
    assert len(side_by_side({"direct": [direct, direct]}, "joint").runs) == len(read_runs(direct))
    with pytest.raises(TensLoRAError, match=r"tuned=.*first_step: must not have another run .* att isorank, dtd with"):
        side_by_side({"tuned": [direct, outputs / "tables" / "first_step"]}, "joint")


def test_a_cell_has_runs_of_one_setting_and_a_column_one_metric(tmp_path: Path) -> None:
    one = written(tmp_path, "one", [make_run("lora", seed=seed, epochs=[0.5]) for seed in (0, 1)])
    two = written(tmp_path, "two", [make_run("lora", seed=seed, epochs=[0.6]) for seed in (2, 3)])
    problem = r"^direct=.*two: must not have runs of other settings than those before them for lora, dtd with vit_base;"
    with pytest.raises(TensLoRAError, match=problem):
        side_by_side({"direct": [one, two]}, "joint")
    assert len(side_by_side({"direct": [one], "other": [two]}, "joint").runs) == 4
    by_pearson = [make_run("lora", seed=seed, epochs=[0.4], column=STSB) for seed in (0, 1)]
    three = written(tmp_path, "three", [replace(run, column=DTD) for run in by_pearson])
    with pytest.raises(TensLoRAError, match=r"^b=.*three: must be scored by accuracy on dtd with vit_base, as the tab"):
        side_by_side({"a": [one], "b": [three]}, "joint")


def test_settings_in_which_the_tables_of_a_protocol_differ_are_said(tmp_path: Path) -> None:
    lora = written(tmp_path, "lora", [make_run("lora", epochs=[0.5]), make_run("lora", epochs=[0.5], column=COLA)])
    att = written(tmp_path, "att", [make_run("att", "isorank", epochs=[0.4, 0.5])])
    rows = [make_run("att", "isorank", epochs=[0.4, 0.5], variant=(f"{key}=2",)) for key in ("trainer.epochs", "m")]
    own = written(tmp_path, "own", rows)

    def notes(**protocols: list[Path]) -> list[str]:
        return [note for note in side_by_side(protocols, "joint").notes if "differ" in note]

    (note,) = notes(a=[lora, att])
    assert note.startswith("Under the protocol a, the tables of dtd with vit_base differ in trainer.epochs=1 or 2, m=")
    assert notes(a=[lora], b=[att]) == notes(a=[lora, own]) == []


def test_the_best_scores_are_compared_where_the_tables_show_them(tmp_path: Path) -> None:
    last = written(tmp_path, "last", [make_run("lora", epochs=[0.6, 0.5])])
    best = written(tmp_path, "best", [make_run("lora", epochs=[0.6, 0.5])])
    (best / "table.csv").write_text(to_csv(summarize(make_table(read_runs(best), score="best"))))
    joint = summarize(side_by_side({"a": [best], "b": [best]}, "joint"))
    assert [cell.mean for row in joint.rows for cell in row.cells] == [60, 60]
    assert "of the best epoch" in joint.caption
    assert "score" not in (last / "table.csv").read_text().splitlines()[0].split(",")
    with pytest.raises(TensLoRAError, match=r"^b=.*best: must show the last scores, as the tables before it, and not"):
        side_by_side({"a": [last], "b": [best]}, "joint")
    edited(best, "score", "first")
    with pytest.raises(TensLoRAError, match=r"not a table that this version can read .*score=first"):
        read_runs(best)


def test_nothing_is_written_where_a_folder_is_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(TensLoRAError, match=r"report\.html: cannot be written \(Is a directory\)$"):
        write_results(make_table([make_run("lora", epochs=[0.5])]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_comparison_is_not_compared_again(outputs: Path) -> None:
    folder = outputs / "tables" / "joint"
    write_results(side_by_side({"direct": [outputs / "tables" / "direct"]}, "joint"), folder)
    with pytest.raises(TensLoRAError, match=r"^again=.*joint: must be a table of a sweep, not a comparison"):
        side_by_side({"again": [folder]}, "further")


def edited(folder: Path, name: str, value: str, number: int = 0) -> None:
    """Write another value into a cell of table.csv."""
    file = folder / "table.csv"
    lines = list(csv.DictReader(file.read_text().splitlines()))
    lines[number][name] = value
    with file.open("w", newline="") as written_to:
        writer = csv.DictWriter(written_to, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tensor_mode", "qkv"), ("rank_strategy", "isoparameters"), ("seed", "7"), ("digest", "7.10E+11")],
)
def test_a_line_that_a_spreadsheet_has_changed_is_named(name: str, value: str, tmp_path: Path) -> None:
    folder = written(tmp_path, "changed", [make_run("att", "isorank", epochs=[0.5])])
    read_runs(folder)
    edited(folder, name, value)
    with pytest.raises(TensLoRAError, match=rf"table\.csv: .*: {name}={re.escape(value)}: (the run's is|must be)"):
        read_runs(folder)


def test_a_setting_of_a_row_must_be_its_runs(tmp_path: Path) -> None:
    alpha = _REAL["config"]["adapter"]["alpha"]
    folder = written(tmp_path, "alpha", [make_run("att", epochs=[0.5], variant=(f"adapter.alpha={alpha}e0",))])
    assert read_runs(folder)
    edited(folder, "variant", "adapter.alpha=16")
    with pytest.raises(TensLoRAError, match=rf": adapter\.alpha=16: the run's is {alpha:g}$"):
        read_runs(folder)


def test_whole_numbers_may_be_those_of_pandas(tmp_path: Path) -> None:
    folder = written(tmp_path, "pandas", [make_run("lora", seed=seed, epochs=[0.5]) for seed in range(2)])
    expected = read_runs(folder)
    for name in ("seed", "adapter_parameters", "lora_parameters"):
        edited(folder, name, f"{getattr(expected[0], name.replace('adapter_', ''))}.0")
    assert read_runs(folder) == expected


def test_a_run_that_has_diverged_since_is_said(tmp_path: Path) -> None:
    folder = written(tmp_path, "lost", [make_run("lora", epochs=[0.5])])
    (file,) = tmp_path.rglob("result.json")
    failure = {"message": "the training loss is nan", "step": 3, "lr": 1.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "diverged", "failure": failure}))
    with pytest.raises(TensLoRAError, match=r"seed 0: has diverged since the table was written; let the sweep"):
        read_runs(folder)


def test_two_scores_of_one_run_are_refused(tmp_path: Path) -> None:
    for name in ("here", "there"):
        written(tmp_path / name, "digits", [make_run("lora", epochs=[0.5])])
    (file,) = (tmp_path / "there").rglob("result.json")
    changed = json.loads(file.read_text())
    changed["metrics"] |= {"last": 0.75, "best": 0.75}
    changed["metrics"]["history"][-1]["accuracy"] = 0.75
    file.write_text(json.dumps(changed))
    tables = [tmp_path / name / "tables" / "digits" for name in ("here", "there")]
    with pytest.raises(
        TensLoRAError, match=r"^a=.*there.*: has another score for lora, .*, seed 0 \(0\.75\) than a ta"
    ):
        side_by_side({"a": tables}, "joint")
    assert len(side_by_side({"a": tables[:1], "b": tables[1:]}, "joint").runs) == 2


def test_truth_values_may_be_a_spreadsheets(tmp_path: Path) -> None:
    tuned = tuned_table()
    folder = written(tmp_path, "tuned", [run for run in tuned.runs if run.row.tensor_mode == "qkv"])
    lines = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], "tuned", "at_edge"])
        writer.writeheader()
        writer.writerows({**line, "tuned": "optimizer.lr=0.1", "at_edge": "TRUE"} for line in lines)
    assert all(run.at_edge for run in read_runs(folder))
    edited(folder, "at_edge", "WAHR")
    with pytest.raises(TensLoRAError, match=r"not a table that this version can read .*at_edge=WAHR"):
        read_runs(folder)


def test_the_runs_of_a_table_are_those_of_its_own_folder(tmp_path: Path) -> None:
    folder = written(tmp_path / "outputs", "digits", [make_run("lora", seed=seed, epochs=[0.5]) for seed in range(3)])
    expected = [run.folder for run in read_runs(folder)]
    of_runs = tmp_path / "outputs" / "dtd"
    for name in ("a_dtd", "dtd_old"):  # copies without the records
        shutil.copytree(of_runs, tmp_path / "outputs" / name, ignore=shutil.ignore_patterns("result.json"))
    for run in list(of_runs.glob("*/*")):
        run.with_name(f"._{run.name}").write_bytes(b"what a Mac keeps of a folder")
    assert [run.folder for run in read_runs(folder)] == expected
    elsewhere = tmp_path / "disk" / "x" / "y"
    elsewhere.parent.mkdir(parents=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    (tmp_path / "latest").symlink_to(folder)
    assert [run.score("last") for run in read_runs(folder)] == [0.5] * 3


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"nothing: must be the folder of a table, with its table\.csv"):
        side_by_side({"direct": [tmp_path / "nothing"]}, "joint")
    folder = written(tmp_path, "gone", [make_run("lora", epochs=[0.5])])
    for record in tmp_path.rglob("result.json"):
        record.unlink()
    place = "lora, dtd with vit_base, seed 0"
    line = rf"^{folder}/table.csv: {place}: its result.json \(\w{{12}}\) is gone; it was looked for below {tmp_path}$"
    with pytest.raises(TensLoRAError, match=line):
        read_runs(folder)
    folder = written(tmp_path, "odd", [make_run("lora", epochs=[0.5])])
    for text in ("a,b\n1,2\n", (folder / "table.csv").read_text().replace("221184", "many")):
        (folder / "table.csv").write_text(text)
        with pytest.raises(TensLoRAError, match=r"table\.csv: not a table that this version can read"):
            read_runs(folder)
    for cells in (text[: text.index("\n") + 20], f"{text.rstrip()},1\n"):  # cut off, and one cell too many
        (folder / "table.csv").write_text(cells)
        with pytest.raises(TensLoRAError, match=r"table\.csv: run 1 has not as many cells as the first line names$"):
            read_runs(folder)
    (folder / "table.csv").write_text(text.replace(",", ";").replace(".", ","))
    with pytest.raises(TensLoRAError, match=r"its table\.csv \(its columns are separated by semicolons; must be"):
        read_runs(folder)
    (folder / "table.csv").write_text("")
    with pytest.raises(TensLoRAError, match=r"table\.csv: holds no runs$"):
        read_runs(folder)
    (folder / "table.csv").unlink()
    os.mkfifo(folder / "table.csv")
    with pytest.raises(TensLoRAError, match=r"must be the folder of a table, .*must be a file, not a pipe"):
        read_runs(folder)
