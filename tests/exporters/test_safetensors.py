from __future__ import annotations

import errno
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_architectures
from safetensors.torch import load_file
from small_graphs import inputs, residual

from effcli import runtime
from effcli.errors import CheckpointError, OutputError, UnsupportedError
from effcli.exporters import _packed
from effcli.exporters import safetensors as exporter
from effcli.exporters._target import MARK
from effcli.files.checkpoint import Checkpoint
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.importers import read
from effcli.inputs.preprocess import Preprocess
from effcli.language.sweep import sweep
from effcli.layers.contract import Layer
from effcli.passes.quantize import linear
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def network(kind: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=64, **TOKENS))
    if kind == "mixtral":
        config = t.MixtralConfig(**SIZES, **HEADS, **TOKENS, num_key_value_heads=1, num_local_experts=3)
        return t.MixtralForCausalLM(config)
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **HEADS, **TOKENS, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random network of a kind at 4 bits; its original lies beside it as `source`."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            network(kind).save_pretrained(folder / "source")
            made[kind] = folder / "out"
            made[kind].mkdir()
            step = PassStep.model_validate(parse_pass("linear:bits=4,group_size=16"))
            sweep(folder / "source", made[kind], step, None, folder / "work")
            (made[kind] / "tokenizer.json").write_text("{}")
            (made[kind] / "report.json").write_text("{}")
        return made[kind]

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_standard_layout_goes_over_byte_for_byte(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    source = compressed("llama")
    exporter.Safetensors().export(source, tmp_path / "new" / "target")
    expected = files(source) | {MARK: b""}
    # What belongs to the run and not to the checkpoint stays behind.
    del expected["report.json"]
    assert files(tmp_path / "new" / "target") == expected
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "target"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_dense_weights_load_with_the_stock_loader(kind: str, compressed: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, target = compressed(kind), tmp_path / "dense"
    exporter.Safetensors(dequantize=True).export(source, target)
    ids = torch.randint(99, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = runtime.load(source, packed=False)(input_ids=ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(target, experts_implementation="eager").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=0)
    # The names are those of the architecture's own checkpoints: other readers find their tensors too.
    assert Checkpoint.open(target).entries.keys() == Checkpoint.open(source.parent / "source").entries.keys()
    assert "quantization_config" not in Checkpoint.open(target).config


def test_several_shards_hold_the_same(
    compressed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter.Safetensors(dequantize=True).export(compressed("llama"), tmp_path / "one")
    monkeypatch.setattr(_packed, "SHARD_BYTES", 20_000)
    exporter.Safetensors(dequantize=True).export(compressed("llama"), tmp_path / "many")
    exporter.Safetensors().export(tmp_path / "many", tmp_path / "copied")
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert len(files(tmp_path / "many")) > len(files(tmp_path / "one")) + 2
    assert files(tmp_path / "copied") == files(tmp_path / "many")
    for name in one.entries:
        torch.testing.assert_close(many.read(name), one.read(name), rtol=0, atol=0)


def test_a_dense_checkpoint_is_copied(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    source = compressed("llama").parent / "source"
    exporter.Safetensors(dequantize=True).export(source, tmp_path / "target")
    assert files(tmp_path / "target") == files(source) | {MARK: b""}


@pytest.mark.parametrize(("kind", "reason"), [("gpt2", "Conv1D"), ("mixtral", "3-D parameter")])
def test_layers_without_a_place_are_named(
    kind: str, reason: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        exporter.Safetensors().export(compressed(kind), tmp_path / "target")
    assert reason in caught.value.cause and ".0." in caught.value.cause and " more " in caught.value.cause
    assert "--dequantize" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    source, target = compressed("llama"), tmp_path / "target"
    exporter.Safetensors().export(source, target)
    (target / "note.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        exporter.Safetensors().export(source, target)
    assert (target / "note.txt").exists()
    exporter.Safetensors().export(source, target, overwrite=True)
    assert not (target / "note.txt").exists()
    assert list(tmp_path.iterdir()) == [target]


def test_overwrite_spares_what_is_no_checkpoint(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds no export"):
        exporter.Safetensors().export(compressed("llama"), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_the_source_is_never_replaced(compressed: Callable[[str], Path]) -> None:
    source = compressed("llama")
    before = files(source)
    for target in (source, source.parent):
        with pytest.raises(OutputError, match="holds the checkpoint"):
            exporter.Safetensors().export(source, target, overwrite=True)
    assert files(source) == before


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot write to")])
def test_a_disk_that_fails_leaves_nothing_behind(
    number: int, message: str, compressed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = compressed("llama"), tmp_path / "target"
    exporter.Safetensors().export(source, target)
    before = files(target)

    def fail(*_: Any) -> None:
        raise OSError(number, "the disk")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OutputError, match=message):
        exporter.Safetensors().export(source, target, overwrite=True)
    assert files(target) == before
    assert list(tmp_path.iterdir()) == [target]


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        exporter.Safetensors().export(tmp_path, tmp_path / "target")


def graph_checkpoint(graph: Graph, folder: Path) -> Path:
    source = folder / "graph"
    source.mkdir()
    graph.save(source)
    return source


@pytest.mark.parametrize("name", vision_architectures.NAMES)
def test_a_classifier_loads_again_as_one(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    graph = read(vision_architectures.make(name, tmp_path / "original"))
    last = graph.sites()[-1].name
    weight: Any = graph.layer(last).weight
    graph.set_weight(last, 1.25 * weight)
    done = exporter.Safetensors().export(graph_checkpoint(graph, tmp_path), tmp_path / "target")
    assert done.checked.startswith("loaded by transformers") and done.remarks == ()
    network, info = AutoModelForImageClassification.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    values = inputs(graph, 3)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(pixel_values=values).logits, graph.run(values), rtol=1e-5, atol=1e-5)
    # It is a source like the original.
    torch.testing.assert_close(read(tmp_path / "target").run(values), graph.run(values), rtol=1e-5, atol=1e-5)


def test_a_classifier_in_half_precision_keeps_the_passes_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    vision_architectures.build("resnet").to(torch.bfloat16).save_pretrained(tmp_path / "original")
    graph = read(tmp_path / "original")
    weight: Any = graph.layer("classifier.1").weight
    graph.set_weight("classifier.1", weight * 1.0001)
    exporter.Safetensors().export(graph_checkpoint(graph, tmp_path), tmp_path / "target")
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "target")
    assert torch.equal(network.get_parameter("classifier.1.weight"), weight)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(scale=1 / 255, mean=(0.5, 0.25, 0.75), std=(0.5, 0.25, 1.0)),
        Preprocess(resize=40, resample="bicubic", crop=(32, 32), scale=1 / 255, mean=0.5, std=0.25),
        Preprocess(resize=(32, 32), mode="rgb", scale=1 / 127.5, mean=1.0),
    ],
)
def test_an_image_processor_goes_along(preprocess: Preprocess, tmp_path: Path) -> None:
    original = vision_architectures.make("resnet", tmp_path / "original")
    graph = read(original, preprocess=preprocess)
    done = exporter.Safetensors().export(graph_checkpoint(graph, tmp_path), tmp_path / "target")
    found = Preprocess.read(tmp_path / "target")
    assert done.remarks == () and found is not None
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    torch.testing.assert_close(found.apply(image, (3, 32, 32)), preprocess.apply(image, (3, 32, 32)))


def test_an_image_processor_that_there_is_not(tmp_path: Path) -> None:
    original = vision_architectures.make("resnet", tmp_path / "original")
    graph = read(original, preprocess=Preprocess(mode="bgr", scale=1 / 255))
    (remark,) = exporter.Safetensors().export(graph_checkpoint(graph, tmp_path), tmp_path / "target").remarks
    assert "preprocessor_config.json" in remark
    assert not (tmp_path / "target" / "preprocessor_config.json").exists()


def test_a_classifier_that_is_none_any_more(tmp_path: Path) -> None:
    graph = read(vision_architectures.make("resnet", tmp_path / "original"))
    (tmp_path / "folded").mkdir()
    graph_sweep(graph_checkpoint(graph, tmp_path), tmp_path / "folded", PassStep.model_validate("fold"))
    with pytest.raises(UnsupportedError) as caught:
        exporter.Safetensors().export(tmp_path / "folded", tmp_path / "target")
    assert "no resnet of transformers" in caught.value.cause and "convolution.bias" in caught.value.cause
    assert "running_mean" in caught.value.cause and "--to onnx" in caught.value.remedy
    assert not (tmp_path / "target").exists()


def test_a_classifier_with_code_of_its_own(tmp_path: Path) -> None:
    graph = read(vision_architectures.make("resnet", tmp_path / "original"))
    config = {**(graph.facts.config or {}), "auto_map": {"AutoConfig": "mine.Config"}}
    graph.facts = graph.facts.model_copy(update={"config": config})
    with pytest.raises(UnsupportedError, match="own Python code"):
        exporter.Safetensors().export(graph_checkpoint(graph, tmp_path), tmp_path / "target")


class Network(torch.nn.Module):
    """What `load_state_dict` is tried with: batch norms have a counter that no checkpoint of a graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.shift = torch.nn.Parameter(torch.ones(4))
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head: torch.Tensor = self.head(self.stem(x).mean((2, 3)) + self.shift)
        return head


@pytest.mark.parametrize("kind", ["factory", "pt2"])
def test_a_network_loads_into_its_own_class(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Network().eval()
    example = torch.randn(2, 3, 8, 8)
    if kind == "pt2":
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(module, (example,), dynamic_shapes=dynamic), tmp_path / "model.pt2")
        graph = read(tmp_path / "model.pt2")
    else:
        own = types.ModuleType("own_network")
        monkeypatch.setitem(sys.modules, "own_network", own)
        monkeypatch.setattr(own, "make", lambda: (module, example), raising=False)
        graph = read("own_network:make")
    weight: Any = graph.layer("head").weight
    graph.set_weight("head", 0.5 * weight)
    graph.facts = graph.facts.model_copy(update={"classes": tuple("abcde")})
    done = exporter.Safetensors().export(graph_checkpoint(graph, tmp_path), tmp_path / "target")
    assert done.checked == "" and done.remarks == ()
    again = Network().eval()
    again.load_state_dict(load_file(tmp_path / "target" / "model.safetensors"), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(again(example), graph.run(example), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == {"classes": list("abcde")}
    assert int(again.get_buffer("stem.1.num_batches_tracked")) == 0
    # Known again as an export, it may be replaced.
    exporter.Safetensors().export(tmp_path / "graph", tmp_path / "target", overwrite=True)


def test_packed_layers_of_a_graph_have_no_place(tmp_path: Path) -> None:
    graph = residual()
    for site in graph.sites():
        weight: Any = graph.layer(site.name).weight
        layer = Layer(site.name, site.kind, weight.reshape(site.shape), torch.float32)
        graph.set_weight(site.name, linear.Linear(granularity="channel").apply(layer).weight)
    source = graph_checkpoint(graph, tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        exporter.Safetensors().export(source, tmp_path / "target")
    assert "stem, block.a, block.b and 1 more" in caught.value.cause and "--dequantize" in caught.value.remedy
    exporter.Safetensors(dequantize=True).export(source, tmp_path / "target")
    assert {file.name for file in (tmp_path / "target").iterdir()} == {"model.safetensors", MARK}
    found = load_file(tmp_path / "target" / "model.safetensors")
    assert torch.equal(found["stem.weight"].reshape(8, 27), graph.stored["stem"].dequantize())
