"""The plan of any network: what its home says of each step, put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import pytest
from plain_passes import HALVE, PRUNE, Tune, asking

from effcli.errors import SelectionError
from effcli.layers.contract import Needs
from effcli.layers.layer import LayerSite
from effcli.layers.selection import Choice
from effcli.run.plan import BASE_MEMORY, Effort, Inspection, Plan, Row, make, summary
from effcli.run.recipe import PassStep, check


class Notebook:
    """A network of two layers of 6 weights that is neither a language model nor a graph; each step halves its bytes."""

    counted: ClassVar[tuple[str, float]] = ("FLOP", 1.0)
    at_a_time: ClassVar[str] = ", one page at a time"
    weights = 12
    layout = "its ink is not blue"

    def __init__(self, *efforts: Effort) -> None:
        self.nbytes = 4096
        self._efforts = iter(efforts)

    def sites(self) -> list[LayerSite]:
        return [LayerSite(name, "linear", f"{name}.weight", 2, 3) for name in ("page.0", "page.1")]

    def left_alone(self, step: str, lm_head: bool) -> Mapping[str, str]:
        return {"page.1": "it is torn"}

    def layered(self, step: PassStep) -> Notebook:
        return self

    def take(self, step: PassStep, choices: Mapping[str, Choice]) -> None:
        self.nbytes //= 2

    def rows(self, choices: Iterable[Choice]) -> list[Row]:
        return [Row.of(choice.site, "ink", self.nbytes, status=choice.planned) for choice in choices]

    def remarks(self, step: PassStep, name: str) -> list[str]:
        return [f"{name} was read at {self.nbytes} bytes"]

    def effort(self, step: PassStep, choices: Mapping[str, Choice]) -> Effort:
        return next(self._efforts)


def plan_of(network: Notebook, *steps: PassStep) -> Plan:
    return make(check({"model": "notebook", "passes": list(steps)}), network)


def test_one_step() -> None:
    found = plan_of(Notebook(Effort(0, 1000)), HALVE)
    assert found.remarks == (
        "weights: 4.10 kB before, 2.05 kB after (2.00 times smaller)",
        "memory: about 450 MB at the peak, one page at a time",
        "halve keeps page.1: it is torn",
        "halve was read at 2048 bytes",
    )
    assert {row.name: row.status for row in found.rows} == {"page.0": "change", "page.1": "keep"}
    assert {row.step for row in found.rows} == {""}
    assert (found.weights, found.input_bytes, found.output_bytes) == (12, 4096, 2048)
    assert found.layout == "its ink is not blue"


def test_operations_are_summed_and_peaks_are_compared() -> None:
    found = plan_of(Notebook(Effort(3, 1000, 50), Effort(4, 900, 70)), HALVE, HALVE)
    assert (found.operations, found.memory_bytes, found.disk_bytes) == (7, BASE_MEMORY + 1000, 70)
    assert found.remarks[2] == "arithmetic: 7.0 FLOP for forwards and Gram matrices, besides what the pass tries out"
    assert {row.step for row in found.rows} == {"1. halve", "2. halve"}
    assert [row.nbytes for row in found.rows] == [2048, 2048, 1024, 1024]


@pytest.mark.parametrize("step", [asking(Needs.GRADIENTS), PassStep(name="tune", config=Tune())])
def test_a_backward_is_told(step: PassStep) -> None:
    found = plan_of(Notebook(Effort(3, 1000, 5_000_000)), step)
    assert found.remarks[2:4] == (
        "arithmetic: 3.0 FLOP for forwards, gradients and Gram matrices, besides what the pass tries out",
        "disk: about 5.00 MB beside the weights, until the step that needs them is done",
    )


def test_bytes_of_what_is_pruned_are_an_upper_bound() -> None:
    found = plan_of(Notebook(Effort(0, 0), Effort(0, 0)), PRUNE, HALVE)
    assert found.remarks[-3] == ("1. prune: the bytes are an upper bound: what goes is decided on the weights")
    assert not any("2. halve: the bytes" in remark for remark in found.remarks)


def test_patterns_are_checked() -> None:
    with pytest.raises(SelectionError, match=r"the pattern 'page\.7' matches no layer"):
        plan_of(Notebook(), asking(Needs.NOTHING, ignore=("page.7",)))


def test_layers_that_are_alike_are_one_line() -> None:
    rows = plan_of(Notebook(Effort(0, 0)), HALVE).rows
    assert [(each.layers, each.count) for each in summary(rows)] == [("page.0", 1), ("page.1", 1)]
    alike = [row.model_copy(update={"status": ""}) for row in rows]
    assert [(each.layers, each.count, each.nbytes) for each in summary(alike)] == [("page.*", 2, 4096)]


def test_an_inspection_says_nothing_of_a_step() -> None:
    rows = plan_of(Notebook(Effort(0, 0)), HALVE).rows
    found = Inspection.of("notebook", rows, ["two pages"], 24, 12)
    assert {row.status for row in found.rows} == {""} and found.bits_per_weight == 16
    assert Inspection.of("nothing", [], [], 0, 0).bits_per_weight == 0
