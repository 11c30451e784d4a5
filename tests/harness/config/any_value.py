"""Values of every kind for settings: of wrong types, huge, empty, not finite, nested, in any script."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(0, 10),
    st.floats(0, 1),
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 64, 0.5, 0.1, 1e-3, -1, -0.5, 1e9, 1e30, 2**31, 2**63, 10**400]),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), 5e-324, 1.8e308, -0.0]),
    st.integers(),
    st.floats(),
)

WORDS = st.sampled_from(
    [
        "qkv",
        "lora",
        "full",
        "head_only",
        "site",
        "cp",
        "tensor_train",
        "isorank",
        "explicit",
        "normal",
        "first_step",
        "none",
        "null",
        "auto",
        "cpu",
        "cuda:0",
        "meta",
        "accuracy",
        "f1",
        "pearson",
        "image",
        "text",
        "bilinear",
        "bf16",
        "timm",
        "transformers",
        "digits",
        "cola",
        "dtd",
        "vit_digits",
        "embedded",
        "train",
        "test",
        "validation",
        "imagenet",
        "last",
        "every_epoch",
        "all",
        "mlp",
        "..",
        ".",
        "/",
        "~",
        "tables",
        "a/b",
        "../a",
        "-x",
        "$HOME",
        "${seed}",
        "${nothing}",
        "???",
        "true",
        "1e3",
        "con",
        ".hidden",
        "name:",
        "[1]",
        "{a:1}",
        "aux\\b",
        "%s",
        "{}",
        "*",
        "user/name",
        "train800",
        "vtab",
        "image_folder",
        "text_files",
    ]
)

TEXTS = st.one_of(
    WORDS,
    st.text(max_size=12),
    st.sampled_from(["", " ", "\n", "a\nb", "\x00", "\ud800", "é", "名前", "🙂", "\u202e", "a" * 300, "a" * 5000]),
)

SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def _nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.one_of(WORDS, st.text(max_size=5), st.sampled_from(["name", "core", "img_size", "depth", "d_in"]))
    return st.one_of(st.lists(values, max_size=4), st.dictionaries(names, values, max_size=3))


VALUES: st.SearchStrategy[Any] = st.recursive(SCALARS, _nested, max_leaves=8)


def like(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, many of which are valid in its place.

    Args:
        value: the value of a setting.
    """
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.one_of(st.integers(1, 12), st.integers(0, 2**40)),
        float: st.one_of(st.floats(0, 1), st.floats(-10, 1e6), st.integers(0, 10)),
        str: st.one_of(WORDS, st.text("abz019._-", min_size=1, max_size=20)),
        type(None): st.one_of(st.none(), st.integers(1, 100), st.floats(0, 1), WORDS),
    }
    if isinstance(value, list):
        return st.lists(like(value[0]) if value else SCALARS, max_size=4)
    return kinds.get(type(value), VALUES)
