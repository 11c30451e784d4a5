"""What an epoch of training costs as a user sees it: the step, the padding in it, and the waiting for data.

    python benchmarks/epoch_time.py                       # all cases, with the data that lies in ../shared
    python benchmarks/epoch_time.py --cases cola/grouped cola/random --steps 12

Every case is `train.py` with other settings and random weights, stopped after some steps and scaled to an epoch. It
runs twice in its process: cold, and again with the data that the first run has prepared, as from the second epoch on.
Wasted is the share of an epoch's tokens that are padding, counted over the whole of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

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


def one(overrides: list[str]) -> dict[str, Any]:
    """Train twice in this process, and count the padding."""
    from hydra import compose, initialize_config_dir

    from tenslora.harness.config import register_resolvers, validate
    from tenslora.harness.training import loop
    from train import train

    # The score after a few steps is of no interest, and takes longer than they do.
    loop.evaluate = lambda *_: (0.0, dict.fromkeys(run.dataset.metrics, 0.0))  # type: ignore[assignment]
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", overrides)
    logging.disable(logging.INFO)
    run = validate(composed)
    records = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            records.append(train(composed, Path(folder), shown=False))
    steps_per_epoch = -(-records[0]["train_examples"] // run.trainer.batch_size)
    found = [
        {
            "seconds_per_step": record["seconds"]["train"] / record["metrics"]["history"][-1]["step"],
            "epoch_seconds": steps_per_epoch * record["seconds"]["train"] / record["metrics"]["history"][-1]["step"],
            "waiting": record["seconds"]["wait"] / record["seconds"]["train"],
            "data_seconds": record["seconds"]["data"],
        }
        for record in records
    ]
    return {
        "cold": found[0],
        "warm": found[1],
        "steps_per_epoch": steps_per_epoch,
        "wasted": wasted(composed) if run.dataset.modality == "text" else None,
        "environment": records[0]["environment"],
        "device": records[0]["device"],
    }


def wasted(composed: Any) -> float:
    """The share of padding among the tokens of one training epoch."""
    from tenslora.harness.backbones import load_tokenizer
    from tenslora.harness.config import validate
    from tenslora.harness.data import load_dataset
    from tenslora.harness.data.batches import TrainBatches
    from tenslora.harness.data.encoding import encode

    run = validate(composed)
    dataset = load_dataset(run.dataset, run.seed)
    tokenizer = load_tokenizer(run.model, dataset.train.inputs)
    train, _, collate = encode(dataset.train, dataset.test, run.dataset, run.model, "", tokenizer)
    masks = [
        batch.inputs["attention_mask"]
        for batch in TrainBatches(train, collate, batch_size=run.trainer.batch_size, seed=run.seed).epoch(1)
    ]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--cola", default="../shared/data/cola_public", help="dataset.root of CoLA")
    parser.add_argument("--dtd", default="../shared/data", help="dataset.root of DTD")
    parser.add_argument("--steps", type=int, default=8, help="training steps per run")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/epoch_time.json"))
    parser.add_argument("overrides", nargs="*", help="further settings for every case, as for train.py")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_intermixed_args()
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if arguments.one:
        print(json.dumps(one(arguments.overrides)))
        return

    roots = {"cola": f"dataset.root={arguments.cola}", "dtd": f"dataset.root={arguments.dtd}"}
    results = {}
    print(f"{'':<26}{'s/step':>8}{'s/epoch':>9}{'wasted':>8}{'waiting, cold':>15}{'warm':>8}")
    for case in arguments.cases:
        settings = [word.format(**roots) for word in CASES[case]]
        command = [sys.executable, __file__, "--one", "--", *settings, f"trainer.max_steps={arguments.steps}"]
        done = subprocess.run([*command, *arguments.overrides], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{case}: failed")
        row = results[case] = json.loads(done.stdout.splitlines()[-1])
        share = "" if row["wasted"] is None else f"{100 * row['wasted']:.1f} %"
        print(
            f"{case:<26}{row['warm']['seconds_per_step']:>8.3f}{row['warm']['epoch_seconds']:>9.0f}{share:>8}"
            f"{100 * row['cold']['waiting']:>13.1f} %{100 * row['warm']['waiting']:>6.1f} %",
            flush=True,
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
