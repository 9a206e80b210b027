"""The page of a vision network: classes, latencies, activations, and nothing of them for a language model."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import checked
from vision_report import CLASSES, classification, latency, vision_report

from effcli.reports import html
from effcli.reports.html_vision import activations, classes, clipped_fraction, latencies
from effcli.reports.report import ActivationRange, Classification, ClassRow, Quality, Report, Stage


def words(page: str) -> str:
    return "".join(checked(page).text)


def stage(name: str = "input", found: Classification | None = None) -> Stage:
    quality = None if found is None else Quality(classification=found)
    return Stage(name=name, nbytes=1, weights=1, bits_per_weight=8, quality=quality)


def report_of(*stages: Stage) -> Report:
    return Report(effcli_version="1", model="m", output=None, machine="", stages=stages)


def ranged(low: float, high: float, edges: tuple[float, ...], counts: tuple[int, ...]) -> ActivationRange:
    return ActivationRange(name="relu", edges=edges, counts=counts, low=low, high=high, observer="mse")


def test_every_figure_is_there() -> None:
    text = words(html.render(vision_report()))
    for found in (
        "top-1",
        "87.4±0.3%",
        "-0.7 pt",
        "96.4%",
        "24.8",
        "2.80x",
        "onnxruntime int8",
        "latency onnxruntime",
        "classification of 10,000 images",
        "cat taken for dog: 163 of 1,000 (16.3%)",
        "40.6 M multiplications of one input",
        "36,928",
        "percentile: 0 to 2.41",
        "0.012% clipped",
        "none clipped",
        "SQNR: energy",
        "MACs: multiplications",
        *CLASSES,
    ):
        assert found in text


def test_a_language_model_has_no_such_section(report: Report, bare_report: Report) -> None:
    for found in (report, bare_report):
        text = words(html.render(found))
        for absent in ("MACs", "Classes", "Activations", "Latency of one input", "SQNR", "Agreement"):
            assert absent not in text


def test_names_are_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    found = vision_report()
    last = found.stages[-1]
    assert last.quality and last.quality.classification
    named = last.quality.classification.model_copy(
        update={"classes": tuple(row.model_copy(update={"name": evil}) for row in last.quality.classification.classes)}
    )
    timed = latency(evil, 1.0).model_copy(update={"device": evil})
    shown = last.activations[0].model_copy(update={"name": evil, "observer": evil})
    odd = last.model_copy(
        update={
            "name": evil,
            "quality": Quality(classification=named),
            "latencies": (timed,),
            "activations": (shown,),
        }
    )
    page = html.render(found.model_copy(update={"stages": (*found.stages[:-1], odd)}))
    assert page.count("<script>") == 1 and "alert('x')</script>" not in page
    assert words(page).count(evil) > 100


def test_the_class_that_lost_most_comes_first() -> None:
    names = ("a", "b", "c")
    before = classification([[50, 50, 0], [0, 90, 10], [0, 0, 0]], names)
    after = classification([[55, 45, 0], [30, 60, 10], [0, 0, 0]], names)
    page = classes(report_of(stage("input", before), stage("awq", after)))
    rows = re.findall(r'<tr><th scope="row" data-v="(\d)">(.*?)</tr>', page)
    assert [key for key, _ in rows] == ["1", "0", "2"]
    assert '<td class="number bad"' in rows[0][1] and "-30.0 pt" in rows[0][1]
    assert "bad" not in rows[1][1] and "+5.0 pt" in rows[1][1]
    assert "pt" not in rows[2][1]


def test_a_loss_within_chance_is_no_warning() -> None:
    names = ("a", "b")
    before, after = classification([[90, 10], [0, 100]], names), classification([[88, 12], [0, 100]], names)
    page = classes(report_of(stage("input", before), stage("awq", after)))
    assert "-2.0 pt" in page and "bad" not in page


def test_one_measurement_has_nothing_to_be_set_against() -> None:
    text = words(classes(report_of(stage("input", classification([[9, 1], [2, 8]], ("a", "b"))))))
    assert "90.0%" in text and "change" not in text and "loss" not in text


def test_classes_without_a_confusion_and_the_reverse() -> None:
    full = classification([[9, 1], [2, 8]], ("a", "b"))
    assert "Confusion" not in classes(report_of(stage("input", full.model_copy(update={"confusion": ()}))))
    text = words(classes(report_of(stage("input", full.model_copy(update={"classes": ()})))))
    assert "Recall" not in text and "0 taken for 1: 1 of 10" in text
    assert classes(report_of(stage("input", Classification(images=3, agreement=0.5)))) == ""
    assert classes(report_of(stage())) == ""


def test_of_many_classes_the_most_confused_are_drawn() -> None:
    count = 50
    matrix = [[10 if j == k else 0 for j in range(count)] for k in range(count)]
    for k in range(0, 40, 2):
        matrix[k][k + 1] = 1 + (k == 0)
    found = classification(matrix, [f"class {k}" for k in range(count)])
    page = classes(report_of(stage("input", found), stage("awq", found)))
    text = words(page)
    assert "the 20 most confused of 50 classes" in text
    assert "class 0 taken for class 1: 2 of 12" in text and "class 49 recognised" not in text
    # The table has all of them, folded.
    assert "class 49" in text and "<details>" in page


def test_latencies_of_every_stage() -> None:
    page = latencies(vision_report())
    assert page.count("<tr>") == 1 + 4
    text = words(page)
    assert "2.80x" in text and "0.92x" in text and "AMD EPYC 9575F" in text
    assert latencies(report_of(stage())) == ""


def test_many_activations_are_folded() -> None:
    found = ranged(0, 1, (0.0, 1.0, 2.0), (3, 1))
    assert "<details>" not in activations([found] * 24)
    assert "<details>" in activations([found] * 25)
    assert activations([]) == ""


@pytest.mark.parametrize(
    ("low", "high", "part"), [(0, 4, 0.0), (0, 3, 0.05), (1, 4, 0.8), (2, 2, 1.0), (-9, 9, 0.0), (5, 6, 1.0)]
)
def test_the_clipped_part_by_hand(low: float, high: float, part: float) -> None:
    assert clipped_fraction(ranged(low, high, (0, 1, 2, 4), (8, 1, 1))) == pytest.approx(part)


def test_a_limit_rounded_to_float32_clips_nothing() -> None:
    assert clipped_fraction(ranged(0, 5.9999995, (0, 3, 6), (1, 99))) == 0


def test_the_clipped_part_of_nothing_and_of_one_value() -> None:
    assert clipped_fraction(ranged(0, 1, (), ())) == 0
    assert clipped_fraction(ranged(0, 1, (0, 1), (0,))) == 0
    assert clipped_fraction(ranged(0, 1, (0.5, 0.5), (7,))) == 0
    assert clipped_fraction(ranged(0, 1, (2.0, 2.0), (7,))) == 1


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    st.floats(-2, 14),
    st.floats(0, 14),
    st.floats(0, 3),
)
def test_a_wider_range_clips_no_more(counts: list[int], low: float, width: float, more: float) -> None:
    edges = tuple(float(k) for k in range(len(counts) + 1))
    narrow = clipped_fraction(ranged(low, low + width, edges, tuple(counts)))
    wide = clipped_fraction(ranged(low - more, low + width + more, edges, tuple(counts)))
    assert 0 <= wide <= narrow + 1e-9 <= 1 + 1e-9


def test_figures_that_are_no_numbers() -> None:
    lost = Classification(images=5, top1=0.0, sqnr=-math.inf, agreement=0.0)
    exact = Classification(images=5, top1=1.0, sqnr=math.inf, agreement=1.0)
    text = words(html.render(report_of(stage("input", exact), stage("awq", lost))))
    assert "inf" in text and "-100.0 pt" in text


def test_a_class_never_tested() -> None:
    row = ClassRow(name="rare", images=0, recall=None, precision=None)
    found = Classification(images=0, classes=(row,))
    assert "rare" in words(classes(report_of(stage("input", found), stage("awq", found))))
