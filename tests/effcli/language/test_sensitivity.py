"""What each layer of a language model costs alone: held against the whole network in memory, on every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import architectures
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from effcli.errors import NumericsError
from effcli.formats import Affine
from effcli.inputs.text import Windows
from effcli.language.sensitivity import layer_costs
from effcli.language.weights import open_weights
from effcli.layers.contract import Layer, LayerPass, Needs, Outcome, Statistics
from effcli.layers.selection import choose
from effcli.reports.sensitivity import Way
from effcli.run.recipe import PassStep
from effcli.search.costs import Cost

LENGTH = 24


class Raise(LayerPass):
    """Adds a little to every bias."""

    step: ClassVar[float] = 1e-3

    @property
    def needs(self) -> Needs:
        return Needs.MEANS

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        return Outcome(layer.weight, shift=self.step * torch.arange(len(layer.weight)) if layer.biased else None)


def windows(count: int = 4, batch: int = 3) -> Windows:
    ids = torch.randint(architectures.VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(5))
    return Windows(list(ids.split(batch)))


def step(name: str, bits: int, **more: object) -> PassStep:
    return PassStep.model_validate({name: {"bits": bits, "group_size": 32, **more}})


def costs(
    source: Path, folder: Path, way: Way, steps: list[PassStep], given: Windows | None = None
) -> list[dict[str, Cost]]:
    skeleton = open_weights(source).skeleton
    folder.mkdir(exist_ok=True)
    variants = [choose(skeleton, each) for each in steps]
    return layer_costs(source, variants, given or windows(), folder, way)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The pass `linear` in float64, groups of 32."""
    from effcli.formats import AffineWeight
    from effcli.layers.contract import Layer, carry_out

    made = step("linear", bits)
    outcome = carry_out(made.config, Layer("", "linear", weight, weight.dtype)).weight
    assert isinstance(outcome, AffineWeight)
    return outcome.dequantize(torch.float32)


def drawn_losses(model: torch.nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """-log p of tokens drawn from the stock network's predictions, of each window as often as makes 64 samples."""
    generator, draws = torch.Generator().manual_seed(0), -(-64 // len(ids))
    for window in ids.split(1):
        logits = model(input_ids=window).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), draws, replacement=True, generator=generator)
        for tokens in drawn.unbind(1):
            yield torch.nn.functional.cross_entropy(logits, tokens, reduction="sum")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("models") / "llama")


def test_fisher_is_that_of_the_whole_network(llama: Path, tmp_path: Path) -> None:
    """Against autograd through the stock network, with the same tokens drawn."""
    (found,) = costs(llama, tmp_path / "work", "fisher", [step("linear", 3)])
    model = AutoModelForCausalLM.from_pretrained(llama).eval().requires_grad_(False)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in names}
    squares = dict.fromkeys(names, 0.0)
    ids = torch.cat(windows().batches)
    errors = {name: (rounded(weight.detach(), 3) - weight.detach()).double() for name, weight in weights.items()}
    for loss in drawn_losses(model, ids):
        gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            squares[name] += float((gradient.double() * errors[name]).sum()) ** 2
    for name in names:
        assert found[name].cost == pytest.approx(0.5 * squares[name] / (64 / len(ids) * ids.numel()), rel=1e-3)


@pytest.mark.parametrize("way", ["fisher", "loss"])
def test_what_is_fitted_to_inputs_is_measured_on_others(llama: Path, tmp_path: Path, way: Way) -> None:
    """The first half of the windows decides the weights, the second what they cost."""
    from effcli.formats import AffineWeight
    from effcli.layers.contract import Layer, Statistics, carry_out

    made = step("gptq", 3, scales=False)
    (found,) = costs(llama, tmp_path / "work", way, [made], windows(6, 6))
    model = AutoModelForCausalLM.from_pretrained(llama).eval().requires_grad_(False)
    name = "model.layers.1.mlp.gate_proj"
    layer = model.get_submodule(name)
    fitted, others = torch.cat(windows(6, 6).batches).split(3)

    gram = Statistics(layer.weight.shape[1])
    handle = layer.register_forward_pre_hook(lambda module, args: gram.add(args[0]))
    model(input_ids=fitted)
    handle.remove()
    outcome = carry_out(made.config, Layer(name, "linear", layer.weight.clone(), torch.float32), (gram,)).weight
    assert isinstance(outcome, AffineWeight)
    error = outcome.dequantize(torch.float32) - layer.weight

    if way == "loss":
        before = model(input_ids=others).logits.double().log_softmax(-1)
        layer.weight.add_(error)
        after = model(input_ids=others).logits.double().log_softmax(-1)
        expected = float((before.exp() * (before - after)).sum(-1).mean())
    else:
        layer.weight.requires_grad_()
        slopes = [
            torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].mul(error).sum()
            for loss in drawn_losses(model, others)
        ]
        expected = 0.5 * float(torch.stack(slopes).square().sum()) / others.numel() / (len(slopes) / len(others))
    assert found[name].cost == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("way", ["fisher", "loss"])
def test_what_is_added_to_a_bias_counts(way: Way, tmp_path: Path) -> None:
    source, name = architectures.make("opt", tmp_path / "opt"), "model.decoder.layers.0.fc1"
    (found,) = costs(source, tmp_path / "work", way, [PassStep(name="raise", config=Raise())], windows(4, 2))
    model = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
    bias, ids = model.get_submodule(name).bias, windows(4, 2).batches[1]
    shift = Raise.step * torch.arange(len(bias))
    if way == "loss":
        before = model(input_ids=ids).logits.double().log_softmax(-1)
        bias.add_(shift)
        after = model(input_ids=ids).logits.double().log_softmax(-1)
        expected = float((before.exp() * (before - after)).sum(-1).mean())
    else:
        bias.requires_grad_()
        slopes = [torch.autograd.grad(loss, bias, retain_graph=True)[0] @ shift for loss in drawn_losses(model, ids)]
        expected = 0.5 * float(torch.stack(slopes).square().mean()) / LENGTH
    assert found[name].cost == pytest.approx(expected, rel=2e-3)


def test_fisher_predicts_the_divergence_of_a_small_change(llama: Path, tmp_path: Path) -> None:
    """On average over many windows, for changes that the network answers linearly."""
    many = windows(96, 8)
    predicted, measured = (
        costs(llama, tmp_path / way, way, [step("linear", 5)], many)[0] for way in ("fisher", "loss")
    )
    assert sum(cost.cost for cost in predicted.values()) == pytest.approx(
        sum(cost.cost for cost in measured.values()), rel=0.15
    )


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.gate_proj"])
def test_loss_is_that_of_the_network_with_one_layer_changed(llama: Path, tmp_path: Path, name: str) -> None:
    (found,) = costs(llama, tmp_path / "work", "loss", [step("linear", 2)])
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = torch.cat(windows().batches)
    with torch.inference_mode():
        before = model(input_ids=ids).logits.double().log_softmax(-1)
        layer = model.get_submodule(name)
        layer.weight.copy_(rounded(layer.weight, 2))
        after = model(input_ids=ids).logits.double().log_softmax(-1)
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    assert found[name].cost == pytest.approx(expected, rel=1e-3)


def test_gram_is_the_relative_output_error(llama: Path, tmp_path: Path) -> None:
    (found,) = costs(llama, tmp_path / "work", "gram", [step("linear", 4)])
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    name, seen = "model.layers.1.mlp.down_proj", []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        for batch in windows().batches:
            model(input_ids=batch)
    weight, inputs = model.get_submodule(name).weight, torch.cat([each.flatten(0, 1) for each in seen])
    with torch.inference_mode():
        error = (inputs @ (rounded(weight, 4) - weight).t()).square().sum() / (inputs @ weight.t()).square().sum()
    assert found[name].cost == found[name].output_error == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("name", architectures.NAMES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Every layer of the blocks has a cost, and more bits cost less; the hidden states are gone or in one folder."""
    source = architectures.make(name, tmp_path / "model")
    for way in ("gram", "fisher", "loss"):
        few, many = costs(
            source, tmp_path / way, way, [step("awq", 2, coarse=1, fine=1), step("awq", 8, coarse=1, fine=1)]
        )
        skeleton = open_weights(source).skeleton
        layers = {site.name for k in range(len(skeleton.blocks)) for site in skeleton.block_layers(k)}
        assert few.keys() == many.keys() == layers
        assert sum(cost.cost for cost in many.values()) < 0.1 * sum(cost.cost for cost in few.values())
        assert all(cost.cost >= 0 for found in (few, many) for cost in found.values())


@pytest.mark.parametrize("way", ["gram", "fisher", "loss"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head(tmp_path: Path, way: Way, tied: bool) -> None:
    source = architectures.make("llama", tmp_path / "model", tie_word_embeddings=tied)
    few, many = costs(source, tmp_path / "work", way, [step("linear", bits, lm_head=True) for bits in (2, 8)])
    assert "lm_head" in few
    assert 0 <= many["lm_head"].cost < 0.05 * few["lm_head"].cost


def test_layers_left_alone_have_no_cost(llama: Path, tmp_path: Path) -> None:
    (found,) = costs(llama, tmp_path / "work", "fisher", [step("awq", 4, ignore=["*.q_proj", "*.1.*"])])
    assert found and not any(name.endswith("q_proj") or ".1." in name for name in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["gram", "fisher", "loss"])
def test_half_precision(tmp_path: Path, way: Way, dtype: torch.dtype) -> None:
    """The costs are those of the same weights in float32, but for what the forward rounds."""
    half = architectures.make("llama", tmp_path / "half", dtype)
    wide = architectures.make("llama", tmp_path / "wide")
    many = windows(32, 4)
    (found,), (expected,) = (costs(path, tmp_path / way, way, [step("linear", 3)], many) for path in (half, wide))
    largest = max(cost.cost for cost in expected.values())
    for name, cost in found.items():
        assert cost.cost == pytest.approx(expected[name].cost, rel=0.2, abs=1e-2 * largest)


def test_the_same_again(llama: Path, tmp_path: Path) -> None:
    steps = [step("awq", 3), step("awq", 4)]
    assert costs(llama, tmp_path / "a", "fisher", steps) == costs(llama, tmp_path / "b", "fisher", steps)


def test_damaged_weights(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.embed_tokens.weight.data[3] = torch.nan
    model.save_pretrained(source)
    with pytest.raises(NumericsError):
        costs(source, tmp_path / "work", "fisher", [step("linear", 3)])


def test_formats_of_the_variants(llama: Path) -> None:
    skeleton = open_weights(llama).skeleton
    chosen = choose(skeleton, step("awq", 3))["model.layers.0.mlp.up_proj"].config
    assert chosen is not None
    assert getattr(chosen, "format", None) == Affine(3, "group", 32)


@pytest.mark.parametrize("way", ["gram", "fisher", "loss"])
def test_progress_is_told_in_steps_within_a_block(llama: Path, tmp_path: Path, way: Way) -> None:
    skeleton = open_weights(llama).skeleton
    told: list[tuple[int, int]] = []
    variants = [choose(skeleton, step("linear", bits)) for bits in (2, 4)]
    layer_costs(llama, variants, windows(), tmp_path, way, lambda *at: told.append(at))
    done, totals = [at for at, _ in told], {total for _, total in told}
    assert totals == {len(told) - 1} and done == list(range(len(told))), "one step after another, up to the last"
    assert len(told) > 2 * (1 + len(skeleton.blocks))
