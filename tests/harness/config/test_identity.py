"""What makes two runs one: digest and folder, also of runs that an earlier version carried out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tenslora.harness.config import REFERENCES, LoggerConfig, TuneConfig, validate
from tenslora.harness.config.identity import identity, with_defaults
from tests.running import CONF, composed, configured

EARLIER_OUTPUTS = Path(__file__).parents[1] / "earlier_outputs"
EARLIER_RECORDS = sorted(EARLIER_OUTPUTS.rglob("result.json"))
EARLIER_FOLDERS: dict[str, str] = yaml.safe_load((Path(__file__).parent / "earlier_folders.yaml").read_text())


def every_option() -> list[str]:
    """Command lines in which every dataset, model, construction, preset, strategy and factorization occurs."""
    lines = []
    for group in ("dataset", "model", "tensor_mode", "preset", "rank_strategy", "factorization", "logger"):
        for option in sorted(path.stem for path in (CONF / group).glob("*.yaml")):
            words = [f"{group}={option}"]
            if option == "explicit":
                words.append("rank_strategy.ranks=[8,8,3,4]")
            if (
                group == "dataset"
                and yaml.safe_load((CONF / group / f"{option}.yaml").read_text())[group]["name"] is None
            ):
                words += ["dataset.root=my/pets", "dataset.name=pets"]
            if group == "model":
                settings = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
                words.insert(0, f"dataset={'cola' if settings['modality'] == 'text' else 'dtd'}")
                if settings["name"] is None:  # a generic model
                    words += ["model.name=tiny", f"model.{'architecture' if option == 'timm' else 'checkpoint'}=tiny"]
            lines.append(" ".join(words))
    return lines


@pytest.mark.parametrize("words", every_option())
def test_settings_are_what_was_composed_and_make_the_same_run_again(words: str) -> None:
    config = composed(*words.split())
    run = validate(config)
    settings = run.settings()
    assert validate(settings) == run
    assert validate(json.loads(json.dumps(settings))) == run

    expected: Any = OmegaConf.to_container(config, resolve=True)
    if run.tensor_mode in REFERENCES:
        del expected["adapter"], expected["factorization"]
    assert settings.pop("logger").items() >= expected.pop("logger").items()
    assert settings == expected


@pytest.mark.parametrize("words", EARLIER_FOLDERS)
def test_a_run_has_the_folder_that_the_earlier_version_gave_it(words: str) -> None:
    run = configured(*words.split())
    assert run.folder() == EARLIER_FOLDERS[words]
    assert run.folder().endswith(run.digest())


@pytest.mark.parametrize("path", EARLIER_RECORDS, ids=lambda path: path.parent.name)
def test_a_record_of_the_earlier_version_is_of_the_run_that_its_settings_describe(path: Path) -> None:
    record = json.loads(path.read_text())
    run = validate(record["config"])
    assert run.digest() == record["digest"]
    assert run.identity() == record["identity"]
    assert run.folder() == str(path.parent.relative_to(EARLIER_OUTPUTS))


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ({"name": "none"}, LoggerConfig()),
        ({"name": "none", "mode": "disabled", "project": "tenslora", "tags": []}, LoggerConfig()),
        ({"name": "wandb", "mode": "offline", "tags": ["a"]}, LoggerConfig(wandb=True, mode="offline", tags=("a",))),
    ],
)
def test_a_record_with_one_logger_by_name_is_read(earlier: dict[str, Any], today: LoggerConfig) -> None:
    settings = {**configured("seed=1").settings(), "logger": earlier}
    assert validate(settings) == replace(configured("seed=1"), logger=today)


def test_a_tuned_run_is_the_run_of_these_settings_and_its_record_says_how_it_was_tuned() -> None:
    tuned = replace(configured(), tuned=TuneConfig("optimizer.lr", (0.001, 0.004), (7, 8), 0.2))
    assert (tuned.digest(), tuned.identity()) == (configured().digest(), configured().identity())
    read = validate(json.loads(json.dumps(tuned.settings())))
    assert read == tuned != configured()


@pytest.mark.parametrize(("every", "today"), [(1, "every_epoch"), (None, "last"), (5, 5)])
def test_a_record_with_the_earlier_name_of_trainer_evaluate_is_read(every: int | None, today: str | int) -> None:
    settings = configured(f"trainer.evaluate={today}").settings()
    assert settings["trainer"].pop("evaluate") == today
    settings["trainer"]["score_every"] = every
    run = validate(settings)
    assert run == configured(f"trainer.evaluate={today}")
    assert run.identity()["trainer"].get("score_every", 1) == every


def test_no_record_of_the_earlier_version_is_lost() -> None:
    assert len(EARLIER_RECORDS) == 10


@pytest.mark.parametrize(
    "same",
    [
        "logger=wandb logger.project=elsewhere",
        "logger=[csv,tensorboard,wandb]",
        "resume=true",
        "overwrite=true",
        "trainer.device=cpu trainer.threads=3 trainer.workers=3 trainer.compile=true trainer.eval_batch_size=7",
        "adapter.alpha=4 optimizer.weight_decay=1e-2 model.std=[0.50]",  # the defaults, written in another way
        "optimizer.lr=0.001 seed=0",
    ],
)
def test_what_cannot_change_a_result_does_not_change_the_folder(same: str) -> None:
    assert configured(*same.split()).folder() == configured().folder()


@pytest.mark.parametrize(
    "different",
    [
        "seed=1",
        "warm_start=elsewhere",
        "tensor_mode=att",
        "rank_strategy=isorank",
        "rank_strategy.rank=8",
        "rank_strategy.scale=2",
        "factorization=cp",
        "adapter.alpha=2",
        "adapter.head_layout=interleaved",
        "optimizer.lr=2e-3",
        "optimizer.factor_weight_decay.core=0",
        "trainer.epochs=13",
        "trainer.precision=bf16",
        "dataset.train_size=100",
        "dataset.validation=0.2",
        "dataset.transform.normalize=false",
        "model.checkpoint=elsewhere.safetensors",
    ],
)
def test_what_can_change_a_result_changes_the_digest(different: str) -> None:
    assert configured(different).digest() != configured().digest()


@pytest.mark.parametrize("mode", REFERENCES)
@pytest.mark.parametrize("ignored", ["rank_strategy=isorank", "adapter.alpha=2", "factorization=cp", "warm_start=x"])
def test_a_run_without_an_adapter_ignores_the_settings_of_an_adapter(mode: str, ignored: str) -> None:
    plain, other = configured(f"tensor_mode={mode}"), configured(f"tensor_mode={mode}", ignored)
    assert plain.folder() == other.folder()
    assert plain.digest() != configured(f"tensor_mode={mode}", ignored, "optimizer.lr=0.1").digest()


def test_lora_at_a_rank_is_one_run_under_both_strategies_of_the_paper() -> None:
    isoparameters, isorank, rank_8, explicit = (
        configured("tensor_mode=lora", *words.split())
        for words in (
            "",
            "rank_strategy=isorank",
            "rank_strategy.rank=8",
            "rank_strategy=explicit rank_strategy.ranks=[8]",
        )
    )
    assert isoparameters.folder() == isorank.folder()
    assert len({isorank.digest(), rank_8.digest(), explicit.digest()}) == 3


def test_hydra_writes_where_the_folder_says() -> None:
    words = ["dataset=dtd", "tensor_mode=att", "rank_strategy=isorank", "seed=2"]
    config = composed(*words)
    hydra = composed(*words, with_hydra=True).hydra
    assert hydra.run.dir == f"outputs/{validate(config).folder()}"
    assert hydra.sweep.subdir == validate(config).folder()


def test_hydra_gets_a_folder_for_a_job_of_a_multirun_that_is_not_valid() -> None:
    config = composed("optimizer.lr=-1", with_hydra=True)
    assert config.hydra.sweep.subdir == "invalid"


def test_identities_are_compared_with_the_defaults_that_they_leave_out() -> None:
    lora, att = (
        with_defaults(identity(configured(f"tensor_mode={mode}", "rank_strategy=isorank"))) for mode in ("lora", "att")
    )
    assert "scaling" not in lora["adapter"]
    assert att["adapter"]["scaling"] == "direct"
    assert (lora["rank_schedule"], att["rank_schedule"]) == ({"name": "fixed"},) * 2
    assert (lora["dataset"], lora["model"], lora["trainer"]) == (att["dataset"], att["model"], att["trainer"])
    assert lora["model"]["quantization"] is lora["dataset"]["validation"] is None
