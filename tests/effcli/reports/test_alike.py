"""Figures of two runs that say nothing of each other: measured or calibrated on other data, on another machine."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from vision_report import vision_report

from effcli.reports.compare import compare
from effcli.reports.report import Report
from effcli.reports.terminal import compare_table


def with_recipe(report: Report, data: dict[str, str] | None = None, **parts: Any) -> Report:
    """The report of a run with other keys under `calibration` or `evaluate`; data: the digests of what they name."""
    recipe = {**report.recipe, **{part: {**report.recipe[part], **keys} for part, keys in parts.items()}}
    return report.model_copy(update={"recipe": recipe, "data": data or {}})


def marks(a: Report, b: Report) -> dict[str, str]:
    return {figure.key: figure.obstacle for figure in compare(a, b).figures if figure.obstacle}


def input_perplexity(report: Report, value: float) -> Report:
    first = report.stages[0]
    assert first.quality
    first = first.model_copy(update={"quality": first.quality.model_copy(update={"perplexity": value})})
    return report.model_copy(update={"stages": (first, *report.stages[1:])})


def test_other_texts(report: Report) -> None:
    other = input_perplexity(with_recipe(report, evaluate={"perplexity": "far/valid.txt"}), 14.2)
    found = compare(report, other)
    assert found.caveats == (
        "perplexity and KL were measured on different texts (test.txt and valid.txt): not comparable",
    ), "the network is the same, though its perplexity is not"
    assert marks(report, other) == {"perplexity": "other text", "kl": "other text"}
    by_key = {figure.key: figure for figure in found.figures}
    assert by_key["perplexity"].change == by_key["kl"].change == "other text"
    assert by_key["accuracy"].change == "0.0 pt"


@pytest.mark.parametrize(
    ("digests", "expected"),
    [
        (({"test.txt": "1"}, {"copy.txt": "1"}), ""),
        (({"test.txt": "1"}, {"copy.txt": "2"}), "(test.txt and copy.txt)"),
        (({"test.txt": "1"}, {}), "(test.txt and copy.txt)"),
    ],
)
def test_a_text_is_known_by_its_content(digests: tuple[dict[str, str], ...], expected: str, report: Report) -> None:
    a = with_recipe(report, digests[0])
    b = with_recipe(report, digests[1], evaluate={"perplexity": "copy.txt"})
    text = "".join(compare(a, b).caveats)
    assert expected in text and bool(text) == bool(expected)


def test_two_texts_of_one_name(report: Report) -> None:
    (caveat,) = compare(with_recipe(report, {"test.txt": "1"}), with_recipe(report, {"test.txt": "2"})).caveats
    assert "on different texts, both called test.txt" in caveat


def test_splits_of_one_folder_differ(report: Report) -> None:
    a, b = (with_recipe(report, evaluate={"perplexity": f"texts#{split}"}) for split in ("train", "test"))
    assert "(texts#train and texts#test)" in compare(a, b).caveats[0]


def test_the_end_of_another_calibration_text_is_another_text(report: Report) -> None:
    a = with_recipe(report, evaluate={"perplexity": True})
    b = with_recipe(a, calibration={"data": "other.txt"})
    assert marks(a, b) == {}, "the same perplexity of the input: it is the sample's own text in both"
    assert marks(a, input_perplexity(b, 31.0)) == {"perplexity": "other text", "kl": "other text"}


def test_questions_and_images(report: Report) -> None:
    a, b = (with_recipe(report, evaluate={"choices": name}) for name in ("arc.jsonl", "piqa.jsonl"))
    assert marks(a, b) == {"accuracy": "other questions"}
    vision = vision_report()
    a, b = (
        vision.model_copy(update={"recipe": {"evaluate": {"images": name}, "calibration": {}}})
        for name in ("test.npz", "train.npz")
    )
    assert marks(a, b) == {key: "other images" for key in ("top1", "top5", "agreement", "sqnr")}


def test_other_machines(report: Report) -> None:
    other = report.model_copy(update={"machine": "a phone"})
    assert marks(report, other) == {"prefill": "other machine", "decode": "other machine"}


def test_calibrated_on_another_text(make_report: Callable[..., Report]) -> None:
    """Errors of outputs hold for the inputs that they were measured on; those of weights hold for all."""
    a = make_report()
    b = with_recipe(make_report(bits=3, output="out/awq3", scale=4.0), calibration={"data": "chats.jsonl"})
    assert {layer.error for layer in compare(a, make_report(bits=3, output="out/awq3", scale=4.0)).layers} == {"output"}
    found = compare(a, b)
    assert {layer.error for layer in found.layers} == {"weight"}
    assert found.caveats == (
        "calibrated on different data (valid.txt and chats.jsonl): layers are compared by the error of their weights",
    )


def test_the_error_of_the_last_pass_is_called_that(make_report: Callable[..., Report]) -> None:
    def drawn(a: Report, b: Report) -> str:
        console = Console(width=100, file=io.StringIO(), color_system=None)
        console.print(compare_table(a, b))
        assert isinstance(console.file, io.StringIO)
        return " ".join(console.file.getvalue().split())

    both = make_report(), make_report(bits=3, output="out/awq3", scale=4.0)
    assert compare(*both).last_pass_alone
    assert "last pass last pass" in drawn(*both) and "that of the last one alone" in drawn(*both)
    alone = [report.model_copy(update={"stages": report.stages[:2]}) for report in both]
    assert not compare(*alone).last_pass_alone and "last pass" not in drawn(*alone)
