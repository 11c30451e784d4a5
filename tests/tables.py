"""Tables of invented runs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from tenslora.constructions import CONSTRUCTIONS, PAPER_CONSTRUCTIONS, Geometry
from tenslora.harness.results.table import Column, Row, Run, Table
from tenslora.harness.results.tuning import Tuning
from tenslora.ranks import isoparameters, isorank, parameter_count

DTD, COLA, DIGITS = Column("dtd", "vit_base"), Column("cola", "minilm"), Column("digits", "vit_digits")
STSB = Column("stsb", "minilm")
_GEOMETRY = {
    "vit_base": Geometry(768, 12, 64, 12),
    "minilm": Geometry(384, 12, 32, 6),
    "vit_digits": Geometry(64, 4, 16, 4),
}
_METRIC = {"dtd": "accuracy", "digits": "accuracy", "cola": "matthews", "stsb": "pearson"}


def make_run(
    mode: str,
    strategy: str = "",
    *,
    seed: int = 0,
    epochs: Sequence[float] = (),
    column: Column = DTD,
    variant: tuple[str, ...] = (),
    problem: str = "",
) -> Run:
    """A run at rank 4, or at its parameters.

    Args:
        mode: the construction, head_only or full.
        strategy: the rank strategy.
        seed: the seed.
        epochs: the headline metric after each epoch; without any, the run has no record.
        column: dataset and backbone.
        variant: of the row.
        problem: why there is no score.
    """
    geometry = _GEOMETRY[column.model]
    lora = parameter_count("lora", geometry, [4])
    ranks = None
    if mode in CONSTRUCTIONS:
        ranks = isoparameters(mode, geometry) if strategy == "isoparameters" else isorank(mode, geometry)
    parameters = parameter_count(mode, geometry, ranks) if ranks else None
    metric = _METRIC.get(column.dataset, "accuracy")
    history = [
        {"epoch": epoch, "step": 16 * epoch, "lr": 1e-3, "train_loss": 1.0, "test_loss": 1.0, metric: score}
        for epoch, score in enumerate(epochs, start=1)
    ]
    best = max(history, key=lambda entry: float(entry[metric]), default=None)
    record = {
        "schema": 1,
        "status": "diverged" if problem else "completed",
        "ranks": list(ranks) if ranks else None,
        "adapter_parameters": parameters or 0,
        "lora_parameters": lora,
        "first_step": 4.0 * len(ranks) / 3 if ranks and len(ranks) > 1 else 32.0 if ranks else None,
        "lora_first_step": 32.0 if ranks else None,
        "head_parameters": 325,
        "train_examples": 1000,
        "test_examples": 400,
        "device": "NVIDIA H100 80GB HBM3",
        "processes": 1,
        "seconds": {"data": 1.0, "backbone": 2.0, "train": 12.5, "evaluate": 3.0},
        "environment": {
            "versions": {"python": "3.11.7", "torch": "2.8.0"},
            "platform": "Linux-6.1-x86_64",
            "git": {"commit": "d206ab517a5399bed7b9395fba4d805547f99308", "changed": False},
        },
        "metrics": {
            "name": metric,
            "last": history[-1][metric] if history else None,
            "best": best and best[metric],
            "best_epoch": best and best["epoch"],
            "others_last": {},
            "history": history,
        },
    }
    row = Row(mode, strategy, variant)
    digest = f"{mode}-{strategy}-{column.dataset}-{seed}"
    if not history:
        return Run(
            row, column, seed, digest, None if ranks is None else (ranks,), parameters, lora, None, problem or "missing"
        )
    return Run(row, column, seed, digest, None if ranks is None else (ranks,), parameters, lora, record, problem)


def make_table(runs: Iterable[Run], **changes: Any) -> Table:
    """A table of the runs given, with a name and a title."""
    return Table(**{"name": "sample", "title": "A sample", "runs": tuple(runs), **changes})


def sample_table(
    columns: Sequence[Column] = (DTD, COLA),
    strategies: Sequence[str] = ("isoparameters", "isorank"),
    seeds: int = 3,
    epochs: int = 4,
    random_seed: int = 0,
) -> Table:
    """LoRA, all constructions and head_only, with plausible scores.

    In the first column a run of att_qkv has failed, in the last one of depth is missing.
    """
    draw = random.Random(random_seed)
    stacked = [mode for mode in PAPER_CONSTRUCTIONS if mode != "lora"]
    rows = [("lora", ""), *((mode, strategy) for strategy in strategies for mode in stacked), ("head_only", "")]
    runs = []
    for column in columns:
        for mode, strategy in rows:
            top = 0.45 if mode == "head_only" else 0.7 + draw.uniform(-0.04, 0.04)
            for seed in range(seeds):
                shift = draw.gauss(0, 0.01)
                curve = [(top + shift) * (1 - 2.0**-epoch) + draw.gauss(0, 0.004) for epoch in range(1, epochs + 1)]
                failed = column == columns[0] and (mode, strategy, seed) == ("att_qkv", strategies[0], 1)
                missing = column == columns[-1] and (mode, strategy, seed) == ("depth", strategies[0], 2)
                problem = "diverged: training loss nan at step 37" if failed else ""
                scores = [] if missing else curve
                runs.append(make_run(mode, strategy, seed=seed, epochs=scores, column=column, problem=problem))
    return make_table(runs)


def swept_table(
    setting: str,
    values: Sequence[str],
    modes: Sequence[str] = ("lora", "qkv", "depth", "head_only"),
    epochs: Sequence[float] = (0.0,),
) -> Table:
    """Three seeds of each construction at each value of a setting, which lora and head_only do not depend on.

    Row number n scores 50 + 5 n + 2 k per cent, 1 more or less with the seed, at value number k.

    Args:
        setting: the setting that is swept.
        values: of the setting.
        modes: the rows.
        epochs: how far below its last score each epoch is.
    """
    runs = []
    for number, mode in enumerate(modes):
        is_fixed = mode in ("lora", "head_only")
        for k, value in enumerate(values[:1] if is_fixed else values):
            last = [0.5 + 0.05 * number + 0.02 * k + shift for shift in (-0.01, 0.0, 0.01)]
            variant = () if is_fixed else (f"{setting}={value}",)
            strategy = "" if is_fixed else "isorank"
            runs += [
                make_run(mode, strategy, seed=seed, epochs=[score - below for below in epochs], variant=variant)
                for seed, score in enumerate(last)
            ]
    return make_table(runs)


def tuned_table() -> Table:
    """LoRA and qkv with 4e-3 and 1e-3 of three learning rates, the latter at the edge; head_only is not tuned."""
    setting = "optimizer.lr"
    scores = {"lora": (0.5, 0.6, 0.4), "qkv": (0.7, 0.6, 0.5)}
    trials = []
    for number, value in enumerate(("0.001", "0.004", "0.016")):
        for mode, of_values in scores.items():
            strategy = "" if mode == "lora" else "isorank"
            for seed, shift in ((7, -0.01), (8, 0.01)):
                score = of_values[number] + shift
                run = make_run(mode, strategy, seed=seed, epochs=[score], variant=(f"{setting}={value}",))
                assert run.record
                config = {"adapter": {"alpha": 4.0}, "optimizer": {"lr": float(value)}}
                trials.append(replace(run, record={**run.record, "scored_on": "validation", "config": config}))
    lora, qkv = Row("lora"), Row("qkv", "isorank")
    chosen = {
        (lora, DTD): replace(lora, variant=(f"{setting}=0.004",)),
        (qkv, DTD): replace(qkv, variant=(f"{setting}=0.001",)),
    }
    tuning = Tuning(setting, make_table(trials, name="sample-trials", by=setting), chosen, frozenset({(qkv, DTD)}))
    runs = [
        make_run(row.tensor_mode, row.strategy, seed=seed, epochs=[score + seed / 100])
        for row, score in ((lora, 0.62), (qkv, 0.66), (Row("head_only"), 0.3))
        for seed in range(2)
    ]
    return make_table(runs, tuning=tuning, notes=(tuning.edge_note,))


def crowded_table() -> Table:
    """Rows of nearly one score, of which two pairs have nearly one count too."""
    draw = random.Random(0)
    scores = {mode: [0.7 + draw.uniform(-0.002, 0.002) for _ in range(2)] for mode in PAPER_CONSTRUCTIONS}
    return make_table(
        make_run(mode, "" if mode == "lora" else "isorank", seed=seed, epochs=[score], column=DIGITS)
        for mode in PAPER_CONSTRUCTIONS
        for seed, score in enumerate(scores[mode])
    )


def small_table() -> Table:
    """LoRA, all constructions and head_only under one strategy, with two seeds."""
    return sample_table((DTD,), ("isorank",), seeds=2)
