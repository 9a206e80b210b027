"""Sparse checkpoints: language models and graphs load, run packed as they run dense, and are checked whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import effcli
from effcli.cli import main
from effcli.errors import CheckpointError
from effcli.files.checkpoint import OWN_STEM, Checkpoint, write_shard
from effcli.files.layout import Stored, own_config
from effcli.formats import (
    Affine,
    AffineWeight,
    Bitmask,
    Codebook,
    CodebookWeight,
    Dense,
    DenseWeight,
    Gaps,
    NOfM,
    Quantized,
    Sparse,
    SparseWeight,
    quantize_codes,
)
from effcli.formats.codebook import fixed_table
from effcli.graphs.graph import Graph
from effcli.language.weights import open_weights


def bitmask_of_dense(weight: Tensor) -> SparseWeight:
    """The larger half of the weights, as they are."""
    format = Dense(weight.dtype)
    mask = weight.abs() > weight.abs().float().median()
    return SparseWeight(Sparse(Bitmask(), format), DenseWeight(format, weight.contiguous()), mask)


def two_of_four_in_four_bits(weight: Tensor) -> SparseWeight:
    """The two largest of four neighbours, in 4 bits with a scale per channel."""
    parts = weight.float().reshape(-1, 4)
    mask = torch.zeros(parts.shape, dtype=torch.bool).scatter_(1, parts.abs().topk(2).indices, True).view(weight.shape)
    format = Affine(4, "channel", symmetric=True)
    scale = (weight.float().abs().amax(1, keepdim=True) / 7).to(weight.dtype)
    codes = quantize_codes(weight.float(), scale.float(), float(format.fixed_zero), format)
    return SparseWeight(Sparse(NOfM(2, 4), format), AffineWeight(format, codes, scale), mask)


def gaps_of_signs(weight: Tensor) -> SparseWeight:
    """The largest tenth of the weights, as a sign times a scale per row: there is no code for 0."""
    format = Codebook("binary", 1, "channel", dtype=weight.dtype)
    mask = weight.abs() > weight.abs().float().quantile(0.9)
    scale = weight.float().abs().mean(1).to(weight.dtype)
    values = CodebookWeight(format, (weight > 0).to(torch.uint8), fixed_table("binary"), scale)
    return SparseWeight(Sparse(Gaps(4, huffman=True), format), values, mask)


WAYS = (bitmask_of_dense, two_of_four_in_four_bits, gaps_of_signs)


def logits(model: Any) -> Tensor:
    ids = torch.randint(architectures.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found: Tensor = model(ids).logits.float()
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Quantized]]:
    """A dense language model, the same with sparse layers, and these by name."""
    source = architectures.make("llama", tmp_path_factory.mktemp("models") / "llama")
    out = tmp_path_factory.mktemp("sparse")
    checkpoint = Checkpoint.open(source)
    tensors = {name: checkpoint.read(name) for name in checkpoint.entries}
    layers: dict[str, Quantized] = {}
    weights = open_weights(source)
    for k in range(len(weights.skeleton.blocks)):
        for number, site in enumerate(weights.skeleton.block_layers(k)):
            weight: Quantized = WAYS[number % len(WAYS)](tensors.pop(site.parameter))
            if number == 1:
                weight = weight.with_input_scale(torch.linspace(0.5, 2, site.columns).to(weight.dtype))
            layers[site.name] = weight
            tensors |= {f"{site.name}.{suffix}": tensor for suffix, tensor in weight.pack().items()}
    write_shard(out / f"{OWN_STEM}.safetensors", tensors)
    stored = {name: Stored(weight.format, "linear", weight.input_scale is not None) for name, weight in layers.items()}
    (out / "config.json").write_text(json.dumps(own_config(checkpoint.config, stored)))
    return source, out, layers


def test_language_models(made: tuple[Path, Path, dict[str, Quantized]], capsys: pytest.CaptureFixture[str]) -> None:
    source, out, layers = made
    with pytest.raises(ValueError, match="effcli"):
        AutoModelForCausalLM.from_pretrained(out)
    reference = AutoModelForCausalLM.from_pretrained(source)
    for name, weight in layers.items():
        reference.get_parameter(f"{name}.weight").data.copy_(weight.effective())
    dense = logits(effcli.load(out, packed=False))
    torch.testing.assert_close(dense, logits(reference))
    model = effcli.load(out)
    torch.testing.assert_close(logits(model), dense, rtol=2e-2, atol=2e-2 * float(dense.abs().max()))
    assert "zeros filled in" in repr(model) and "dense copy of sparse weights" in repr(model)
    assert main(["inspect", str(out)]) == 0
    assert "sparse 2:4, int4" in capsys.readouterr().out


def test_a_damaged_layer_is_named(made: tuple[Path, Path, dict[str, Quantized]], tmp_path: Path) -> None:
    _, out, layers = made
    name = next(name for name, weight in layers.items() if isinstance(weight.format, Sparse))
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    written = Checkpoint.open(out)
    tensors = {key: written.read(key) for key in written.entries}
    tensors[f"{name}.weight_mask"][0, 0] ^= 1
    write_shard(tmp_path / f"{OWN_STEM}.safetensors", tensors)
    with pytest.raises(CheckpointError, match=rf"does not hold {name} as sparse bitmask.*: weight is"):
        effcli.load(tmp_path)


def test_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    assert main(["compress", "sample:cnn", "--pass=linear:bits=8", "--no-eval", "--quiet", "-o", str(dense)]) == 0
    graph = Graph.read(dense)
    for number, site in enumerate(graph.sites()):
        weight: Tensor = graph.layer(site.name).weight.detach()  # type: ignore[assignment]
        way = WAYS[number % len(WAYS)] if site.columns % 4 == 0 else bitmask_of_dense
        made = way(site.view(weight))
        # Of one layer nothing is kept.
        graph.set_weight(site.name, made if number else dataclasses.replace(made, mask=torch.zeros_like(made.mask)))
    out.mkdir()
    graph.save(out)
    inputs = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    again = Graph.read(out)
    torch.testing.assert_close(effcli.load(out)(inputs), graph.run(inputs), rtol=0, atol=0)
    assert {name: weight.format for name, weight in again.stored.items()} == {
        name: weight.format for name, weight in graph.stored.items()
    }
    assert main(["inspect", str(out)]) == 0
    assert "sparse" in capsys.readouterr().out
    assert main(["export", str(out), "--to", "onnx", "-o", str(tmp_path / "exported")]) != 0
    assert "ONNX has no place for" in capsys.readouterr().err
