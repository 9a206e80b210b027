"""Remarks of one wording become one, with what differs kept; others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

from pages import checked

from effcli.reports import html
from effcli.reports.html_remarks import Gathered, gather
from effcli.reports.report import LedgerRow, Report, Stage

ALIKE = (
    "stem.conv and stage1.conv stay as they are: a ReLU6 stands between, hardtanh; another pass can take it",
    "stage1.conv and stage2.conv stay as they are: a ReLU6 stands between, hardtanh_1; another pass can take it",
    "stage2.conv and head stay as they are: a ReLU6 stands between, hardtanh_2; another pass can take it",
)


def stage(name: str, remarks: Sequence[str], layers: Sequence[str] = ()) -> Stage:
    rows = tuple(
        LedgerRow(name=layer, kind="linear", shape=(1,), format="f", bits_per_weight=1, nbytes=1, status="kept")
        for layer in layers
    )
    return Stage(name=name, nbytes=1, weights=1, bits_per_weight=8, remarks=tuple(remarks), ledger=rows)


def test_names_and_numbers_become_a_gap() -> None:
    (found,) = gather([stage("equalize", ALIKE, ["head"])])
    assert found.text == "… and … stay as they are: a ReLU6 stands between, …; another pass can take it"
    assert found.differing == (
        "stem.conv, stage1.conv, hardtanh",
        "stage1.conv, stage2.conv, hardtanh_1",
        "stage2.conv, head, hardtanh_2",
    )
    assert found.count == 3 and found.stages == ("equalize",)


def test_other_words_are_another_remark() -> None:
    remarks = ("the layer was kept here", "the layer was changed here", "the layer was kept", "3 windows lost")
    assert [found.text for found in gather([stage("awq", remarks)])] == list(remarks)


def test_the_same_remark_of_two_stages_counts_once() -> None:
    found = gather([stage("awq", ["calibrated on a short text"]), stage("gptq", ["calibrated on a short text"])])
    assert found == [Gathered(("awq", "gptq"), "calibrated on a short text")]
    assert gather([stage("awq", ())]) == []


def test_the_page_folds_what_differs() -> None:
    stages = (stage("input", ()), stage("equalize", ALIKE, ["head"]), stage("linear", ["alone"]))
    report = Report(effcli_version="1", model="m", output=None, machine="", stages=stages)
    remarks = checked(html.render(report)).root.one(id="remarks")
    first, second = (each for each in remarks.one("ul", "remarks").inside if not isinstance(each, str))
    assert first.one("summary").text == "3 times" and "open" not in first.one("details").attributes
    assert [each.text for each in first.one("details").all("li")][1] == "stage1.conv, stage2.conv, hardtanh_1"
    assert second.text.split() == ["linear", "alone"] and not second.all("details")
