"""Gradients streamed through language models block by block: those of plain autograd on the whole network."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from effcli.errors import DataError
from effcli.inputs.text import Windows
from effcli.language.backward import StoredGradients
from effcli.language.skeleton import find_layers
from effcli.language.sweep import sweep
from effcli.language.weights import open_weights
from effcli.layers.contract import Layer, LayerPass, Needs, Outcome
from effcli.layers.layer import LayerSite
from effcli.layers.statistics import Statistics
from effcli.run.recipe import PassStep

BOTH = Needs.GRADIENTS | Needs.SQUARED_GRADIENTS


def checkpoint(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(architectures.config(name))
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + noise / 4 if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    network.save_pretrained(folder)
    return folder


def batches() -> list[Tensor]:
    """Windows of three shapes, one of a single token, which has nothing to predict."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(architectures.VOCABULARY, shape, generator=generator) for shape in ((3, 12), (1, 7), (1, 1))]


def plain(source: Path, sites: list[LayerSite]) -> dict[str, tuple[Tensor, Tensor]]:
    """By autograd on the whole network in float64, one window after the other."""
    network = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager").double()
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    found = {site.name: (torch.zeros(site.shape).double(), torch.zeros(site.shape).double()) for site in sites}
    for window in (row for batch in batches() for row in batch):
        if len(window) < 2:
            continue
        network.zero_grad()
        logits = network(window.unsqueeze(0)).logits[0]
        functional.cross_entropy(logits[:-1], window[1:]).backward()
        for site in sites:
            gradient = network.get_parameter(site.parameter).grad
            if gradient is not None:
                total, squares = found[site.name]
                total += site.view(gradient)
                squares += site.view(gradient).square()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_those_of_autograd(name: str, tmp_path: Path) -> None:
    """Linears, Conv1D, capped logits, and experts that not every window reaches; the head by itself."""
    source = checkpoint(name, tmp_path / "source")
    skeleton = open_weights(source).skeleton
    blocks = [skeleton.block_layers(k) for k in range(2)]
    (head,) = [site for site in skeleton.outer_layers() if site.name == skeleton.head]
    work = tmp_path / "work"
    work.mkdir()
    stored = StoredGradients(source, blocks, head, batches(), BOTH, work)
    found = {**stored.of(0), **stored.of(1), **stored.of(2)}
    assert sorted(file.suffix for file in work.iterdir()) == [".safetensors"] * 3
    expected = plain(source, [*blocks[0], *blocks[1], head])
    assert found.keys() == expected.keys()
    for site_name, (total, squares) in expected.items():
        sums = found[site_name].sums
        assert found[site_name].samples == 5
        scale = float(total.abs().max())
        torch.testing.assert_close(sums[Needs.GRADIENTS].double(), total, rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(sums[Needs.SQUARED_GRADIENTS].double(), squares, rtol=1e-3, atol=1e-4 * scale**2)
    # What is on the disk is not made again.
    (source / "model.safetensors").unlink()
    again = StoredGradients(source, blocks, head, batches(), BOTH, work).of(1)
    assert all(torch.equal(again[key].sums[Needs.GRADIENTS], found[key].sums[Needs.GRADIENTS]) for key in again)


class Taylor(LayerPass):
    """First-order Taylor pruning (Molchanov et al. 2019, equation 8): weights of small Σ (w ∂L/∂w)² become zero."""

    @property
    def needs(self) -> Needs:
        return Needs.SQUARED_GRADIENTS

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        importance = layer.weight.square() * seen.squared_gradient
        return Outcome(layer.weight * (importance > importance.median()))


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_a_pass_that_reads_them(inputs: str, tmp_path: Path) -> None:
    source, target = checkpoint("llama", tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    step = PassStep.model_validate({"linear": {}}).model_copy(update={"config": Taylor(lm_head=True)})
    sweep(source, target, step, Windows(batches(), inputs), tmp_path / "work")
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, target))
    sites = list(find_layers(before, ""))
    for name, (_, squares) in plain(source, sites).items():
        weight = before.get_parameter(f"{name}.weight").detach()
        importance = weight.double().square() * squares
        kept = after.get_parameter(f"{name}.weight") != 0
        # Float32 sums may put a weight next to the median on its other side.
        wrong = kept != (importance > importance.median())
        assert float(wrong.float().mean()) < 1e-3
        assert not (target / "work").exists()


def test_gradients_last_through_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that goes on reads those that it wrote; the outcome is that of a run in one piece."""
    source = checkpoint("llama", tmp_path / "source")
    step = PassStep.model_validate({"linear": {}}).model_copy(update={"config": Taylor()})
    whole, target, work = tmp_path / "whole", tmp_path / "target", tmp_path / "work"
    whole.mkdir()
    target.mkdir()
    sweep(source, whole, step, Windows(batches()), tmp_path / "other")

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(source, target, step, Windows(batches()), work, stop)
    monkeypatch.setattr(StoredGradients, "_make", lambda self: pytest.fail("gradients are made again"))
    sweep(source, target, step, Windows(batches()), work)
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    source = checkpoint("llama", tmp_path / "source")
    site = open_weights(source).skeleton.block_layers(0)
    with pytest.raises(DataError, match="has a token to predict"):
        StoredGradients(source, [site, []], None, [torch.zeros(2, 1, dtype=torch.int64)], BOTH, tmp_path).of(0)
