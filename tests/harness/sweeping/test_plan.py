"""What a sweep says before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tenslora.constructions import CONSTRUCTIONS, PAPER_CONSTRUCTIONS
from tenslora.errors import TensLoRAError
from tenslora.harness.results.table import Table
from tenslora.harness.sweeping.jobs import Job, plan_jobs
from tenslora.harness.sweeping.plan import announcements, plan
from tests.sweeps import claimed, complete, planned, swept

# The README's parameters and percentages of LoRA's, for d = 768, 12 layers, 12 heads.
VIT_BASE = {
    "lora": ("221,184", "100.0"),
    "att": ("123,840", "56.0"),
    "qkv": ("74,640", "33.7"),
    "depth": ("18,768", "8.5"),
    "att_qkv": ("43,728", "19.8"),
    "att_depth": ("11,040", "5.0"),
    "qkv_depth": ("6,460", "2.9"),
    "att_qkv_depth": ("4,460", "2.0"),
}
FIRST_STEPS = {  # those of the design's section on the first step, divided by LoRA's 32
    "lora": "1.00", "att": "0.25", "qkv": "0.12", "depth": "0.07",
    "att_qkv": "0.25", "att_depth": "0.14", "qkv_depth": "0.07", "att_qkv_depth": "0.14",
}  # fmt: skip


def printed(jobs: list[Job]) -> list[str]:
    looks = {job: job.look() for job in jobs}
    return plan(Table("name", "A title", tuple(job.in_table(look) for job, look in looks.items())), looks).splitlines()


def test_the_plan_has_each_rows_exact_count_and_share_of_loras(tmp_path: Path) -> None:
    runs = []
    for mode in PAPER_CONSTRUCTIONS:
        # The name is all that these options hold; to compose each of them would take Hydra a second.
        job = swept("dataset=dtd", "rank_strategy=isorank", f"tensor_mode.name={mode}")
        runs.append(replace(job, words=(f"tensor_mode={mode}",)))
    jobs = plan_jobs(runs, tmp_path)
    title, _, column, head, *rows, _, total = printed(jobs)
    assert (title, column) == ("A title", "dtd with vit_base")
    assert head.split() == ["ranks", "parameters", "of", "LoRA", "first", "step", "seeds"]
    assert [row.split() for row in rows] == [
        [
            *([mode] if mode == "lora" else [mode, "isorank"]),
            *", ".join("4" * (1 if mode == "lora" else len(CONSTRUCTIONS[mode]) + 2)).split(),
            *VIT_BASE[mode], "%", FIRST_STEPS[mode], "1", "to", "run",
        ]
        for mode in VIT_BASE
    ]  # fmt: skip
    assert len({row.rindex("%") for row in rows}) == 1, "the numbers are right-aligned"
    assert total == "8 jobs: 8 to run"
    assert not any(line != line.rstrip() for line in rows)


def test_the_plan_and_the_announcements_tell_how_far_each_job_has_come(tmp_path: Path) -> None:
    jobs = [planned(tmp_path, "tensor_mode=qkv", "rank_strategy=isorank", f"seed={seed}") for seed in range(6)]
    jobs.append(planned(tmp_path, "tensor_mode=head_only"))
    done, begun, failed, running = jobs[:4]
    complete(done)
    begun.folder.path.mkdir(parents=True)
    begun.folder.checkpoint.touch()
    failed.folder.write_failure(TensLoRAError("out of luck"))
    with claimed(running.folder):
        lines = printed(jobs)
        announced = announcements({job: job.look() for job in jobs})
    assert lines[-1] == "7 jobs: 1 done, 1 to go on with, 1 to run again, 1 running elsewhere, 3 to run"
    (row,) = (line for line in lines if line.startswith("  qkv"))
    assert row.endswith("1 done, 1 to go on with, 1 to run again, 1 running elsewhere, 2 to run")
    assert lines[-3].split() == ["head_only", "0", "0.0", "%", "1", "to", "run"]
    assert announced == [
        "skip: digits qkv isorank seed 0 is done",
        "go on: digits qkv isorank seed 1, from its checkpoint",
        "again: digits qkv isorank seed 2, which failed (out of luck)",
        "wait: digits qkv isorank seed 3 is running elsewhere",
    ]


def test_each_backbone_has_its_own_counts_and_unknown_ones_stay_empty(tmp_path: Path) -> None:
    words = ["rank_strategy=isorank", "tensor_mode=qkv_depth"]
    undeclared = ["model.geometry=null", "dataset=cola", "tensor_mode=full"]
    jobs = [planned(tmp_path, *words), planned(tmp_path, *words, "dataset=cola"), planned(tmp_path, *undeclared)]
    lines = printed(jobs)
    at = [lines.index(head) for head in ("digits with vit_digits", "cola with roberta_base")]
    assert lines[at[0] + 2].split()[-7:-3] == ["796", "13.0", "%", "0.43"]
    assert lines[at[1] + 2].split()[-7:-3] == ["6,460", "2.9", "%", "0.07"]
    assert lines[at[1] + 3].split() == ["full", "1", "to", "run"]


def test_datasets_with_the_same_lines_share_them(tmp_path: Path) -> None:
    words = ["rank_strategy=isorank", "tensor_mode=qkv_depth"]
    datasets = ("dataset=dtd", "dataset=eurosat", "dataset=cola", "dataset=mrpc")
    jobs = [planned(tmp_path, *words, dataset) for dataset in datasets]
    complete(jobs[3])
    _, *lines, _, total = printed(jobs)
    assert [line for line in lines if not line.startswith(" ")] == [
        *["", "dtd with vit_base", "eurosat with vit_base", "cola with roberta_base"],
        *["", "mrpc with roberta_base"],
    ]
    assert [line.split("step")[1].strip() for line in lines if "first" in line] == ["seeds of each", "seeds"]
    assert [line.split()[-2:] for line in lines if "qkv_depth" in line] == [["to", "run"], ["1", "done"]]
    assert total == "4 jobs: 1 done, 3 to run"


def test_a_generic_models_sizes_are_unknown_and_its_name_is_the_column(tmp_path: Path) -> None:
    runs = []
    for architecture in ("vit_tiny_patch16_224", "deit_tiny_patch16_224"):
        for mode in ("qkv", "head_only"):
            words = (f"model.architecture={architecture}", f"tensor_mode={mode}")
            job = swept("dataset=dtd", "model=timm", f"model.architecture={architecture}", f"tensor_mode={mode}")
            runs.append(replace(job, words=words))
    lines = printed(plan_jobs(runs, tmp_path))
    assert [line for line in lines if " with " in line] == [
        "dtd with vit_tiny_patch16_224",
        "dtd with deit_tiny_patch16_224",
    ]
    assert [line.split() for line in lines if line.startswith("  qkv")] == [
        ["qkv", "isoparameters", "-", "-", "-", "-", "1", "to", "run"]
    ]
    assert [line.split() for line in lines if line.startswith("  head_only")] == [["head_only", "0", "1", "to", "run"]]
