"""The engine on a network of plain matrices: which inputs get a factor, what layers are given, what the ledger says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from effcli.formats import Affine, Quantized
from effcli.layers.contract import Group, Layer, Needs, Outcome, ScalingPass, Statistics
from effcli.layers.engine import LayerEngine
from effcli.layers.layer import LayerSite
from effcli.layers.network import Factors, Held, Readers, among
from effcli.layers.selection import Choice
from effcli.passes.quantize._affine import encode, extremes

FACTOR = torch.tensor([2.0, 0.5, 4.0])


class Doubling(ScalingPass):
    """Takes FACTOR for every input, and leaves the weights or rounds them to 8 bits."""

    seen: ClassVar[dict[str, Statistics]] = {}
    groups: ClassVar[list[Group]] = []
    stays: Literal["unscaled", "explicit"] = "unscaled"
    packs: bool = True

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    @property
    def without_scale(self) -> Literal["unscaled", "explicit"]:
        return self.stays

    def scale(self, group: Group, seen: Statistics) -> tuple[Tensor, Mapping[str, Any]]:
        self.groups.append(group)
        return FACTOR, {"of": len(group.layers)}

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        self.seen[layer.name] = seen
        format = Affine(8, "channel")
        low, high = extremes(layer.weight, format)
        return Outcome(encode(layer.weight, low, high, format, layer.dtype) if self.packs else layer.weight)


class Matrices:
    """x -> first -> (left, right), each a matrix; the producer is first, unless there is a reason against it."""

    def __init__(self, reason: str = "", dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.factors = Factors()
        shapes = {"first": (3, 5), "left": (4, 3), "right": (2, 3)}
        self.weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.before = {name: weight.clone() for name, weight in self.weights.items()}
        self.reason, self.dtype = reason, dtype
        # What a producer of low precision makes of a factor.
        self.taken = 1.0

    def sites(self, groups: int = 1) -> dict[str, LayerSite]:
        return {
            name: LayerSite(name, "linear", f"{name}.weight", *weight.shape, groups=groups if name == "left" else 1)
            for name, weight in self.weights.items()
        }

    def choices(self, options: ScalingPass, left_out: tuple[str, ...] = (), groups: int = 1) -> dict[str, Choice]:
        return {
            name: Choice(site, None, "left out") if name in left_out else Choice(site, options)
            for name, site in self.sites(groups).items()
        }

    def readers(self) -> list[Readers]:
        channel = None if self.reason else torch.arange(3)
        produces = "" if self.reason else "first"
        producer = None if self.reason else "the first"
        return [Readers(0, ("left", "right"), producer, self.reason, produces, channel, columns=torch.arange(3))]

    def read(self, site: LayerSite) -> Layer:
        # A view: what the engine compares with must not change under it.
        return Layer(site.name, site.kind, self.weights[site.name], self.dtype)

    def divide(self, readers: Readers, factor: Tensor) -> Tensor:
        factor = factor * self.taken
        self.weights["first"] /= factor.unsqueeze(1)
        self.factors.divide("first", factor)
        return factor

    def multiply(self, site: LayerSite, factor: Tensor) -> None:
        self.weights[site.name] *= factor
        self.factors.columns[site.name] = factor

    def write(self, site: LayerSite, weight: Quantized | Tensor, effective: Tensor) -> Held:
        self.weights[site.name].copy_(effective)
        return Held.of(weight, macs=7, parameters=weight.shape[0])

    def held(self, site: LayerSite) -> Held:
        return Held.of(self.weights[site.name])


def statistics(features: int, seed: int) -> tuple[Statistics, Tensor]:
    inputs = torch.randn(50, features, generator=torch.Generator().manual_seed(seed))
    made = Statistics(features, Needs.GRAM)
    made.add(inputs)
    return made, inputs


def carried_out(network: Matrices, choices: Mapping[str, Choice]) -> tuple[LayerEngine, dict[str, Tensor]]:
    """All layers in their order, with random inputs; returns those of each."""
    Doubling.seen.clear()
    Doubling.groups.clear()
    engine = LayerEngine(network, choices)
    (shared, behind), (own, before) = statistics(3, 1), statistics(5, 2)
    seen = engine.scale({name: (own if name == "first" else shared,) for name in engine.taken})
    for name in engine.taken:
        engine.compress(name, seen[name])
    return engine, {"first": before, "left": behind, "right": behind}


def test_a_factor_moves_from_the_readers_to_their_producer() -> None:
    network = Matrices()
    network.taken = 1.25
    engine, inputs = carried_out(network, network.choices(Doubling()))
    (group,) = Doubling.groups
    assert [layer.name for layer in group.layers] == ["left", "right"]
    assert group.channel is not None and group.channel.tolist() == [0, 1, 2]
    torch.testing.assert_close(Doubling.groups[0].layers[0].weight, network.weights["left"])
    taken = FACTOR * network.taken
    for name in ("left", "right"):
        torch.testing.assert_close(network.weights[name] / taken, network.before[name], rtol=0.05, atol=0.05)
        expected = (inputs[name] / taken).T @ (inputs[name] / taken)
        torch.testing.assert_close(Doubling.seen[name].matrix, expected, rtol=1e-4, atol=1e-4)
        assert engine.row(name).notes == {"of": 2, "folded_into": "the first"}
    assert Doubling.seen["left"] is Doubling.seen["right"], "what a pass remembers of shared inputs is made once"
    torch.testing.assert_close(network.weights["first"] * taken[:, None], network.before["first"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reason", ["", "none before it"])
def test_errors_are_told_of_the_layers_as_they_were(reason: str) -> None:
    network = Matrices(reason)
    engine, inputs = carried_out(network, network.choices(Doubling(stays="explicit")))
    for name, x in inputs.items():
        rows, columns = network.factors.of(name)
        made = network.weights[name].double()
        if not reason:
            made = made if rows is None else made * rows[:, None].double()
            made = made if columns is None else made / columns.double()
        row, before = engine.row(name), network.before[name].double()
        error = float((made - before).square().sum() / before.square().sum())
        assert error > 0 and row.weight_error == pytest.approx(error, rel=1e-3)
        outputs = x.double() @ before.T
        error = float((x.double() @ made.T - outputs).square().sum() / outputs.square().sum())
        assert row.output_error == pytest.approx(error, rel=1e-3)
        assert (row.status, row.macs, row.parameters) == ("compressed", 7, len(before))
    assert [item.layer for item in engine.histograms] == ["first", "left", "right"]


def test_a_factor_stays_on_the_input_where_the_pass_asks_for_it() -> None:
    network = Matrices("none before it", torch.bfloat16)
    engine, inputs = carried_out(network, network.choices(Doubling(stays="explicit")))
    for name in ("left", "right"):
        torch.testing.assert_close(network.weights[name], network.before[name], rtol=0.05, atol=0.05)
        scaled = inputs[name] / FACTOR
        torch.testing.assert_close(Doubling.seen[name].matrix, scaled.T @ scaled, rtol=1e-4, atol=1e-4)
        assert engine.row(name).reason == "its scale stays explicit on its input: none before it"
        assert engine.row(name).notes == {"of": 2}
    assert Doubling.seen["left"] is Doubling.seen["right"]
    dense = Matrices("none before it")
    engine, _ = carried_out(dense, dense.choices(Doubling(stays="explicit", packs=False)))
    torch.testing.assert_close(dense.weights, dense.before)
    assert engine.row("left").status == "changed" and engine.row("left").weight_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("left_out", "groups", "reason", "said"),
    [
        (("right",), 1, "", "right reads the same input and is left alone"),
        (("right",), 1, "none before it", "right reads the same input and is left alone"),
        (("first",), 1, "", "first, which produces its input, is left alone"),
        ((), 1, "none before it", "none before it"),
        ((), 2, "", "it is a grouped convolution"),
    ],
)
def test_why_an_input_gets_no_factor(left_out: tuple[str, ...], groups: int, reason: str, said: str) -> None:
    network = Matrices(reason)
    choices = network.choices(Doubling(), left_out, groups)
    engine, _ = carried_out(network, choices)
    assert engine.row("left").reason == f"unscaled: {said}" and not network.factors.columns
    for name in left_out:
        assert (engine.row(name).status, engine.row(name).reason) == ("kept", "left out")
        torch.testing.assert_close(network.weights[name], network.before[name])


def test_a_layer_that_nothing_reached() -> None:
    network = Matrices()
    engine = LayerEngine(network, network.choices(Doubling()))
    empty = (Statistics(3, Needs.GRAM),)
    seen = engine.scale({"left": empty, "right": empty})
    engine.compress("left", seen["left"])
    row = engine.row("left")
    assert row.reason == "no calibration token reached it: rounded without activations"
    assert row.output_error is None and row.notes == {}


def test_values_of_columns_by_channel() -> None:
    columns, factor = torch.tensor([0, 0, 2, 2, 1, 1]), torch.tensor([2.0, 2, 3, 3, 5, 5])
    assert among(columns, factor).tolist() == [2, 5, 3]
