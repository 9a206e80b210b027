"""Small pictures of what layers cost over the values of an option."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from pages import checked

from effcli.reports import html_sensitivity, svg
from effcli.reports.sensitivity import LayerCosts, Option, Sensitivity
from effcli.reports.svg_curves import Curve, curves_plot

VALUES = (0.0, 0.5, 0.8)


def lines(picture: str) -> list[ElementTree.Element]:
    return [each for each in ElementTree.fromstring(picture).iter() if each.tag == "polyline"]


def places(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (each.split(",") for each in (line.get("points") or "").split())]


def test_a_line_for_each_layer_the_dearest_heavy_and_on_top() -> None:
    curves = [Curve("a", ((0.0, 0.0), (0.5, 2.0), (0.8, 9.0))), Curve("b", ((0.0, 0.0), (0.5, 1.0), (0.8, 3.0)))]
    scale = svg.log_scale([1.0, 9.0])
    cheap, dear = lines(curves_plot(curves, VALUES, scale, 2, "costs"))
    assert (cheap.get("class"), dear.get("class")) == ("trend s2", "loss s2")
    titles = [line.findtext("title") for line in (cheap, dear)]
    assert titles == ["b: 0: 0, 0.5: 1.00, 0.8: 3.00", "a: 0: 0, 0.5: 2.00, 0.8: 9.00"]
    # A cost of 0 has no logarithm; the higher the cost, the further up.
    (low, high), (_, top) = places(cheap), places(dear)
    assert low[0] < high[0] == top[0] and low[1] > high[1] > top[1]


@pytest.mark.parametrize("cost", [math.inf, math.nan])
def test_what_is_not_finite_stands_at_the_upper_edge(cost: float) -> None:
    curves = [Curve("a", ((0.5, 1.0), (0.8, cost)))]
    assert curves[0].worst == 1.0
    (line,) = lines(curves_plot(curves, VALUES, svg.log_scale([1.0, cost]), 0, "costs"))
    assert places(line)[1][1] == pytest.approx(10)


def test_values_that_are_close_are_named_once() -> None:
    picture = curves_plot(
        [Curve("a", ((0.0, 1.0), (0.01, 1.0), (0.8, 2.0)))], (0.0, 0.01, 0.8), svg.log_scale([1.0]), 0, "costs"
    )
    assert ">0.8<" in picture and ">0.01<" not in picture


def sensitivity(names: list[str], option: str = "sparsity") -> Sensitivity:
    options = tuple(
        Option(value=value, format="f", nbytes=9, output_error=0.1, cost=10 * value * (value + 1)) for value in VALUES
    )
    layers = tuple(LayerCosts(name=name, kind="linear", shape=(3, 3), options=options) for name in names)
    return Sensitivity.model_validate(
        {"model": "m", "step": "s", "option": option, "way": "loss", "unit": "nats", "inputs": 1, "seconds": 0}
        | {"layers": layers}
    )


def test_a_picture_for_the_layers_of_each_kind() -> None:
    found = sensitivity([f"model.layers.{k}.{role}" for k in range(4) for role in ("up", "down")] + ["lm_head"])
    page = checked(html_sensitivity.render(found))
    titles = [caption.text for caption in page.root.all("figcaption")]
    assert [title.partition("dearest")[0] for title in titles] == ["up, 4 layers", "down, 4 layers", "linear, 1 layer"]
    assert "dearest: model.layers.0.up" in titles[0]
    text = "".join(page.text)
    assert "measured with one layer pruned at a time" in text and "Over sparsity" in text
    # What costs nothing in any layer has no picture of its own.
    assert "sparsity 0.5 nats; logarithmic axis" in text and "sparsity 0 nats" not in text


def test_one_value_makes_no_curve() -> None:
    found = sensitivity(["a", "b"])
    single = found.model_copy(
        update={"layers": tuple(layer.model_copy(update={"options": layer.options[-1:]}) for layer in found.layers)}
    )
    assert "Over sparsity" not in html_sensitivity.render(single)
