"""Measures what an adapter costs per training step, compared with a step of the frozen backbone.

    python benchmarks/step_time.py                                   # everything, on this machine
    python benchmarks/step_time.py --backbones roberta --variants floor peft_lora qkv_depth/isoparameters
    python benchmarks/step_time.py --against ../before               # beside another checkout of this repository
    python benchmarks/step_time.py --backbones llama --variants qlora nf4/qkv_depth/isoparameters   # in four bits

The floor is the same model with two trainable parts, the head and the smallest parameter of its input embedding (of a
Llama, which has no new head: the first layer's norm), so that the gradient travels through all layers. Weights and
inputs are random, which does not change the time. Each variant runs in a process of its own. The processes take turns,
so that anything that slows the machine for a while slows all of them. A turn's ratio is the turn's time divided by the
floor's time just before and after the turn. A variant's ratio is the median over the rounds. If the hypervisor gave the
processors to others during a turn (the "steal" of /proc/stat), the turn is repeated, up to a few times.

Some variants are an adapter with a prefix. dense/ builds the whole update in every step. peft_tenslora/ puts the
adapter on through PEFT; it takes its turns next to the same adapter on by `attach`, and the ratio of the two times is
printed at the end. nf4/ quantises the Linear layers with bitsandbytes, and qlora is PEFT's LoRA on such a backbone.

With --against, each adapter takes its turns next to the same adapter of the other checkout, whose own copy of this
script builds the model and takes the steps. The ratio of the two times is printed at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest.mock import patch

from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.errors import TensLoRAError
from tenslora.files import write_json
from tenslora.harness.commands import command_parser, file_to_write, mistakes_in_one_line, thread_count, whole_number

STRATEGIES = ("isorank", "isoparameters")
TENSORS = tuple(mode for mode in PAPER_CONSTRUCTIONS if mode != "lora")
REFERENCES = ("floor", "full", "peft_lora", "qlora")  # variants without an adapter of this project
ADAPTERS = ("lora/isorank", *(f"{mode}/{strategy}" for strategy in STRATEGIES for mode in TENSORS))
PREFIXES = ("dense", "peft_tenslora", "nf4")
IN_PEFT = "peft_tenslora/"
VARIANTS = (*REFERENCES, *(f"{prefix}/qkv_depth/isoparameters" for prefix in PREFIXES), *ADAPTERS)
BATCHES = {
    "vit_hf": {"cpu": 8, "cuda": 64},
    "vit_timm": {"cpu": 8, "cuda": 64},
    "roberta": {"cpu": 32, "cuda": 32},
    "llama": {"cpu": 1, "cuda": 8},
}
TOKENS = {"roberta": 16, "llama": 256}  # per text; CoLA's sentences have 11 on average
LLAMA = {
    "vocab_size": 10_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
"""A Llama of 199 million parameters."""
CLASSES = 47
QUIET = 0.02  # the largest share of the processors' time that may be stolen during a turn
TRIES = 4  # the largest number of attempts at a quiet turn
GROUP = 3  # how many variants take a turn between two turns of the floor


@dataclass(frozen=True)
class Setting:
    """The settings that all variants of a measurement share.

    Args:
        backbone: a key of `BATCHES`.
        device: "cpu" or "cuda".
        precision: "fp32", or "bf16" by autocast.
        batch: the number of examples per step.
        threads: the number of CPU threads of each process.
        compiled: whether the models run through torch.compile.
    """

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
    """Build a variant.

    Args:
        setting: the settings of the measurement.
        variant: one of `VARIANTS`, or one of `ADAPTERS` after one of `PREFIXES`.

    Returns:
        The model in training mode, on the device, and its trainable parameters.
    """
    import torch

    torch.manual_seed(0)
    model: Any
    if setting.backbone == "vit_timm":
        import timm

        model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES)
        embedding = model.cls_token
        head = model.get_classifier()
        names = ["qkv"]
    elif setting.backbone == "vit_hf":
        from transformers import ViTConfig, ViTForImageClassification

        model = ViTForImageClassification(ViTConfig(num_labels=CLASSES))
        embedding, head, names = model.vit.embeddings.cls_token, model.classifier, _names(model)
    elif setting.backbone == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
        embedding, head, names = model.model.layers[0].input_layernorm.weight, torch.nn.Module(), _names(model)
    else:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
        model = RobertaForSequenceClassification(RobertaConfig(**sizes, num_labels=2))
        embedding, head, names = model.roberta.embeddings.LayerNorm.bias, model.classifier, _names(model)
    prefix = next((prefix for prefix in PREFIXES if variant.startswith(f"{prefix}/")), "")
    if prefix == "nf4" or variant == "qlora":
        _quantise(model, head)
    model.to(setting.device).requires_grad_(False)
    if variant == "floor":
        embedding.requires_grad_(True)
    elif variant == "full":
        model.requires_grad_(True)
    elif variant in ("peft_lora", "qlora"):
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=16, target_modules=names), model)
    else:
        from tenslora import AdapterConfig, RankStrategy, attach

        mode, strategy = variant.removeprefix(f"{prefix}/").split("/")
        if prefix == "peft_tenslora":
            from peft import get_peft_model

            from tenslora.peft import TensLoraConfig

            model = get_peft_model(model, TensLoraConfig(tensor_mode=mode, rank_strategy=strategy))
            adapter = model.base_model.tenslora_adapters["default"]
        else:
            adapter = attach(model, AdapterConfig(mode, RankStrategy(strategy)))
        with torch.no_grad():
            for tensor in adapter.parameters():
                # After a few steps a core that starts at zero would hold subnormal numbers, which are slow.
                if not tensor.any():
                    tensor.normal_(std=0.01)
        if prefix == "dense":
            _build_updates(model)
    head.requires_grad_(True)
    if setting.precision == "bf16":
        from tenslora.harness.training.precision import round_frozen_weights

        round_frozen_weights(model)  # as training does
    model.train()
    return model, [p for p in model.parameters() if p.requires_grad]


def _names(model: Any) -> list[str]:
    """The names of the modules that hold query, key and value, as PEFT takes them."""
    from tenslora.projections import find_projections

    return sorted({target.path.rpartition(".")[2] for stage in find_projections(model) for target in stage.targets})


def _quantise(model: Any, head: Any) -> None:
    """Store the weights of all Linear layers but the head's in bitsandbytes' nf4."""
    import torch

    bnb: Any = importlib.import_module("bitsandbytes.nn")  # its types are not declared
    kept = {*map(id, head.modules()), id(getattr(model, "get_output_embeddings", lambda: None)())}
    for path, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and id(linear) not in kept:
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            quantised = bnb.Linear4bit(*sizes, torch.float32, quant_type="nf4")
            quantised.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            quantised.bias = linear.bias
            model.set_submodule(path, quantised)


def _build_updates(model: Any) -> None:
    """Let every adapted Linear build its own dW and multiply its input by dW."""
    from tenslora.adapted_linear import AdaptedLinear

    for module in model.modules():
        if isinstance(module, AdaptedLinear):

            def forward(x: Any, module: AdaptedLinear = module) -> Any:
                module.layer_update.call.called = True
                left, right = module.layer_update.as_lora()
                return module.plain_class.forward(module, x) + x @ (left @ right).to(x.dtype)

            module.forward = forward  # type: ignore[method-assign]


def stepper(setting: Setting, model: Any, parameters: Sequence[Any]) -> Callable[[], Any]:
    """The function that takes one training step.

    Args:
        setting: the settings of the measurement.
        model: the model.
        parameters: the model's trainable parameters.
    """
    import torch
    from torch.nn import functional as F

    classes, shape = (2 if setting.backbone == "roberta" else CLASSES), [setting.batch]
    if setting.backbone in TOKENS:
        sizes = [setting.batch, TOKENS[setting.backbone]]
        tokens = torch.randint(5, LLAMA["vocab_size"], sizes, device=setting.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if setting.backbone == "llama":
            classes, shape = LLAMA["vocab_size"], sizes
    else:
        inputs = {"pixel_values": torch.randn(setting.batch, 3, 224, 224, device=setting.device)}
    labels = torch.randint(classes, shape, device=setting.device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    run = torch.compile(model) if setting.compiled else model
    autocast = torch.autocast(setting.device, dtype=torch.bfloat16, enabled=setting.precision == "bf16")

    def step() -> Any:
        with autocast:
            logits = run(*inputs.values()) if setting.backbone == "vit_timm" else run(**inputs).logits
        loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    return step


def operations(step: Callable[[], Any]) -> int:
    """The number of operations of a step that compute or copy something. On a GPU each is at least one kernel.

    Args:
        step: the function that takes one step.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            self.count += not func.is_view and name != "_unsafe_view" and "empty" not in name
            return func(*args, **(kwargs or {}))

    with Counter() as counter:  # type: ignore[no-untyped-call]
        step()
    return int(counter.count)


def saved_bytes(model: Any, step: Callable[[], Any]) -> int:
    """The number of bytes that a step saves for its backward pass, without the model's parameters and buffers.

    Args:
        model: the model.
        step: the function that takes one step.
    """
    import torch

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, Any] = {}  # by address; they are kept alive, so that no address is used twice

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    # A layer that finds such hooks takes them for activation checkpointing and does not use the cache; the patch hides
    # them.
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        patch("tenslora.thin_products.saved_tensors_hooks", return_value=None),
    ):
        step()
    return sum(storage.nbytes() for storage in storages.values())


def weight_bytes(model: Any) -> int:
    """The number of bytes that the model's weights take, the scales of quantised ones among them.

    Args:
        model: the model.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in model.state_dict().values()}
    return sum(storage.nbytes() for storage in storages.values())


def worker(setting: Setting, variant: str, connection: Connection) -> None:
    """Measure one variant, in a process of its own.

    The worker sends the facts about the variant. Then it repeatedly receives a number of steps, takes these steps, and
    sends (the seconds of each step, the peak memory in bytes). It ends when the number is zero.

    Args:
        setting: the settings of the measurement.
        variant: one of `VARIANTS`.
        connection: the connection to the process that compares the variants.
    """
    with mistakes_in_one_line(), contextlib.suppress(EOFError):  # if the process that compares has ended
        import torch

        torch.set_num_threads(setting.threads)
        model, parameters = build(setting, variant)
        step = stepper(setting, model, parameters)
        before = _memory(setting)
        step()  # the first step creates the optimizer's state
        # Hooks would make torch.compile compile the model again, and would not see the tensors that it saves.
        saved, count = (0, 0) if setting.compiled else (saved_bytes(model, step), operations(step))
        facts = {"trained": sum(p.numel() for p in parameters), "weight_bytes": weight_bytes(model)}
        connection.send({**facts, "saved_bytes": saved, "operations": count})
        _reset_peak(setting)
        while count := connection.recv():
            seconds = []
            for _ in range(count):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
            connection.send((seconds, _peak(setting) - before))
        connection.close()


def worker_of(checkout: str, setting: dict[str, Any], variant: str, connection: Connection) -> None:
    """Measure one variant with another checkout's package and that checkout's copy of this script.

    Args:
        checkout: the root of the other checkout.
        setting: the settings of the measurement, as a dict.
        variant: one of `VARIANTS`.
        connection: the connection to the process that compares the variants.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "tenslora"]:
        del sys.modules[name]
    sys.path.insert(0, checkout)
    spec = importlib.util.spec_from_file_location("step_time_of_checkout", f"{checkout}/benchmarks/step_time.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.worker(module.Setting(**setting), variant, connection)


def _memory(setting: Setting) -> int:
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
    """One turn: the mean seconds of its steps, and the share of the processors' time that was stolen meanwhile."""

    seconds: float
    stolen: float


class Process:
    """A process that measures one variant, and the times of its turns.

    Args:
        setting: the settings of the measurement.
        variant: one of `VARIANTS`.
        checkout: the root of another checkout whose code is measured; None for this checkout.
    """

    def __init__(self, setting: Setting, variant: str, checkout: Path | None = None) -> None:
        self.name = variant if checkout is None else f"{variant} @ {checkout.name}"
        self.facts: dict[str, Any] = {}
        self.seconds: list[float] = []
        self.ratios: list[float] = []
        self.stolen: list[float] = []
        self.peak = 0
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        target, arguments = (
            (worker, (setting, variant, theirs))
            if checkout is None
            else (worker_of, (str(checkout), vars(setting), variant, theirs))
        )
        self.process = context.Process(target=target, args=arguments, daemon=True)
        # A process that starts while Ctrl-C is ignored goes on ignoring it. This one does not, and ends all others.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()

    def wait(self) -> None:
        """Wait until the variant is ready and has taken a step."""
        self.facts = self._answer()
        self.run(1)

    def run(self, steps: int) -> Turn:
        """Take a turn.

        Args:
            steps: the number of steps.

        Returns:
            The times of the turn.
        """
        stolen_before, started = _stolen(), time.perf_counter()
        seconds, self.peak = self._answer(steps)
        available = (time.perf_counter() - started) * (os.cpu_count() or 1)
        return Turn(statistics.fmean(seconds), (_stolen() - stolen_before) / available)

    def _answer(self, steps: int | None = None) -> Any:
        try:
            if steps is not None:
                self.connection.send(steps)
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise TensLoRAError(f"{self.name}: cannot be measured; the reason is above") from error

    def end(self) -> None:
        """End the process."""
        self.connection.send(0)
        self.process.join()

    def row(self) -> dict[str, Any]:
        """The measurements of the variant, for the results file."""
        return {
            "variant": self.name,
            **self.facts,
            "peak_bytes": self.peak,
            "seconds": self.seconds,
            "ratios": self.ratios,
            "stolen": self.stolen,
        }


def measure(
    setting: Setting, variants: Sequence[str], rounds: int, steps: int, at_once: int, against: Path | None
) -> list[dict[str, Any]]:
    """Measure variants.

    Args:
        setting: the settings of the measurement.
        variants: some of `VARIANTS`. The floor is always measured.
        rounds: the number of turns that each variant takes.
        steps: the number of steps of a turn.
        at_once: the number of variants that are in memory at once, beside the floor and the variants' neighbours.
        against: the root of another checkout, whose adapters are measured too.

    Returns:
        A row for the floor, for each variant, and for each adapter of the other checkout.
    """
    floor = Process(setting, "floor")
    floor.wait()
    rows = []
    others = [variant for variant in variants if variant != "floor"]
    # An adapter and the same adapter in PEFT or of the other checkout take neighbouring turns.
    neighbours: dict[str, list[str]] = {}
    for variant in others:
        neighbours.setdefault(variant.removeprefix(IN_PEFT), []).append(variant)
    together = list(neighbours.values())
    for start in range(0, len(together), at_once):
        sets = [
            [Process(setting, variant) for variant in variants]
            + [Process(setting, variant, against) for variant in variants if against and variant not in REFERENCES]
            for variants in together[start : start + at_once]
        ]
        processes = [process for members in sets for process in members]
        for process in processes:
            process.wait()
        for number in range(rounds):
            before = floor.run(steps)
            for group in _groups(sets, number):
                before = _take_turns(floor, group, before, steps)
        for process in processes:
            rows.append(process.row())
            process.end()
            print(f"  {_line(rows[-1])}", file=sys.stderr, flush=True)
    floor.ratios = [seconds / statistics.median(floor.seconds) for seconds in floor.seconds]
    floor.end()
    return [floor.row(), *rows]


def _groups(sets: list[list[Process]], number: int) -> list[list[Process]]:
    """The groups of processes that take their turns between two turns of the floor. Every round has another order."""
    start = number % len(sets)
    rotated = [members[:: -1 if number % 2 else 1] for members in sets[start:] + sets[:start]]
    if any(len(members) > 1 for members in sets):
        return rotated
    order = [process for members in rotated for process in members]
    return [order[first : first + GROUP] for first in range(0, len(order), GROUP)]


def _take_turns(floor: Process, group: Sequence[Process], before: Turn, steps: int) -> Turn:
    """Let a group of processes and then the floor take a turn.

    Args:
        floor: the floor's process.
        group: the processes that take the turns.
        before: the floor's latest turn.
        steps: the number of steps of a turn.

    Returns:
        The floor's turn.
    """
    tries: list[tuple[float, list[Turn]]] = []
    while len(tries) < TRIES and (not tries or tries[-1][0] > QUIET):
        turns = [before, *(process.run(steps) for process in group), floor.run(steps)]
        tries.append((max(turn.stolen for turn in turns), turns))
        before = turns[-1]
    stolen, (start, *turns, end) = min(tries, key=lambda attempt: attempt[0])
    floor.seconds.append(end.seconds)
    floor.stolen.append(stolen)
    for position, (process, turn) in enumerate(zip(group, turns, strict=True), start=1):
        # The floor's time at this turn, interpolated linearly between the floor's turns before and after it.
        expected = start.seconds + (end.seconds - start.seconds) * position / (len(group) + 1)
        process.seconds.append(turn.seconds)
        process.ratios.append(turn.seconds / expected)
        process.stolen.append(stolen)
    return before


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['variant']:<40} {row['trained']:>11,} {statistics.median(row['seconds']):>8.4f} "
        f"{_quartiles(row['ratios'])} {row['peak_bytes'] / 2**20:>8,.0f} {row['saved_bytes'] / 2**20:>9,.0f}"
        f" {row['operations']:>10,} {row['weight_bytes'] / 2**20:>11,.0f}"
    )


def _quartiles(ratios: Sequence[float]) -> str:
    middle = statistics.median(ratios)
    lower, _, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [middle] * 3
    return f"{middle:>6.3f}  {lower:.3f} to {upper:.3f}"


def comparison(rows: Sequence[dict[str, Any]], variant: str, beside: str) -> dict[str, list[float]]:
    """The ratios of the times of two variants of each adapter in neighbouring turns, and those of all adapters.

    Args:
        rows: the rows that `measure` returns.
        variant: the name of the variant whose time is divided, with {} for the adapter's name.
        beside: the name of the variant by whose time it is divided, likewise.
    """
    seconds = {row["variant"]: row["seconds"] for row in rows}
    pairs = {name: (variant.format(name), beside.format(name)) for name in seconds}
    ratios = {
        name: [one / other for one, other in zip(seconds[first], seconds[second], strict=True)]
        for name, (first, second) in pairs.items()
        if first in seconds and second in seconds
    }
    return {**ratios, "all": [ratio for each in ratios.values() for ratio in each]} if ratios else {}


HEAD = (
    f"{'':<40} {'trained':>11} {'seconds':>8} {'ratio':>6}  {'quartiles':<14} {'peak MiB':>8} {'saved MiB':>9}"
    f" {'operations':>10} {'weights MiB':>11}"
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


def main(given: Sequence[str] | None = None) -> None:
    import torch

    parser = command_parser("benchmarks/step_time.py", __doc__)
    parser.add_argument("--backbones", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", default=list(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--batch", type=whole_number, help="examples per step; the default is docs/performance.md's")
    parser.add_argument("--threads", type=thread_count, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=whole_number, default=7)
    parser.add_argument("--steps", type=whole_number, help="per turn; the default is 1 on a CPU, 10 on a GPU")
    parser.add_argument("--at-once", type=whole_number, default=6, help="variants in memory at once, beside the floor")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, to measure beside")
    parser.add_argument("--compile", action="store_true", help="run the models through torch.compile")
    parser.add_argument("--out", type=file_to_write, default="outputs/benchmarks/step_time.json")
    arguments = parser.parse_args(given)
    for variant in arguments.variants:
        prefix, _, adapter = variant.partition("/")
        if variant not in VARIANTS and not (prefix in PREFIXES and adapter in ADAPTERS):
            parser.error(f"--variants {variant}: must be one of {', '.join(VARIANTS)}")

    if set(arguments.variants) == {"floor"}:
        parser.error("argument --variants: must name another variant than floor, which is always measured")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda: torch finds no GPU here")

    against = arguments.against and arguments.against.resolve()
    if against and not (against / "benchmarks" / "step_time.py").is_file():
        parser.error(f"--against {against}: holds no benchmarks/step_time.py")
    steps = arguments.steps or (10 if arguments.device == "cuda" else 1)
    results = []
    for backbone in arguments.backbones:
        for precision in arguments.precisions:
            batch = arguments.batch or BATCHES[backbone][arguments.device]
            setting = Setting(backbone, arguments.device, precision, batch, arguments.threads, arguments.compile)
            print(f"{setting}", file=sys.stderr, flush=True)
            rows = measure(setting, arguments.variants, arguments.rounds, steps, arguments.at_once, against)
            results.append({"setting": vars(setting), "rows": rows})
            print("\n".join([f"\n{setting}", HEAD, *map(_line, rows)]), flush=True)
            comparisons = {"time in PEFT over that of attach": comparison(rows, IN_PEFT + "{}", "{}")}
            if against:
                comparisons[f"time over that of {against}"] = comparison(rows, "{}", f"{{}} @ {against.name}")
            for title, by_name in comparisons.items():
                lines = [f"{name:<40} {_quartiles(ratios)}" for name, ratios in by_name.items()]
                print("\n".join(["", f"{title}, median and quartiles", *lines]) if lines else "", flush=True)
            # After every setting, as the next one may take an hour.
            write_json(arguments.out, {"machine": machine(arguments.device), "results": results})
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
