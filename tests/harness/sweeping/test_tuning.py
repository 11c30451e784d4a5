"""Which runs choose a value, which value they choose, and which runs follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.sweeping.jobs import Job, plan_jobs
from tenslora.harness.sweeping.plan import cost, news, tuning_plan
from tenslora.harness.sweeping.tuning import Known, Stages, name_of, tune_of
from tenslora.harness.training.metrics import METRICS
from tests.running import composed, configured
from tests.sweeps import complete, diverge, swept

QKV = ("tensor_mode.name=qkv", "rank_strategy=isorank")
LR = ("tune.setting=optimizer.lr", "tune.values=[1e-3,4e-3,1.6e-2]", "tune.seeds=[7,8]")


def stages(outputs: Path, *words: str, rows: tuple[tuple[str, ...], ...] = (QKV,)) -> Stages:
    """The stages of a sweep of these rows with the seeds 0 and 1."""
    jobs = [swept(*row, *words, f"seed={seed}") for row in rows for seed in (0, 1)]
    return Stages(plan_jobs(jobs, outputs), tune_of(jobs[0].compose()))


def value_of(job: Job) -> float:
    """The learning rate of a job."""
    return job.run.optimizer.lr


def go_on(sweep: Stages, score: Callable[[Job], float | None]) -> Known:
    """Let every job end with a score, or diverge without one, until none is left."""
    known = sweep.look()
    for _ in range(9):
        for job in known.open:
            last = score(job)
            if last is None:
                diverge(job)
            else:
                complete(job, last)
        known = sweep.look()
        if not known.open:
            return known
    raise AssertionError("the sweep does not end")


def test_a_trial_is_the_plain_run_that_holds_out_a_part_and_the_final_run_the_one_that_does_not(tmp_path: Path) -> None:
    sweep = stages(tmp_path, *LR)
    trials = sweep.look().open
    plain = [
        configured(*QKV, f"optimizer.lr={rate}", "dataset.validation=0.2", "trainer.evaluate=last", f"seed={seed}")
        for rate in ("1e-3", "4e-3", "1.6e-2")
        for seed in (7, 8)
    ]
    assert [job.digest for job in trials] == [run.digest() for run in plain]
    assert [job.folder.path for job in trials] == [tmp_path / run.folder() for run in plain]
    # The process that carries a job out composes it anew from its words.
    assert {configured(*_of_run(job)).digest() for job in trials} == {job.digest for job in trials}

    known = go_on(sweep, lambda job: 0.5 - abs(value_of(job) - 4e-3))
    assert [job.digest for job in known.jobs] == [
        configured(*QKV, "optimizer.lr=4e-3", "trainer.evaluate=last", f"seed={seed}").digest() for seed in (0, 1)
    ]
    (final, _) = known.jobs
    tuned = tune_of(composed(*final.overrides, config_name="sweep"))
    assert tuned is not None and (tuned.values, tuned.seeds) == ((0.001, 0.004, 0.016), (7, 8))
    assert not any(tune_of(composed(*trial.overrides, config_name="sweep")) for trial in known.trials)


def _of_run(job: Job) -> list[str]:
    return [word for word in job.overrides if not word.startswith(("tune", "table"))]


@pytest.mark.parametrize("peak", [1e-9, 3e-5, 3e-4, 1e-3, 5e-3, 2e-2, 0.2, 1.5, 1e3])
def test_the_nearest_value_of_the_grid_extended_by_three_is_found_wherever_the_best_lies(
    peak: float, tmp_path: Path
) -> None:
    known = go_on(stages(tmp_path, *LR), lambda job: 0.5 - abs(math.log(value_of(job) / peak)) / 100)
    ((search, choice),) = known.choices.items()
    reachable = [4.0**power * 1e-3 for power in range(-3, 6)]
    nearest = min(reachable, key=lambda value: abs(math.log(value / peak)))
    assert [*choice.value] == pytest.approx([nearest])
    assert {value_of(job) for job in known.jobs} == {choice.value[0]}
    assert choice.at_edge == (nearest in (reachable[0], reachable[-1]))
    grid = [value_of(search.trials(value)[0]) for value in choice.grid]
    assert grid == sorted(grid)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1e-3: [0.4, 0.8], 4e-3: [0.7, 0.7], 1.6e-2: [0.6, 0.6]}, 4e-3),  # the best single run is not of the best mean
        ({1e-3: [0.1, 0.1], 4e-3: [0.5, 0.5], 1.6e-2: [0.99, None]}, 4e-3),  # one seed has diverged
        ({1e-3: [0.5, 0.5], 4e-3: [0.5, 0.5], 1.6e-2: [0.5, 0.5]}, 1e-3),  # of equals the row's own
        ({1e-3: [0.4, 0.4], 4e-3: [0.5, 0.5], 1.6e-2: [0.5, 0.5]}, 4e-3),  # or else the first that is not at an edge
    ],
)
def test_the_best_mean_wins(scores: dict[float, list[float | None]], expected: float, tmp_path: Path) -> None:
    known = go_on(stages(tmp_path, *LR), lambda job: scores.get(value_of(job), [0.2, 0.2])[job.run.seed % 7])
    assert [value_of(job) for job in known.jobs] == [expected] * 2
    assert not known.failed, "a trial that diverges is an answer"
    (choice,) = known.choices.values()
    assert (len(choice.grid), choice.at_edge) == (3, False)


def test_a_smaller_error_wins_where_smaller_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "accuracy", replace(METRICS["accuracy"], larger_is_better=False))
    known = go_on(stages(tmp_path, *LR), lambda job: abs(value_of(job) - 4e-3))
    assert [value_of(job) for job in known.jobs] == [4e-3] * 2


def test_a_row_of_which_every_value_diverges_has_a_problem_and_no_runs(tmp_path: Path) -> None:
    sweep = stages(tmp_path, *LR)
    known = go_on(sweep, lambda _: None)
    assert not set(known.jobs) & set(known.looks)
    assert {run.problem for run in sweep.runs(known)} == {"every value of optimizer.lr diverged: [0.001, 0.004, 0.016]"}


def dropout_times(sign: float, job: Job) -> float:
    assert job.run.adapter
    return 0.5 + sign * job.run.adapter.dropout / 10


def test_what_cannot_be_extended_ends_at_the_edge(tmp_path: Path) -> None:
    words = ("tune.setting=adapter.dropout", "tune.values=[0,0.3,0.9]", "tune.seeds=[7]")
    for end, better in (("0", -1), ("0.9", 1)):  # the next values would be 0 again, and 2.7
        known = go_on(stages(tmp_path / end, *words), partial(dropout_times, better))
        (choice,) = known.choices.values()
        assert (choice.value, choice.at_edge, len(choice.grid)) == ((float(end),), True, 3)
    names = ("tune.setting=adapter.init", "tune.values=[normal,orthogonal]", "tune.seeds=[7]")
    (choice,) = go_on(stages(tmp_path, *names), lambda _: 0.5).choices.values()
    assert (choice.value, choice.at_edge) == (("orthogonal",), False)  # of equals the row's own


def test_rows_that_the_setting_does_not_change_are_not_tuned(tmp_path: Path) -> None:
    rows = (*((f"tensor_mode.name={mode}",) for mode in ("lora", "head_only", "full")), QKV)

    def tuned(*words: str) -> list[str]:
        sweep = stages(tmp_path, *words, rows=rows)
        others = {job.run.tensor_mode for job in sweep.look().open} - {
            s.jobs[0].run.tensor_mode for s in sweep.searches
        }
        assert others == {row[0].partition("=")[2] for row in rows} - {
            s.jobs[0].run.tensor_mode for s in sweep.searches
        }
        return [search.jobs[0].row.tensor_mode for search in sweep.searches]

    assert tuned("tune=lr") == ["lora", "full", "qkv"]
    assert tuned("tune=alpha") == ["lora", "qkv"]
    assert tuned("tune.setting=adapter.head_layout", "tune.values=[aligned,interleaved]") == ["lora", "qkv"]


def test_vtab_has_a_validation_split_of_its_own(tmp_path: Path) -> None:
    trials = stages(tmp_path, "tune=lr", "dataset=vtab/cifar").look().open
    datasets = {(job.run.dataset.train_splits, job.run.dataset.test_split, job.run.dataset.scored_on) for job in trials}
    assert datasets == {(("train800",), "val200", "validation")}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("tune=lr optimizer.lr=1e-2", "optimizer.lr=1e-2: must not be given, because tune.setting=optimizer.lr"),
        ("tune=lr trainer.evaluate=5", "trainer.evaluate=5: must be last with tune"),
        ("tune=lr table.score=best", "table.score=best: must be last with tune"),
        ("tune=lr dataset.validation=0.3", "dataset.validation=0.3: must be left out with tune"),
        ("tune=lr tune.seeds=[1,7]", r"tune.seeds=\[1, 7\]: must be other seeds than the table's, which has \[1\]"),
        ("tune=lr tune.seeds=[]", r"tune.seeds=\[\]: must be at least one seed, all different"),
        ("tune=lr tune.seeds=[-1]", "tune.seeds=-1: must be at least 0"),
        ("tune=lr tune.values=[1e-3]", r"tune.values=\[0.001\]: must be at least two values"),
        ("tune=lr tune.values=[{alpha:1},2]", "tune.values={'alpha': 1}: must be a number or a word"),
        ("tune=lr tune.values=[[0.9,0.99],2]", r"tune.values=\[0.9, 0.99\]: must be a number or a word"),
        ("tune=lr tune.values=[1,1.0]", r"tune.values=\[1, 1.0\]: must be at least two values, all different"),
        ("tune=lr tune.values=[-1,1]", "optimizer.lr=-1: must be at least 0"),
        ("tune=lr tune.validation=1", "tune.validation=1: must be above 0 and below 1"),
        ("tune.values=[1,2]", r"tune.setting=null: must be the setting whose values are \[1, 2\]"),
        ("tune.setting=seed tune.values=[1,2]", "tune.setting=seed: must be another setting"),
        ("tune.setting=tensor_mode.name tune.values=[att,qkv]", ".*rows and columns of the table differ in it"),
        ("tune.setting=dataset.test_split tune.values=[test,train]", ".*rows and columns of the table differ in it"),
        ("tune.setting=factorization tune.values=[cp,tucker]", "tune.setting=factorization: must be a single"),
        ("tune=lr +tune.tune=1", "tune.tune: there is no such setting; a file in tune/ holds setting, values, seeds, "),
        ("tune.setting=lr tune.values=[1,2]", "tune.setting=lr: there is no such setting; did you mean optimizer.lr?"),
        (
            "tune.setting=trainer.workers tune.values=[1,2]",
            "tune.setting=trainer.workers: must be a setting that changes",
        ),
    ],
)
def test_a_mistake_is_one_line(words: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=f"^{line}"):
        stages(tmp_path, *words.split())
    assert not list(tmp_path.iterdir())


def test_a_tuned_table_has_a_name_of_its_own() -> None:
    assert name_of(composed(config_name="sweep")) == "digits"
    assert name_of(composed("tune=core_lr_ratio", config_name="sweep")) == "digits-tuned-core_lr_ratio"


def test_the_plan_has_each_rows_values_and_the_most_that_may_follow(tmp_path: Path) -> None:
    rows = (("tensor_mode=qkv", "rank_strategy=isorank"), ("tensor_mode=head_only",))
    sweep = stages(tmp_path, *LR, rows=rows)
    known = sweep.look()
    head, _, column, _, row, _, total = tuning_plan(known).splitlines()
    assert (head, column) == ("tuning optimizer.lr with the seeds 7, 8", "digits with vit_digits")
    assert row.split() == ["qkv", "isorank", "0.001,", "0.004,", "0.016", "6", "to", "run"]
    assert total == "6 trials: 6 to run; at most 6 more where the best value is at an edge"
    assert cost(known.open) == "", "there is nothing to tell it from"
    for job in known.open[:4]:  # with the two smaller values
        complete(job, 0.1, seconds={"train": 59.0, "data": 2.0}, config=job.run.settings())
    assert cost(sweep.look().open) == "about 5 min one after the other, as 4 finished runs took\n"  # 5 times 61 s
    last = go_on(sweep, lambda job: 0.9 if value_of(job) < 0.05 else None)  # 0.016 is at the edge, and 0.064 diverges
    assert news(known, last) == ["tuned: digits qkv isorank optimizer.lr=0.016"]
    assert tuning_plan(last).splitlines()[4].split()[2:] == [
        "0.001,", "0.004,", "0.016,", "0.064", "0.016", "6", "done,", "2", "diverged",
    ]  # fmt: skip
