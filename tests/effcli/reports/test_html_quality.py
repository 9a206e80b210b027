"""A loss is marked as large as it is where it is more than chance; checkpoints stand by size and quality."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import checked
from vision_report import vision_report

from effcli.reports import html
from effcli.reports.html_quality import change_stderr, data_names, loss, plots, unmeasured_searches
from effcli.reports.report import Classification, Quality, Report, Stage
from effcli.reports.sensitivity import Point, Search, Sensitivity
from effcli.reports.svg_quality import Mark, quality_plot


def stage(name: str, nbytes: int = 100, **quality: object) -> Stage:
    return Stage(name=name, nbytes=nbytes, weights=9, bits_per_weight=8, quality=Quality.model_validate(quality))


def report_of(*stages: Stage, **keys: object) -> Report:
    return Report.model_validate(
        {"effcli_version": "1", "model": "m", "output": None, "machine": "", "stages": stages, **keys}
    )


def perplexities(before: float, after: float, **keys: object) -> int:
    found = loss("perplexity", stage("awq", perplexity=after, **keys), stage("input", perplexity=before))
    assert found is not None
    return found.level


def test_levels_of_perplexity() -> None:
    assert [perplexities(20, after) for after in (19.5, 20, 20.2, 21, 25, math.inf, math.nan)] == [0, 0, 1, 2, 3, 3, 3]


def test_a_loss_within_chance_is_none() -> None:
    before = stage("input", perplexity=math.exp(2.0), losses=[1.0, 2.0, 3.0])
    # Every window loses the same: the spread of the windows themselves does not hide it.
    sure = stage("awq", perplexity=math.exp(2.03), losses=[1.03, 2.03, 3.03])
    unsure = stage("awq", perplexity=math.exp(2.03), losses=[1.23, 2.03, 2.83])
    found, other = loss("perplexity", sure, before), loss("perplexity", unsure, before)
    assert found is not None and found.level == 2 and found.stderr == "±0.0%"
    assert other is not None and other.level == 0 and other.stderr == "±11.9%"


def test_the_error_of_a_change_by_hand() -> None:
    one, two = Quality(losses=(1.0, 2.0)), Quality(losses=(1.1, 2.3))
    # Changes of 0.1 and 0.3: mean 0.2, deviation 0.1 √2, error of the mean 0.1.
    assert change_stderr(one, two) == pytest.approx(0.1 * math.exp(0.2))
    for other in (Quality(), Quality(losses=(1.0, 2.0, 3.0)), Quality(losses=(math.inf, 1.0))):
        assert change_stderr(one, other) is None
    assert change_stderr(one, Quality(losses=(1000.0, 2000.0))) is None


def test_accuracy_and_agreement() -> None:
    before = stage("input", accuracy=0.8, classification=Classification(images=9, top1=0.8))
    for key, after in (
        ("accuracy", stage("awq", accuracy=0.7, accuracy_stderr=0.01)),
        ("top1", stage("awq", classification=Classification(images=9, top1=0.7, top1_stderr=0.01))),
    ):
        found = loss(key, after, before)
        assert found is not None and found.level == 3
    within = loss("accuracy", stage("awq", accuracy=0.7, accuracy_stderr=0.06), before)
    assert within is not None and within.level == 0
    agreeing = loss("agreement", stage("awq", classification=Classification(images=9, agreement=0.98)), before)
    assert agreeing is not None and agreeing.level == 1
    assert loss("accuracy", before, before) is None and loss("size", within and before, before) is None


def test_the_page_colours_what_was_lost(make_report: Callable[..., Report]) -> None:
    root = checked(html.render(make_report())).root
    rows = root.one("table", "stages").one("tbody").all("tr")
    notes = [{name for small in row.all("small") for name in small.classes} for row in rows]
    assert not notes[0] and "lost3" in notes[1] and "lost3" in notes[2]
    assert [each.text for each in root.one("p", "levels").all("span")] == [
        " ".join(words) if isinstance(words, tuple) else words
        for words in ("no loss beyond chance", "small loss", "clear loss", "large loss")
    ]
    # The tiles say the same as the last row.
    assert {"lost3", "lost1"} & {name for each in root.one("dl", "tiles").all("dd") for name in each.classes}


def test_the_benchmark_stands_at_its_figure(make_report: Callable[..., Report]) -> None:
    report = make_report()
    evaluate = {"perplexity": "texts/test.txt", "choices": ["qa/arc_easy.jsonl", "piqa.jsonl"], "images": True}
    report = report.model_copy(update={"recipe": {**report.recipe, "evaluate": evaluate}})
    assert data_names(report) == {"perplexity": "test.txt", "accuracy": "arc_easy.jsonl, piqa.jsonl"}
    root = checked(html.render(report)).root
    heads = {head.inside[0]: head.text for head in root.one("table", "stages").all("th", scope="col")}
    assert heads["accuracy"] == "accuracyarc_easy.jsonl, piqa.jsonl" and heads["perplexity"] == "perplexitytest.txt"
    assert "accuracy on arc_easy.jsonl, piqa.jsonl, %" in root.one(id="quality").text
    assert "accuracy arc_easy.jsonl, piqa.jsonl" in [each.text for each in root.one("dl", "tiles").all("dt")]


@pytest.mark.parametrize("recipe", [{}, {"evaluate": False}, {"evaluate": {"choices": 3, "images": [4]}}])
def test_recipes_that_name_no_data(recipe: dict[str, object]) -> None:
    assert data_names(report_of(stage("input"), recipe=recipe)) == {}


def searched(measure: str, *measured: float | None) -> Search:
    points = tuple(
        Point(name="", nbytes=10 * (k + 1), average=k + 2, cost=1.0, measured=value) for k, value in enumerate(measured)
    )
    costs = Sensitivity(
        model="m", step="awq", option="bits", way="gram", unit="relative output error", inputs=1, layers=(), seconds=1.0
    )
    return Search(
        sensitivity=costs, budget="3 bits", front=points, uniform=(), chosen=points[1], values={}, measure=measure
    )


def test_stages_and_the_choices_of_a_search_by_size_and_quality() -> None:
    found = searched("perplexity", 40.0, 30.0, 25.0)
    last = stage("awq", 120, perplexity=30.0, perplexity_stderr=2.0).model_copy(update={"search": found})
    (plot,) = plots(report_of(stage("input", 400, perplexity=20.0), last))
    root = ElementTree.fromstring(plot)
    # The layers of the chosen one take 20 of 120 bytes, so that 100 are added to the others.
    titles = [element.findtext("title") for element in root.iter("g")]
    assert titles == [
        "2.00 bits on average: 110 B, 40.00 (tried)",
        "4.00 bits on average: 130 B, 25.00 (tried)",
        "input: 400 B, 20.00",
        "awq: 120 B, 30.00 ± 2.0",
    ]
    assert [line.get("class") for line in root.iter("line")].count("stderr s0") == 1
    places = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter("circle")]
    (small, _), (larger, best) = places[0], places[2]
    assert small < larger and best == max(y for _, y in places)
    assert unmeasured_searches(report_of(stage("input"), last)) == []
    unmeasured = last.model_copy(update={"search": searched("", None, None)})
    assert unmeasured_searches(report_of(stage("input"), unmeasured)) == ["awq"]


@pytest.mark.parametrize(("limited", "drawn"), [("size, bytes", 2), ("macs", 1)])
def test_choices_of_ratios_stand_where_their_files_were_weighed(limited: str, drawn: int) -> None:
    """The bytes of groups share what lies between them, so that they place no choice."""
    found = searched("perplexity", 40.0, 30.0, 25.0)
    points = tuple(point.model_copy(update={"limited": 10.0 * point.nbytes}) for point in found.front)
    costs = found.sensitivity.model_copy(update={"option": "ratio"})
    found = found.model_copy(update={"sensitivity": costs, "front": points, "chosen": points[1], "limited": limited})
    last = stage("channels", 15, perplexity=30.0).model_copy(update={"search": found})
    text = "".join(plots(report_of(stage("input", 400, perplexity=20.0), last)))
    assert text.count("(tried)") == 2 * (drawn - 1)
    assert ("ratio 2.00 on average: 100 B" in text) == (drawn == 2)


def test_a_vision_network_has_its_accuracy_drawn() -> None:
    (plot,) = plots(vision_report())
    assert "top-1, %" in plot and plot.count("stderr") == 3


def test_one_stage_or_none_measured_draws_nothing() -> None:
    assert plots(report_of(stage("input", perplexity=3.0))) == []
    assert plots(report_of(stage("input"), stage("awq", perplexity=3.0))) == []
    lost = report_of(stage("input", perplexity=3.0), stage("awq", perplexity=math.inf))
    assert len(plots(lost)) == 1


@given(
    st.lists(
        st.builds(
            Mark,
            nbytes=st.integers(0, 10**12),
            value=st.one_of(st.floats(allow_nan=True), st.floats(0.1, 100)),
            name=st.text(max_size=40),
            shown=st.text(max_size=9),
            stderr=st.none() | st.floats(0, 1e9),
            tried=st.booleans(),
        ),
        max_size=6,
    )
)
def test_any_marks_can_be_drawn(marks: list[Mark]) -> None:
    plot = quality_plot(marks, "quality")
    if plot:
        root = ElementTree.fromstring(plot)
        for element in root.iter():
            for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
                assert math.isfinite(float(element.get(key, "0")))


def test_figures_far_apart_stand_on_a_logarithmic_axis_that_says_so() -> None:
    near = quality_plot([Mark(1, 20.0, "a", ""), Mark(2, 30.0, "b", "")], "perplexity")
    far = quality_plot([Mark(1, 20.0, "a", ""), Mark(2, 3000.0, "b", "")], "perplexity")
    assert "logarithmic" not in near and far.count("logarithmic axis") == 2
    assert re.search(r">1000<", far)
