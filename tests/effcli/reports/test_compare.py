"""What differs between two runs, and what makes them hard to compare."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vision_report import latency, vision_report

from effcli.reports.compare import Comparison, Figure, compare
from effcli.reports.report import LedgerRow, Report


def with_last(report: Report, **changes: object) -> Report:
    last = report.stages[-1].model_copy(update=changes)
    return report.model_copy(update={"stages": (*report.stages[:-1], last)})


def test_a_run_equals_itself(report: Report) -> None:
    found = compare(report, report)
    assert found.layers == () and found.caveats == ()
    assert found.same_layers == 211
    assert all(figure.a == figure.b for figure in found.figures)
    assert found.a.label != found.b.label


def test_figures_and_layers(make_report: Callable[..., Report]) -> None:
    a, b = make_report(), make_report(bits=3, output="out/awq3", scale=4.0)
    found = compare(a, b)
    figures = {figure.key: figure for figure in found.figures}
    assert (figures["nbytes"].a, figures["nbytes"].b) == (a.stages[-1].nbytes, b.stages[-1].nbytes)
    assert figures["seconds"].a == pytest.approx(613.3)
    assert figures["peak_memory"].a == 1_400_000_000
    assert (found.a.label, found.b.label) == ("awq4", "awq3")
    # The head was kept in both; the projection that has 8 bits in both restores its weight equally well.
    assert len(found.layers) + found.same_layers == 211
    assert {(layer.format_a, layer.format_b) for layer in found.layers if layer.format_a != layer.format_b} == {
        ("int4 g64 asym", "int3 g64 asym")
    }
    ratios = [layer.error_b / layer.error_a for layer in found.layers if layer.error_a and layer.error_b]
    assert ratios == pytest.approx([4.0] * len(ratios))


def test_the_layers_furthest_apart_come_first(report: Report) -> None:
    rows = list(report.stages[-1].ledger)
    rows[17] = rows[17].model_copy(update={"output_error": 100 * (rows[17].output_error or 0)})
    rows[40] = rows[40].model_copy(update={"output_error": (rows[40].output_error or 0) / 5})
    found = compare(report, with_last(report, ledger=tuple(rows)))
    assert [layer.name for layer in found.layers] == [rows[17].name, rows[40].name]
    assert found.layers[0].error == "output"


def test_a_layer_of_one_run_only(report: Report) -> None:
    found = compare(report, with_last(report, ledger=(), name="none"))
    assert found.same_layers > 0  # the pass before still says how they are stored
    lost = report.model_copy(update={"stages": report.stages[:1]})
    found = compare(report, lost)
    assert len(found.layers) == 211
    assert all(layer.format_b is None and layer.error_b is None for layer in found.layers)


def test_an_emptied_ledger_is_said(report: Report) -> None:
    assert compare(report, with_last(report, ledger=(), name="none")).caveats == (
        "B: awq4 has no ledger of none: what it did to the layers is not known",
    )
    emptied = report.model_copy(
        update={
            "stages": tuple(stage.model_copy(update={"ledger": ()}) for stage in report.stages),
            "output": "out/emptied",
        }
    )
    assert compare(report, emptied).caveats == ("emptied has no ledger: its layers are not known",)


@pytest.mark.parametrize(
    ("errors_a", "errors_b", "told"),
    [
        ((0.1, 0.2), (0.3, 0.4), ("output", 0.1, 0.3)),
        ((0.1, 0.2), (None, 0.4), ("weight", 0.2, 0.4)),
        ((None, 0.2), (None, None), ("weight", 0.2, None)),
        ((None, None), (0.3, 0.4), ("output", None, 0.3)),
        ((None, None), (None, None), ("", None, None)),
    ],
)
def test_which_error_is_told(
    errors_a: tuple[float | None, float | None],
    errors_b: tuple[float | None, float | None],
    told: tuple[str, float | None, float | None],
    report: Report,
) -> None:
    def with_row(format: str, errors: tuple[float | None, float | None]) -> Report:
        row = report.stages[-1].ledger[0]
        made = row.model_copy(update={"format": format, "output_error": errors[0], "weight_error": errors[1]})
        return report.model_copy(update={"stages": (report.stages[0], *with_last(report, ledger=(made,)).stages[2:])})

    (layer,) = compare(with_row("int4", errors_a), with_row("int3", errors_b)).layers
    assert (layer.error, layer.error_a, layer.error_b) == told
    assert compare(with_row("int4", errors_a), with_row("int4", (None, None))).layers == ()


def test_a_layer_that_the_last_pass_kept_has_the_error_of_the_pass_before(report: Report) -> None:
    def keep(row: LedgerRow) -> LedgerRow:
        return row.model_copy(update={"status": "kept", "output_error": None, "weight_error": None})

    kept = with_last(report, ledger=tuple(keep(row) for row in report.stages[-1].ledger))
    found = compare(report.model_copy(update={"stages": report.stages[:2]}), kept)
    assert found.layers == ()


def test_nothing_measured(bare_report: Report) -> None:
    found = compare(bare_report, bare_report)
    assert [figure.key for figure in found.figures] == ["nbytes", "ratio", "bits_per_weight"]
    assert found.same_layers == 0


def test_caveats(report: Report) -> None:
    last = report.stages[-1]
    assert last.quality and last.speed
    other = with_last(
        report,
        quality=last.quality.model_copy(update={"tokens": 99, "examples": 7}),
        speed=last.speed.model_copy(update={"threads": 8, "prefill_tokens": 512}),
    ).model_copy(update={"model": "another/model"})
    text = "\n".join(compare(report, other).caveats)
    for words in (
        "different models",
        "16,384 and 99 tokens",
        "2,376 and 7 examples",
        "different threads",
        "128 and 512",
    ):
        assert words in text


def test_accuracies_within_chance(report: Report) -> None:
    last = report.stages[-1]
    assert last.quality
    near = with_last(report, quality=last.quality.model_copy(update={"accuracy": 0.385}))
    assert "less than two standard errors" in compare(report, near).caveats[0]


def test_two_vision_networks() -> None:
    b = vision_report()
    a = b.model_copy(update={"stages": b.stages[:2], "output": "out/weights"})
    found = compare(a, b)
    figures = {figure.key: figure for figure in found.figures}
    assert figures["top1"].change == "-0.6 pt" and figures["agreement"].change == "-2.2 pt"
    assert figures["sqnr"].change == "-6.6 dB"
    assert (figures["latency torch"].a, figures["latency torch"].b) == (2.52, None)
    assert (figures["latency onnxruntime"].a, figures["latency onnxruntime"].b) == (None, 0.312)
    assert found.caveats == ("the top-1 figures differ by less than two standard errors",)
    assert Comparison.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(("a", "b", "change"), [(20.0, 31.5, "+11.5 dB"), (20.0, float("inf"), "")])
def test_decibels_differ_and_have_no_ratio(a: float, b: float, change: str) -> None:
    assert Figure(key="sqnr", title="SQNR, dB", unit="decibels", a=a, b=b).change == change


def test_caveats_of_vision_networks() -> None:
    a = vision_report()
    last = a.stages[-1]
    assert last.quality and last.quality.classification
    fewer = last.quality.classification.model_copy(update={"images": 99})
    b = with_last(
        a,
        quality=last.quality.model_copy(update={"classification": fewer}),
        latencies=(latency("onnxruntime int4", 0.2).model_copy(update={"threads": 8}),),
    )
    assert compare(a, b).caveats == (
        "classification was measured on 10,000 and 99 images: not comparable",
        "latency of onnxruntime was measured on different machines or with different threads: not comparable",
        "latency of onnxruntime is that of onnxruntime int8 and of onnxruntime int4",
    )
    assert compare(a, a).caveats == ()


def test_json(make_report: Callable[..., Report]) -> None:
    found = compare(make_report(), make_report(bits=3, output="out/awq3"))
    assert Comparison.model_validate_json(found.model_dump_json()) == found


def test_two_networks_of_one_name(report: Report) -> None:
    first, *rest = report.stages
    last = report.stages[-1]
    assert first.quality
    row = last.ledger[0]
    others = {
        " weights": first.model_copy(update={"weights": first.weights + 1}),
        " GB": first.model_copy(update={"nbytes": first.nbytes + 10**9}),
        "perplexity": first.model_copy(update={"quality": first.quality.model_copy(update={"perplexity": 4838.0})}),
    }
    made = {words: report.model_copy(update={"stages": (stage, *rest)}) for words, stage in others.items()}
    made[f"{row.name} is"] = with_last(report, ledger=(row.model_copy(update={"shape": (9, 9)}), *last.ledger[1:]))
    for words, other in made.items():
        caveat = compare(report, other).caveats[0]
        assert "different networks, both called" in caveat and words in caveat
    assert compare(report, report).caveats == ()
