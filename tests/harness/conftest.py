"""What the harness's tests share: finished runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.running import run

_SIZES = "hidden_size:24,num_hidden_layers:2,num_attention_heads:3,intermediate_size:32"
TINY_BERT = (
    "model=minilm", "model.pretrained=false", "model.geometry=null", f"model.options={{model_type:bert,{_SIZES}}}",
    "trainer.epochs=1", "optimizer.lr=0.05", "tensor_mode=depth", "rank_strategy=isorank",
)  # fmt: skip
"""A short run of a BERT of random weights."""

TINY_SWIN = (
    "model=swin_tiny", "model.pretrained=false", "model.image_size=32", "trainer.eval_batch_size=300",
    "model.geometry=[{d_in:8,heads:1,d_head:8,layers:2,d_ff:32},{d_in:16,heads:2,d_head:8,layers:2,d_ff:64}]",
    "+model.options={embed_dim:8,depths:[2,2],num_heads:[1,2],window_size:4}", "dataset.train_size=50",
    "trainer.epochs=2", "optimizer.lr=0.02",
)  # fmt: skip
"""A short run on a Swin of random weights, whose layers come in two stages."""


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on images with a timm backbone."""
    folder = tmp_path_factory.mktemp("digits_run")
    run(folder, "trainer.epochs=1", "dataset.train_size=64", "optimizer.lr=0.05", "tensor_mode=att_qkv")
    return folder


@pytest.fixture(scope="session")
def staged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on images with a Swin of random weights."""
    folder = tmp_path_factory.mktemp("staged_run")
    run(folder, *TINY_SWIN)
    return folder


@pytest.fixture(scope="session")
def sentences_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on sentences with a BERT of random weights."""
    root = tmp_path_factory.mktemp("sentences_run")
    lines = [f"x\t{number % 2}\t\tthe {('cat', 'dog', 'bird')[number % 3]} sat {number} times" for number in range(40)]
    (root / "raw").mkdir()
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        (root / "raw" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    run(root / "run", "dataset=cola", f"dataset.root={root}", *TINY_BERT)
    return root / "run"


@pytest.fixture(scope="session")
def regression_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on pairs of sentences with scores, with a BERT of random weights."""
    root = tmp_path_factory.mktemp("regression_run")
    lines = [f"a {n % 3} cat\ta {n % 5} dog\t{n % 3 - 0.25 * (n % 5)}" for n in range(60)]
    (root / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]))
    run(root / "run", "dataset=text", f"dataset.root={root / 'pairs.tsv'}", *TINY_BERT)
    return root / "run"
