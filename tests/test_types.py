"""What a type checker says of a user's program. mypy reads this file, and reports a comment that ignores nothing."""

# mypy: warn-unused-ignores

import pytest

from tenslora.peft import TensLoraConfig


def test_misspelt_names_are_mistakes() -> None:
    with pytest.raises(ImportError):
        from tenslora import atach  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(ImportError):
        from tenslora.peft import TensLoraConfg  # type: ignore[attr-defined]  # noqa: F401


def test_tuples_stand_for_lists_in_peft() -> None:
    config = TensLoraConfig(target_modules=("query", "value"), ranks=(4, 4, 2, 2), modules_to_save=("classifier",))
    assert (config.ranks, config.modules_to_save) == ([4, 4, 2, 2], ["classifier"])
