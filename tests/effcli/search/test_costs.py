"""A pass under observation: errors by hand, scales undone, groups joined, and nothing changed by looking on."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor

from effcli.layers.contract import UNSEEN, Layer, LayerPass, Needs, Outcome, Statistics
from effcli.run.recipe import PassStep
from effcli.search.costs import Cost, Probe, Slopes, Trial, energies, steadied


def gram(inputs: Tensor) -> Statistics:
    found = Statistics(inputs.shape[1])
    found.add(inputs)
    return found


class Halving(LayerPass):
    """A pass that halves every weight, and remembers what it was given."""

    asks: Needs = Needs.GRAM
    _given: list[Statistics] = PrivateAttr(default_factory=list)

    @property
    def needs(self) -> Needs:
        return self.asks

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        self._given.append(seen)
        return Outcome(layer.weight / 2)


def layer(weight: Tensor, name: str = "a") -> Layer:
    return Layer(name, "linear", weight, torch.float32)


def test_slopes_by_hand() -> None:
    biased = torch.zeros(1, 2), torch.tensor([3.0])
    found = Slopes([(torch.tensor([[1.0, 0.0]]), None), (torch.tensor([[0.0, 2.0]]), None), biased])
    # The gradient of the weight is 1·(1, 2) + 3·(3, 0) = (10, 2), and then 2·(0, 5) = (0, 10).
    found.add(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[[1.0], [3.0]]]))
    found.end_sample()
    # One sample may come in two calls.
    found.add(torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0]]))
    found.add(torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0]]))
    found.end_sample()
    found.end_sample()

    # That of the bias is 1 + 3, and then 2 + 2.
    assert found.squares == [100.0, 16.0 + 400.0, 144.0 + 144.0]


def test_costs_by_hand() -> None:
    # Halved, the rows [2, 0] and [0, 4] leave errors of 1 and 2 per unit of input, over inputs (1, 1) and (3, 0).
    probe = Probe(keep_weights=True)
    seen = gram(torch.tensor([[1.0, 1.0], [3.0, 0.0]]))
    probe.apply(Halving(), layer(torch.tensor([[2.0, 0.0], [0.0, 4.0]])), (seen,))
    trial = probe.trials["a"]

    assert trial.energy is not None and trial.whole is not None and trial.weight is not None
    assert trial.energy.tolist() == [5.0, 2.0]
    assert trial.whole.tolist() == [20.0, 8.0]
    assert trial.output_error == 0.25
    assert trial.weight.tolist() == [[1.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize("shifted", [False, True])
def test_energies_are_the_mean_squares_of_the_outputs(shifted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    shift = torch.randn(7, generator=generator) if shifted else None
    seen = Statistics(5, Needs.GRAM | Needs.MEANS)
    seen.add(inputs)
    outputs = inputs.double() @ weight.double().t() + (0 if shift is None else shift)
    torch.testing.assert_close(
        energies(weight, [seen], shift), outputs.square().mean(0), check_dtype=False, rtol=1e-5, atol=1e-5
    )
    two = [gram(inputs), gram(2 * inputs)]
    expected = torch.cat([energies(weight[:4], two[:1]), 4 * energies(weight[4:], two[:1])])
    torch.testing.assert_close(energies(weight, two), expected)
    assert energies(weight[:0], [gram(inputs)]).shape == (0,)


def test_a_scaled_layer_is_told_of_as_it_was() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(4, 3, generator=generator), torch.randn(9, 3, generator=generator)
    rows, columns = torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.tensor([0.5, 2.0, 3.0])
    plain, scaled = Probe(keep_weights=True), Probe(keep_weights=True)
    scaled.factors = lambda name: (rows, columns)
    plain.apply(Halving(), layer(weight), (gram(inputs),))
    scaled.apply(Halving(), layer(weight * columns / rows.unsqueeze(1)), (gram(inputs).rescaled(columns),))

    for key in ("energy", "whole", "weight"):
        torch.testing.assert_close(getattr(scaled.trials["a"], key), getattr(plain.trials["a"], key))


def test_inputs_that_a_pass_does_not_ask_for_are_kept_from_it() -> None:
    halving = Halving(asks=Needs.NOTHING)
    seen = gram(torch.ones(2, 3))
    probe = Probe()
    probe.apply(halving, layer(torch.ones(2, 3)), (seen,))
    # A layer of two groups is given whole.
    probe.apply(halving, layer(torch.ones(4, 3), "b"), (seen, seen))

    assert halving._given == [UNSEEN, UNSEEN]
    assert probe.trials["a"].output_error == probe.trials["b"].output_error == 0.25
    assert probe.trials["a"].weight is None


def test_groups_seen_one_by_one_become_one_layer() -> None:
    halving, probe = Halving(), Probe(keep_weights=True)
    parts = torch.arange(12.0).view(2, 2, 3)
    seen = gram(torch.eye(3)), gram(torch.eye(3))
    probe.apply(halving, layer(parts.view(4, 3)), seen)
    assert halving._given == list(seen)
    trial = probe.trials["a"]

    assert trial.weight is not None
    torch.testing.assert_close(trial.weight, parts.view(4, 3) / 2)
    assert trial.output_error == pytest.approx(0.25)


def test_an_output_that_is_always_zero() -> None:
    probe = Probe()
    probe.apply(Halving(), layer(torch.zeros(2, 3)), (gram(torch.ones(4, 3)),))
    assert probe.trials["a"].output_error == 0.0


@pytest.mark.parametrize("name", ["linear", "awq"])
def test_looking_on_changes_nothing(name: str) -> None:
    step = PassStep.model_validate({name: {"bits": 3, "group_size": 16}})
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 32, generator=generator)
    seen = gram(torch.randn(40, 32, generator=generator))
    probe, options = Probe(keep_weights=True), cast(LayerPass, step.config)
    outcome = probe.apply(options, layer(weight), (seen,))
    expected = options.apply(layer(weight), seen)

    made, wanted = cast(Any, outcome.weight), cast(Any, expected.weight)
    assert torch.equal(made.dequantize(), wanted.dequantize())
    kept = probe.trials["a"].weight
    assert kept is not None
    assert torch.equal(kept, made.dequantize(torch.float32))


def sampled(samples: int, own: float = 0.0, layers: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Errors, true costs and costs as so many samples show them, (layers, variants) each.

    own: standard deviation of what a layer's cost per error has to itself in single variants, as a logarithm.
    """
    generator = torch.Generator().manual_seed(0)
    errors = torch.tensor([1e-1, 2e-2, 5e-3, 1e-4]) * (1 + torch.rand(layers, 4, generator=generator))
    factors = torch.randn(layers, 1, generator=generator) + own * torch.randn(layers, 4, generator=generator)
    true = errors * factors.exp()
    slopes = torch.randn(layers, 4, samples, generator=generator)
    return errors, true, true * slopes.square().mean(-1)


def as_costs(errors: Tensor, costs: Tensor) -> list[dict[str, Cost]]:
    return [
        {str(at): Cost(float(error), float(cost)) for at, (error, cost) in enumerate(zip(*variant, strict=True))}
        for variant in zip(errors.unbind(1), costs.unbind(1), strict=True)
    ]


def as_tensor(costs: list[dict[str, Cost]]) -> Tensor:
    return torch.tensor([[cost.cost for cost in of.values()] for of in costs]).t()


@pytest.mark.parametrize("own", [0.0, 0.1, 1.0])
def test_steadied_costs_are_nearer_to_the_truth(own: float) -> None:
    """Twice as near where variants have nothing to themselves, and never farther."""
    errors, true, seen = sampled(64, own)
    steady = as_tensor(steadied(as_costs(errors, seen), 2 / 64))
    before, after = ((of / true).log().square().mean().sqrt() for of in (seen, steady))
    assert after < {0.0: 0.55, 0.1: 0.8, 1.0: 1.0}[own] * before


def test_layers_that_are_alike_do_not_seem_to_differ() -> None:
    seen = torch.randn(200, 4, 64, generator=torch.Generator().manual_seed(1)).square().mean(-1)
    steady = as_tensor(steadied(as_costs(torch.full((200, 4), 0.1), seen), 2 / 64))
    assert float(seen.min()) < 0.6 < 0.7 < float(steady.min())
    assert float(steady.max()) < 1.4 < 1.5 < float(seen.max())


def test_steadied_by_hand() -> None:
    """Two layers and two variants, errors of 1: rests of log 2 · (1, -1; -1, 1), of variance 4 · log² 2."""
    seen = as_costs(torch.ones(2, 2), torch.tensor([[4.0, 1.0], [1.0, 4.0]]))
    kept = as_tensor(steadied(seen, 0.0))
    torch.testing.assert_close(kept, torch.tensor([[4.0, 1.0], [1.0, 4.0]]))
    halved = as_tensor(steadied(seen, 2 * math.log(2) ** 2))
    torch.testing.assert_close(halved, 2 * torch.tensor([[2**0.5, 2**-0.5], [2**-0.5, 2**0.5]]))
    torch.testing.assert_close(as_tensor(steadied(seen, 100.0)), torch.full((2, 2), 2.0))


def test_what_cannot_be_steadied_stays() -> None:
    errors, seen = (
        torch.tensor([[0.1, 0.0], [0.2, 0.1], [0.3, 0.1]]),
        torch.tensor([[1.0, 0.0], [2.0, 1.0], [1.0, 5.0]]),
    )
    costs = as_costs(errors, seen)
    assert [of["0"] for of in steadied(costs, 0.1)] == [of["0"] for of in costs]
    assert steadied(costs[:1], 0.1) == costs[:1]
    assert steadied([{}, {}], 0.1) == [{}, {}]


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_cost_that_is_no_number_spoils_no_other(broken: float) -> None:
    seen = as_costs(torch.ones(3, 2), torch.tensor([[4.0, 1.0], [1.0, 4.0], [1.0, broken]]))
    found = steadied(seen, 2 * math.log(2) ** 2)
    assert [of["2"] for of in found] == [of["2"] for of in seen]
    sound = [{name: of[name] for name in "01"} for of in seen]
    assert [{name: of[name] for name in "01"} for of in found] == steadied(sound, 2 * math.log(2) ** 2)


def test_a_cost_is_0_or_more_and_what_is_no_number_is_not_free() -> None:
    trial = Trial(None, None, None)
    assert [trial.costing(cost).cost for cost in (0.5, 0.0, -1e-12)] == [0.5, 0.0, 0.0]
    assert math.isnan(trial.costing(math.nan).cost) and trial.costing(math.inf).cost == math.inf
