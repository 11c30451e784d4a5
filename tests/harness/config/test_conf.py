"""What the files in conf/ say, and which of two files has the last word."""

from __future__ import annotations

from itertools import permutations

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tenslora.harness.config import ImageDatasetConfig, TextDatasetConfig
from tests.running import CONF, composed, configured


@pytest.mark.parametrize(
    ("dataset", "model", "kind"),
    [
        ("digits", "vit_digits", ImageDatasetConfig),
        ("dtd", "vit_base", ImageDatasetConfig),
        ("cola", "roberta_base", TextDatasetConfig),
    ],
)
def test_a_dataset_picks_its_model(dataset: str, model: str, kind: type) -> None:
    run = configured(f"dataset={dataset}")
    assert (run.dataset.name, run.model.name) == (dataset, model)
    assert isinstance(run.dataset, kind)


@pytest.mark.parametrize(("dataset", "model"), [("dtd", "vit_small_timm"), ("cola", "minilm")])
def test_a_model_on_the_command_line_wins_in_either_order(dataset: str, model: str) -> None:
    for words in permutations([f"dataset={dataset}", f"model={model}"]):
        assert configured(*words).model.name == model


@pytest.mark.parametrize("file", ["run", "sweep"])
def test_a_run_that_quantises_nothing_hears_nothing_of_bitsandbytes(file: str) -> None:
    logging_of = OmegaConf.load(CONF / "hydra" / "job_logging" / f"{file}.yaml")
    assert logging_of.loggers.bitsandbytes.level == "ERROR"


def test_the_papers_protocol_is_the_default() -> None:
    run = configured("dataset=dtd")
    assert run.adapter is not None
    assert (run.optimizer.lr, run.optimizer.min_lr, run.adapter.alpha) == (1e-3, 1e-6, 4.0)
    assert (run.dataset.train_size, run.trainer.epochs, run.trainer.batch_size) == (1000, 10, 64)
    eurosat = configured("dataset=eurosat")
    assert isinstance(eurosat.dataset, ImageDatasetConfig)
    assert eurosat.dataset.train_fraction == 0.8
    assert eurosat.model.image_size and eurosat.dataset.transform.crop_ratio
    assert round(eurosat.model.image_size / eurosat.dataset.transform.crop_ratio) == 300


@pytest.mark.parametrize(
    ("option", "value", "setting"),
    [("dataset=digits", 32, "trainer.batch_size"), ("tensor_mode=full", 5e-5, "optimizer.lr")],
)
def test_an_option_brings_a_setting_of_another_group_unless_the_command_line_has_it(
    option: str, value: float, setting: str
) -> None:
    group, name = setting.split(".")
    assert getattr(getattr(configured(option), group), name) == value
    assert getattr(getattr(configured(f"{setting}=2", "optimizer.min_lr=0", option), group), name) == 2


def test_the_image_size_reaches_the_architecture() -> None:
    assert configured("dataset=dtd", "model=vit_small_timm", "model.image_size=112").model.options == {"img_size": 112}


@pytest.mark.parametrize("table", sorted(path.stem for path in (CONF / "table").glob("*.yaml")))
def test_every_value_that_a_table_varies_is_valid(table: str) -> None:
    config = composed(f"table={table}", config_name="sweep", with_hydra=True)
    assert config.table.name == table
    params = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
    parsed = OverridesParser.create().parse_overrides(params)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    seen: set[str] = set()
    for words in jobs:
        if not seen.issuperset(words):
            seen.update(words)
            # The name is all that these options hold; to compose each of them would take Hydra seconds.
            configured(*(word.replace("tensor_mode=", "tensor_mode.name=") for word in words))
