"""Regular expressions of PEFT's settings, matched in limited time, against PEFT's own matching."""

from __future__ import annotations

import sys

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from tenslora.errors import TensLoRAError
from tenslora.peft.patterns import first_matches, of_paths

NAMES = ["encoder.layer.0.query", "encoder.layer.1.query", "encoder.layer.1.key", "query", "xquery", "head"]


@pytest.mark.parametrize(
    "patterns",
    [
        ["query"],
        ["layer.1.query", "query"],
        ["query", "layer.1.query"],
        [r"encoder\.layer\.[0-9]+\.(query|key)", ".*head"],
        ["^query", "xquery$", "layer.{0,3}key"],
    ],
)
def test_the_first_pattern_that_matches_is_that_of_peft(patterns: list[str]) -> None:
    expected = {name: get_pattern_key(patterns, name) for name in NAMES}
    assert first_matches(patterns, NAMES) == {name: found for name, found in expected.items() if found in patterns}


def test_a_pattern_of_paths_matches_these_and_no_longer_ones_however_many_they_are() -> None:
    paths = [f"encoder.layer.{index}.query" for index in range(48)]
    config = LoraConfig(target_modules=of_paths(paths))
    for path in (*paths, f"memory.{paths[0]}", "encoder.layer.48.query", "encoder-layer.0.query"):
        assert bool(check_target_module_exists(config, path)) == (path in paths)
    assert first_matches([of_paths(paths)], paths, "{}").keys() == set(paths)


@pytest.mark.parametrize("pattern", ["(a+)+$b", "(a|a)*b", "a*" * 30 + "b"])
def test_a_pattern_that_would_take_hours_is_refused(pattern: str) -> None:
    with pytest.raises(TensLoRAError, match=r"matching the names of the modules takes more than 0\.2 seconds"):
        first_matches([pattern], ["a" * 99], seconds=0.2)


@pytest.mark.parametrize("pattern", ["(", "*", "a{99999999999}", "(" * 999, "\ud800("])
def test_what_is_no_regular_expression_is_refused_in_one_line(pattern: str) -> None:
    with pytest.raises(TensLoRAError, match="not a regular expression") as caught:
        first_matches(["query", pattern], NAMES)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("program", ["", None, "/nowhere/python", "/bin/false", "/bin/echo"])
def test_patterns_are_matched_where_no_python_can_be_started(
    program: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    assert first_matches(["(que|ke)ry"], NAMES[:3]) == dict.fromkeys(NAMES[:2], "(que|ke)ry")
    with pytest.raises(TensLoRAError, match=r'^\["\("\]: not a regular expression'):
        first_matches(["("], NAMES)
