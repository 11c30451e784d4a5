"""The jobs of a sweep and their settings, which are those that Hydra composes for each job alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import pytest
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tenslora.errors import TensLoRAError
from tenslora.harness.config import register_resolvers, validate
from tenslora.harness.sweeping.composing import Composer, words_of_jobs
from tests.running import CONF

TABLES = sorted(path.stem for path in (CONF / "table").glob("*.yaml"))


@pytest.fixture(scope="module")
def loader() -> Iterator[ConfigLoader]:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture(scope="module")
def config(loader: ConfigLoader) -> DictConfig:
    """The config of a sweep without the settings that vary."""
    return loader.load_configuration("sweep", [], RunMode.MULTIRUN)


def container(config: DictConfig) -> Any:
    return OmegaConf.to_container(
        OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("hydra", "seed")])
    )


@pytest.mark.parametrize("table", TABLES)
def test_jobs_of_every_table_are_composed_as_by_hydra(table: str, loader: ConfigLoader, config: DictConfig) -> None:
    params = OmegaConf.load(CONF / "table" / f"{table}.yaml").hydra.sweeper.params
    jobs = list(words_of_jobs(loader, [f"table={table}", *(f"{key}={value}" for key, value in params.items())]))
    composer = Composer(loader, config)
    if hypothesis.settings.get_current_profile_name() != "large":  # Hydra would take minutes for all of them
        composer.config(jobs[0])
        jobs = jobs[-1:]
    for words in jobs:
        by_hydra = loader.load_sweep_config(config, list(words))
        assert container(composer.config(words)) == container(by_hydra), words
        assert composer.run(words) == validate(by_hydra), words


@pytest.mark.parametrize(
    "words",
    [
        # options that only fill their groups, and options that do more
        ["tensor_mode=qkv,head_only,lora", "rank_strategy=isorank,isoparameters"],
        ["preset=lorta,none", "rank_strategy=isorank"],
        # values of settings that an option brings
        ["rank_strategy=isorank,isoparameters", "rank_strategy.rank=2,8"],
        ["model=minilm,roberta_base", "dataset=cola", "optimizer.betas=[0.9,0.99]"],
        ["dataset=cola,mrpc", "model=minilm", "model.checkpoint=x", "dataset.root=y,z", "dataset.train_size=8"],
        ["dataset=dtd,digits", "dataset.transform.flip=false,true", "trainer.batch_size=8", "table.name=other"],
        # overrides that are no plain values
        ["~dataset.transform", "tensor_mode=qkv,lora"],
        ["trainer={epochs:3}", "trainer.epochs=1,2"],
        # interpolations
        ["dataset.root=x${seed}", "seed=0,1"],
        ["model.image_size=null,8"],
        # a list of options
        ["logger=[csv,tensorboard]", "seed=0,1"],
    ],
)
def test_jobs_of_any_kind_are_composed_as_by_hydra(words: list[str], loader: ConfigLoader, config: DictConfig) -> None:
    composer = Composer(loader, config)
    for job in words_of_jobs(loader, words):
        by_hydra = loader.load_sweep_config(config, list(job))
        assert container(composer.config(job)) == container(by_hydra), job
        with contextlib.suppress(TensLoRAError):
            assert composer.run(job) == validate(by_hydra), job


def composed_alone(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A list that grows by the words of each config that Hydra composes."""
    composed, alone = [], Composer.alone

    def noted(self: Composer, words: Sequence[str]) -> DictConfig:
        composed.append(tuple(words))
        return alone(self, words)

    monkeypatch.setattr(Composer, "alone", noted)
    return composed


def test_jobs_that_differ_in_values_or_in_plain_options_are_composed_once(
    loader: ConfigLoader, config: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    composer = Composer(loader, config)
    composed = composed_alone(monkeypatch)
    words = ["tensor_mode=qkv,lora,depth", "rank_strategy=isorank,isoparameters", "seed=0,1", "optimizer.lr=1,2"]
    runs = [composer.run(job) for job in words_of_jobs(loader, words)]
    assert len({run.digest() for run in runs}) == 2 * 2 * 5  # of 24, because lora is the same under both strategies
    assert composed == [("tensor_mode=qkv", "rank_strategy=isorank")]


def test_settings_of_a_chosen_option_do_not_keep_jobs_from_being_composed_once(
    loader: ConfigLoader, config: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    composer = Composer(loader, config)
    composed = composed_alone(monkeypatch)
    words = ["table=digits", "table.name=other", "dataset=dtd", "dataset.root=x", "tensor_mode=qkv,lora", "seed=0,1"]
    for job in words_of_jobs(loader, words):
        composer.run(job)
        assert composer.config(job).table.name == "other"
    assert composed == [("table=digits", "dataset=dtd", "tensor_mode=qkv")]


@pytest.mark.parametrize("word", ["seed=1,-1", "trainer.epochs=0", "rank_strategy.rank=65,3", "dataset.root=${no}"])
def test_a_wrong_setting_of_a_job_is_found(word: str, loader: ConfigLoader, config: DictConfig) -> None:
    composer = Composer(loader, config)
    with pytest.raises(TensLoRAError, match=rf"^{word.partition('=')[0]}(=|: )"):
        for job in words_of_jobs(loader, [word]):
            composer.run(job)


def test_a_job_is_a_combination_of_the_values(loader: ConfigLoader) -> None:
    words = ["a=1,2", "b=x", "a=3,4", "c=[1,2],null"]
    jobs = [("a=3", "b=x", "c=[1,2]"), ("a=3", "b=x", "c=null"), ("a=4", "b=x", "c=[1,2]"), ("a=4", "b=x", "c=null")]
    assert list(words_of_jobs(loader, words)) == jobs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=range(0)"], "seed=range(0): must be at least one value"),
        (["seed=range(0,4,0)"], "seed=range(0,4,0): range() arg 3 must not be zero"),
        (["seed=range(1000000000000)"], "seed=range(1000000000000): must be at most 10,000 values, because each is a "),
        (["seed=range(101)", "x=range(100)"], "x: with all its values the sweep has more than 10,000 jobs; divide it"),
        (["optimizer.lr=interval(0,1)"], "optimizer.lr=interval(0,1): must be a list of values or a range"),
    ],
)
def test_a_sweep_has_at_least_one_job_and_not_too_many(words: list[str], message: str, loader: ConfigLoader) -> None:
    with pytest.raises(TensLoRAError) as caught:
        words_of_jobs(loader, words)
    assert str(caught.value).startswith(message)
