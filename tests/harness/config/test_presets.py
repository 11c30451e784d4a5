"""Each preset against its paper's formula, written out with NumPy, and its paper's parameter count."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tenslora.adapter import Adapter, AdapterConfig
from tenslora.constructions import Geometry
from tenslora.harness.config import digest, validate
from tenslora.ranks import parameter_count
from tests.running import composed

Array = NDArray[np.float64]
Factors = list[Mapping[str, Array]]

# Dimensions that no two axes share: d_in, heads, d_head, layers, and a feed-forward block twice as wide.
SMALL = {"d_in": 15, "heads": 3, "d_head": 4, "layers": 5, "d_ff": 24}
D_OUT = 12


def built(preset: str) -> tuple[Adapter, Factors]:
    """The preset's adapter on the small dimensions at rank 6, in float64, and its numbers."""
    run = validate(composed(f"preset={preset}", "rank_strategy.rank=6", "model.geometry=null"))
    geometry = Geometry(**SMALL, adapt=run.adapter.adapt)  # type: ignore[arg-type]
    settings = {**vars(run.adapter), "factorization": run.factorization.name}
    adapter = Adapter(AdapterConfig(run.mode, run.strategy, **settings), geometry).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    return adapter, [{name: p.detach().numpy() for name, p in t.named_parameters()} for t in adapter.tensors]


def fact_tk(factors: Factors, layer: int, slice_: int, _: int) -> Array:
    # Delta W = s sum_t1 sum_t2 sum_t3 C[t1, t2, t3] P[:, t1] U[:, t2] V[:, t3].
    f = factors[0]
    return np.einsum("abt,ia,ob,t->io", f["core"], f["d_in"], f["d_out"], f["site"][slice_ * SMALL["layers"] + layer])


def fact_tt(factors: Factors, layer: int, slice_: int, _: int) -> Array:
    # Delta W[j] = s U Sigma[j] V^T.
    f = factors[0]
    return f["d_in"] @ f["site"][:, slice_ * SMALL["layers"] + layer] @ f["d_out"]


def lotr(factors: Factors, layer: int, slice_: int, _: int) -> Array:
    # Delta W_s = A G_s B^T, A and B shared by the queries and values of all layers.
    f = factors[0]
    return f["d_in"] @ f["site"][:, slice_ * SMALL["layers"] + layer] @ f["d_out"]


def lorta(factors: Factors, layer: int, slice_: int, _: int) -> Array:
    # Delta W = sum_r A[:, r] B[:, r] C_H[:, r] C_L[:, r] C_M[:, r], head by head.
    f = factors[0]
    heads = np.einsum(
        "ir,dr,hr,r,r->ihd", f["d_in"], f["d_head"], f["head"], f["depth"][layer], f["projection"][slice_]
    )
    return heads.reshape(SMALL["d_in"], D_OUT)


def cara(factors: Factors, layer: int, slice_: int, _: int) -> Array:
    # As LoRTA, with one axis for the 3 L queries, keys and values.
    f = factors[0]
    place = f["site"][slice_ * SMALL["layers"] + layer]
    return np.einsum("ir,dr,hr,r->ihd", f["d_in"], f["d_head"], f["head"], place).reshape(SMALL["d_in"], D_OUT)


Formula = Callable[[Factors, int, int, int], Array]
FORMULAS: dict[str, Formula] = {"fact_tk": fact_tk, "fact_tt": fact_tt, "lotr": lotr, "lorta": lorta, "cara": cara}


@pytest.mark.parametrize("preset", FORMULAS)
def test_updates_are_those_of_the_papers_formula(preset: str) -> None:
    adapter, factors = built(preset)
    for layer in range(SMALL["layers"]):
        slice_ = 0
        for matrix, update in enumerate(adapter.dense(layer)):
            parts = []
            for _ in range(adapter.geometry.slices_per_matrix[matrix]):
                parts.append(FORMULAS[preset](factors, layer, slice_, matrix))
                slice_ += 1
            np.testing.assert_allclose(update.detach().numpy(), np.concatenate(parts, axis=1), atol=1e-11)


@pytest.mark.parametrize(
    ("preset", "rank", "count"),
    [
        # 2 d r + 12 L r + r^3 and 2 d r + 12 L r^2: d = 768, L = 12, twelve squares to a layer (FacT).
        ("fact_tk", 32, 2 * 768 * 32 + 144 * 32 + 32**3),
        ("fact_tt", 16, 2 * 768 * 16 + 144 * 16**2),
        # 2 d r + 2 L r^2; at rank 2 the 595,298 - 592,130 of the authors' example on RoBERTa-base (LoTR).
        ("lotr", 32, 2 * 768 * 32 + 24 * 32**2),
        ("lotr", 2, 595_298 - 592_130),
        # r (d + d / H + H + L + 4) (LoRTA).
        ("lorta", 16, 16 * (768 + 64 + 12 + 12 + 4)),
        # R (d + d_head + H + 3 L) (CaRA's tensor of the attention).
        ("cara", 32, 32 * (768 + 64 + 12 + 36)),
    ],
)
def test_counts_are_the_papers(preset: str, rank: int, count: int) -> None:
    run = validate(composed(f"preset={preset}", f"rank_strategy.rank={rank}", "dataset=dtd", "model=vit_base"))
    geometry = run.geometry
    assert geometry is not None
    ranks = run.strategy.resolve(run.mode, geometry, run.factorization.name)
    assert parameter_count(run.mode, geometry, ranks, run.factorization.name) == count


def test_a_preset_is_what_it_picks_and_no_more() -> None:
    words = ["tensor_mode=site", "factorization=tensor_train", "rank_strategy=isorank"]
    assert digest(composed("preset=lotr", "rank_strategy.rank=8")) == digest(
        composed(*words, "rank_strategy.rank=8", "adapter.adapt=qv")
    )
    assert validate(composed("preset=lotr", "tensor_mode=qkv_depth")).mode == "qkv_depth"
