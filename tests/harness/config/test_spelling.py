"""Words of a command line that name what does not exist, and the nearest that does."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from tenslora.harness.config.spelling import in_quotes, misspelt, reading, wrong_file
from tests.running import CONF


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("lr=1", "lr: there is no such setting; did you mean optimizer.lr?"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: there is no such setting; did you mean optimizer.lr?"),
        ("tensor_mod=qkv", "tensor_mod: there is no such setting; did you mean tensor_mode?"),
        ("~lr", "lr: there is no such setting; did you mean optimizer.lr?"),
        ("nosuchkey=1", "nosuchkey: there is no such setting; --help lists all settings"),
        ("trainer.xyz=1", "trainer.xyz: there is no such setting; trainer has epochs, batch_size"),
        ("hydra.run.dirr=x", "hydra.run.dirr: there is no such setting; did you mean hydra.run.dir?"),
        # settings that exist only with another option of their group
        ("model=roberta_base dataset=cola model.imagesize=1", "model.imagesize: there is no such setting"),
        # options
        ("tensor_mode=qkv_dept", "tensor_mode=qkv_dept: must be one of att, att_depth"),
        ("tensor_mode=qkv_dept", "; did you mean qkv_depth?"),
        ("dataset=null", "dataset=null: must be one of cifar10, cola"),
        ("hydra/launcher=slrm", "; did you mean slurm?"),
        ("hydra/sweeper=optuna", "; another one is there once its plugin of Hydra is installed"),
        ("experiment=paper/dt", ", lotr, paper/cola, paper/dtd, paper/eurosat, "),
        ("experiment=paper/dt", "; did you mean paper/dtd?"),
        ("dataset=vtab/kity", "; did you mean vtab/kitti?"),
        ("table=base/on_digits", "table=base/on_digits: must be one of adapted_modules, core_lr"),
        # beside a sweep
        ("lr=1 seed=0,1", "lr: there is no such setting; did you mean optimizer.lr?"),
        ("seed=0,1 optimizer.learning_rate=1,2", "did you mean optimizer.lr?"),
        ("seeds=0,1", "seeds: there is no such setting; did you mean seed?"),
        ("tensor_mode=lora,qkv_dept seed=0,1", "; did you mean qkv_depth?"),
    ],
)
def test_what_does_not_exist_is_answered_with_the_nearest(words: str, line: str) -> None:
    answer = misspelt(words.split(), CONF, "sweep")
    assert answer is not None
    assert line in answer
    assert "\n" not in answer


@pytest.mark.parametrize(
    "words",
    [
        "",
        "optimizer.lr=1 seed=0,1 tensor_mode=lora,att",
        "dataset=dtd model=vit_base",
        "experiment=paper/dtd dataset=vtab/kitti hydra/launcher=gpus",
        "+anything=1",
        "no word",
    ],
)
def test_words_that_name_what_exists_are_not_at_fault(words: str) -> None:
    assert misspelt(words.split(), CONF, "sweep") is None


@pytest.mark.parametrize(
    ("option", "text", "line"),
    [
        ("preset/own", "tensor_mode: att", "must begin with the line # @package _global_, with nothing before it"),
        ("experiment/a/own", "dataset: dtd", "must begin with the line # @package _global_, with nothing before it"),
        ("dataset/own", "model: vit_base", "must begin with the line # @package _global_, with nothing before it"),
        (
            "preset/own",
            "dataset: dtd",
            "cannot choose an option of dataset, which is chosen after preset; a file in exp",
        ),
        ("experiment/own", "debug: fast", "cannot choose an option of debug, which is chosen after experiment"),
    ],
)
def test_a_file_that_chooses_what_it_cannot_is_named(option: str, text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / f"{option}.yaml"
    file.parent.mkdir(parents=True)
    first = "\n# @package _global_\n" * ("begin" not in line)
    file.write_text(f"{first.strip()}\ndefaults:\n  - override /{text}\n")
    group, _, name = option.partition("/")
    word = f"{group}={name}"
    assert misspelt([word], CONF, "config", str(tmp_path)) is None
    assert f"{name}, " in str(misspelt([f"{group}=nope"], CONF, "config", str(tmp_path)))
    with pytest.raises(HydraException) as raised, reading(CONF, str(tmp_path)):
        compose("config", [word])
    assert str(wrong_file(raised.value)).startswith(f"{option}.yaml: {line}")
    assert wrong_file(HydraException("Could not override 'x'")) is None


@pytest.mark.parametrize(
    "value", ["a (1).csv", "a,b", "it's (1).csv", 'a"b', "back\\slash#1", "[new].csv", "a=1", "range(1,3)"]
)
def test_a_value_in_quotes_is_read_as_it_was(value: str) -> None:
    (typed,) = shlex.split(in_quotes(f"dataset.root={value}") or "")
    override = OverridesParser.create().parse_override(typed)
    assert (override.key_or_group, override.value()) == ("dataset.root", value)


def test_a_value_with_quotes_of_its_own_gets_no_others() -> None:
    assert in_quotes('dataset.root="a') is None
