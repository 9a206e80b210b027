"""The page is well formed, asks nobody for anything, and shows every layer as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import checked

from effcli.reports import html, svg, svg_training, units
from effcli.reports.report import Continuation, Histogram, LedgerRow, Quality, Report, Stage, Training


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
    # Two passes of 210 errors each, and 211 figures of bits, which are the same in both passes.
    assert sum(len(plots.all("circle")) for plots in found.root.all("div", "plots")) == 2 * 210 + 211


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 80])
def test_any_depth(make_report: Callable[..., Report], blocks: int) -> None:
    found = checked(html.render(make_report(blocks=blocks)))
    marks = sum(len(plots.all("circle")) for plots in found.root.all("div", "plots"))
    # One figure alone makes no plot.
    assert marks == (2 * 7 * blocks + 7 * blocks + 1 if blocks else 0)


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
    assert [tick.text for tick in axis.ticks] == ["embed", "0", "1", "2", "3", "lm_head"]


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
    assert units.quantity(number) == text


def test_layers_of_a_small_network_stand_in_order() -> None:
    axis = axis_of("features.0", "features.3", "classifier")
    assert [tick.text for tick in axis.ticks] == ["features.0", "features.3", "classifier"]
    assert axis.slanted and axis.legend == ()


def test_layers_without_a_figure_take_no_room() -> None:
    names = [f"model.layers.{block}.{role}" for block in range(4) for role in ("attn.q", "mlp.up")]
    rows = [row_named(name) for name in ("model.embed_tokens", *names, "lm_head")]
    axis = svg.layer_axis(rows, names)
    assert axis.length == 4 and set(axis.places) == set(names)
    assert [tick.text for tick in axis.ticks] == ["0", "1", "2", "3"]
    # With them, one slot each, whose names are whole where the pointer asks.
    whole = svg.layer_axis(rows)
    assert whole.length == 6
    assert next((tick.text, tick.name) for tick in whole.ticks) == ("embed_tokens", "model.embed_tokens")
    # A series keeps its colour where the layers of another have nothing to be drawn.
    fewer = svg.layer_axis(rows, [name for name in names if "mlp" in name])
    assert fewer.places[names[1]].series == axis.places[names[1]].series == 1


def test_a_head_without_a_weight_of_its_own_has_no_mark_at_0_bits(make_report: Callable[..., Report]) -> None:
    report = make_report(blocks=3)
    *rows, head = report.stages[1].ledger
    tied = head.model_copy(update={"nbytes": 0, "bits_per_weight": 0.0})
    found = checked(html.render(with_ledger(report, [*rows, tied]))).root.one("section", "pass", id="pass-1")
    marks = [mark.text for plots in found.all("div", "plots") for mark in plots.all("circle")]
    assert len(marks) == 2 * 21 and not any("lm_head" in mark for mark in marks)
    assert "lm_head stores no weight of its own" in found.text
    *_, row = found.one("table", "ledger").one("tbody").all("tr")
    assert row.all("td", "none")[0].attributes["data-v"] == "-1"


def test_an_axis_says_that_it_is_logarithmic(report: Report) -> None:
    errors, bits = checked(html.render(report)).root.all("section", "pass")[0].all("svg", role="img")[:2]
    assert "logarithmic axis" in errors.text and "logarithmic" in errors.attributes["aria-label"]
    assert "logarithmic" not in bits.text + bits.attributes["aria-label"]


def test_plots_without_anything_to_see_are_said_in_a_line() -> None:
    rows = [
        row_named(name).model_copy(update={"output_error": 0.0, "macs": 9, "bits_per_weight": 32.0})
        for name in ("stem.conv", "a.conv", "head")
    ]
    stages = [Stage(name=name, nbytes=9, weights=9, bits_per_weight=32, ledger=rows) for name in ("fold", "equalize")]
    base = Stage(name="input", nbytes=9, weights=9, bits_per_weight=32)
    report = Report(effcli_version="1", model="m", output=None, machine="", stages=(base, *stages))
    first, second = checked(html.render(report)).root.all("section", "pass")
    assert len(first.all("svg")) == 1 and not second.all("svg")
    for found in (first, second):
        assert "Output error, relative and squared: 0 in all 3 layers" in found.text
        assert "Bits per weight: 32.0 in all 3 layers" in found.text
    assert "Work and storage per layer: as after fold" in second.text


def test_long_names_below_an_axis_are_whole_for_the_pointer() -> None:
    names = [f"backbone.stage{stage}.{block}.depthwise.conv" for stage in (1, 2) for block in ("first", "second")]
    rows = [row_named(name).model_copy(update={"bits_per_weight": k}) for k, name in enumerate(names)]
    picture = checked(html.render(report_with(rows))).root.one("div", "plots").all("svg")[0]
    labels = [each for each in picture.all("text") if each.all("title")]
    assert [label.one("title").text for label in labels] == names
    assert len({label.inside[0] for label in labels}) == len(names)


def report_with(rows: list[LedgerRow]) -> Report:
    stages = (
        Stage(name="input", nbytes=9, weights=9, bits_per_weight=32),
        Stage(name="linear", nbytes=9, weights=9, bits_per_weight=32, ledger=tuple(rows)),
    )
    return Report(effcli_version="1", model="m", output=None, machine="", stages=stages)


def test_the_table_of_contents_names_every_section(report: Report) -> None:
    root = checked(html.render(report)).root
    links = {link.attributes["href"][1:] for link in root.one("nav", "toc").all("a")}
    sections = [section.attributes["id"] for section in root.all("section")]
    assert links == set(sections) and {"steps", "quality", "remarks", "pass-1", "pass-2", "made"} <= links


def test_figures_and_marks_explain_themselves_to_the_pointer(report: Report) -> None:
    root = checked(html.render(report)).root
    heads = {head.inside[0]: head.attributes.get("title", "") for head in root.one("table", "stages").all("th")[1:]}
    assert "lower is better" in heads["perplexity"] and "scales and zero points" in heads["bits"]
    for mark in root.all("circle"):
        assert mark.all("title") or any(mark in group.inside and group.all("title") for group in root.all("g"))


def test_wide_tables_scroll_and_show_that_they_do(report: Report) -> None:
    root = checked(html.render(report)).root
    boxes = root.all("div", "scroll")
    inside = [table for box in boxes for table in box.all("table")]
    assert len(inside) == len(root.all("table")) == 3
    for box in boxes:
        if box.all("table"):
            assert box.attributes["tabindex"] == "0" and box.attributes["aria-label"]
    style = "".join(str(part) for part in root.one("style").inside)
    rule = style[style.index(".scroll {") :].partition("}")[0]
    assert "overflow-x: auto" in rule and "local" in rule and "--shade" in rule


def test_on_paper_headings_stay_with_their_charts_and_everything_is_open(report: Report) -> None:
    root = checked(html.render(report)).root
    style = "".join(str(part) for part in root.one("style").inside)
    paper = style[style.index("@media print") :]
    assert re.search(r"h1, h2, h3[^{}]*\{ break-after: avoid; \}", paper)
    assert re.search(r"svg[^{}]*\.chart \{ break-inside: avoid; \}", paper)
    script = "".join(str(part) for part in root.one("script").inside)
    assert "beforeprint" in script and "details:not([open])" in script and "folded.open = true" in script
    for chart in root.all("figure", "chart"):
        assert len(chart.all("svg")) == 1


def test_the_recipe_is_that_which_was_given(report: Report) -> None:
    given = {"model": "SmolLM2", "passes": [{"awq": {"bits": 4}}]}
    recipe = {**given, "seed": 0, "calibration": {"samples": 32}}
    made = checked(html.render(report.model_copy(update={"given": given, "recipe": recipe}))).root.one(id="made")
    assert "seed" not in made.one("pre").text and "calibration" not in made.one("pre").text
    assert "bits: 4" in made.one("pre").text and "report.json has all settings" in made.text
    # A report of an effcli that did not record it.
    assert "calibration" in checked(html.render(report)).root.one(id="made").one("pre").text


def test_texts_before_and_after(report: Report) -> None:
    def written(stage: Stage, *texts: str) -> Stage:
        found = tuple(Continuation(prompt=f"<prompt {k}>", text=text) for k, text in enumerate(texts))
        return stage.model_copy(update={"continuations": found})

    first, second, third = report.stages
    stages = (
        written(first, "a king is dead", "same"),
        written(second, "a king is gone", "same"),
        written(third, "a king", "same"),
    )
    section = checked(html.render(report.model_copy(update={"stages": stages}))).root.one(id="texts")
    assert [prompt.text for prompt in section.all("p", "prompt")] == ["<prompt 0>", "<prompt 1>"]
    assert [each.text for each in section.all("dd")] == [
        "a king is dead",
        "a king is gone",
        "a king",
        "same",
        "the same text",
        "the same text",
    ]
    assert [mark.text for mark in section.all("mark")] == ["gone"]
    assert not checked(html.render(report)).root.all(id="texts")


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
    curve = found.root.one("div", "curve")
    assert len(curve.all("circle")) == 3 and len(curve.all("polyline")) == 1
    assert "logarithmic axis" in curve.text


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
