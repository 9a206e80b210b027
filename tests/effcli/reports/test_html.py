"""The page is well formed, asks nobody for anything, and shows every layer as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import checked

from effcli.reports import html, svg, svg_training
from effcli.reports.report import Histogram, LedgerRow, Quality, Report, Training


def with_ledger(report: Report, rows: list[LedgerRow]) -> Report:
    stage = report.stages[1].model_copy(update={"ledger": tuple(rows)})
    return report.model_copy(update={"stages": (report.stages[0], stage)})


def test_every_layer_figure_and_option_is_there(report: Report) -> None:
    found = checked(html.render(report))
    text = "".join(found.text)
    for stage in report.stages:
        for row in stage.ledger:
            assert row.name in text
    for words in (
        "HuggingFaceTB/SmolLM2-135M",
        "269 MB",
        "2.36x",
        "+16.2%",
        "group_size",
        "5.23.0",
        "2 cores",
        "valid.txt",
        "were joined",
        "logit difference",
        "int4 _weight_int4pack_mm_for_cpu",
    ):
        assert words in text
    # Two passes, 210 errors and 211 figures of bits each.
    assert found.counts["circle"] == 2 * (210 + 211)


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 80])
def test_any_depth(make_report: Callable[..., Report], blocks: int) -> None:
    found = checked(html.render(make_report(blocks=blocks)))
    assert found.counts["circle"] == 2 * (14 * blocks + 1)


def test_nothing_measured_and_nothing_compressed(bare_report: Report) -> None:
    page = html.render(bare_report)
    assert "no layer compressed, 0 kept" in "".join(checked(page).text)
    checked(html.render(bare_report.model_copy(update={"stages": bare_report.stages[:1]})))


def test_only_kept_layers(report: Report) -> None:
    page = html.render(with_ledger(report, [report.stages[1].ledger[-1]]))
    text = "".join(checked(page).text)
    assert "no layer compressed, 1 kept" in text and "outside the blocks" in text
    assert "Error per layer" not in text


def test_text_is_escaped(report: Report) -> None:
    evil = "<script>alert('x')</script>\"&"
    row = (
        report.stages[1]
        .ledger[0]
        .model_copy(update={"name": evil, "format": evil, "reason": evil, "notes": {evil: evil}, "kind": evil})
    )
    odd = with_ledger(report, [row, report.stages[1].ledger[1]])
    stage = odd.stages[1].model_copy(
        update={
            "name": evil,
            "options": {evil: {evil: [evil]}},
            "remarks": (evil,),
            "histograms": (report.stages[1].histograms[0].model_copy(update={"layer": evil}),),
        }
    )
    odd = odd.model_copy(
        update={
            "stages": (odd.stages[0], stage),
            "model": evil,
            "output": evil,
            "machine": evil,
            "verified": evil,
            "recipe": {evil: evil},
            "software": {evil: evil},
        }
    )
    page = html.render(odd)
    assert page.count("<script>") == 1
    assert "alert('x')</script>" not in page
    found = checked(page)
    assert "".join(found.text).count(evil) >= 10
    assert {key for key, _ in found.attributes if key.startswith("on")} == set()


@pytest.mark.parametrize("error", [0.0, math.nan, math.inf, 1e-300, 1e300])
def test_errors_that_no_axis_holds(report: Report, error: float) -> None:
    rows = [row.model_copy(update={"output_error": error}) for row in report.stages[1].ledger[:3]]
    checked(html.render(with_ledger(report, rows)))
    checked(html.render(with_ledger(report, [*rows, *report.stages[1].ledger[3:]])))


def test_a_lost_network(report: Report) -> None:
    lost = report.stages[1].model_copy(update={"quality": Quality(perplexity=math.inf, kl=math.nan)})
    assert "inf" in "".join(checked(html.render(report.model_copy(update={"stages": (report.stages[0], lost)}))).text)


@pytest.mark.parametrize(
    ("edges", "before", "after"),
    [((), (), ()), ((0.0, 1.0), (0,), (0,)), ((-1.0, 0.0, 1.0), (1, 5), (6, 0)), ((0.0, 0.0), (3,), (3,))],
)
def test_odd_histograms(edges: tuple[float, ...], before: tuple[int, ...], after: tuple[int, ...]) -> None:
    checked(svg.histogram_plot(Histogram(layer="a", edges=edges, before=before, after=after)))


def row_named(name: str) -> LedgerRow:
    return LedgerRow(
        name=name,
        kind="linear",
        shape=(4, 4),
        format="int4 g4 sym",
        bits_per_weight=8,
        nbytes=16,
        status="compressed",
        output_error=0.1,
    )


def axis_of(*names: str) -> svg.Axis:
    return svg.layer_axis([row_named(name) for name in names])


def test_layers_of_repeated_blocks_stand_by_block() -> None:
    names = [f"model.layers.{block}.{role}" for block in range(4) for role in ("attn.q", "mlp.up")]
    axis = axis_of("embed", *names, "lm_head")
    assert axis.legend == ("q", "up")
    assert axis.places["model.layers.2.attn.q"].series == 0
    assert round(axis.places["model.layers.2.attn.q"].x - axis.places["model.layers.1.attn.q"].x, 9) == 1
    assert axis.places["embed"].x < axis.places[names[0]].x < axis.places[names[-1]].x < axis.places["lm_head"].x
    assert [text for _, text in axis.ticks] == ["embed", "0", "1", "2", "3", "lm_head"]


def test_experts_share_a_series() -> None:
    axis = axis_of(*(f"layers.{block}.experts.{e}.{w}" for block in range(3) for e in range(9) for w in ("up", "down")))
    assert axis.legend == ("up", "down")


def test_many_kinds_of_layers_end_in_grey() -> None:
    axis = axis_of(*(f"h.{block}.kind{k}" for block in range(6) for k in range(12)))
    assert len(axis.legend) == svg.SERIES - 1
    assert axis.places["h.0.kind11"].series is None


def test_blocks_that_are_numbered_twice_stand_in_order() -> None:
    rows = [
        row_named(f"layer{stage}.{block}.conv{k}").model_copy(update={"shape": (stage, k)})
        for stage in (1, 2)
        for block in range(3)
        for k in (1, 2)
    ]
    axis = svg.layer_axis(rows)
    assert axis.legend == () and len({place.x for place in axis.places.values()}) == len(rows)


def costed(name: str, macs: int | None, nbytes: int) -> LedgerRow:
    return row_named(name).model_copy(update={"macs": macs, "nbytes": nbytes})


def test_costs_by_hand() -> None:
    rows = [costed("conv", 3_000_000, 500), costed("fc", 1_500_000, 1000), costed("free", None, 0)]
    picture = svg.cost_plot(svg.layer_axis(rows), rows, height=300)
    tall = [float(found) for found in re.findall(r'class="macs"[^>]*height="([\d.]+)"', picture)]
    deep = [float(found) for found in re.findall(r'class="bytes"[^>]*height="([\d.]+)"', picture)]
    assert tall == [2 * tall[1], tall[1], 0]
    assert deep == [deep[0], 2 * deep[0], 0]
    assert "conv: 3.00 M MACs, 500 B (int4 g4 sym)" in picture and "free: not counted, 0 B" in picture


def test_no_costs_without_multiplications() -> None:
    rows = [costed("conv", None, 500), costed("fc", 0, 1000)]
    assert svg.cost_plot(svg.layer_axis(rows), rows, height=300) == ""


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (512, "512"), (2359, "2.36 k"), (40_551_424, "40.6 M"), (4.09e9, "4.09 G")]
)
def test_quantities(number: float, text: str) -> None:
    assert svg.quantity(number) == text


def test_layers_of_a_small_network_stand_in_order() -> None:
    axis = axis_of("features.0", "features.3", "classifier")
    assert [text for _, text in axis.ticks] == ["features.0", "features.3", "classifier"]
    assert axis.slanted and axis.legend == ()


def test_written_to_its_file(report: Report, tmp_path: Path) -> None:
    html.write(report, tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html.render(report)


def test_a_training_is_drawn(report: Report) -> None:
    training = Training(
        steps=40,
        curve=((20, 0.5), (40, 0.25)),
        errors=((0, 0.6), (20, 0.2), (40, 0.3)),
        kept=20,
        measured="loss on <these> inputs",
    )
    stage = report.stages[1].model_copy(update={"training": training, "ledger": ()})
    page = html.render(report.model_copy(update={"stages": (report.stages[0], stage)}))
    found = checked(page)
    text = "".join(found.text)
    assert "40 steps, loss 0.500 to 0.250; the weights of step 20 are kept" in text
    assert "error: loss on <these> inputs" in text and "step 20: 0.200 (kept)" in text
    assert found.counts["circle"] == 3 and found.counts["polyline"] == 1


@pytest.mark.parametrize(
    "values", [(), (0.0,), (0.0, 0.0), (-1.0, 2.0), (math.inf, 1.0), (math.nan,), (1e-30, 1e30), (5.0, 5.0)]
)
def test_any_training_can_be_drawn(values: tuple[float, ...]) -> None:
    points = tuple(enumerate(values))
    for training in (
        Training(steps=len(values), curve=points, errors=points, kept=0),
        Training(steps=0, errors=points[:1], kept=0),
    ):
        plot = svg_training.training_plot(training)
        numbers = [float(number) for number in re.findall(r' (?:[xy][12]?|c[xy]|r)="([^"]*)"', plot)]
        assert all(map(math.isfinite, numbers)) and all(0 <= number <= 480 for number in numbers)
        assert ("<svg" in plot) == bool(values)
