"""Which latencies stand side by side, and against what they are set."""

from __future__ import annotations

import pytest
from vision_report import latency

from effcli.reports.latencies import conditions, latency_in, runtime_names, speedup
from effcli.reports.report import Latency, Stage


def timed(*latencies: Latency) -> Stage:
    return Stage(name="s", nbytes=1, weights=1, bits_per_weight=8, latencies=latencies)


def test_one_runtime_at_two_precisions_is_one_column() -> None:
    stages = [timed(latency("onnxruntime float32", 3)), timed(latency("onnxruntime int8", 2))]
    assert runtime_names(stages) == ["onnxruntime"]
    assert [latency_in(stage, "onnxruntime") for stage in stages] == [stage.latencies[0] for stage in stages]
    assert speedup(stages[1].latencies[0], stages[0]) == pytest.approx(1.5)


def test_two_precisions_in_one_stage_are_two_columns() -> None:
    first = timed(latency("torch float32", 4), latency("cpu", 1))
    last = timed(latency("torch float32", 2), latency("torch int8", 1))
    assert runtime_names([first, last]) == ["torch float32", "cpu", "torch int8"]
    assert latency_in(first, "torch int8") is None
    assert latency_in(last, "torch int8") == last.latencies[1]
    assert speedup(last.latencies[0], first) == pytest.approx(2)
    assert speedup(last.latencies[1], first) == pytest.approx(4)


def test_a_bare_name_is_not_taken_for_a_longer_one() -> None:
    stage = timed(latency("torch int8", 1), latency("torch", 2))
    assert runtime_names([stage]) == ["torch int8", "torch"]
    assert latency_in(stage, "torch") == stage.latencies[1]


def test_no_speedup_without_a_counterpart() -> None:
    found = latency("torch int8", 1)
    assert speedup(found, timed()) is None
    assert speedup(found, timed(latency("onnxruntime int8", 1))) is None
    assert speedup(found, timed(latency("torch float32", 1), latency("torch bfloat16", 1))) is None
    assert speedup(latency("torch int8", 0.0), timed(found)) is None


def test_nothing_timed() -> None:
    assert runtime_names([timed(), timed()]) == []
    assert conditions([timed()]) == []


def test_conditions_name_each_runtime_once() -> None:
    one, other = latency("torch float32", 4), latency("torch int8", 2, repetitions=1000)
    found = conditions([timed(one), timed(one, other)])
    assert found == ["latency of torch float32, torch int8: one input, AMD EPYC 9575F, 1 thread, median"]
