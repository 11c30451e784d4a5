"""What an adapter costs per training step, over the frozen backbone's own step.

    python benchmarks/step_time.py                                   # all of it, on this machine
    python benchmarks/step_time.py --backbones roberta --variants floor peft_lora qkv_depth/isoparameters

The floor is the same model with two things trainable, the head and the smallest parameter of its input embedding, so
that the gradient travels the whole depth. Random weights and inputs: neither changes the time. Each variant is a
process of its own; they take turns, so that what slows the machine for a while slows all of them. A variant's ratio is
to the floor's time just before and after it, its figure the median over the rounds. A turn during which a hypervisor
gave the processors to someone else (the "steal" of /proc/stat) is made again, a few times at most.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tenslora.constructions import PAPER_CONSTRUCTIONS

STRATEGIES = ("isorank", "isoparameters")
TENSORS = tuple(mode for mode in PAPER_CONSTRUCTIONS if mode != "lora")
VARIANTS = (
    "floor",
    "full",
    "peft_lora",
    "dense/qkv_depth/isoparameters",
    "lora/isorank",
    *(f"{mode}/{strategy}" for strategy in STRATEGIES for mode in TENSORS),
)
BATCHES = {"vit_hf": {"cpu": 8, "cuda": 64}, "vit_timm": {"cpu": 8, "cuda": 64}, "roberta": {"cpu": 32, "cuda": 32}}
TOKENS = 16  # of a sentence: CoLA's are 11 on average
CLASSES = 47
QUIET = 0.02  # of the processors' time may be stolen from a turn
TRIES = 4


@dataclass(frozen=True)
class Setting:
    """backbone: a key of BATCHES. precision: fp32, or bf16 by autocast. compiled: through torch.compile."""

    backbone: str
    device: str
    precision: str
    batch: int
    threads: int
    compiled: bool

    def __str__(self) -> str:
        return ", ".join(
            (self.backbone, self.device, self.precision, f"batch {self.batch}", *["compiled"] * self.compiled)
        )


def build(setting: Setting, variant: str) -> tuple[Any, list[Any]]:
    """(model, its trainable parameters), in training mode and on the device."""
    import torch

    torch.manual_seed(0)
    model: Any
    if setting.backbone == "vit_timm":
        import timm

        model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES)
        first = model.cls_token
        head = model.get_classifier()
        names = ["qkv"]
    elif setting.backbone == "vit_hf":
        from transformers import ViTConfig, ViTForImageClassification

        model = ViTForImageClassification(ViTConfig(num_labels=CLASSES))
        first, head, names = model.vit.embeddings.cls_token, model.classifier, _names(model)
    else:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
        model = RobertaForSequenceClassification(RobertaConfig(**sizes, num_labels=2))
        first, head, names = model.roberta.embeddings.LayerNorm.bias, model.classifier, _names(model)
    model.to(setting.device).requires_grad_(False)
    if variant == "floor":
        first.requires_grad_(True)
    elif variant == "full":
        model.requires_grad_(True)
    elif variant == "peft_lora":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=16, target_modules=names), model)
    else:
        from tenslora import AdapterConfig, RankStrategy, attach

        *dense, mode, strategy = variant.split("/")
        adapter = attach(model, AdapterConfig(mode, RankStrategy(strategy)))
        with torch.no_grad():
            for tensor in adapter.parameters():  # a core of zeros would have its products skipped by nothing, but
                if not tensor.any():  # subnormal numbers are slow, and zeros are no fair test of them
                    tensor.normal_(std=0.01)
        if dense:
            _materialise(model)
    head.requires_grad_(True)
    if setting.precision == "bf16":
        from tenslora.harness.training.precision import round_frozen_weights

        round_frozen_weights(model)  # as training does
    model.train()
    return model, [p for p in model.parameters() if p.requires_grad]


def _names(model: Any) -> list[str]:
    from tenslora.projections import find_projections

    return sorted({site.path.rpartition(".")[2] for site in find_projections(model)[1]})


def _materialise(model: Any) -> None:
    """Have every projection build its own dW and multiply by it."""
    from tenslora.attachment import AdaptedLinear

    for module in model.modules():
        if isinstance(module, AdaptedLinear):

            def forward(x: Any, module: AdaptedLinear = module) -> Any:
                first, second = module.as_lora()
                return module.base[0](x) + x @ (first @ second).to(x.dtype)

            module.forward = forward  # type: ignore[method-assign]


def stepper(setting: Setting, model: Any, parameters: Sequence[Any]) -> Callable[[], Any]:
    """A function that makes one training step."""
    import torch
    from torch.nn import functional as F

    classes = 2 if setting.backbone == "roberta" else CLASSES
    if setting.backbone == "roberta":
        tokens = torch.randint(5, 50000, (setting.batch, TOKENS), device=setting.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    else:
        inputs = {"pixel_values": torch.randn(setting.batch, 3, 224, 224, device=setting.device)}
    labels = torch.randint(classes, (setting.batch,), device=setting.device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    run = torch.compile(model) if setting.compiled else model
    autocast = torch.autocast(setting.device, dtype=torch.bfloat16, enabled=setting.precision == "bf16")

    def step() -> None:
        with autocast:
            logits = run(*inputs.values()) if setting.backbone == "vit_timm" else run(**inputs).logits
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if setting.device == "cuda":
            torch.cuda.synchronize()

    return step


def operations(step: Callable[[], Any]) -> int:
    """How many operations of a step compute or copy something; on a GPU each is one kernel or more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            self.count += not func.is_view and name != "_unsafe_view" and "empty" not in name
            return func(*args, **(kwargs or {}))

    with Counted() as counted:  # type: ignore[no-untyped-call]
        step()
    return int(counted.count)


def saved_bytes(model: Any, step: Callable[[], Any]) -> int:
    """How much a step keeps for its backward, the model's own parameters aside."""
    import torch

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    alive: list[Any] = []  # so that no address is used twice

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    # Layers that are watched like this would make their own thin products, as for activation checkpointing.
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        patch("tenslora.attachment._saving_is_watched", return_value=False),
    ):
        step()
    return sum(seen.values())


def worker(setting: Setting, variant: str, connection: Connection) -> None:
    """One variant: says what it takes, then makes as many steps as it is told and says how long each took."""
    import torch

    torch.set_num_threads(setting.threads)
    model, parameters = build(setting, variant)
    step = stepper(setting, model, parameters)
    before = _resident(setting)
    step()  # the optimizer's first, which makes its state
    # Once compiled, the graph keeps what it keeps; hooks would have it compiled another time.
    saved, count = (0, 0) if setting.compiled else (saved_bytes(model, step), operations(step))
    connection.send({"trained": sum(p.numel() for p in parameters), "saved_bytes": saved, "operations": count})
    _reset_peak(setting)
    while count := connection.recv():
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        connection.send((seconds, _peak(setting) - before))
    connection.close()


def _resident(setting: Setting) -> int:
    import torch

    return torch.cuda.memory_allocated() if setting.device == "cuda" else _status("VmRSS")


def _peak(setting: Setting) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if setting.device == "cuda" else _status("VmHWM")


def _reset_peak(setting: Setting) -> None:
    import torch

    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _stolen() -> float:
    """Seconds of processor time that the hypervisor has given to others since the machine started."""
    stat = Path("/proc/stat")
    return int(stat.read_text().split()[8]) / os.sysconf("SC_CLK_TCK") if stat.exists() else 0.0


class Turn(NamedTuple):
    """seconds: of a step, the mean over the turn's. stolen: share of the processors' time meanwhile."""

    seconds: float
    stolen: float


class Process:
    def __init__(self, setting: Setting, variant: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(setting, variant, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}
        self.seconds: list[float] = []
        self.ratios: list[float] = []
        self.stolen: list[float] = []
        self.peak = 0

    def wait(self) -> None:
        """Until it is ready, one step made."""
        self.facts = self.connection.recv()
        self.run(1)

    def run(self, steps: int) -> Turn:
        before, started = _stolen(), time.perf_counter()
        self.connection.send(steps)
        seconds, self.peak = self.connection.recv()
        passed = (time.perf_counter() - started) * (os.cpu_count() or 1)
        return Turn(statistics.fmean(seconds), (_stolen() - before) / passed)

    def end(self) -> None:
        self.connection.send(0)
        self.process.join()


def measure(setting: Setting, variants: Sequence[str], rounds: int, steps: int, at_once: int) -> list[dict[str, Any]]:
    """A row per variant: the seconds of its steps, its ratios to the floor, and its memory."""
    floor = Process(setting, "floor")
    floor.wait()
    rows: dict[str, dict[str, Any]] = {}
    others = [variant for variant in variants if variant != "floor"]
    for start in range(0, len(others), at_once):
        here = {variant: Process(setting, variant) for variant in others[start : start + at_once]}
        for process in here.values():
            process.wait()
        for number in range(rounds):
            order = list(here.values())
            order = order[number % len(order) :] + order[: number % len(order)]
            before = floor.run(steps)
            for first in range(0, len(order), 3):
                group = order[first : first + 3]
                before = _take_turns(floor, group, before, steps)
        for variant, process in here.items():
            rows[variant] = _row(variant, process)
            process.end()
            print(f"  {_line(rows[variant])}", file=sys.stderr, flush=True)
    floor.ratios = [seconds / statistics.median(floor.seconds) for seconds in floor.seconds]
    floor.end()
    return [_row("floor", floor), *(rows[variant] for variant in others)]


def _take_turns(floor: Process, group: Sequence[Process], before: Turn, steps: int) -> Turn:
    """Add a turn to each of the group and to the floor, whose turn `before` was; returns the floor's turn after."""
    tries: list[tuple[float, list[Turn]]] = []
    while len(tries) < TRIES and (not tries or tries[-1][0] > QUIET):
        turns = [before, *(process.run(steps) for process in group), floor.run(steps)]
        tries.append((max(turn.stolen for turn in turns), turns))
        before = turns[-1]
    stolen, (start, *found, end) = min(tries, key=lambda tried: tried[0])
    floor.seconds.append(end.seconds)
    floor.stolen.append(stolen)
    # Were the floor's time to change evenly between the two, it would be this at each turn.
    for place, (process, turn) in enumerate(zip(group, found, strict=True), start=1):
        expected = start.seconds + (end.seconds - start.seconds) * place / (len(group) + 1)
        process.seconds.append(turn.seconds)
        process.ratios.append(turn.seconds / expected)
        process.stolen.append(stolen)
    return before


def _row(variant: str, process: Process) -> dict[str, Any]:
    return {
        "variant": variant,
        **process.facts,
        "peak_bytes": process.peak,
        "seconds": process.seconds,
        "ratios": process.ratios,
        "stolen": process.stolen,
    }


def _line(row: dict[str, Any]) -> str:
    ratios = sorted(row["ratios"])
    middle = statistics.median(ratios)
    quarter = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [middle] * 3
    return (
        f"{row['variant']:<30} {row['trained']:>11,} {statistics.median(row['seconds']):>8.4f} {middle:>6.3f}  "
        f"{quarter[0]:.3f} to {quarter[2]:.3f} {row['peak_bytes'] / 2**20:>8,.0f} {row['saved_bytes'] / 2**20:>9,.0f}"
        f" {row['operations']:>10,}"
    )


HEAD = (
    f"{'':<30} {'trained':>11} {'seconds':>8} {'ratio':>6}  {'quartiles':<14} {'peak MiB':>8} {'saved MiB':>9}"
    f" {'operations':>10}"
)


def machine(device: str) -> dict[str, Any]:
    import platform

    import torch

    from tenslora.harness.training.processes import Processes

    return {
        "device": Processes(device).name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--backbones", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", default=list(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--batch", type=int, help="examples per step; as in docs/performance.md unless given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="per turn; 1 on a CPU and 10 on a GPU unless given")
    parser.add_argument("--at-once", type=int, default=6, help="variants in memory at once, beside the floor")
    parser.add_argument("--compile", action="store_true", help="run the models through torch.compile")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/step_time.json"))
    arguments = parser.parse_args()
    for variant in arguments.variants:
        if variant.removeprefix("dense/") not in VARIANTS and variant not in VARIANTS:
            parser.error(f"--variants {variant}: must be one of {', '.join(VARIANTS)}")

    steps = arguments.steps or (10 if arguments.device == "cuda" else 1)
    results = []
    for backbone in arguments.backbones:
        for precision in arguments.precisions:
            batch = arguments.batch or BATCHES[backbone][arguments.device]
            setting = Setting(backbone, arguments.device, precision, batch, arguments.threads, arguments.compile)
            print(f"{setting}", file=sys.stderr, flush=True)
            rows = measure(setting, arguments.variants, arguments.rounds, steps, arguments.at_once)
            results.append({"setting": vars(setting), "rows": rows})
            print("\n".join([f"\n{setting}", HEAD, *map(_line, rows)]), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": machine(arguments.device), "results": results}, indent=1)
            arguments.out.write_text(text + "\n")  # of what there is: the rest may take an hour
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
