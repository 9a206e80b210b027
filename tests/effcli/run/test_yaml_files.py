"""YAML: the scalars people expect, and text that comes back as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcli.errors import RecipeError
from effcli.run import yaml_files as yamls

# Text that YAML can hold: no lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TRICKY = st.sampled_from(
    ["2:4", "1e-3", "no", "on", "010", "0x1f", "1_000", "null", "~", "true", ".5", "2024-01-01", "=", "\x85", "a\u2028"]
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("no", "no"),
        ("1e-3", 0.001),
        ("1_000", "1_000"),
        ("010", 10),
        ("0x1f", 31),
        ("-3", -3),
        ("4.", 4.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("null", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("[a, 'b, c']", ["a", "b, c"]),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = yamls.parse(text, "here")
    assert found == value
    assert type(found) is type(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | TRICKY,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | TRICKY, inner, max_size=4),
        max_leaves=12,
    )
)
def test_dump_comes_back(data: Any) -> None:
    assert yamls.parse(yamls.dump(data), "here") == data


def test_a_key_that_stands_twice_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"file.yaml, line 2: .*'a' stands twice"):
        yamls.parse("a: 1\na: 2\n", "file.yaml")


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\tx", "!!python/object:os.system {}", "a: &x [*x]", "? [a]\n: 1"]
)
def test_what_is_not_plain_yaml_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not YAML"):
        yamls.parse(text, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000, "nested too deep"),
        ("[" * 70 + "]" * 70, "nested too deep"),
        ("9" * 4301, "a number of 4301 digits"),
        ("0x" + "f" * 60, "a number of 62 digits"),
        ("!!timestamp x", "the tag !!timestamp is not read"),
        ("!!binary x", "the tag !!binary is not read"),
        ("!other x", "the tag !other is not read"),
        ("!!python/name:os.system x", "is not read"),
        ("!!bool maybe", "'maybe' is no !!bool"),
        ("!!int x", "'x' is no !!int"),
        ("!!float [1]", "!!float is not read for a list"),
        ("!!set {a}", "!!set is not read for a mapping"),
        ("!!map [a]", "!!map is not read for a list"),
        ('"\\ud800"', "half a character"),
        ('"\\UFFFFFFFF"', "not YAML"),
    ],
)
def test_what_is_not_read_is_named(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        yamls.parse(text, "here")
    assert message in caught.value.cause
    assert len(caught.value.cause) < 200


def test_tags_that_say_what_stands_there() -> None:
    text = "{a: !!str 1, b: !!int '7', c: !!seq [1], d: !!null '', e: !!float 1}"
    assert yamls.parse(text, "here") == {"a": "1", "b": 7, "c": [1], "d": None, "e": 1.0}
