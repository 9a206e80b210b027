"""The columns of the table of a run: which there are, and what is set against the input."""

from __future__ import annotations

from vision_report import latency

from effcli.reports.columns import columns
from effcli.reports.report import Report, Stage


def report(*macs: int | None) -> Report:
    stages = [
        Stage(
            name=f"step {k}",
            nbytes=8,
            weights=2,
            bits_per_weight=32,
            macs=each,
            latencies=(latency("torch float32", 4 / (k + 1)),),
        )
        for k, each in enumerate(macs)
    ]
    return Report.model_construct(stages=tuple(stages))


def test_multiplications_stand_beside_the_speed_where_a_step_takes_some_away() -> None:
    found = columns(report(125_000_000, 62_500_000))
    keys = [column.key for column in found]
    assert keys.index("macs") + 1 == keys.index("latency torch")
    cells = found[keys.index("macs")].cells
    assert [(cell.text, cell.note) for cell in cells if cell] == [("125 M", ""), ("62.5 M", "2.00x")]
    assert [cell.note for cell in found[keys.index("macs") + 1].cells if cell] == ["", "2.00x"]


def test_no_step_takes_any_away() -> None:
    for macs in ((125, 125), (125, None), (None, None)):
        assert "macs" not in [column.key for column in columns(report(*macs))]
