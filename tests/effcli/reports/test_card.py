"""The model card: front matter that parses, a way to load that fits the storage, and limits that are true."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from vision_report import vision_report

from effcli.reports.card import model_card
from effcli.reports.columns import became, export_lines
from effcli.reports.report import Classification, Exported, Latency, Quality, Report

BASE = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [old]\nbase_model: somebody/else\n---\n# Base\n"


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter(report: Report) -> None:
    front, _ = parts(model_card(report, BASE))
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert front["base_model_relation"] == "quantized"
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["effcli", "quantized", "awq", "gptq"]
    assert front["license"] == "apache-2.0" and front["language"] == ["en"]
    assert front["quantization"]["formats"] == ["int4 g64 asym", "int8 g64 asym"]


@pytest.mark.parametrize("model", ["./models/tiny", "/home/someone/models/tiny", "sample:lm", "tiny"])
def test_a_path_is_no_base_model_and_stays_private(report: Report, model: str) -> None:
    card = model_card(report.model_copy(update={"model": model}))
    front, body = parts(card)
    assert "base_model" not in front and "base_model_relation" not in front
    assert "someone" not in card
    assert model.rsplit("/", 1)[-1] in body


@pytest.mark.parametrize(
    "base", [None, "", "# no front matter", "---\n: [\n---\n", "---\n- a\n---\n", "---\nnever ended"]
)
def test_a_base_card_without_front_matter(report: Report, base: str | None) -> None:
    front, _ = parts(model_card(report, base))
    assert "license" not in front


def test_the_table_has_one_row_per_stage(report: Report) -> None:
    _, body = parts(model_card(report))
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(report.stages)
    assert {row.replace("\\|", "").count("|") for row in rows} == {rows[0].count("|")}
    assert "34.10 (+16.2%)" in rows[3] and "39.9±1.0% (-1.3 pt)" in rows[3]


def test_how_to_load(report: Report, bare_report: Report) -> None:
    standard = model_card(report)
    assert 'AutoModelForCausalLM.from_pretrained("awq4")' in standard and "compressed-tensors" in standard
    own = model_card(report, layout="effcli")
    assert 'effcli.load("awq4")' in own and "AutoModel" not in own
    assert parts(own)[0]["library_name"] == "effcli"
    assert "compressed-tensors" not in model_card(bare_report)


def test_an_image_classifier_is_loaded_as_one(report: Report) -> None:
    rows = tuple(row.model_copy(update={"kind": "conv"}) for row in report.stages[1].ledger)
    stage = report.stages[1].model_copy(update={"ledger": rows})
    card = model_card(report.model_copy(update={"stages": (report.stages[0], stage)}))
    assert "AutoModelForImageClassification" in card and "AutoTokenizer" not in card


def test_a_vision_network_is_a_module_of_tensors() -> None:
    card = model_card(vision_report(), layout="graph")
    front, body = parts(card)
    assert front["library_name"] == "effcli" and "base_model" not in front
    assert 'effcli.load("resnet20-int8")' in body and "float32 batch" in body
    assert "top-1 from 88.1% to 87.4% (-0.7 pt)" in body
    assert "AMD EPYC 9575F" in body and "10,000 images" in body
    for absent in ("transformers", "perplexity", "token", "language", "instructions"):
        assert absent not in card


def test_limits_of_a_vision_network_that_was_not_measured() -> None:
    found = vision_report()
    bare = [stage.model_copy(update={"quality": None, "latencies": ()}) for stage in found.stages]
    card = model_card(found.model_copy(update={"stages": tuple(bare), "verified": None}), layout="graph")
    assert "Not measured: top-1 on labelled inputs, the distance of its outputs from the original's, latency." in card
    assert "The passes observed calibration inputs." in card and "not verified" in card


def test_an_agreement_of_zero_was_measured() -> None:
    found = vision_report()
    lost = found.stages[-1].model_copy(
        update={"quality": Quality(classification=Classification(images=9, top1=0.0, agreement=0.0))}
    )
    card = model_card(found.model_copy(update={"stages": (*found.stages[:-1], lost)}), layout="graph")
    assert "Not measured" not in card


@pytest.mark.parametrize("model", ["models/net.pt2", "models/net.onnx", "nets/net.py"])
def test_a_file_is_no_base_model(report: Report, model: str) -> None:
    front, body = parts(model_card(report.model_copy(update={"model": model})))
    assert "base_model" not in front and model not in body


def test_code_in_the_card_compiles(report: Report) -> None:
    odd = report.model_copy(update={"output": 'out/it\'s "odd"'})
    for card in (model_card(odd), model_card(odd, layout="effcli"), model_card(odd, layout="graph")):
        compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_limits_say_what_was_observed_and_what_was_not(report: Report, bare_report: Report) -> None:
    full = model_card(report)
    assert "64 windows of 512 tokens of `valid.txt`" in full
    assert "Not measured" not in full and "largest logit difference 2.1e-05" in full
    bare = model_card(bare_report)
    assert "Not measured: perplexity" in bare and "speed." in bare
    assert "not verified" in bare and "observed" not in bare


def test_remarks_and_reasons_are_told(report: Report) -> None:
    card = model_card(report)
    assert "were joined" in card
    assert "kept `lm_head`: outside the blocks; lm\\_head: true takes it" in card


def test_text_cannot_break_out(report: Report) -> None:
    stage = report.stages[1].model_copy(
        update={"name": "a|b", "remarks": ("<script>x</script>\n---\n# forged",), "options": {"layers": {"`|`": 1}}}
    )
    card = model_card(report.model_copy(update={"stages": (report.stages[0], stage), "model": "x\n# y"}))
    assert "<script>" not in card
    assert "\n# forged" not in card and "\n# y" not in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {rows[0].count("|")}


def test_an_input_alone(bare_report: Report) -> None:
    card = model_card(bare_report.model_copy(update={"stages": bare_report.stages[:1]}))
    assert "not compressed" in card


def test_what_became_of_the_layers(report: Report) -> None:
    stage, row = report.stages[1], report.stages[1].ledger[0]
    kinds = ["compressed", "changed", "changed", "kept"]
    ledger = tuple(row.model_copy(update={"status": kind}) for kind in kinds)
    assert became(stage.model_copy(update={"ledger": ledger})) == "1 layer compressed, 2 layers changed, 1 kept"
    assert became(stage.model_copy(update={"ledger": ledger[1:3]})) == "2 layers changed, 0 kept"
    assert became(stage.model_copy(update={"ledger": ()})) == "no layer compressed, 0 kept"


def test_exports_are_named_with_their_speed(report: Report) -> None:
    latency = Latency(
        runtime="onnxruntime int8", milliseconds=0.25, fastest=0.2, repetitions=9, threads=1, device="a machine"
    )
    graph = Exported(target="onnx", nbytes=308_000, checked="top-1 agreement 100.0%", latencies=(latency,))
    speed = report.stages[1].speed
    language = Exported(target="onnx", nbytes=1000, speed=speed, remarks=("8 bits are slow",))
    exported = report.model_copy(update={"exports": (graph, language)})
    lines = export_lines(exported)
    assert lines[0] == "onnx: 308 kB; onnxruntime int8 0.250 ms; top-1 agreement 100.0%"
    assert lines[1].startswith("onnx: 1.00 kB; ") and lines[1].endswith("; 8 bits are slow") and "decode" in lines[1]
    assert "## Exports" in model_card(exported) and "## Exports" not in model_card(report)
