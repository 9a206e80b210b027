"""Which module can take in a scale, found by experiment: what a person would write down, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import architectures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from effcli.files.checkpoint import Checkpoint
from effcli.language.calls import Call
from effcli.language.pairs import (
    Producer,
    SharedInput,
    _by_input,
    _Seen,
    divide_norm,
    find_pairs,
    match_channels,
    output_factors,
)
from effcli.language.skeleton import Skeleton
from effcli.language.stream import Stream
from effcli.language.weights import Weights

LLAMA = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): ("input_layernorm", "norm"),
    ("self_attn.o_proj",): ("self_attn.v_proj", "rows"),
    ("mlp.gate_proj", "mlp.up_proj"): ("post_attention_layernorm", "norm"),
    ("mlp.down_proj",): ("mlp.up_proj", "rows"),
}
PAIRS: dict[str, dict[tuple[str, ...], tuple[str, str] | None]] = {
    "llama": {**LLAMA},
    "qwen2": {**LLAMA},
    "qwen3": {**LLAMA},
    "mistral": {**LLAMA},
    # Norms whose weight stands for 1 + w, and more of them.
    "gemma2": {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): ("input_layernorm", "norm plus one"),
        ("self_attn.o_proj",): ("self_attn.v_proj", "rows"),
        ("mlp.gate_proj", "mlp.up_proj"): ("pre_feedforward_layernorm", "norm plus one"),
        ("mlp.down_proj",): ("mlp.up_proj", "rows"),
    },
    "phi3": {
        ("self_attn.qkv_proj",): ("input_layernorm", "norm"),
        ("self_attn.o_proj",): ("self_attn.qkv_proj", "rows"),
        ("mlp.gate_up_proj",): ("post_attention_layernorm", "norm"),
        ("mlp.down_proj",): ("mlp.gate_up_proj", "rows"),
    },
    "gpt2": {
        ("attn.c_attn",): ("ln_1", "norm"),
        ("attn.c_proj",): ("attn.c_attn", "rows"),
        ("mlp.c_fc",): ("ln_2", "norm"),
        ("mlp.c_proj",): None,
    },
    # ReLU lets a positive scale through.
    "opt": {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): ("self_attn_layer_norm", "norm"),
        ("self_attn.out_proj",): ("self_attn.v_proj", "rows"),
        ("fc1",): ("final_layer_norm", "norm"),
        ("fc2",): ("fc1", "rows"),
    },
    "gpt_neox": {
        ("attention.query_key_value",): ("input_layernorm", "norm"),
        ("attention.dense",): ("attention.query_key_value", "rows"),
        ("mlp.dense_h_to_4h",): ("post_attention_layernorm", "norm"),
        ("mlp.dense_4h_to_h",): None,
    },
    # Attention and MLP side by side behind one norm.
    "falcon": {
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"): ("input_layernorm", "norm"),
        ("self_attention.dense",): ("self_attention.query_key_value", "rows"),
        ("mlp.dense_4h_to_h",): None,
    },
    "falcon_new": {
        ("self_attention.query_key_value",): ("ln_attn", "norm"),
        ("self_attention.dense",): ("self_attention.query_key_value", "rows"),
        ("mlp.dense_h_to_4h",): ("ln_mlp", "norm"),
        ("mlp.dense_4h_to_h",): None,
    },
    "bloom": {
        ("self_attention.query_key_value",): ("input_layernorm", "norm"),
        ("self_attention.dense",): ("self_attention.query_key_value", "rows"),
        ("mlp.dense_h_to_4h",): ("post_attention_layernorm", "norm"),
        ("mlp.dense_4h_to_h",): None,
    },
    "mixtral": {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): ("input_layernorm", "norm"),
        ("self_attn.o_proj",): ("self_attn.v_proj", "rows"),
        # Router and experts read one norm, each expert its own tokens: no scale of one suits the others.
        ("mlp.gate.weight",): None,
        **{(f"mlp.experts.gate_up_proj.{k}",): None for k in range(4)},
        **{(f"mlp.experts.down_proj.{k}",): (f"mlp.experts.gate_up_proj.{k}", "rows") for k in range(4)},
    },
}

HEADS, WIDTH = 4, 16
# The producer's row behind channel d of head h, for fused projections and repeated heads.
CHANNELS: dict[tuple[str, str], Callable[[int, int], int]] = {
    ("llama", "self_attn.o_proj"): lambda h, d: h // 2 * WIDTH + d,
    ("phi3", "self_attn.o_proj"): lambda h, d: 96 + h // 2 * WIDTH + d,
    ("gpt2", "attn.c_proj"): lambda h, d: 128 + h * WIDTH + d,
    ("opt", "self_attn.out_proj"): lambda h, d: h * WIDTH + d,
    ("gpt_neox", "attention.dense"): lambda h, d: h * 48 + 32 + d,
    ("bloom", "self_attention.dense"): lambda h, d: h * 48 + 32 + d,
    ("falcon", "self_attention.dense"): lambda h, d: 80 + d,
    ("falcon_new", "self_attention.dense"): lambda h, d: h // 2 * 64 + 48 + d,
}


def pairs_of(path: Path, k: int = 0) -> list[SharedInput]:
    checkpoint = Checkpoint.open(path)
    skeleton = Skeleton(path, checkpoint.config)
    weights = Weights(checkpoint, skeleton)
    block, prefix = skeleton.blocks[k], skeleton.block_names[k] + "."
    generator = torch.Generator().manual_seed(0)
    probes = []
    with Stream(weights) as stream, weights.opened(block, prefix, skeleton.block_parameters(k)):
        for shape in ((64, 1), (2, 12)):
            hidden, calls = stream.enter(torch.randint(architectures.VOCABULARY, shape, generator=generator))
            probes.append((hidden, calls[k]))
        return find_pairs(block, probes[0], probes[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", architectures.NAMES)
def test_pairs_are_what_a_person_would_write_down(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = pairs_of(architectures.make(name, tmp_path, dtype))
    assert {item.consumers: item.producer and (item.producer.name, item.producer.how) for item in found} == PAIRS[name]
    for item in found:
        assert bool(item.reason) == (item.producer is None)
        assert item.producer is None or (item.error is not None and item.error < 2e-6)
        channel = CHANNELS.get((name, item.consumers[0]))
        if channel is not None and item.producer is not None:
            expected = [channel(h, d) for h in range(HEADS) for d in range(WIDTH)]
            assert item.producer.channel.tolist() == expected
        elif item.producer is not None and item.producer.how != "rows":
            assert item.producer.channel.tolist() == list(range(64))


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_the_second_half_of_a_fused_gate(name: str, tmp_path: Path) -> None:
    by_consumer = {item.consumers[0]: item.producer for item in pairs_of(architectures.make(name, tmp_path))}
    producer = by_consumer["mlp.down_proj" if name == "phi3" else "mlp.experts.down_proj.2"]
    assert producer is not None
    assert producer.channel.tolist() == list(range(128, 256))
    assert producer.outputs == 256


def test_pairs_survive_being_written_down(tmp_path: Path) -> None:
    for item in pairs_of(architectures.make("gpt2", tmp_path)):
        again = SharedInput.from_json(item.to_json())
        assert (again.consumers, again.reason, again.error) == (item.consumers, item.reason, item.error)
        assert (again.producer is None) == (item.producer is None)
        if again.producer is not None and item.producer is not None:
            assert again.producer.channel.equal(item.producer.channel)
            assert again.producer.channel.dtype == torch.int64


class Block(nn.Module):
    """norm -> a -> `between` -> b, with a residual; `also` reads the norm's output beside a."""

    def __init__(self, between: Callable[[Tensor], Tensor], also: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        self.between, self.also = between, also

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        out = x + self.b(self.between(self.a(normed)))
        return out if self.also is None else out + self.also(normed)


def probe(block: nn.Module, several: Tensor | None = None) -> dict[tuple[str, ...], SharedInput]:
    torch.manual_seed(1)
    wide = torch.randn(2, 12, 16) if several is None else several
    call = Call((), {})
    return {item.consumers: item for item in find_pairs(block, (torch.randn(64, 1, 16), call), (wide, call))}


@pytest.mark.parametrize("between", [F.relu, lambda y: y, lambda y: 3 * y, lambda y: F.leaky_relu(y, 0.2)])
def test_what_lets_a_positive_scale_through_is_accepted(between: Callable[[Tensor], Tensor]) -> None:
    found = probe(Block(between))
    first, second = found["a",].producer, found["b",].producer
    assert first is not None and (first.name, first.how) == ("norm", "norm")
    assert second is not None and (second.name, second.how) == ("a", "rows")


@pytest.mark.parametrize(
    "between", [F.gelu, F.silu, torch.tanh, lambda y: y.softmax(-1), lambda y: y + 1, torch.square]
)
def test_a_nonlinearity_between_two_linears_is_refused(between: Callable[[Tensor], Tensor]) -> None:
    found = probe(Block(between))
    assert found["b",].producer is None
    assert found["b",].reason
    assert found["a",].producer is not None


@pytest.mark.parametrize(
    "also", [lambda y: 0.01 * y, lambda y: 1e-3 * y.mean(-1, keepdim=True), lambda y: y.roll(1, 1)]
)
def test_a_producer_that_someone_else_also_reads_is_refused(also: Callable[[Tensor], Tensor]) -> None:
    found = probe(Block(F.relu, also))
    assert found["a",].producer is None
    assert "others read it" in found["a",].reason
    assert found["b",].producer is not None


def test_one_token_of_massive_activations_does_not_hide_another_reader() -> None:
    wide = torch.randn(2, 12, 16)
    wide[:, 0] *= 1e5
    found = probe(Block(F.relu, lambda y: 0.01 * y), wide)
    assert found["a",].producer is None


def test_a_rotation_between_two_linears_is_refused() -> None:
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3)))[0]
    assert probe(Block(lambda y: y @ rotation))["b",].producer is None


def test_a_permutation_is_followed() -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    producer = probe(Block(lambda y: y[..., order]))["b",].producer
    assert producer is not None
    assert producer.channel.tolist() == order.tolist()


def test_the_block_is_left_as_it_was() -> None:
    block = Block(F.relu)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    probe(block)
    for key, value in block.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_matching_by_hand() -> None:
    """Columns (1, 2), (3, -1), (0, 5); the inputs read twice the third, the first, and the first again."""
    products = torch.tensor([[1.0, 3, 0], [2, -1, 5]])
    inputs = torch.tensor([[0.0, 1, 7], [10, 2, 14]])
    channel = match_channels(products, inputs)
    assert channel is not None
    assert channel.tolist() == [2, 0, 0]
    assert match_channels(products, torch.tensor([[1.0], [1.0]])) is None
    assert match_channels(products, -inputs) is None


def test_dead_channels_are_filled_in_only_when_all_others_stand_in_their_place() -> None:
    products = torch.tensor([[1.0, 0, 0], [2, 0, 5]])
    channel = match_channels(products, 2 * products)
    assert channel is not None
    assert channel.tolist() == [0, 1, 2]
    assert match_channels(products, products[:, [2, 1, 0]]) is None
    assert match_channels(products, products[:, :2]) is None
    assert match_channels(torch.zeros(2, 3), torch.zeros(2, 3)) is None


@given(outputs=st.integers(1, 300), seed=st.integers(0, 2**32), data=st.data())
def test_matching_finds_any_selection_of_channels(outputs: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    products = torch.randn(32, outputs, generator=generator)
    count = data.draw(st.integers(1, 300))
    chosen = torch.randint(outputs, (count,), generator=generator)
    channel = match_channels(products, products[:, chosen] * (torch.rand(count, generator=generator) + 0.1))
    assert channel is not None
    assert channel.equal(chosen)


def test_output_factors_by_hand() -> None:
    """Two inputs behind channel 3, none behind channel 0 and 2."""
    producer = Producer("v", "rows", torch.tensor([3, 1, 3]), 4)
    assert output_factors(producer, torch.tensor([5.0, 7, 5])).tolist() == [1, 7, 1, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["norm", "norm plus one"])
def test_what_a_norm_gives_up_its_readers_take_back(how: str, dtype: torch.dtype) -> None:
    """The rounding of the norm's new weight is part of the scale that is returned."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"norm": nn.LayerNorm(41)}).to(dtype)
    norm, shift = block["norm"], 1.0 if how == "norm plus one" else 0.0
    assert isinstance(norm, nn.LayerNorm)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm.weight[3] = -shift  # a channel that is off
        before, bias = norm.weight.float() + shift, norm.bias.float().clone()
        taken = divide_norm(block, Producer("norm", how, torch.arange(41), 41), torch.rand(41) * 4 + 0.1)
        after = norm.weight.float() + shift
    assert norm.weight.dtype == dtype
    torch.testing.assert_close(after * taken, before, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.bias.float() * taken, bias, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert bool((taken > 0).all())


def test_a_channel_that_its_dtype_could_not_hold_stays() -> None:
    """1e-7 / 1e3 is zero in float16 and 60000 / 1e-3 infinite: both are left alone, and their readers with them."""
    block = nn.ModuleDict({"norm": nn.LayerNorm(3, bias=False)}).half()
    norm = block["norm"]
    assert isinstance(norm, nn.LayerNorm)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1e-7, 60000, 2]))
        before = norm.weight.clone()
        scale = torch.tensor([1e3, 1e-3, 4])
        taken = divide_norm(block, Producer("norm", "norm", torch.arange(3), 3), scale)
    assert taken.tolist() == [1, 1, 4]
    assert norm.weight.tolist() == [before[0], before[1], 0.5]


def test_experts_that_no_token_reached_share_no_input() -> None:
    widths = {"a": 4, "b": 4, "c": 8}
    seen = [_Seen(name, torch.zeros(0, width), torch.zeros(0, 1), k) for k, (name, width) in enumerate(widths.items())]
    assert [[item.name for item in group] for group in _by_input(seen)] == [["a"], ["b"], ["c"]]


def test_an_input_computed_without_gradients_has_no_producer() -> None:
    class Indexing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.index, self.out = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                picked = self.index(self.norm(x))
            return self.out(x + picked.sign())

    generator = torch.Generator().manual_seed(0)
    probes = [(torch.randn(shape, generator=generator), Call((), {})) for shape in ((32, 1, 4), (2, 6, 4))]
    found = {pair.consumers: pair for pair in find_pairs(Indexing(), probes[0], probes[1])}
    assert found["index",].producer is None
    assert found["out",].producer is None
