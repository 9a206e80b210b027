"""Names lose what they have in common, and keep what tells them apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from effcli.reports.short_names import shortened


def test_short_names_stay() -> None:
    assert shortened(["features.0", "head"], 12) == ["features.0", "head"]
    assert shortened([], 5) == []


def test_the_last_part_where_it_tells_all_apart() -> None:
    assert shortened(["model.embed_tokens"], 12) == ["embed_tokens"]
    assert shortened(["model.decoder.wte", "lm_head"], 12) == ["wte", "lm_head"]
    # A number says nothing by itself.
    assert shortened(["encoder.features.0", "classifier"], 12)[0].startswith("encod")


def test_what_all_have_in_common_goes() -> None:
    names = ["backbone.a.first.conv", "backbone.b.first.conv", "backbone.a.second.conv"]
    assert shortened(names, 12) == ["a.first", "b.first", "a.second"]


def test_the_middle_goes_and_the_names_stay_different() -> None:
    names = ["stage2.1.depthwise.conv", "stage2.1.expand.conv", "stage2.2.expand.conv", "head"]
    found = shortened(names, 12)
    assert len(set(found)) == 4 and all(len(name) <= 12 for name in found)
    assert found[3] == "head" and "\N{HORIZONTAL ELLIPSIS}" in found[0]


@given(st.lists(st.text("ab.1", min_size=1, max_size=30), max_size=8), st.integers(4, 20))
def test_never_longer_than_asked_for(names: list[str], most: int) -> None:
    found = shortened(names, most)
    assert len(found) == len(names) and all(len(name) <= most for name in found)
    assert all(a == b for a, b in zip(found, names, strict=True)) or any(len(name) > most for name in names)
