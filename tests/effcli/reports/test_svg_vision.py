"""Pictures of a classifier: every count in its cell, and no coordinate that is not a number."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vision_report import CLASSES, activation, confusion, logits

from effcli.reports.report import ActivationRange
from effcli.reports.svg_vision import activation_plot, confusion_plot, most_confused, recall_plot


def parsed(picture: str) -> ElementTree.Element:
    """The picture as XML, its numbers checked."""
    root = ElementTree.fromstring(picture)
    for element in root.iter():
        for key in ("x", "y", "width", "height", "x1", "x2", "y1", "y2", "cx", "cy"):
            assert math.isfinite(float(element.get(key, "0")))
    return root


def titles(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("title")]


def test_a_matrix_by_hand() -> None:
    root = parsed(confusion_plot([[9, 1], [0, 4]], ["cat", "<dog>"], [0, 1], "label"))
    assert titles(root) == [
        "cat recognised: 9 of 10 (90.0%)",
        "cat taken for <dog>: 1 of 10 (10.0%)",
        "<dog> recognised: 4 of 4 (100.0%)",
    ]
    cells = [element for element in root.iter("rect") if element.get("class") != "field"]
    assert [cell.get("class") for cell in cells] == ["right", "wrong", "right"]
    assert [float(cell.get("fill-opacity", "")) for cell in cells] == pytest.approx(
        [math.sqrt(0.9), math.sqrt(0.1), 1], abs=1e-3
    )
    assert [element.text for element in root.iter("text")].count("9") == 1


def test_every_class_stands_at_both_sides() -> None:
    root = parsed(confusion_plot(confusion(0), CLASSES, range(len(CLASSES)), "label"))
    texts = [element.text for element in root.iter("text")]
    assert all(texts.count(name) == 2 for name in CLASSES)
    filled = sum(count > 0 for row in confusion(0) for count in row)
    assert len(titles(root)) == filled


@pytest.mark.parametrize(("classes", "counts"), [(12, True), (13, False)])
def test_counts_are_written_where_there_is_room(classes: int, counts: bool) -> None:
    matrix = [[7 if j == k else 0 for j in range(classes)] for k in range(classes)]
    root = parsed(confusion_plot(matrix, [f"c{k}" for k in range(classes)], range(classes), "label"))
    assert ("7" in [element.text for element in root.iter("text")]) is counts


def test_no_class_and_classes_without_images() -> None:
    assert confusion_plot([], [], [], "label") == ""
    assert titles(parsed(confusion_plot([[0, 0], [0, 0]], ["a", "b"], [0, 1], "label"))) == []


def test_the_most_confused_classes_by_hand() -> None:
    # Missed and wrongly taken: 0 + 5, 2 + 0, 3 + 0, 0 + 0.
    matrix = [[9, 0, 0, 0], [2, 7, 0, 0], [3, 0, 6, 0], [0, 0, 0, 9]]
    assert most_confused(matrix, 2) == [0, 2]
    assert most_confused(matrix, 3) == [0, 1, 2]
    assert most_confused(matrix) == [0, 1, 2, 3]
    assert most_confused([]) == []


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=n, max_size=n)
    ),
    st.integers(1, 9),
)
def test_no_class_left_out_is_more_confused_than_one_shown(matrix: list[list[int]], most: int) -> None:
    def wrong(k: int) -> int:
        return sum(row[k] for row in matrix) + sum(matrix[k]) - 2 * matrix[k][k]

    shown = most_confused(matrix, most)
    assert shown == sorted(set(shown)) and len(shown) == min(most, len(matrix))
    left_out = set(range(len(matrix))) - set(shown)
    assert max(map(wrong, left_out), default=0) <= min(map(wrong, shown))


def test_a_recall_stands_between_the_ends_of_its_axis() -> None:
    root = parsed(recall_plot(0.5, 1.0, 0.5, bad=False))
    assert [float(circle.get("cx", "")) for circle in root.iter("circle")] == [5, 175]
    parsed(recall_plot(1.0, 1.0, 1.0, bad=True))


def test_a_range_cuts_the_picture_where_it_ends() -> None:
    root = parsed(
        activation_plot(ActivationRange(name="a", edges=(0, 1, 2, 4), counts=(8, 4, 1), low=0, high=3, observer="mse"))
    )
    limits = [float(line.get("x1", "")) for line in root.iter("line") if line.get("class") == "limit"]
    assert limits == [0, 225]
    views = {part.get("class"): (float(part.get("x", "0")), float(part.get("width", "0"))) for part in root.iter("svg")}
    # Bins of their own width: the last is twice as wide as the others.
    assert re.findall(r"H([\d.]+)", ElementTree.tostring(root, encoding="unicode"))[:3] == ["75.0", "150.0", "300.0"]
    assert views["after"] == (0, 225) and views["clipped"] == (225, 75)


def test_a_range_wider_than_the_values_widens_the_axis() -> None:
    texts = [element.text for element in parsed(activation_plot(logits())).iter("text")]
    assert texts == ["-13", "19.5"]


@pytest.mark.parametrize(
    ("edges", "counts", "low", "high"),
    [
        ((), (), 0.0, 1.0),
        ((0.0, 1.0), (0,), 0.0, 1.0),
        ((2.0, 2.0), (5,), 2.0, 2.0),
        ((0.0, math.inf), (5,), 0.0, 1.0),
        ((0.0, 1.0), (5,), math.nan, 1.0),
        ((0.0, 1.0), (5,), 2.0, 3.0),
    ],
)
def test_odd_ranges(edges: tuple[float, ...], counts: tuple[int, ...], low: float, high: float) -> None:
    parsed(activation_plot(ActivationRange(name="<a>", edges=edges, counts=counts, low=low, high=high, observer="x")))


def test_heights_are_logarithms() -> None:
    picture = activation_plot(activation("relu", 1.0, 0.0, 6.0, "minmax"))
    # 2 million and more in the first bin: the axis has one line for each power of ten below it.
    assert len(re.findall('class="grid"', picture)) == 6
