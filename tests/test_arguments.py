"""Arguments of a wrong kind: every public function takes any of them, or refuses it in one line."""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tenslora
from tenslora import Adapter, AdapterConfig, Geometry, RankStrategy, StagedAdapter, TensLoRAError
from tenslora.decomposition import approximate, spectra
from tenslora.harness.analyse import updates_in
from tests.plain_transformer import PlainTransformer

GEOMETRY = Geometry(d_in=16, heads=2, d_head=8, layers=2)


def odd_values() -> Iterator[Any]:
    """Values of many types, none of which is right everywhere."""
    yield from (None, True, False, 0, 1, -1, 2**70, 0.5, float("nan"), float("inf"), 1j)
    yield from ("", "x", "a\0b", "\ud800", b"x", bytearray(b"x"), memoryview(b"x"), np.str_("x"), "qkv_depth")
    yield from ([], [1], [None], ["x"], [[1]], (), (0,), {}, {"a": 1}, set(), {1}, range(3), iter([1]), slice(1))
    yield from (object(), object, int, nn.Linear, len, io, ..., NotImplemented, ValueError("x"), io.StringIO())
    yield from (np.zeros(2), np.array(3), np.float32(1), np.int64(2), decimal.Decimal(1), fractions.Fraction(1, 2))
    yield from (torch.zeros(2), torch.zeros(()), nn.Parameter(torch.ones(3, 3)), torch.float32, torch.device("meta"))
    yield from (nn.Linear(3, 3), nn.ModuleList(), nn.Module(), nn.Identity(), Path("."), Path("nowhere/x"))
    yield from (AdapterConfig(), AdapterConfig, RankStrategy(), GEOMETRY, Adapter(AdapterConfig(), GEOMETRY))


def adapted() -> nn.Module:
    model = PlainTransformer()
    tenslora.attach(model, AdapterConfig("qkv_depth"))
    return model


def merged() -> nn.Module:
    model = adapted()
    tenslora.merge(model)
    return model


def updated() -> nn.Module:
    module = nn.Conv2d(4, 4, 3)
    tenslora.adapt_tensor(module, "weight", ranks=2)
    return module


def disabled_once(**arguments: Any) -> None:
    with tenslora.disabled(**arguments):
        pass


def defaults(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def save_adapter(**arguments: Any) -> None:
    Adapter(AdapterConfig(), GEOMETRY).save(**arguments)


def products(**arguments: Any) -> None:
    Adapter(AdapterConfig(), GEOMETRY).products(**arguments)


def resize(**arguments: Any) -> None:
    Adapter(AdapterConfig(), GEOMETRY).resize(**arguments)


# Each public function, and the arguments of a call that succeeds.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "attach": (tenslora.attach, lambda: {"model": PlainTransformer(), "adapter": AdapterConfig(), "train": ["head"]}),
    "detach": (tenslora.detach, lambda: {"model": adapted()}),
    "disabled": (disabled_once, lambda: {"model": adapted()}),
    "merge": (tenslora.merge, lambda: {"model": adapted()}),
    "unmerge": (tenslora.unmerge, lambda: {"model": merged()}),
    "save_pretrained": (tenslora.save_pretrained, lambda: {"model": adapted(), "folder": "saved"}),
    "load": (tenslora.load, lambda: {"model": PlainTransformer(), "source": "adapter", "revision": None}),
    "push_to_hub": (tenslora.push_to_hub, lambda: {"model": adapted(), "repo_id": "some/one", "private": False}),
    "adapt_tensor": (
        tenslora.adapt_tensor,
        lambda: {
            "module": nn.Conv2d(4, 4, 3),
            "name": "weight",
            "ranks": 2,
            "factorization": "tucker",
            "alpha": 1.0,
            "scaling": "direct",
            "seed": 0,
        },
    ),
    "detach_tensors": (tenslora.detach_tensors, lambda: {"model": updated()}),
    "merge_tensors": (tenslora.merge_tensors, lambda: {"model": updated()}),
    "unmerge_tensors": (tenslora.unmerge_tensors, lambda: {"model": updated()}),
    "save_tensors": (tenslora.save_tensors, lambda: {"model": updated(), "path": "saved.safetensors"}),
    "load_tensors": (tenslora.load_tensors, lambda: {"model": nn.Conv2d(4, 4, 3), "path": "tensors.safetensors"}),
    "Adapter": (
        Adapter,
        lambda: {"config": AdapterConfig(), "geometry": GEOMETRY, "ranks": None, "first_step": None, "stage": 0},
    ),
    "Adapter.save": (save_adapter, lambda: {"path": "saved.safetensors"}),
    "Adapter.products": (products, lambda: {"layers": range(2), "matrices": None}),
    "Adapter.resize": (resize, lambda: {"ranks": (4, 4, 3, 2)}),
    "StagedAdapter": (StagedAdapter, lambda: {"stages": [Adapter(AdapterConfig(), GEOMETRY)]}),
    "AdapterConfig": (AdapterConfig, lambda: defaults(AdapterConfig())),
    "RankStrategy": (RankStrategy, lambda: defaults(RankStrategy())),
    "Geometry": (Geometry, lambda: defaults(GEOMETRY)),
    # These are in no list, and the pages show them.
    "decomposition.approximate": (
        approximate,
        lambda: {"adapter": Adapter(AdapterConfig(), GEOMETRY), "updates": [[[torch.ones(16, 16)] * 3] * 2]},
    ),
    "decomposition.spectra": (
        spectra,
        lambda: {"updates": [[torch.ones(16, 16)] * 3] * 2, "geometry": GEOMETRY, "head_layout": "aligned"},
    ),
    "analyse.updates_in": (updates_in, lambda: {"folder": "adapter", "model": None, "adapt": "qkv"}),
}


def test_every_public_function_is_among_the_calls() -> None:
    assert set(tenslora.__all__) == {name for name in CALLS if "." not in name} | {"TensLoRAError"}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_a_wrong_kind_is_taken_or_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tenslora.pretrained.upload", lambda *_, **__: "")  # nothing is sent to the hub
    tenslora.save_pretrained(adapted(), "adapter")
    tenslora.save_tensors(updated(), "tensors.safetensors")
    function, arguments = CALLS[name]
    function(**arguments())
    for argument in arguments():
        for value in odd_values():
            try:
                function(**arguments() | {argument: value})
            except TensLoRAError as error:
                assert "\n" not in str(error)
            except Exception as error:
                pytest.fail(f"{name}({argument}={value!r}): {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tenslora.attach(None, AdapterConfig()), "model: must be of type Module, and is None"),  # type: ignore[arg-type]
        (
            lambda: tenslora.attach(PlainTransformer(), "qkv_depth"),  # type: ignore[arg-type]
            "adapter: must be of type AdapterConfig or Adapter or StagedAdapter, and is of type str",
        ),
        (
            lambda: tenslora.attach(PlainTransformer(), AdapterConfig(), train=[1]),  # type: ignore[list-item]
            "a name in train: must be of type str, and is of type int",
        ),
        (
            lambda: tenslora.save_pretrained(adapted(), 3),  # type: ignore[arg-type]
            "folder: must be text or a Path, and is of type int",
        ),
        (
            lambda: approximate(
                Adapter(AdapterConfig(), GEOMETRY), [[[torch.ones(16, 16, dtype=torch.complex64)] * 3] * 2]
            ),
            "updates[0][0]: must be dense tensors of floating-point numbers",
        ),
        (
            lambda: spectra([[torch.ones(16, 16)] * 3, None], GEOMETRY),  # type: ignore[list-item]
            "updates[1]: must be of type Sequence, and is None",
        ),
        (
            lambda: tenslora.save_pretrained(adapted(), "s3://bucket/run 1"),
            "folder=s3://bucket/run 1: must be a path on disk, not an address",
        ),
        (lambda: Adapter(AdapterConfig(), GEOMETRY, ranks=(0,)), r"ranks=[0]: must be 4 whole numbers from 1 up"),
        (lambda: StagedAdapter([]), "stages=[]: must hold at least one adapter"),
        (
            lambda: StagedAdapter([Adapter(AdapterConfig(alpha=alpha), GEOMETRY) for alpha in (4.0, 1.0)]),
            "stages: alpha=1.0 in stage 1: must be 4.0, as in stage 0",
        ),
    ],
)
def test_the_line_names_the_argument_and_its_types(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TensLoRAError) as raised:
        call()
    assert str(raised.value) == message


def test_a_revision_of_a_folder_on_disk_is_refused(tmp_path: Path) -> None:
    tenslora.save_pretrained(adapted(), tmp_path)
    with pytest.raises(TensLoRAError, match=r"^revision=v1: .* is on disk, where there is only one; leave it out$"):
        tenslora.load(PlainTransformer(), tmp_path, revision="v1")
