"""The `gradual` pass: the removed share along its curve, which weights go, and what rewinding goes back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_graphs
import torch
from pydantic import ValidationError
from small_graphs import Held, chain
from torch import Tensor, nn

from effcli.errors import RecipeError
from effcli.formats import Mask
from effcli.graphs.graph import Graph
from effcli.graphs.training import train
from effcli.layers.contract import Attached, Layer, Pass, Transformed
from effcli.passes.prune.gradual import Gradual
from effcli.training import loop


def attached(config: Gradual, *weights: Tensor, masks: tuple[Mask | None, ...] = ()) -> dict[str, Attached]:
    found = {}
    for number, weight in enumerate(weights):
        mask = masks[number] if masks else None
        module = config.attach(Layer(str(number), "linear", weight, torch.float32, mask=mask))
        assert module is not None
        found[str(number)] = Attached(module, weight, torch.zeros(len(weight)))
    return found


def kept(layers: dict[str, Attached], name: str = "0") -> Tensor:
    found = layers[name].module.get_buffer("kept")
    return found


def test_the_curve_by_hand() -> None:
    """Two rounds to a share of 4/8: 7/8 of it after the first, which is 3.5 weights, rounded to the even 4."""
    weight = torch.arange(1.0, 9.0).view(2, 4)
    config = Gradual(sparsity=0.5, rounds=2, until=0.5)
    layers = attached(config, weight)
    assert config.advance(layers, 0.24) is False and bool(kept(layers).all())
    config.advance(layers, 0.25)
    assert kept(layers).tolist() == [[False] * 4, [True] * 4]
    assert not config.counts(0.49) and config.counts(0.5) and config.counts(1.0)
    config = Gradual(sparsity=0.75, rounds=4, until=1)
    layers = attached(config, torch.arange(1.0, 65.0).view(4, 16))
    removed = []
    for progress in (0.25, 0.5, 0.75, 1.0):
        config.advance(layers, progress)
        removed.append(int((~kept(layers)).sum()))
    assert removed == [round(48 * (1 - (1 - k / 4) ** 3)) for k in (1, 2, 3, 4)]
    assert removed[-1] == 48


def test_what_is_removed_stays_removed_and_the_smallest_go() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    config = Gradual(sparsity=0.5, rounds=1, until=0.5)
    first = attached(config, weight, masks=(Mask(torch.tensor([[True, True, True, False]])),))
    config.advance(first, 1.0)
    assert kept(first).tolist() == [[False, True, True, False]]
    moved = attached(Gradual(sparsity=0.5, rounds=2, until=1), torch.tensor([[1.0, -2.0, 3.0, -4.0]]))
    own = Gradual(sparsity=0.5, rounds=2, until=1)
    own.advance(moved, 0.5)
    assert kept(moved).tolist() == [[False, False, True, True]]
    moved["0"].weight.copy_(torch.tensor([[9.0, 9.0, 1.0, 1.0]]))
    own.advance(moved, 1.0)
    assert kept(moved).tolist() == [[False, False, True, True]]


def test_layers_have_shares_of_their_own_or_compete() -> None:
    small, large = torch.arange(1.0, 5.0).view(1, 4), 100 * torch.arange(1.0, 5.0).view(1, 4)
    config = Gradual(sparsity=0.5, rounds=1, until=1, layers={"1": {"sparsity": 0.25}})
    own = Gradual(sparsity=0.25, rounds=1, until=1)
    layers = attached(config, small) | {"1": attached(own, large)["0"]}
    config.advance(layers, 1.0)
    assert (kept(layers).tolist(), kept(layers, "1").tolist()) == ([[False, False, True, True]], [[False] + [True] * 3])
    # In units of their root mean square both layers are the same, and one weight is smaller than all of the second.
    config = Gradual(sparsity=3 / 8, rounds=1, until=1, compare="network")
    layers = attached(config, torch.tensor([[0.1, 1.0, 1.0, 1.0]]), large)
    config.advance(layers, 1.0)
    assert (kept(layers).tolist(), kept(layers, "1").tolist()) == ([[False] + [True] * 3], [[False, False, True, True]])


def test_rewinding_goes_back_to_early_weights() -> None:
    config = Gradual(sparsity=0.5, rounds=2, until=0.96, rewind=0.5, schedule="constant")
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    layers = attached(config, weight)
    assert config.advance(layers, 0.2) is False
    weight.copy_(torch.tensor([[5.0, 6.0, 7.0, 8.0]]))
    layers["0"].bias.fill_(1)  # type: ignore[union-attr]
    assert config.advance(layers, 0.3) is False
    weight.copy_(torch.tensor([[8.0, 7.0, 6.0, 5.0]]))
    assert config.advance(layers, 0.5) is True
    assert weight.tolist() == [[5.0, 6.0, 7.0, 8.0]] and layers["0"].bias.tolist() == [1]  # type: ignore[union-attr]
    assert kept(layers).tolist() == [[True, True, False, False]]


def trained(graph: Graph, folder: Path | None = None, **options: Any) -> Transformed:
    config = Gradual(**{"epochs": 8, "learning_rate": 1e-2, "towards": "original"} | options).for_graph()
    data = Held(small_graphs.inputs(graph, 40))
    chosen: dict[str, Pass] = {site.name: config for site in graph.sites()}
    for pattern, own in config.layers.items():
        chosen[pattern] = config.model_copy(update=own)
    return train(graph, "gradual", config, data, chosen, batch_size=8, original=small_graphs.separable(), work=folder)


@pytest.mark.parametrize("options", [{}, {"rewind": 0.5, "schedule": "constant", "rounds": 3}, {"compare": "network"}])
def test_a_network_is_pruned_to_the_share_while_it_learns(options: dict[str, Any]) -> None:
    """Never are weights kept of a time before all were removed, however good they were."""
    graph, original = small_graphs.separable(), small_graphs.separable()
    made = trained(graph, sparsity=0.7, epochs=40, **options)
    assert made.training is not None and made.training.kept >= 0.75 * made.training.steps
    counts = {site.name: graph.mask(site.name) for site in graph.sites()}
    removed = sum(int((~mask.kept).sum()) for mask in counts.values() if mask is not None)
    total = sum(site.rows * site.columns for site in graph.sites())
    assert removed == pytest.approx(0.7 * total, abs=3)
    inputs = small_graphs.inputs(graph, 40)
    error = (graph.run(inputs) - original.run(inputs)).square().mean()
    for name, mask in counts.items():
        assert mask is not None
        assert made.notes[name]["sparsity"] == pytest.approx(float((~mask.kept).float().mean()), abs=1e-6)
        original.set_weight(name, mask.over(original.held(next(s for s in original.sites() if s.name == name))))
    untrained = (original.run(inputs) - small_graphs.separable().run(inputs)).square().mean()
    assert float(error) < 0.6 * float(untrained)


@pytest.mark.parametrize("rewind", [None, 0.5])
def test_a_killed_training_ends_with_the_same_weights(
    rewind: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    options = {"rounds": 4, "rewind": rewind, "schedule": "constant"}
    whole = small_graphs.separable()
    trained(whole, **options)
    for stop in (3, 9, 17, 31):
        update = loop._Run._update

        def dying(self: Any, loss: float, stop: int = stop, update: Any = update) -> None:
            update(self, loss)
            if self.step == stop:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(loop._Run, "_update", dying)
            with pytest.raises(Killed):
                trained(small_graphs.separable(), tmp_path / str(stop), **options)
        again = small_graphs.separable()
        trained(again, tmp_path / str(stop), **options)
        for name, value in whole.module.state_dict().items():
            assert torch.equal(again.module.state_dict()[name], value), name


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"rounds": 0},
        {"until": 0.0},
        {"rewind": 0.5},
        {"steps": 20, "rounds": 16},
        {"rewind": 0.5, "schedule": "constant", "until": 1.0},
        {"layers": {"a": {"rounds": 3}}},
        {"layers": {"a": {"sparsity": 0.5}}, "compare": "network"},
    ],
)
def test_options_that_contradict(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Gradual(**options)


@pytest.mark.parametrize(
    ("key", "value"), [("until", "75%"), ("until", "0.5 %"), ("rewind", "10%"), ("until", "100%"), ("rewind", None)]
)
def test_shares_of_the_training_as_percentages(key: str, value: str | None) -> None:
    given = {"schedule": "constant", key: value} if key == "rewind" else {key: value}
    found = getattr(Gradual.model_validate(given), key)
    assert found == (None if value is None else float(value.rstrip(" %")) / 100)


@pytest.mark.parametrize("wrong", [{"until": "101%"}, {"until": "0%"}, {"rewind": "100%", "schedule": "constant"}])
def test_percentages_outside_of_the_training(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Gradual.model_validate(wrong)


def test_more_rounds_than_steps_are_refused_however_the_steps_come_about() -> None:
    """5 epochs of 5 batches with until=0.8 hold 20 rounds: not one more, and not with one batch fewer."""
    Gradual(epochs=5, rounds=20, until=0.8).check_steps(25)
    Gradual(rounds=29, until=0.29).check_steps(100)
    Gradual(steps=100, rounds=29, until=0.29)
    with pytest.raises(RecipeError, match=r"^21 rounds do not fit into 0.8 of 25 steps, those of 5 epochs\n"):
        Gradual(epochs=5, rounds=21, until=0.8).check_steps(25)
    with pytest.raises(RecipeError, match=r"^1 round does not fit into 0.5 of 1 step, those of 1 epoch\n"):
        Gradual(epochs=1, rounds=1, until=0.5).check_steps(1)
    with pytest.raises(ValidationError, match=r"21 rounds do not fit into 0.8 of 25 steps; set rounds lower"):
        Gradual(steps=25, rounds=21, until=0.8)
    graph = small_graphs.separable()
    with pytest.raises(RecipeError, match=r"20 rounds do not fit into 0.75 of 25 steps"):
        trained(graph, epochs=5, rounds=20)
    assert all(graph.mask(site.name) is None for site in graph.sites())


def test_rounds_that_nobody_asked_for_are_as_many_as_there_are_steps() -> None:
    graph = small_graphs.separable()
    made = trained(graph, epochs=1, sparsity=0.7)
    assert made.training is not None and made.training.steps == 5
    for name in (site.name for site in graph.sites()):
        assert made.notes[name]["sparsity"] == pytest.approx(0.7, abs=0.02)
    again = Gradual.model_validate(Gradual(steps=3).model_dump())
    again.check_steps(3)


def test_labels_and_one_layer() -> None:
    """One linear learns which of its inputs the class hangs on; the other ones' weights go."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 10, generator=generator)
    graph = chain((10,), nn.Linear(10, 2))
    config = Gradual(sparsity=0.8, epochs=30, learning_rate=0.05)
    data = Held(inputs, (inputs[:, 3] > inputs[:, 7]).numpy().astype(np.int64))
    train(graph, "gradual", config, data, {"layer0": config}, batch_size=20)
    mask = graph.mask("layer0")
    assert mask is not None and sorted(mask.kept.any(0).nonzero().flatten().tolist()) == [3, 7]


def test_a_small_layer_keeps_a_weight_where_all_compete() -> None:
    config = Gradual(sparsity=0.8, rounds=1, until=1, compare="network")
    layers = attached(config, torch.tensor([[1.0, 1.01, 1.02, 1.0]]), torch.arange(1.0, 17.0).view(4, 4) ** 4)
    config.advance(layers, 1.0)
    assert int(kept(layers).sum()) >= 1 and int(kept(layers).sum() + kept(layers, "1").sum()) == 4


def test_a_mask_of_before_is_not_changed() -> None:
    before = Mask(torch.ones(1, 4, dtype=torch.bool))
    layers = attached(Gradual(sparsity=0.5, rounds=1, until=1), torch.tensor([[1.0, 2, 3, 4]]), masks=(before,))
    Gradual(sparsity=0.5, rounds=1, until=1).advance(layers, 1.0)
    assert bool(before.kept.all()) and int(kept(layers).sum()) == 2
