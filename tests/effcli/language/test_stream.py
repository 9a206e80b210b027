"""A network that runs in parts gives the logits of the whole one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from effcli.errors import CheckpointError, DataError, UnsupportedError
from effcli.files.checkpoint import Checkpoint
from effcli.language.forward import last_hidden
from effcli.language.skeleton import Skeleton, find_layers
from effcli.language.stream import Stream, WatchLayers, running
from effcli.language.weights import Weights, open_weights
from effcli.layers.layer import LayerSite


def streamed(path: Path, ids: Tensor) -> Tensor:
    """Logits of token ids (batch, length), one block in memory at a time."""
    checkpoint = Checkpoint.open(path)
    skeleton = Skeleton(path, checkpoint.config)
    weights = Weights(checkpoint, skeleton)
    with Stream(weights, with_head=True) as stream, torch.inference_mode():
        hidden, calls = stream.enter(ids)
        for k, block in enumerate(skeleton.blocks):
            with weights.opened(block, skeleton.block_names[k] + ".", skeleton.block_parameters(k)):
                hidden = stream.through(k, hidden, calls[k])
            assert all(parameter.is_meta for parameter in block.parameters())
        logits = stream.leave(ids, hidden)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    return logits


@pytest.mark.parametrize("name", architectures.NAMES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    architectures.make(name, tmp_path)
    ids = torch.randint(architectures.VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    with torch.inference_mode():
        torch.testing.assert_close(streamed(tmp_path, ids), model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", architectures.SPECIAL_BLOCKS)
def test_blocks_are_called_and_answer_as_the_network_has_it(name: str, batch: int, tmp_path: Path) -> None:
    """Tuples that the network unpacks, and arguments made of the token ids: two batches of one shape differ in them."""
    architectures.make(name, tmp_path / "model")
    ids = torch.randint(architectures.VOCABULARY, (2, batch, 17), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with Stream(open_weights(tmp_path / "model"), with_head=True) as stream, torch.inference_mode():
        hidden = last_hidden(stream, list(ids), tmp_path / "spool")
        for number, rows in enumerate(ids):
            expected = model(rows, use_cache=False).logits
            torch.testing.assert_close(stream.leave(rows, hidden.read(number)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("length", [12, 40])
def test_positions_that_change_with_the_length(length: int, tmp_path: Path) -> None:
    """Phi 3 with longrope: up to 16 tokens it takes the short factors, then the long ones."""
    make_longrope(tmp_path)
    ids = torch.randint(architectures.VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(streamed(tmp_path, ids), model(ids, use_cache=False).logits, rtol=0, atol=0)


def test_a_graph_holds_no_positions_that_change_with_the_length(tmp_path: Path) -> None:
    trace = pytest.importorskip("effcli.exporters._onnx_language_trace")
    with pytest.raises(UnsupportedError, match=r"phi3 changes its rotary position embedding .* \(longrope\)"):
        trace.trace(Skeleton(tmp_path, Checkpoint.open(make_longrope(tmp_path)).config))


def make_longrope(folder: Path) -> Path:
    factors = {"short_factor": [1 + 0.1 * k for k in range(8)], "long_factor": [2.0 + k for k in range(8)]}
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        **factors,
    }
    rope["partial_rotary_factor"] = 1.0
    return architectures.make("phi3", folder, rope_parameters=rope, original_max_position_embeddings=16)


class Stacked(LlamaForCausalLM):
    """Llama whose decoder runs its blocks in a way of its own."""

    def __init__(self, config: LlamaConfig, run: Callable[..., Tensor]) -> None:
        super().__init__(config)
        self.run = run

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        inputs = self.model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        call = {"position_embeddings": self.model.rotary_emb(inputs, positions)}
        return CausalLMOutputWithPast(logits=self.lm_head(self.run(self.model.layers, inputs, call)))


def backwards(layers: nn.ModuleList, x: Tensor, call: dict[str, Any]) -> Tensor:
    return layers[0](layers[1](x, **call), **call)


def looping(layers: nn.ModuleList, x: Tensor, call: dict[str, Any]) -> Tensor:
    for layer in (*layers, *layers):
        x = layer(x, **call)
    return x


def adding_between(layers: nn.ModuleList, x: Tensor, call: dict[str, Any]) -> Tensor:
    return layers[1](layers[0](x, **call) + x, **call)


def handing_on_more(layers: nn.ModuleList, x: Tensor, call: dict[str, Any]) -> Tensor:
    y = layers[0](x, **call)
    return layers[1](y, **call, attention_mask=y.mean() * torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("run", "what"),
    [
        (backwards, "do not run once each in their order"),
        (looping, "do not run once each in their order"),
        (adding_between, "do not take their hidden states from one another as they are"),
        (handing_on_more, "hand more on to one another than hidden states"),
    ],
)
def test_networks_that_do_not_run_block_by_block_are_refused(
    run: Callable[..., Tensor], what: str, tmp_path: Path
) -> None:
    weights = open_weights(architectures.make("llama", tmp_path))
    with torch.device("meta"):
        weights.skeleton.model = Stacked(weights.skeleton.config, run).eval()
    weights.skeleton.model.model.rotary_emb = type(weights.skeleton.model.model.rotary_emb)(weights.skeleton.config)
    weights.skeleton.blocks = weights.skeleton.model.model.layers
    with Stream(weights) as stream, pytest.raises(UnsupportedError, match=what) as caught:
        stream.enter(torch.zeros(2, 5, dtype=torch.int64))
    assert "--no-eval" in caught.value.remedy


def test_asking_a_block_takes_no_memory_and_leaves_it_empty(tmp_path: Path) -> None:
    weights = open_weights(architectures.make("bamba", tmp_path))
    with Stream(weights) as stream:
        stream.enter(torch.zeros(1, 5, dtype=torch.int64))
    assert all(parameter.is_meta for parameter in weights.skeleton.model.parameters())
    assert all("forward" not in vars(block) for block in weights.skeleton.blocks)


def test_a_window_longer_than_the_sliding_attention(tmp_path: Path) -> None:
    """Blocks of one network are called with different masks."""
    architectures.make("gemma2", tmp_path, sliding_window=5)
    ids = torch.randint(architectures.VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(streamed(tmp_path, ids), model(ids).logits, rtol=0, atol=0)


def test_a_network_that_reaches_none_of_its_blocks(tmp_path: Path) -> None:
    architectures.make("llama", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    skeleton = Skeleton(tmp_path, checkpoint.config)
    skeleton.model.model.config.num_hidden_layers = 0
    with (
        Stream(Weights(checkpoint, skeleton)) as stream,
        pytest.raises(CheckpointError, match="reaches none of its blocks"),
    ):
        stream.enter(torch.zeros(1, 4, dtype=torch.int64))


def test_what_the_code_of_a_network_raises_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not run: KeyError: 'yarn'"), running(tmp_path):
        raise KeyError("yarn")
    with pytest.raises(MemoryError), running(tmp_path):
        raise MemoryError
    with pytest.raises(DataError, match="mine"), running(tmp_path):
        raise DataError("mine")


class Mixed(nn.Module):
    """Every way in which a weight is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name = nn.Linear(3, 2)
        self.operator = nn.Linear(3, 2)
        self.stack = nn.Parameter(torch.randn(4, 2, 3))
        self.unwatched = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.linear(input=x, weight=self.by_name.weight)
        b = x @ self.operator.weight.t()
        c = F.linear(x, self.stack[2]) + torch.matmul(x, other=self.stack[3].t())
        return a + b + c + self.unwatched(x)


def test_every_product_with_a_watched_weight_is_seen() -> None:
    root = Mixed()
    sites = [site for site in find_layers(root, "block") if "unwatched" not in site.name]
    sites += [LayerSite(f"block.stack.{k}", "expert", "block.stack", 2, 3, k) for k in range(4)]
    seen: dict[str, tuple[torch.Size, torch.Size]] = {}
    x = torch.randn(5, 3)
    with torch.no_grad():
        expected = root(x)
        with WatchLayers(root, "block.", sites, lambda name, x, y: seen.update({name: (x.shape, y.shape)})):
            actual = root(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert seen == {
        name: ((5, 3), (5, 2)) for name in ("block.by_name", "block.operator", "block.stack.2", "block.stack.3")
    }
