"""One sentence says what became of size and quality, and where the result runs."""

from __future__ import annotations

from collections.abc import Callable

from pages import checked
from vision_report import vision_report

from effcli.reports import html
from effcli.reports.html_summary import sentence
from effcli.reports.report import Exported, Quality, Report


def test_a_language_model(make_report: Callable[..., Report]) -> None:
    report = make_report()
    evaluate = {"perplexity": "test.txt", "choices": "arc_easy.jsonl"}
    exports = (Exported(target="gguf", nbytes=1), Exported(target="onnx", nbytes=1))
    report = report.model_copy(
        update={"recipe": {"evaluate": evaluate}, "layout": "standard", "exports": exports, "output": None}
    )
    assert sentence(report) == (
        "SmolLM2-135M is 2.36x smaller: 114 MB instead of 269 MB; "
        "its perplexity on test.txt is 32.40 instead of 29.35 (+10.4%); "
        "it gets 38.0% instead of 41.2% of the questions in arc_easy.jsonl right; it loads with transformers; "
        "it is exported to gguf, onnx; with effcli.load on Intel Xeon (AMX) it writes text 1.87x as fast as before."
    )
    assert checked(html.render(report)).root.one("p", "summary").text == sentence(report)


def test_a_vision_network() -> None:
    found = sentence(vision_report().model_copy(update={"layout": "graph"}))
    assert "of the images right; it loads with effcli.load; on AMD EPYC" in found and "as fast as before." in found


def test_where_little_is_known(bare_report: Report) -> None:
    first, last = bare_report.stages
    assert sentence(bare_report) == "sample:lm takes 1.00 kB, as before; its quality was not measured."
    alone = bare_report.model_copy(update={"stages": (first,), "layout": "standard"})
    assert sentence(alone) == "sample:lm takes 1.00 kB and was measured, not compressed."
    larger = last.model_copy(update={"nbytes": 2000, "quality": Quality(perplexity=3.0)})
    own = bare_report.model_copy(update={"stages": (first, larger), "layout": "effcli"})
    assert sentence(own) == (
        "sample:lm is 2.00x larger: 2.00 kB instead of 1.00 kB; its quality was not measured; "
        "it loads with effcli.load, not with transformers."
    )


def test_unchanged_accuracy(make_report: Callable[..., Report]) -> None:
    report = make_report()
    first, *_, last = report.stages
    same = last.model_copy(update={"quality": first.quality})
    assert "41.2% of the questions right, as before" in sentence(report.model_copy(update={"stages": (first, same)}))
