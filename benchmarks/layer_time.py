"""What an adapter costs one layer, over its query, key and value alone, in the forms that it could take.

    python benchmarks/layer_time.py                                  # ViT-B/16's layer, 8 images
    python benchmarks/layer_time.py --tokens 512 --separate          # RoBERTa-base's, 32 sentences

Forward and backward with the weights frozen and the gradient of the input wanted. In use is what training does, but for
one thing: the layer stands alone here, and every form makes its thin matrices itself, which a model makes for all
layers at once. Input and output are its two groupings (see `factorizations.tucker.Tucker.slices`), merged adds dW to
the weight for the forward and keeps the backward thin, dense multiplies by dW. The forms take turns; a figure is the
fastest fifth's slowest time over that of the Linear alone, which a busy machine moves less than a median.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from tenslora import AdapterConfig, Geometry, RankStrategy
from tenslora.adapted_linear import AdaptedLinear, SharedInput
from tenslora.adapter import Adapter
from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.factorizations.tucker import Tucker
from tenslora.thin_products import ForwardPassCache, MatrixGroup

GEOMETRY = Geometry(d_in=768, heads=12, d_head=64, layers=12)
ADAPTERS = {
    **{
        f"{mode}/{strategy}": (mode, RankStrategy(strategy))
        for strategy in ("isorank", "isoparameters")
        for mode in PAPER_CONSTRUCTIONS
        if mode != "lora"
    },
    # Output ranks below the input's: what the choice of grouping is for.
    **{
        f"{mode}/{r_in}x{r_out}": (mode, RankStrategy("explicit", ranks=(r_in, r_out, *others)))
        for mode, others in (("depth", (12,)), ("qkv_depth", (3, 12)))
        for r_in, r_out in ((64, 8), (64, 24), (64, 40), (16, 4))
    },
}
FORMS = ("in use", "input", "output", "merged", "dense")


class _Merged(torch.autograd.Function):
    """y = x (W + dW^T)^T + b with dW[p] = left[p] @ right[p], and LoRA's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        merged = weight + (left @ right).mT.flatten(0, 1)
        ctx.save_for_backward(x, merged, left, right)
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
        x, merged, left, right = ctx.saved_tensors
        flat, tokens = grad.flatten(0, -2), x.flatten(0, -2)
        blocks = flat.chunk(len(right), dim=1)
        grad_h = torch.stack([block @ r.T for block, r in zip(blocks, right, strict=True)])
        h = tokens @ left
        grad_right = torch.stack([h[p % len(h)].T @ block for p, block in enumerate(blocks)])
        grad_left = tokens.T @ (grad_h if len(left) > 1 else grad_h.sum(0, keepdim=True))
        return grad @ merged, None, None, grad_left, grad_right


def forms(adapter: Adapter, linears: list[nn.Linear]) -> dict[str, Callable[[Tensor], list[Tensor]]]:
    """Every form as a function from the layer's input to the outputs of its Linears, one fused or three apart."""
    layer = 3
    group = MatrixGroup(
        adapter, range(3), writes_to_stream=False, fused=len(linears) == 1, cache=ForwardPassCache(nn.Module())
    )
    shared = SharedInput(group, layer)
    held = [(0, 1, 2)] if len(linears) == 1 else [(0,), (1,), (2,)]
    places = [tuple((m, column * GEOMETRY.d_out) for column, m in enumerate(which)) for which in held]
    adapted = [AdaptedLinear(linear, shared, where) for linear, where in zip(linears, places, strict=True)]

    def in_use(x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in adapted]

    def grouped(by_input: bool) -> Callable[[Tensor], list[Tensor]]:
        def run(x: Tensor) -> list[Tensor]:
            chosen = Tucker.core_joins_input
            Tucker.core_joins_input = lambda *_: not by_input  # type: ignore[method-assign]
            try:
                return in_use(x)
            finally:
                Tucker.core_joins_input = chosen  # type: ignore[method-assign]

        return run

    def merged(x: Tensor) -> list[Tensor]:
        lefts, rights = adapter.layer_products(layer)
        left, right = torch.stack(lefts), torch.stack(rights) * adapter.config.alpha
        outputs = []
        for linear, which in zip(linears, held, strict=True):
            one = left if len(left) == 1 else left[list(which)]
            outputs.append(_Merged.apply(x, linear.weight, linear.bias, one, right[list(which)]))
        return outputs

    def dense(x: Tensor) -> list[Tensor]:
        updates = torch.stack(adapter.dense(layer)) * adapter.config.alpha
        outputs = []
        for linear, which in zip(linears, held, strict=True):
            outputs.append(linear(x) + x @ updates[list(which)].transpose(0, 1).flatten(1))
        return outputs

    return dict(zip(FORMS, (in_use, grouped(True), grouped(False), merged, dense), strict=True))


def measure(name: str, tokens: int, separate: bool, repeats: int) -> dict[str, float]:
    """Seconds of the Linear alone, and every form's ratio to it."""
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
    for repeat in range(repeats + 2):
        for form, function in functions.items():
            started = time.perf_counter()
            torch.autograd.backward(function(x), gradients)
            passed = time.perf_counter() - started
            x.grad = None
            adapter.zero_grad()
            if repeat >= 2:
                seconds[form].append(passed)
    fast = {form: sorted(found)[len(found) // 5] for form, found in seconds.items()}
    return {"alone": fast["alone"], **{form: fast[form] / fast["alone"] for form in FORMS}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, metavar="ADAPTER", default=list(ADAPTERS))
    parser.add_argument("--tokens", type=int, default=1576, help="per step, a multiple of 8")
    parser.add_argument("--separate", action="store_true", help="three Linear layers instead of one that is fused")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/layer_time.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'':<26} {'alone, ms':>9}" + "".join(f"{form:>8}" for form in FORMS))
    found = {}
    for name in arguments.adapters:
        row = found[name] = measure(name, arguments.tokens, arguments.separate, arguments.repeats)
        ratios = "".join(f"{row[form]:>8.3f}" for form in FORMS)
        print(f"{name:<26} {1000 * row['alone']:>9.2f}{ratios}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**vars(arguments), "out": None, "rows": found}, indent=1) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
