"""The `nf4` pass: by hand, against a search over all levels, and bit for bit against bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from small_graphs import inputs, residual
from torch import Tensor

from effcli.formats import Codebook, CodebookWeight, DoubleQuantized, unpack
from effcli.formats.codebook import NF4_LEVELS, dynamic_map
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.layers.contract import Layer, LayerPass, Needs
from effcli.passes.quantize import _nf4, nf4
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = torch.tensor(NF4_LEVELS)
# Half the widest gap between two levels, which is that of the two lowest.
WORST = float(LEVELS.diff().max()) / 2


def quantized(weight: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> CodebookWeight:
    outcome = nf4.NF4(**options).apply(Layer("layer", "linear", weight.float(), dtype))
    assert isinstance(outcome.weight, CodebookWeight)
    return outcome.weight


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    """Two rows are two blocks: the levels times 2, forwards, and the levels backwards, of which none moves."""
    weight = torch.stack((2 * LEVELS, LEVELS.flip(0)))
    made = quantized(weight, block_size=16)
    assert made.codes.tolist() == [list(range(16)), list(range(15, -1, -1))]
    assert isinstance(made.scale, Tensor) and made.scale.tolist() == [2, 1]
    assert torch.equal(made.dequantize(), weight)


def test_blocks_run_on_over_the_ends_of_rows() -> None:
    """Rows of three in blocks of four: 1 2 3 4 | 8 0; the last block has two numbers."""
    made = quantized(torch.tensor([[1.0, 2.0, 3.0], [4.0, 8.0, 0.0]]), block_size=4)
    assert isinstance(made.scale, Tensor) and made.scale.tolist() == [4, 8]
    # 1/4 lies next to 0.246, 1/2 to 0.441 (0.5017 is the middle), 3/4 to 0.723.
    assert made.codes.tolist() == [[10, 12, 14], [15, 15, 7]]


def test_halfway_takes_the_lower_level() -> None:
    middles = (LEVELS[:-1] + LEVELS[1:]) / 2
    block = torch.cat((middles, torch.ones(1)))
    assert quantized(block.unsqueeze(0), block_size=16).codes.tolist() == [[*range(15), 15]]
    above = torch.cat((torch.nextafter(middles, torch.tensor(2.0)), torch.ones(1)))
    assert quantized(above.unsqueeze(0), block_size=16).codes.tolist() == [[*range(1, 16), 15]]


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (41, 1271), (64, 128), (3, 401)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_of_all_levels(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Against a search in float64. Numbers within rounding of a middle may go either way, so distances are compared."""
    weight = sample(*shape).to(dtype)
    made = quantized(weight, dtype)
    flat = weight.double().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    largest = padded.abs().amax(1)
    assert isinstance(made.scale, Tensor) and torch.equal(made.scale.double(), largest)
    unit = (padded / largest.unsqueeze(1)).view(-1)[: len(flat)]
    distances = (unit.unsqueeze(1) - LEVELS.double()).abs()
    chosen = distances.gather(1, made.codes.view(-1, 1).long()).squeeze(1)
    torch.testing.assert_close(chosen, distances.amin(1), rtol=0, atol=1e-7)
    expected = (LEVELS[made.codes.long()].view(-1) * made.scale.repeat_interleave(64)[: len(flat)]).view(shape)
    assert torch.equal(made.dequantize(torch.float32), expected)
    assert made.dtype is dtype and torch.equal(made.dequantize(), expected.to(dtype))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 64), (37, 53), (41, 1271), (129, 65), (256, 1024), (1, 3 * 64 * 256 + 5)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_for_bit_as_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int], block_size: int, double: bool) -> None:
    """Codes and constants; ordinary weights, heavy tails, zeros, blocks of zeros, one value only, tiny ones."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = sample(*shape)
    holes = weight * (sample(*shape, seed=1) > 0)
    holes.view(-1)[:64] = 0
    kinds = [weight, weight * sample(*shape, seed=2).abs() ** 4, torch.zeros(shape), holes, torch.full(shape, 0.3)]
    for values in [*kinds, 1e-6 * weight]:
        given_weight = values.to(dtype)
        packed, state = functional.quantize_4bit(
            given_weight, blocksize=block_size, quant_type="nf4", compress_statistics=double
        )
        made = quantized(given_weight, dtype, block_size=block_size, double=double)
        codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(-1)[: given_weight.numel()]
        assert torch.equal(made.codes.view(-1), codes)
        if isinstance(made.scale, DoubleQuantized):
            assert torch.equal(made.scale.codes, state.absmax)
            assert torch.equal(made.scale.absmax, state.state2.absmax)
            assert torch.equal(made.scale.mean, state.offset)
        else:
            assert isinstance(made.scale, Tensor) and torch.equal(made.scale, state.absmax)
        assert torch.equal(made.dequantize(), functional.dequantize_4bit(packed, state))


def test_the_tables_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), LEVELS)
    assert torch.equal(functional.create_dynamic_map(), dynamic_map())


def test_double_quantization_by_hand() -> None:
    """Scales 1, 2, 3: the mean is 2, what remains -1, 0, 1 times 1. There is no -1 in the map, only -0.993."""
    made = _nf4.double_quantize(torch.tensor([1.0, 2.0, 3.0]))
    assert made.mean == 2 and made.absmax.tolist() == [1]
    # Zero falls between two of the 65536 numbers, and the code is that of the upper one, 1/65535.
    assert made.codes.tolist() == [0, 131, 255]
    torch.testing.assert_close(made.restore(), torch.tensor([2 - 0.99296874, 2 + 2.125e-5, 3.0]))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3000])
def test_double_quantization_is_nearest(count: int) -> None:
    """Each scale is within half a gap of the map around it, and what the 65536 numbers add, of its own."""
    scales = sample(count).abs() + 0.1
    made = _nf4.double_quantize(scales)
    rest = scales.double() - made.mean.double()
    absmax = made.absmax.double().repeat_interleave(256)[:count]
    nearest = (rest.unsqueeze(1) - dynamic_map().double() * absmax.unsqueeze(1)).abs().amin(1)
    found = (made.restore().double() - scales.double()).abs()
    assert bool((found <= nearest + absmax * 2 / 65535 + 1e-6).all())


@pytest.mark.parametrize(("double", "bits"), [(False, 0.5), (True, 0.127)])
def test_bits_of_the_constants(double: bool, bits: float) -> None:
    """0.5 bits per weight, or 8/64 + 32/(64·256) = 0.127, in the notes and in the file."""
    weight = sample(256, 1024)
    outcome = nf4.NF4(double=double).apply(Layer("layer", "linear", weight, torch.bfloat16))
    assert outcome.notes["constant_bits"] == pytest.approx(bits, abs=1e-4)
    assert isinstance(outcome.weight, CodebookWeight)
    stored = sum(t.nbytes for name, t in outcome.weight.pack().items() if name.startswith("weight_scale"))
    assert 8 * stored / weight.numel() == pytest.approx(bits, abs=2e-4)
    again = unpack(outcome.weight.format, outcome.weight.pack())
    assert torch.equal(again.dequantize(), outcome.weight.dequantize())


@given(
    seed=st.integers(0, 2**32),
    exponent=st.integers(-20, 20),
    block_size=st.sampled_from([1, 7, 64]),
    columns=st.integers(1, 70),
)
def test_scale_invariance_and_error_bound(seed: int, exponent: int, block_size: int, columns: int) -> None:
    weight = sample(3, columns, seed=seed)
    made = quantized(weight, block_size=block_size)
    scaled = quantized(weight * 2.0**exponent, block_size=block_size)
    assert torch.equal(scaled.codes, made.codes)
    assert torch.equal(scaled.dequantize(), made.dequantize() * 2.0**exponent)
    assert isinstance(made.scale, Tensor)
    bound = made.scale.repeat_interleave(block_size)[: weight.numel()].view(weight.shape) * WORST
    assert bool(((made.dequantize() - weight).abs() <= bound * (1 + 1e-5)).all())


@given(seed=st.integers(0, 2**32))
def test_idempotence(seed: int) -> None:
    once = quantized(sample(5, 64, seed=seed)).dequantize()
    assert torch.equal(quantized(once).dequantize(), once)


def test_determinism_and_the_size_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sample(65, 129)
    first = _nf4.encode(weight, 64)
    monkeypatch.setattr(_nf4, "_STEP", 128)
    for a, b in zip(first, _nf4.encode(weight, 64), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
@pytest.mark.parametrize("double", [False, True])
def test_no_weights(shape: tuple[int, int], double: bool) -> None:
    made = quantized(torch.zeros(shape), double=double)
    assert made.dequantize().shape == shape


def test_the_options() -> None:
    assert nf4.NF4(block_size=128, double=True).format == Codebook("nf4", 4, "group", 128, True)
    assert isinstance(nf4.NF4(), LayerPass) and nf4.NF4().needs == Needs.NOTHING


@pytest.mark.parametrize("options", [{"block_size": 0}, {"block_size": None}, {"group_size": 64}, {"bits": 4}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        nf4.NF4(**options)


@pytest.mark.parametrize("double", [False, True])
def test_convolutions(double: bool, tmp_path: Any) -> None:
    """A graph is compressed, saved, and computes what its dequantized weights say."""
    graph = residual()
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    graph.save(tmp_path / "source")
    result = graph_sweep(
        tmp_path / "source", tmp_path / "out", PassStep.model_validate(parse_pass(f"nf4:double={str(double).lower()}"))
    )
    assert {row.name for row in result.ledger if row.status == "compressed"} == {site.name for site in graph.sites()}
    again = Graph.read(tmp_path / "out")
    for site in graph.sites():
        weight: Any = graph.layer(site.name).weight
        expected = quantized(weight.detach().reshape(site.shape), double=double).dequantize(torch.float32)
        graph.set_weight(site.name, expected.view(weight.shape))
    values = inputs(graph, 3)
    torch.testing.assert_close(again.run(values), graph.run(values), rtol=1e-5, atol=1e-5)
