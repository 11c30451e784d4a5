"""Each preset against its paper's formula, written out with NumPy, and against its paper's number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tenslora.adapter import Adapter
from tenslora.constructions import Geometry
from tenslora.ranks import parameter_count
from tests.running import configured

Array = NDArray[np.float64]
Factors = Mapping[str, Array]
Formula = Callable[[Factors, int, int], Array]

# Dimensions that no two axes share, and a feed-forward block twice as wide as d_out.
D_IN, HEADS, D_HEAD, LAYERS, D_OUT, D_FF = 15, 3, 4, 5, 12, 24


def adapter_and_factors(preset: str) -> tuple[Adapter, Factors]:
    """The preset's adapter on the small dimensions at rank 6, in float64, with the numbers of its one tensor."""
    config = configured(f"preset={preset}", "rank_strategy.rank=6", "model.geometry=null").adapter
    assert config is not None
    adapter = Adapter(config, Geometry(D_IN, HEADS, D_HEAD, LAYERS, adapt=config.adapt, d_ff=D_FF)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    (tensor,) = adapter.tensors
    return adapter, {name: parameter.detach().numpy() for name, parameter in tensor.named_parameters()}


def test_tensor_guide_is_the_formula_that_the_docs_print() -> None:
    geometry = Geometry(d_in=12, heads=2, d_head=4, layers=2)  # blocks of 2 rows
    config = configured("preset=tensor_guide", "rank_strategy.rank=3", "model.geometry=null").adapter
    assert config is not None
    adapter = Adapter(config, geometry).double()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    for layer, matrix in ((0, 0), (1, 2)):
        tensor = adapter.tensors[matrix * 2 + layer]  # each projection of each layer has a train of its own
        f = {name: value.detach().numpy() for name, value in tensor.state_dict().items()}

        def rows(blocks: Array, f: Factors = f) -> Array:
            return np.array(
                [
                    sum(f["noise"][m, n] * blocks[m, i] @ f["offset"][:, n, j] for m in range(4) for n in range(4))
                    @ f["rank"]
                    for i in range(blocks.shape[1])
                    for j in range(2)
                ]
            )

        expected = rows(f["left"]) @ rows(f["right"]).T
        assert expected.shape == (12, 8)
        np.testing.assert_allclose(adapter.dense(layer)[matrix].detach().numpy(), expected, atol=1e-10)


def fact_tk(f: Factors, layer: int, slice_: int) -> Array:
    # Delta W = s sum_t1 sum_t2 sum_t3 C[t1, t2, t3] P[:, t1] U[:, t2] V[:, t3].
    return np.einsum("abt,ia,ob,t->io", f["core"], f["d_in"], f["d_out"], f["site"][slice_ * LAYERS + layer])


def fact_tt(f: Factors, layer: int, slice_: int) -> Array:
    # Delta W[j] = s U Sigma[j] V^T.
    return f["d_in"] @ f["site"][:, slice_ * LAYERS + layer] @ f["d_out"]


def lotr(f: Factors, layer: int, slice_: int) -> Array:
    # Delta W_s = A G_s B^T, A and B shared by the queries and values of all layers.
    return f["d_in"] @ f["site"][:, slice_ * LAYERS + layer] @ f["d_out"]


def lorta(f: Factors, layer: int, slice_: int) -> Array:
    # Delta W = sum_r A[:, r] B[:, r] C_H[:, r] C_L[:, r] C_M[:, r], head by head.
    components = f["depth"][layer] * f["projection"][slice_]
    return np.einsum("ir,dr,hr,r->ihd", f["d_in"], f["d_head"], f["head"], components).reshape(D_IN, D_OUT)


def cara(f: Factors, layer: int, slice_: int) -> Array:
    # As LoRTA, with one axis for the 3 L queries, keys and values.
    components = f["site"][slice_ * LAYERS + layer]
    return np.einsum("ir,dr,hr,r->ihd", f["d_in"], f["d_head"], f["head"], components).reshape(D_IN, D_OUT)


FORMULAS: dict[str, Formula] = {"fact_tk": fact_tk, "fact_tt": fact_tt, "lotr": lotr, "lorta": lorta, "cara": cara}


@pytest.mark.parametrize("preset", FORMULAS)
def test_updates_are_those_of_the_papers_formula(preset: str) -> None:
    adapter, factors = adapter_and_factors(preset)
    for layer in range(LAYERS):
        slices = [FORMULAS[preset](factors, layer, slice_) for slice_ in range(adapter.geometry.projections)]
        for count, update in zip(adapter.geometry.slices_per_matrix, adapter.dense(layer), strict=True):
            expected = np.concatenate([slices.pop(0) for _ in range(count)], axis=1)
            np.testing.assert_allclose(update.detach().numpy(), expected, atol=1e-11)


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
        # 3 L (8 d r / b + 4 b r^2 + r^2) with blocks of b = 24 rows (our choice of TensorGuide's cores).
        ("tensor_guide", 4, 36 * (8 * 768 * 4 // 24 + 4 * 24 * 16 + 16)),
        # R (d + d_head + H + 3 L) (CaRA's tensor of the attention).
        ("cara", 32, 32 * (768 + 64 + 12 + 36)),
    ],
)
def test_counts_are_the_papers(preset: str, rank: int, count: int) -> None:
    base = "model.geometry={d_in:768,heads:12,d_head:64,layers:12,d_ff:3072}"
    run = configured(f"preset={preset}", f"rank_strategy.rank={rank}", base)
    assert run.geometries is not None and run.adapter is not None
    (geometry,) = run.geometries
    ranks = run.rank_strategy.resolve(run.tensor_mode, geometry, run.adapter.factorization)
    assert parameter_count(run.tensor_mode, geometry, ranks, run.adapter.factorization) == count


def test_a_preset_is_the_settings_that_it_picks_and_no_more() -> None:
    settings = ["tensor_mode=site", "factorization=tensor_train", "rank_strategy=isorank", "adapter.adapt=qv"]
    preset = configured("preset=lotr", "rank_strategy.rank=8")
    assert preset.digest() == configured(*settings, "rank_strategy.rank=8").digest()
    assert configured("preset=lotr", "tensor_mode=qkv_depth").tensor_mode == "qkv_depth"
