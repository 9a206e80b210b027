"""Pruned layers in the layouts of other tools: their zeros stand among the numbers, and read back as zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs
import torch
from plain_passes import Prune
from safetensors.torch import load_file

from effcli.exporters.awq import AWQ
from effcli.exporters.bitsandbytes import BitsAndBytes
from effcli.exporters.gptq import GPTQ
from effcli.exporters.onnx import ONNX
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.language.sweep import sweep
from effcli.language.weights import open_weights
from effcli.run.recipe import PassStep

PRUNE = PassStep(name="prune", config=Prune())
HEAD = PassStep(name="prune", config=Prune(ignore=("*.mlp.*",)))


def pruned(folder: Path, after: dict[str, Any], prune: PassStep = PRUNE) -> Path:
    """A small Llama, pruned and then quantized."""
    source = architectures.make("llama", folder / "source", torch.float32)
    steps = [prune, PassStep.model_validate(after)]
    for number, step in enumerate(steps):
        target = folder / f"out-{number}"
        target.mkdir()
        sweep(source, target, step, None, folder / "work")
        source = target
    return source


LAYOUTS = {
    "gptq": (GPTQ(), {"linear": {"bits": 4, "group_size": 32}}),
    "awq": (AWQ(), {"linear": {"bits": 4, "group_size": 32}}),
    "bitsandbytes": (BitsAndBytes(), {"nf4": {}}),
    "onnx": (ONNX(), {"linear": {"bits": 4, "group_size": 32}}),
    "onnx int8": (ONNX(activations="int8"), {"linear": {"bits": 8, "granularity": "channel", "symmetric": True}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_stand_among_the_numbers(tmp_path: Path, layout: str) -> None:
    """The exporter reads back what it wrote, and the file that holds zeros is said to save nothing for them."""
    exporter, step = LAYOUTS[layout]
    source = pruned(tmp_path, step)
    held = open_weights(source)
    name = "model.layers.0.mlp.down_proj"
    mask = held.mask(name)
    assert mask is not None and float(mask.kept.float().mean()) < 0.6
    made = exporter.export(source, tmp_path / "exported")
    assert "pruned layers stored with the zeros" in str(made.remarks) + made.checked


def test_what_is_pruned_only_is_dense(tmp_path: Path) -> None:
    """A layer that is pruned and not quantized is one of those that a loader must leave dense."""
    quantize = {"linear": {"bits": 4, "group_size": 32, "ignore": ["*.self_attn.*"]}}
    source = pruned(tmp_path, quantize, HEAD)
    GPTQ().export(source, tmp_path / "exported")
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    dense = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(dense, open_weights(source).parameter("model.layers.0.self_attn.q_proj.weight"))
    assert 0.4 < float((dense == 0).float().mean()) < 0.6
    assert "model.layers.0.mlp.up_proj.qweight" in tensors


@pytest.mark.parametrize("bits", [4, 8])
def test_graphs(tmp_path: Path, bits: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    graph = small_graphs.separable()
    graph.save(source)
    quantize = {"linear": {"bits": bits, "granularity": "channel"}}
    for number, step in enumerate([PRUNE, PassStep.model_validate(quantize)]):
        target = tmp_path / f"out-{number}"
        target.mkdir()
        graph_sweep(source, target, step, small_graphs.batches(graph))
        source = target
    made = ONNX().export(source, tmp_path / "exported")
    assert Graph.read(source).stored and "stored with the zeros" in made.checked
