"""Measures an epoch of training: the time of the steps, the share of padding, and the time spent waiting for data.

    python benchmarks/epoch_time.py                       # all cases, with the data in ../shared
    python benchmarks/epoch_time.py --cases cola/grouped cola/random --steps 12

Every case is `train.py` with other settings and random weights, stopped after some steps and scaled to an epoch. Each
case runs twice in a process of its own: first cold, then warm. The warm run uses the data that the cold run has
prepared, as every epoch but the first does. "wasted" is the share of padding among the tokens of an epoch.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

import argparse
import json
import logging
import math
import subprocess
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from tenslora.errors import TensLoRAError, first_line
from tenslora.files import write_json
from tenslora.harness.commands import command_parser, file_to_write, mistakes_in_one_line, whole_number

if TYPE_CHECKING:
    from tenslora.harness.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
COLA = ["dataset=cola", "model=roberta_base", "model.pretrained=false", "trainer.batch_size=32", "{cola}"]
DTD = ["dataset=dtd", "model=vit_small_timm", "model.pretrained=false", "model.image_size=224", "{dtd}"]
CASES = {
    "cola/grouped": COLA,
    "cola/random": [*COLA, "dataset.group_by_length=false"],
    "cola/512": [*COLA, "dataset.group_by_length=false", "dataset.padding=max_length", "dataset.max_length=512"],
    "dtd/plain": DTD,
    "dtd/augmented": [*DTD, "dataset.transform.flip=true", "dataset.transform.color_jitter=0.4"],
    "dtd/plain, 2 workers": [*DTD, "trainer.workers=2"],
    "dtd/augmented, 2 workers": [
        *DTD,
        "dataset.transform.flip=true",
        "dataset.transform.color_jitter=0.4",
        "trainer.workers=2",
    ],
}


def run_of(overrides: Sequence[str]) -> RunConfig:
    """The settings of a case.

    Args:
        overrides: the settings, as for train.py.

    Raises:
        TensLoRAError: if train.py would not take them.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from tenslora.harness.config import register_resolvers, validate
    from tenslora.harness.config.spelling import misspelt

    register_resolvers()
    conf = ROOT / "conf"
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            return validate(compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise TensLoRAError(misspelt(overrides, conf, "config") or first_line(error)) from error


def measure(overrides: Sequence[str]) -> dict[str, Any]:
    """Train one case twice in this process, and count its padding.

    Args:
        overrides: the settings, as for train.py.
    """
    from tenslora.harness.training.evaluation import Evaluation
    from train import train

    run = run_of(overrides)
    logging.disable(logging.INFO)
    # The score after a few steps says nothing, and an evaluation takes longer than the steps.
    no_score = Evaluation(0.0, dict.fromkeys(run.dataset.metrics or ("accuracy",), 0.0), {})
    records = []
    with patch("tenslora.harness.training.loop.evaluate", return_value=no_score):
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                records.append(train(run, Path(folder), show_progress=False))
    steps_per_epoch = math.ceil(records[0]["train_examples"] / run.trainer.batch_size)
    cold, warm = (_times(record, steps_per_epoch) for record in records)
    return {
        "cold": cold,
        "warm": warm,
        "steps_per_epoch": steps_per_epoch,
        "wasted": padding_share(run) if run.dataset.modality == "text" else None,
        "environment": records[0]["environment"],
        "device": records[0]["device"],
    }


def _times(record: dict[str, Any], steps_per_epoch: int) -> dict[str, float]:
    seconds_per_step = record["seconds"]["train"] / record["metrics"]["history"][-1]["step"]
    return {
        "seconds_per_step": seconds_per_step,
        "epoch_seconds": steps_per_epoch * seconds_per_step,
        "waiting": record["seconds"]["wait"] / record["seconds"]["train"],
        "data_seconds": record["seconds"]["data"],
    }


def padding_share(run: RunConfig) -> float:
    """The share of padding among the tokens of a run's first training epoch."""
    from tenslora.harness.backbones import load_backbone, load_tokenizer
    from tenslora.harness.data import load_dataset
    from tenslora.harness.data.batches import TrainBatches
    from tenslora.harness.data.encoding import encode

    dataset = load_dataset(run.dataset, run.seed)
    tokenizer = load_tokenizer(run.model, dataset.train.inputs)
    backbone = load_backbone(run.model, dataset.outputs, run.seed, tokenizer)
    data = encode(dataset, run.dataset, backbone, tokenizer)
    masks = [
        batch.inputs["attention_mask"]
        for batch in TrainBatches(data.train, data.collate, batch_size=run.trainer.batch_size, seed=run.seed).epoch(1)
    ]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def main(given: Sequence[str] | None = None) -> None:
    parser = command_parser("benchmarks/epoch_time.py", __doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--cola", default="../shared/data/cola_public", help="dataset.root of CoLA")
    parser.add_argument("--dtd", default="../shared/data", help="dataset.root of DTD")
    parser.add_argument("--steps", type=whole_number, default=8, help="training steps per run")
    parser.add_argument("--out", type=file_to_write, default="outputs/benchmarks/epoch_time.json")
    parser.add_argument("overrides", nargs="*", help="further settings for every case, as for train.py")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)  # one case: `overrides`
    arguments, rest = parser.parse_known_intermixed_args(given)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if arguments.in_this_process:
        print(json.dumps(measure(arguments.overrides)))
        return

    roots = {"cola": arguments.cola, "dtd": arguments.dtd}
    for name, root in roots.items():
        if any(case.startswith(name) for case in arguments.cases) and not Path(root).is_dir():
            parser.error(f"argument --{name}: {root}: no such folder")
    cases = {
        case: [
            *(word.format(**{name: f"dataset.root={root}" for name, root in roots.items()}) for word in CASES[case]),
            f"trainer.max_steps={arguments.steps}",
            *arguments.overrides,
        ]
        for case in arguments.cases
    }
    for settings in cases.values():
        run_of(settings)
    results = {}
    print(f"{'':<26}{'s/step':>8}{'s/epoch':>9}{'wasted':>8}{'waiting, cold':>15}{'warm':>8}")
    for case, settings in cases.items():
        command = [sys.executable, __file__, "--in-this-process", "--out", str(arguments.out), "--", *settings]
        # In a process group of its own it does not get the Ctrl-C that ends this process, which then ends it.
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, process_group=0)
        if done.returncode:
            raise TensLoRAError(f"{case}: cannot be measured; the reason is above")
        row = results[case] = json.loads(done.stdout.splitlines()[-1])
        share = "" if row["wasted"] is None else f"{100 * row['wasted']:.1f} %"
        print(
            f"{case:<26}{row['warm']['seconds_per_step']:>8.3f}{row['warm']['epoch_seconds']:>9.0f}{share:>8}"
            f"{100 * row['cold']['waiting']:>13.1f} %{100 * row['warm']['waiting']:>6.1f} %",
            flush=True,
        )
    write_json(arguments.out, results)
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
