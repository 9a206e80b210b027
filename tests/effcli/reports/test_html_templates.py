"""Whatever a report holds, its page holds it as text: every field, in every section."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import pytest
from markupsafe import Markup
from pages import checked
from vision_report import vision_report

from effcli.reports import html
from effcli.reports.escaping import terminal
from effcli.reports.html_templates import _ENVIRONMENT, render
from effcli.reports.report import Continuation, Exported, Report, Training

EVIL = "</style></script><script>alert('x')</script>\"&\x1b[31m\u202e\x00{{ 7 * 7 }}"
# Fields whose values are checked, so that no such text can stand in them.
_FIXED = {"status", "layout", "way", "unit", "measure", "schema_version"}


def corrupted(value: Any, key: str = "") -> Any:
    """The data with `EVIL` in place of every text and every key that a user chose."""
    if isinstance(value, str) and key not in _FIXED:
        return EVIL
    if isinstance(value, list | tuple):
        return [corrupted(each, key) for each in value]
    if isinstance(value, dict):
        free = key in {"options", "recipe", "given", "software", "notes"}
        return {EVIL if free else name: corrupted(each, name) for name, each in value.items()}
    return value


@pytest.mark.parametrize("vision", [False, True])
def test_no_field_leaves_its_place(vision: bool, make_report: Callable[..., Report]) -> None:
    report = vision_report() if vision else make_report(blocks=2)
    training = Training(steps=2, curve=((1, 0.5),), errors=((1, 0.6),), kept=1, measured="loss")
    stages = tuple(
        stage.model_copy(
            update={
                "continuations": (Continuation(prompt="a", text=f"b {k}"),),
                "training": training if k else None,
                "remarks": ("a remark on layer_1", "a remark on layer_2"),
            }
        )
        for k, stage in enumerate(report.stages)
    )
    exports = (Exported(target="onnx", nbytes=9, checked="ran", remarks=("r",)),)
    recipe = {"evaluate": {"perplexity": "a.txt", "choices": "b.jsonl", "images": "c.npz"}}
    report = report.model_copy(update={"stages": stages, "exports": exports, "given": recipe, "recipe": recipe})
    evil = Report.model_validate(corrupted(report.model_dump(mode="json")))
    evil = evil.model_copy(update={"recipe": {"evaluate": {key: EVIL for key in recipe["evaluate"]}}})
    page = html.render(evil)
    assert terminal(page, lines=True) == page
    assert page.count("<script>") == page.count("</script>") == page.count("</style>") == 1
    found = checked(page)
    text = "".join(found.text)
    assert text.count("{{ 7 * 7 }}") > 50 and "49" not in [part.strip() for part in found.text]
    assert r"\x1b[31m\u202e\x00" in text
    assert {key for key, _ in found.attributes if key.startswith("on")} == set()


def test_a_template_shows_nothing_that_was_not_given() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("latencies.html.j2")


@pytest.mark.parametrize("source", ["{{ x }}", "<a b='{{ x }}'>", "{% for y in [x] %}{{ y }}{% endfor %}"])
def test_everything_shown_is_escaped(source: str) -> None:
    shown = _ENVIRONMENT.from_string(source).render(x="<b>'\"&\x1b\u2028")
    assert "<b>" not in shown and "\x1b" not in shown and "\u2028" not in shown
    assert "&lt;b&gt;&#x27;&quot;&amp;\\x1b\\u2028" in shown
    assert "<b>" in _ENVIRONMENT.from_string(source).render(x=Markup("<b>"))
