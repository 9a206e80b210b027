"""The model card of an output directory: front matter for the Hub, what was done, and what is not known."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from effcli.errors import RecipeError
from effcli.reports import units
from effcli.reports.columns import EMPTY_TEXT, Column, became, columns, conditions, export_lines
from effcli.reports.escaping import markdown, markdown_code
from effcli.reports.report import Classification, Layout, Quality, Report, Stage
from effcli.run import yaml_files as yamls

FILE_NAME = "README.md"
# The classes of transformers that load a model and prepare its inputs.
LANGUAGE = ("AutoModelForCausalLM", "AutoTokenizer")
IMAGES = ("AutoModelForImageClassification", "AutoImageProcessor")

_NETWORK_FILES = (".pt2", ".pt", ".pth", ".onnx", ".safetensors", ".py")

# What a compressed model takes over from the card of the model it was made from.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_FLOATS = ("bfloat16", "float16", "float32", "float64")


def model_card(
    report: Report,
    base_card: str | None = None,
    *,
    layout: Layout = "standard",
    loaders: tuple[str, str] = LANGUAGE,
    adapter: str = "",
) -> str:
    """The text of README.md.

    base_card: the README.md of the model that was compressed; its licence and language are taken over. layout:
    'standard' where transformers loads the directory, 'effcli' where only `effcli.load` does, 'graph' for a vision
    network, which `effcli.load` gives back as a module of tensors. loaders: the classes of transformers that load
    it and prepare its inputs. adapter: the folder of one that stands beside the weights, empty without.
    """
    parts = [
        f"---\n{yamls.dump(_front_matter(report, base_card, layout)).rstrip()}\n---",
        f"# {_title(report)}",
        _what(report),
        "## Figures",
        _table(columns(report)),
        "\n".join(f"- {text}" for text in [*conditions(report.stages), *_machine(report)]),
        "Changes and ratios are against the input. Sizes are powers of 1000.",
        "## How to load it",
        _loading(report, layout, loaders, adapter),
        *_exports(report),
        "## What was done",
        *(_step(stage) for stage in report.stages[1:]),
        "## Limits",
        "\n".join(f"- {text}" for text in _limits(report, layout)),
        f"Made with effcli {report.effcli_version}. `report.json` and `report.html` hold every layer's format and "
        "error; `recipe.yaml` repeats the run.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: Report, base_card: str | None, layout: Layout) -> dict[str, Any]:
    base = _base_front_matter(base_card)
    matter: dict[str, Any] = {key: base[key] for key in _INHERITED if key in base}
    quantized = _is_quantized(report)
    steps = [stage.name for stage in report.stages[1:]]
    # The Hub refuses a base model that is a path, and a link to a model of another owner would mislead.
    if _is_hub_id(report.model):
        matter["base_model"] = report.model
        if quantized:
            matter["base_model_relation"] = "quantized"
    matter["library_name"] = "transformers" if layout == "standard" else "effcli"
    tags = ["effcli", *(["quantized"] if quantized else []), *steps]
    matter["tags"] = list(dict.fromkeys(tags))
    if quantized:
        matter["quantization"] = {
            "passes": steps,
            "formats": _formats(report.stages[-1]),
            "bits_per_weight": round(report.stages[-1].bits_per_weight, 3),
        }
    return matter


def _base_front_matter(card: str | None) -> Mapping[str, Any]:
    """The front matter of another card; nothing where it has none or where it is not YAML."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card or "", re.DOTALL)
    if match is None:
        return {}
    try:
        found = yamls.parse(match[1], FILE_NAME)
    except RecipeError:
        return {}
    return found if isinstance(found, Mapping) else {}


def _title(report: Report) -> str:
    """The base model's name and the passes."""
    steps = ", ".join(stage.name for stage in report.stages[1:])
    return f"{markdown(_name(report.model))}: {steps}" if steps else markdown(_name(report.model))


def _name(model: str) -> str:
    return PurePath(model).name or model


def _what(report: Report) -> str:
    first, last = report.stages[0], report.stages[-1]
    model = markdown_code(_shown_model(report.model))
    if len(report.stages) == 1:
        return f"{model}, {units.size(first.nbytes)}, not compressed."
    text = f"{model} compressed from {units.size(first.nbytes)} to {units.size(last.nbytes)}"
    if last.nbytes:
        text += f" ({units.ratio(first.nbytes / last.nbytes)})"
    text += f", {units.bits(last.bits_per_weight)} bits per weight"
    if first.quality and last.quality and first.quality.perplexity and last.quality.perplexity:
        change = units.change(last.quality.perplexity, first.quality.perplexity)
        before, after = first.quality.perplexity, last.quality.perplexity
        text += f"; perplexity from {units.significant(before, 4)} to {units.significant(after, 4)} ({change})"
    one, two = _classification(first), _classification(last)
    if one.top1 is not None and two.top1 is not None:
        points = units.points(two.top1, one.top1)
        text += f"; top-1 from {units.fraction(one.top1)} to {units.fraction(two.top1)} ({points})"
    return text + "."


def _table(found: list[Column]) -> str:
    """The table in Markdown, notes in brackets after their figures."""
    head = [_headed(column) for column in found]
    lines = [_row(head), _row([":--" if not column.numeric else "--:" for column in found])]
    for index in range(len(found[0].cells)):
        cells = []
        for column in found:
            cell = column.cells[index]
            text = EMPTY_TEXT if cell is None else f"{cell.text} ({cell.note})" if cell.note else cell.text
            cells.append(markdown(text))
        lines.append(_row(cells))
    return "\n".join(lines)


def _headed(column: Column) -> str:
    """A column's title with its unit: `bits/weight`, `peak memory`, `prefill (tok/s)`."""
    if not column.unit or column.unit.startswith("/"):
        return markdown(column.title + column.unit)
    return markdown(f"{column.title} ({column.unit})")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(report: Report) -> list[str]:
    measured = any(stage.speed or stage.latencies for stage in report.stages)
    return [f"machine: {markdown(report.machine)}"] if measured and report.machine else []


def _loading(report: Report, layout: Layout, loaders: tuple[str, str], adapter: str) -> str:
    folder = json.dumps(_name(report.output) if report.output else ".")
    if layout == "graph":
        text = (
            f"{markdown_code('effcli.load')} returns a {markdown_code('torch.nn.Module')}. Call it with a float32 "
            "batch whose first dimension counts the inputs, prepared as for the original network."
        )
        code = (
            f"import torch\n\nimport effcli\n\nnetwork = effcli.load({folder}).eval()\n"
            "with torch.inference_mode():\n    outputs = network(batch)"
        )
    elif layout == "effcli":
        text = "No standard loader knows this storage; transformers refuses it. `effcli.load` reads it."
        code = f"import effcli\n\nmodel = effcli.load({folder})"
    else:
        text = "It loads with transformers."
        if _is_quantized(report):
            text = (
                f"It loads with transformers and {markdown_code('compressed-tensors')}, which unpack the weights; "
                f"{markdown_code('effcli.load')} computes with the packed ones."
            )
        loader, companion = IMAGES if _has_convolutions(report) else loaders
        name = "tokenizer" if companion == "AutoTokenizer" else "processor"
        code = (
            f"from transformers import {companion}, {loader}\n\n"
            f"model = {loader}.from_pretrained({folder})\n"
            f"{name} = {companion}.from_pretrained({folder})"
        )
    if adapter:
        text += (
            f" An adapter stands beside the weights, in {markdown_code(adapter)}: {markdown_code('effcli.load')} gives "
            "the model with it, and so does PEFT. The pass `merge` adds it to the weights."
        )
        if layout == "standard":
            name = json.dumps(f"{_name(report.output) if report.output else '.'}/{adapter}")
            code = f"from peft import PeftModel\n{code}\nmodel = PeftModel.from_pretrained(model, {name})"
    return f"{text}\n\n```python\n{code}\n```"


def _exports(report: Report) -> list[str]:
    lines = export_lines(report)
    return ["## Exports", "\n".join(f"- {markdown(line)}" for line in lines)] if lines else []


def _step(stage: Stage) -> str:
    kept = [row for row in stage.ledger if row.status == "kept"]
    given = {key: value for key, value in stage.options.items() if value not in ((), [], {}, None)}
    options = [f"{key} {markdown_code(_value(value))}" for key, value in given.items()]
    text = f"**{markdown(stage.name)}**" + (f" with {', '.join(options)}" if options else "")
    text += f": {became(stage)}."
    lines = [text, ""]
    reasons: dict[str, list[str]] = {}
    for row in kept:
        reasons.setdefault(row.reason or "no reason recorded", []).append(row.name)
    for reason, names in reasons.items():
        which = markdown_code(names[0]) if len(names) == 1 else f"{markdown_code(names[0])} and {len(names) - 1} more"
        lines.append(f"- kept {which}: {markdown(reason)}")
    lines += [f"- {markdown(remark)}" for remark in stage.remarks]
    return "\n".join(lines).rstrip()


def _limits(report: Report, layout: Layout) -> list[str]:
    """What was measured, on what, and what was not."""
    vision = layout == "graph" or _has_convolutions(report)
    found = _vision_limits(report) if vision else _text_limits(report)
    if layout == "standard" and _is_quantized(report):
        found.append("transformers unpacks the weights to compute with them: there the gain is on disk, not in speed.")
    unknown = "Robustness, bias and other sources of images" if vision else "Safety, bias and long contexts"
    found.append(f"{unknown} were not evaluated after compression; the original's limits stay.")
    found.append(
        f"Reloaded and compared: {markdown(report.verified)}."
        if report.verified
        else "The directory was not verified by reloading it: run `effcli verify` on it."
    )
    return found


def _text_limits(report: Report) -> list[str]:
    last = report.stages[-1]
    quality = last.quality or Quality()
    found = []
    calibration = report.recipe.get("calibration")
    if _observed(report):
        text = "The passes observed"
        if isinstance(calibration, Mapping) and {"samples", "length"} <= calibration.keys():
            data = calibration.get("data")
            source = f"of {markdown_code(_name(str(data)))}" if data else "of the sample model's own text"
            text += f" {calibration['samples']} windows of {calibration['length']} tokens {source}"
        else:
            text += " calibration text"
        found.append(f"{text}. On other languages, domains or lengths the loss may be larger than the table says.")
    found += _not_measured(
        {
            "perplexity": quality.perplexity,
            "the distance of its predictions from the original's": quality.kl,
            "accuracy on tasks": quality.accuracy,
            "speed": last.speed,
        }
    )
    if quality.perplexity is not None:
        tokens = f" of {units.count(quality.tokens, 'token')}" if quality.tokens else ""
        found.append(f"Perplexity is that of one text{tokens}; it says little of following instructions or reasoning.")
    if last.speed is not None:
        found.append(
            f"Speed is that of effcli.load's kernels on {markdown(last.speed.device)}; "
            "another runtime or machine will differ."
        )
    return found


def _vision_limits(report: Report) -> list[str]:
    last = report.stages[-1]
    classified = _classification(last)
    found = []
    if _observed(report) or any(stage.activations for stage in report.stages):
        found.append(
            "The passes observed calibration inputs. On inputs unlike them the loss may be larger than the table says."
        )
    if any(stage.activations for stage in report.stages):
        found.append("`probe.npz` holds a few of the calibration inputs: take it out if these must not be passed on.")
    found += _not_measured(
        {
            "top-1 on labelled inputs": classified.top1,
            "the distance of its outputs from the original's": classified.sqnr
            if classified.agreement is None
            else classified.agreement,
            "latency": last.latencies or None,
        }
    )
    if classified.top1 is not None:
        images = units.count(classified.images, "image")
        found.append(f"Top-1 is that of one test set of {images}; classes it lacks or has few of are not judged by it.")
    if last.latencies:
        devices = " and ".join(dict.fromkeys(markdown(latency.device) for latency in last.latencies))
        found.append(f"Latency is that of one input on {devices}; another runtime, batch or machine will differ.")
    return found


def _has_convolutions(report: Report) -> bool:
    return any(row.kind == "conv" for stage in report.stages for row in stage.ledger)


def _observed(report: Report) -> bool:
    return any(row.output_error is not None for stage in report.stages for row in stage.ledger)


def _not_measured(figures: Mapping[str, object]) -> list[str]:
    """One line for the figures that are None."""
    missing = [name for name, figure in figures.items() if figure is None]
    return [f"Not measured: {', '.join(missing)}."] if missing else []


def _classification(stage: Stage) -> Classification:
    """What a classifier was found to make of its inputs; without a figure where it was not measured."""
    return (stage.quality and stage.quality.classification) or Classification(images=0)


def _is_quantized(report: Report) -> bool:
    return any(not name.startswith(_FLOATS) for name in _formats(report.stages[-1]))


def _formats(stage: Stage) -> list[str]:
    """The formats of the compressed layers, the most common first."""
    counts: dict[str, int] = {}
    for row in stage.ledger:
        if row.status == "compressed":
            counts[row.format] = counts.get(row.format, 0) + 1
    return sorted(counts, key=lambda name: (-counts[name], name))


def _shown_model(model: str) -> str:
    """A path says more about its owner's disk than about the model: its last part is enough."""
    return model if _is_hub_id(model) else _name(model)


def _is_hub_id(model: str) -> bool:
    """Whether `model` can be a repository of the Hub: 'owner/name', and not the path of a network's file."""
    return bool(_HUB_ID.fullmatch(model)) and not model.startswith(".") and not model.endswith(_NETWORK_FILES)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
