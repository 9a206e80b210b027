"""Wrong answers of passes: each is an error that names the pass, the layer, what came and what must come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import packages
import pytest
import torch
from pydantic import Field
from small_graphs import batches, chain, inputs
from torch import Tensor, nn

from effcli.cli import main
from effcli.errors import PluginError
from effcli.formats import Affine, Mask, NOfM
from effcli.graphs.sweep import graph_sweep
from effcli.graphs.training import train
from effcli.layers.contract import (
    AttachPass,
    CutPass,
    Group,
    Layer,
    LayerPass,
    Needs,
    NetworkPass,
    Outcome,
    ScalingPass,
    Statistics,
    Transformed,
    carry_out,
)
from effcli.passes.quantize._affine import encode, extremes
from effcli.run.recipe import PassStep
from effcli.search.costs import Probe


class Answers(LayerPass):
    """Returns what a test says."""

    made: Callable[[Layer], Any]

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        return self.made(layer)  # type: ignore[no-any-return]


LAYER = Layer("block.dense", "linear", torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.float32)


def packed(weight: Tensor) -> Any:
    format = Affine(8, "channel")
    return encode(weight, *extremes(weight, format), format, torch.float32)


WRONG: dict[str, tuple[Callable[[Layer], Any], str, str]] = {
    "bare": (lambda layer: layer.weight, r"returned a tensor \(4, 6\) of float32", "an `Outcome`"),
    "nothing": (lambda layer: None, "returned None", "an `Outcome`"),
    "a list": (lambda layer: Outcome([1.0]), "a weight that is of the type list", r"a weight \(4, 6\)"),  # type: ignore[arg-type]
    "transposed": (lambda layer: Outcome(layer.weight.T), r"a tensor \(6, 4\) of float32", r"a weight \(4, 6\)"),
    "integers": (lambda layer: Outcome(layer.weight.int()), r"a tensor \(4, 6\) of int32", "floating or in a format"),
    "packed of another shape": (
        lambda layer: Outcome(packed(layer.weight[:2])),
        r"a weight \(2, 6\) stored as int8",
        r"a weight \(4, 6\)",
    ),
    "notes": (
        lambda layer: Outcome(layer.weight, {"scale": torch.ones(2)}),
        r"the note 'scale' that is a tensor \(2,\)",
        "notes that JSON can hold",
    ),
    "no notes": (lambda layer: Outcome(layer.weight, 3), "notes that are of the type int", "notes that JSON"),  # type: ignore[arg-type]
    "a bare mask": (
        lambda layer: Outcome(layer.weight, {}, layer.weight > 0),  # type: ignore[arg-type]
        r"a tensor \(4, 6\) of bool",
        "a mask that is a `Mask`",
    ),
    "a mask of another shape": (
        lambda layer: Outcome(layer.weight, {}, Mask(layer.weight[:2] > 0)),
        r"a mask that is a tensor \(2, 6\)",
        r"one that is bool \(4, 6\)",
    ),
    "a pattern by name": (
        lambda layer: Outcome(layer.weight, {}, Mask(layer.weight > 0, "bitmask")),  # type: ignore[arg-type]
        "of the type str",
        "a mask whose pattern is a `Pattern`",
    ),
    "a mask of another pattern": (
        lambda layer: Outcome(layer.weight, {}, Mask(torch.ones(4, 6, dtype=torch.bool), NOfM(1, 2))),
        "a mask that is not of its pattern",
        "one that is",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("groups", [1, 2])
def test_outcomes(name: str, groups: int) -> None:
    made, came, wanted = WRONG[name]
    layer = LAYER
    if groups == 2:
        layer = Layer(LAYER.name, "conv", torch.cat([LAYER.weight, LAYER.weight]), torch.float32)
    seen = [Statistics(6, Needs.NOTHING)] * (groups if groups > 1 else 0)
    with pytest.raises(PluginError, match=f"the pass Answers returned .*for block.dense; .*{wanted}") as caught:
        carry_out(Answers(made=made), layer, seen)
    assert caught.match(came) and caught.value.remedy == "mend `Answers.apply`"


@pytest.mark.parametrize(
    ("shift", "biased", "wanted"),
    [
        (torch.ones(4), False, "none, for the layer has no bias"),
        (torch.ones(6), True, r"a floating one \(4,\)"),
        (torch.ones(4).long(), True, r"a floating one \(4,\)"),
        (torch.full((4,), torch.nan), True, "finite numbers"),
    ],
)
def test_shifts_of_a_bias(shift: Tensor, biased: bool, wanted: str) -> None:
    layer = dataclasses.replace(LAYER, biased=biased)
    with pytest.raises(PluginError, match=wanted):
        carry_out(Answers(made=lambda layer: Outcome(layer.weight, shift=shift)), layer)


def test_a_weight_that_no_mask_goes_around() -> None:
    from effcli.formats import Quantized

    class Foreign(Quantized):
        shape = (4, 6)
        format = "shift4"

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    Foreign.__abstractmethods__ = frozenset()
    layer = Layer("dense", "linear", LAYER.weight, torch.float32, mask=Mask(LAYER.weight > 0))
    with pytest.raises(PluginError, match=r"stored as shift4 .* in a format of numbers, for some of its weights"):
        carry_out(Answers(made=lambda layer: Outcome(Foreign())), layer)  # type: ignore[abstract]


def holed(value: float, pack: bool) -> Callable[[Layer], Any]:
    """The weight with one number that is `value`, or packed with a scale that is."""

    def made(layer: Layer) -> Outcome:
        weight = layer.weight.clone()
        if not pack:
            weight[1, 2] = value
            return Outcome(weight)
        found = packed(weight)
        found.scale[1] = value
        return Outcome(found)

    return made


def net() -> Any:
    return chain((4,), nn.Linear(4, 6), "relu.default", nn.Linear(6, 3))


def swept(config: Any, tmp_path: Path) -> Any:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    graph = net()
    graph.save(source)
    step = PassStep(name="own", config=config)
    return graph_sweep(source, target, step, batches(graph) if config.needs else None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pack", [False, True])
def test_numbers_that_are_not_finite(value: float, pack: bool, tmp_path: Path) -> None:
    made = holed(value, pack)
    with pytest.raises(PluginError, match=r"returned a weight with . NaN or infinite numbers from `apply` for layer0"):
        swept(Answers(made=made), tmp_path)
    assert not any((tmp_path / "target").iterdir())
    with pytest.raises(PluginError, match=r"NaN or infinite numbers from `apply` for block\.dense"):
        Probe().apply(Answers(made=made), LAYER)


def test_large_numbers_are_finite(tmp_path: Path) -> None:
    """Their squares are not, and that is no fault of the pass."""
    assert len(swept(Answers(made=lambda layer: Outcome(layer.weight * 1e30)), tmp_path).ledger) == 2


class Scales(ScalingPass):
    """Finds the factor that a test says."""

    found: Any

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    def scale(self, group: Group, seen: Statistics) -> tuple[Tensor, Mapping[str, Any]]:
        return self.found  # type: ignore[no-any-return]

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        return Outcome(layer.weight)


@pytest.mark.parametrize(
    ("found", "came"),
    [
        (torch.ones(6), r"a tensor \(6,\) of float32"),
        ((torch.ones(5), {}), r"a tensor \(5,\) of float32"),
        ((torch.ones(6, dtype=torch.int64), {}), "int64"),
        ((torch.tensor([1.0, 2, float("nan"), 1, 1, 1]), {}), "1 factors that are NaN"),
        ((torch.tensor([1.0, 2, 0, -1, 1, float("inf")]), {}), "3 factors that are NaN, infinite or not above 0"),
        ((torch.ones(6), {"by": object()}), "the note 'by' that is of the type object"),
        (([1.0] * 6, {}), "of the type list"),
    ],
)
def test_factors(found: Any, came: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=rf"the pass Scales returned .*{came}.* from `scale` for layer2; it must"):
        swept(Scales(found=found), tmp_path)


class Network(NetworkPass):
    """Returns what a test says."""

    made: Any

    def transform(self, graph: Any, seen: Any) -> Transformed:
        return self.made(graph)  # type: ignore[no-any-return]


def with_nan(graph: Any) -> Transformed:
    graph.layer("layer2").weight[0, 0] = float("nan")
    return Transformed(graph)


@pytest.mark.parametrize(
    ("made", "came"),
    [
        (lambda graph: graph, "of the type Graph from `transform`; it must return a `Transformed`"),
        (lambda graph: Transformed(graph.module), "of the type GraphModule from `transform`; .* a graph or an integer"),
        (lambda graph: Transformed(graph, {"layer0": {"x": graph}}), "the note 'x' .* for layer0"),
        (with_nan, "a weight with 1 NaN or infinite numbers from `transform` for layer2.weight"),
    ],
)
def test_networks(made: Callable[[Any], Any], came: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=came):
        swept(Network(made=made), tmp_path)
    assert not any((tmp_path / "target").iterdir())


class Cuts(CutPass):
    """Returns what a test says."""

    made: Any

    def cut(self, groups: Any, seen: Any) -> Any:
        return self.made


@pytest.mark.parametrize(("made", "came"), [(None, "None"), ([torch.ones(6)], r"a tensor \(6,\)"), (3, "the type int")])
def test_cuts(made: Any, came: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=f"{came}.* from `cut`; it must return a list of `Cut`"):
        swept(Cuts(made=made), tmp_path)


class Trains(AttachPass):
    """Fine-tuning to zero, of which a test changes one method."""

    epochs: int = 1
    answers: dict[str, Any] = Field(default_factory=dict)

    def attach(self, layer: Layer) -> nn.Module | None:
        return self.answers.get("attach", nn.Identity())  # type: ignore[no-any-return]

    def loss(self, step: Any) -> Tensor:
        return self.answers.get("loss", lambda outputs: outputs.square().mean())(step.outputs)  # type: ignore[no-any-return]

    def measure(self, step: Any) -> tuple[float, float]:
        return self.answers["measure"] if "measure" in self.answers else super().measure(step)

    def optimizer(self, parameters: Any) -> Any:
        return self.answers["optimizer"] if "optimizer" in self.answers else super().optimizer(parameters)

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        return self.answers.get("finish", Outcome)(layer.weight)  # type: ignore[no-any-return]


class Transposes(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.T


class Rows:
    """Inputs without labels."""

    labels = None

    def __init__(self, given: Tensor) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    def batches(self, size: int, order: Any = None) -> Any:
        rows = self.given if order is None else self.given[torch.from_numpy(order)]
        return ((part, None) for part in rows.split(size))


@pytest.mark.parametrize(
    ("method", "answer", "came"),
    [
        ("attach", 3, "of the type int from `attach` for layer0; it must return a module, or None"),
        ("attach", Transposes(), r"a module that gives a tensor \(4, 6\) .*`attach` for layer0; .*weight \(6, 4\)"),
        ("loss", lambda outputs: outputs, r"a tensor \(4, 3\) of float32 from `loss`; it must return a scalar tensor"),
        ("loss", lambda outputs: 0.5, "of the type float from `loss`"),
        ("loss", lambda outputs: outputs.detach().mean(), "a tensor without a gradient from `loss`"),
        ("measure", 0.5, "of the type float from `measure`; it must return two numbers"),
        ("optimizer", None, "None from `optimizer`; it must return an optimizer of torch"),
        ("finish", lambda weight: weight, r"a tensor \(6, 4\) of float32 from `finish` for layer0; .* an `Outcome`"),
        (
            "finish",
            lambda weight: Outcome(weight / 0),
            "a weight with 24 NaN or infinite numbers from `finish` for layer0",
        ),
    ],
)
def test_trainings(method: str, answer: Any, came: str) -> None:
    graph = net()
    config = Trains(answers={method: answer})
    chosen: dict[str, Any] = {"layer0": config, "layer2": config}
    with pytest.raises(PluginError, match=f"the pass Trains returned {came}"):
        train(graph, "own", config, Rows(inputs(graph, 8)), chosen, batch_size=4)


WRONG_PASS = '''
from effcli.layers.contract import LayerPass


class Bare(LayerPass):
    """Halve each weight, and forget the outcome."""

    def apply(self, layer, seen):
        return layer.weight / 2
'''


@pytest.mark.parametrize("model", ["sample:cnn", "sample:lm"])
def test_the_package_is_named(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"effcli.passes": {"own": "effcli_wrong:Bare"}}
    packages.install(tmp_path / "site", "effcli-wrong", groups, {"effcli_wrong.py": WRONG_PASS})
    monkeypatch.syspath_prepend(tmp_path / "site")
    code = main(["compress", model, "--pass", "own", "--no-eval", "--quiet", "-o", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code == 2 and "internal error" not in said and "Traceback" not in said
    *stages, first, second = said.splitlines()
    assert len(stages) == 1 and stages[0].startswith("input: ")
    assert first.startswith("error: the pass 'own' of the package effcli-wrong returned a tensor (")
    assert " from `apply` for " in first and first.endswith("; it must return an `Outcome`")
    assert second == "  report it to those who make effcli-wrong"
