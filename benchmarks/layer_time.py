"""Measures what an adapter costs one layer's query, key and value, in each form that the update could take.

    python benchmarks/layer_time.py                                  # ViT-B/16's layer, 8 images
    python benchmarks/layer_time.py --tokens 512 --separate          # RoBERTa-base's layer, 32 sentences

A figure is the time of a forward and a backward pass, divided by that of the frozen Linear layers alone. The gradient
of the input is computed too. The forms are

- in use: the form that training uses, except that the layer computes its own thin matrices, which a model computes for
  all layers at once;
- input, output: the two groupings of a Tucker slice, in which the core joins right, or left (see
  `factorizations.tucker.Tucker.slices`);
- merged: dW is added to the weight for the forward pass, and the backward pass stays low-rank;
- dense: dW is built, and the input is multiplied by dW.

The forms take turns. The benchmark compares the 20th percentiles of their times, which a busy machine changes less than
the medians.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tenslora import AdapterConfig, Geometry, RankStrategy
from tenslora.adapted_linear import LayerUpdate, SharedInput, put_on
from tenslora.adapter import Adapter
from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.factorizations.tucker import Tucker
from tenslora.files import write_json
from tenslora.forward_pass import ForwardPass
from tenslora.harness.commands import command_parser, file_to_write, mistakes_in_one_line, thread_count, whole_number
from tenslora.projections import Columns
from tenslora.thin_products import MatrixGroup

GEOMETRY = Geometry(d_in=768, heads=12, d_head=64, layers=12)
ADAPTERS = {
    **{
        f"{mode}/{strategy}": (mode, RankStrategy(strategy))
        for strategy in ("isorank", "isoparameters")
        for mode in PAPER_CONSTRUCTIONS
        if mode != "lora"
    },
    # The choice of grouping matters if the rank of the output is lower than that of the input.
    **{
        f"{mode}/{r_in}x{r_out}": (mode, RankStrategy("explicit", ranks=(r_in, r_out, *others)))
        for mode, others in (("depth", (12,)), ("qkv_depth", (3, 12)))
        for r_in, r_out in ((64, 8), (64, 24), (64, 40), (16, 4))
    },
}
WARM_UP = 2  # repeats that are not counted
FORMS = ("in use", "input", "output", "merged", "dense")


class _Merged(torch.autograd.Function):
    """y = x (W + dW^T)^T + b with dW[p] = left[p] @ right[p], and the backward pass of a LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        merged = weight + (left @ right).mT.flatten(0, 1)
        ctx.save_for_backward(x, merged, left, right)
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
        x, merged, left, right = ctx.saved_tensors
        tokens = x.flatten(0, -2)
        blocks = grad.flatten(0, -2).chunk(len(right), dim=1)
        grad_h = torch.stack([block @ r.T for block, r in zip(blocks, right, strict=True)])
        h = tokens @ left
        grad_right = torch.stack([h[p % len(h)].T @ block for p, block in enumerate(blocks)])
        grad_left = tokens.T @ (grad_h if len(left) > 1 else grad_h.sum(0, keepdim=True))
        return grad @ merged, None, None, grad_left, grad_right


def forms(adapter: Adapter, linears: list[nn.Linear]) -> dict[str, Callable[[Tensor], list[Tensor]]]:
    """Each form as a function from the layer's input to the outputs of its Linear layers.

    Args:
        adapter: the adapter that holds the updates.
        linears: one fused Linear layer, or three separate ones.
    """
    layer = 3
    width = GEOMETRY.d_out
    fused_parts = 1 if len(linears) == 1 else 0
    forward_pass = ForwardPass(nn.Module())
    group = MatrixGroup(adapter, range(3), False, fused_parts, forward_pass)
    shared = SharedInput(group, layer)
    matrices = [[0, 1, 2]] if len(linears) == 1 else [[0], [1], [2]]
    adapted = [copy.copy(linear) for linear in linears]
    for linear, held in zip(adapted, matrices, strict=True):
        columns = tuple(Columns(matrix, index * width, width) for index, matrix in enumerate(held))
        put_on(linear, LayerUpdate(linear, shared, columns, forward_pass.layer("", [])))

    def in_use(x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in adapted]

    def grouped(core_joins_left: bool) -> Callable[[Tensor], list[Tensor]]:
        def run(x: Tensor) -> list[Tensor]:
            with patch.object(Tucker, "core_joins_input", lambda *_: core_joins_left):
                return in_use(x)

        return run

    def merged(x: Tensor) -> list[Tensor]:
        lefts, rights = adapter.layer_products(layer)
        left, right = torch.stack(lefts), torch.stack(rights) * adapter.config.alpha
        outputs = []
        for linear, held in zip(linears, matrices, strict=True):
            own_left = left if len(left) == 1 else left[held]
            outputs.append(_Merged.apply(x, linear.weight, linear.bias, own_left, right[held]))
        return outputs

    def dense(x: Tensor) -> list[Tensor]:
        updates = torch.stack(adapter.dense(layer)) * adapter.config.alpha
        outputs = []
        for linear, held in zip(linears, matrices, strict=True):
            outputs.append(linear(x) + x @ updates[held].transpose(0, 1).flatten(1))
        return outputs

    return dict(zip(FORMS, (in_use, grouped(False), grouped(True), merged, dense), strict=True))


def measure(name: str, tokens: int, separate: bool, repeats: int) -> dict[str, float]:
    """Time one adapter.

    Args:
        name: a key of `ADAPTERS`.
        tokens: the number of tokens per step, a multiple of 8.
        separate: whether there are three Linear layers instead of a fused one.
        repeats: how many times each form is timed.

    Returns:
        The seconds of the Linear layers alone, and each form's ratio to them.
    """
    torch.manual_seed(0)
    adapter = Adapter(AdapterConfig(*ADAPTERS[name]), GEOMETRY)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.01)
    width = GEOMETRY.d_out
    linears = [nn.Linear(GEOMETRY.d_in, width if separate else 3 * width) for _ in range(3 if separate else 1)]
    for linear in linears:
        linear.requires_grad_(False)
    functions = {"alone": lambda x: [linear(x) for linear in linears], **forms(adapter, linears)}
    x = torch.randn(8, tokens // 8, GEOMETRY.d_in, requires_grad=True)
    gradients = [torch.randn(8, tokens // 8, linear.out_features) for linear in linears]
    seconds: dict[str, list[float]] = {form: [] for form in functions}
    for repeat in range(repeats + WARM_UP):
        for form, function in functions.items():
            started = time.perf_counter()
            torch.autograd.backward(function(x), gradients)
            passed = time.perf_counter() - started
            x.grad = None
            adapter.zero_grad()
            if repeat >= WARM_UP:
                seconds[form].append(passed)
    fastest_fifth = {form: sorted(times)[len(times) // 5] for form, times in seconds.items()}
    alone = fastest_fifth.pop("alone")
    return {"alone": alone, **{form: time / alone for form, time in fastest_fifth.items()}}


def main(given: Sequence[str] | None = None) -> None:
    parser = command_parser("benchmarks/layer_time.py", __doc__)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, metavar="ADAPTER", default=list(ADAPTERS))
    parser.add_argument("--tokens", type=whole_number, default=1576, help="tokens per step, a multiple of 8")
    parser.add_argument("--separate", action="store_true", help="three Linear layers instead of a fused one")
    parser.add_argument("--threads", type=thread_count, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=whole_number, default=40)
    parser.add_argument("--out", type=file_to_write, default="outputs/benchmarks/layer_time.json")
    arguments = parser.parse_args(given)
    if arguments.tokens % 8:
        parser.error(f"argument --tokens: {arguments.tokens}: must be a multiple of 8")
    torch.set_num_threads(arguments.threads)
    print(f"{'':<26} {'alone, ms':>9}" + "".join(f"{form:>8}" for form in FORMS))
    rows = {}
    for name in arguments.adapters:
        row = rows[name] = measure(name, arguments.tokens, arguments.separate, arguments.repeats)
        ratios = "".join(f"{row[form]:>8.3f}" for form in FORMS)
        print(f"{name:<26} {1000 * row['alone']:>9.2f}{ratios}", flush=True)
    write_json(arguments.out, {**vars(arguments), "out": str(arguments.out), "rows": rows})
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
