"""The recipes in conf/experiment, and the short runs in conf/debug."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.running import CONF, configured, run

EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix("")) for path in (CONF / "experiment").rglob("*.yaml")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_recipe_is_valid_and_trains_what_its_name_says(name: str) -> None:
    made = configured(f"experiment={name}")
    folder, _, last = name.rpartition("/")
    if folder == "paper":
        assert made == configured(f"dataset={last}")  # the paper's protocol is the default
    elif folder == "":
        assert made.preset == last


@pytest.mark.parametrize(("name", "rank", "alpha"), [("fact_tk", 32, 0.1), ("fact_tt", 8, 1.0), ("cara", 32, 0.1)])
def test_a_methods_recipe_has_the_hyperparameters_of_its_code(name: str, rank: int, alpha: float) -> None:
    made = configured(f"experiment={name}")
    assert made.adapter is not None
    assert (made.dataset.name, made.model.name) == ("vtab_cifar", "vit_base_in21k")
    assert (made.rank_strategy.rank, made.adapter.alpha) == (rank, alpha)
    assert (made.trainer.epochs, made.trainer.batch_size) == (100, 64)
    schedule = made.optimizer
    assert (schedule.lr, schedule.min_lr, schedule.weight_decay) == (1e-3, 1e-5, 1e-4)
    assert schedule.warmup_steps == 10 * -(-1000 // 64)  # ten epochs on 1,000 images


def test_the_recipes_of_the_released_code_have_every_switch_that_the_docs_list() -> None:
    section = (ROOT / "docs" / "design.md").read_text().partition("## Where the released code")[2].partition("\n## ")[0]
    switches = set(re.findall(r"`((?:adapter|dataset)\.[\w.]+=\w+)`", section))
    assert len(switches) == 5
    of_images = {switch for switch in switches if "normalize" in switch}
    of_texts = {switch for switch in switches if "padding" in switch or "group_by" in switch}
    for name, others in (("images", of_texts), ("texts", of_images)):
        recipe = f"experiment=released_code/{name}"
        assert configured(recipe) == configured(recipe, *(switches - others))


def test_the_command_line_wins_over_a_recipe() -> None:
    made = configured("experiment=fact_tk", "dataset=vtab/svhn", "model=vit_base_timm", "optimizer.lr=0.5")
    assert (made.dataset.name, made.model.name) == ("vtab_svhn", "vit_base_timm")
    assert (made.optimizer.lr, made.optimizer.warmup_steps, made.preset) == (0.5, 160, "fact_tk")


def test_a_fast_run_goes_through_everything_in_four_steps(tmp_path: Path) -> None:
    record = run(tmp_path, "debug=fast", "trainer.device=cpu")
    assert [entry["step"] for entry in record["metrics"]["history"]] == [2, 4]
    assert record["status"] == "completed"


def test_a_profiled_run_leaves_a_table_and_a_trace(tmp_path: Path) -> None:
    saved = run(tmp_path, "debug=profile", "trainer.max_steps=1", "dataset.train_size=40", "trainer.device=cpu")
    assert (
        saved["digest"]
        == configured(
            "trainer.epochs=1", "trainer.max_steps=1", "dataset.train_size=40", "dataset.validation=0.2"
        ).digest()
    )
    table = (tmp_path / "profile.txt").read_text()
    assert "aten::addmm" in table and "AddmmBackward0" in table
    trace = json.loads(gzip.decompress((tmp_path / "profile.json.gz").read_bytes()))
    named = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::addmm", "aten::native_layer_norm_backward"} <= named


def test_a_debug_run_shortens_any_recipe() -> None:
    made = configured("experiment=cara", "debug=fast")
    assert (made.trainer.epochs, made.dataset.train_size, made.adapter) == (
        2,
        20,
        configured("experiment=cara").adapter,
    )
