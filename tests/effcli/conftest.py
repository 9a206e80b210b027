"""Reports to show: a language model after two passes, and the least a report can hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from effcli.reports.report import Check, Histogram, LedgerRow, Quality, Report, Speed, Stage

WEIGHTS = 134_515_008
PROJECTIONS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks of a few thousand weights: several threads would only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ledger(blocks: int, bits: int, scale: float = 1.0) -> tuple[LedgerRow, ...]:
    """One row per projection of `blocks` blocks and a head that was kept; errors rise with depth."""
    rows = []
    for block in range(blocks):
        for place, (role, (out, width)) in enumerate(PROJECTIONS.items()):
            name = f"model.layers.{block}.{role}"
            here = 8 if block == 0 and role.endswith("down_proj") else bits
            wave = 0.9 * math.sin(place * 1.3) + 0.3 * math.sin(7.3 * place + 2.9 * block)
            error = scale * 0.004 * 4.0 ** (bits - here) * math.exp(0.05 * block + wave)
            rows.append(
                LedgerRow(
                    name=name,
                    kind="linear",
                    shape=(out, width),
                    format=f"int{here} g64 asym",
                    bits_per_weight=here + 0.3125,
                    nbytes=round(out * width * (here + 0.3125) / 8),
                    status="compressed",
                    reason="scaled on its own input: no producer" if role.endswith("o_proj") and block == 0 else "",
                    weight_error=1.7 * error,
                    output_error=error,
                )
            )
    rows.append(
        LedgerRow(
            name="lm_head",
            kind="linear",
            shape=(49152, 576),
            format="bfloat16",
            bits_per_weight=16,
            nbytes=49152 * 576 * 2,
            status="kept",
            reason="outside the blocks; lm_head: true takes it",
        )
    )
    return tuple(rows)


def histogram(layer: str, levels: int) -> Histogram:
    """A bell before, a comb of `levels` teeth after."""
    bins = 64
    edges = tuple(-0.4 + 0.8 * k / bins for k in range(bins + 1))
    before = tuple(round(9000 * math.exp(-(((k - 31.5) / 11) ** 2))) for k in range(bins))
    step = bins // levels
    after = tuple(sum(before[k : k + step]) if k % step == 0 else 0 for k in range(bins))
    return Histogram(layer=layer, edges=edges, before=before, after=after)


@pytest.fixture
def make_report() -> Callable[..., Report]:
    """A run of awq and then gptq on a model of `blocks` blocks, everything measured."""

    def make(blocks: int = 30, bits: int = 4, output: str = "out/awq4", scale: float = 1.0) -> Report:
        def speed(kernel: str, prefill: float, decode: float) -> Speed:
            return Speed(
                kernel=kernel,
                prefill_kernel="bf16 matmul",
                prefill_tokens=128,
                prefill_tokens_per_second=prefill,
                decode_tokens_per_second=decode,
                threads=2,
                device="Intel Xeon (AMX)",
            )

        def quality(perplexity: float, kl: float, accuracy: float) -> Quality:
            return Quality(
                perplexity=perplexity, kl=kl, tokens=16384, accuracy=accuracy, accuracy_stderr=0.0102, examples=2376
            )

        packed = round(106_000_000 * (bits + 0.3125) / 8) + 56_700_000
        awq = {"bits": bits, "group_size": 64, "symmetric": False, "layers": {"*.0.mlp.down_proj": {"bits": 8}}}
        return Report(
            effcli_version="0.1.0",
            model="HuggingFaceTB/SmolLM2-135M",
            output=output,
            machine="Linux x86_64, Intel Xeon (AMX), 2 cores, 8.2 GB",
            software={"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
            recipe={
                "model": "HuggingFaceTB/SmolLM2-135M",
                "calibration": {"data": "valid.txt", "samples": 64, "length": 512},
                "evaluate": {"perplexity": "test.txt", "latency": True},
                "passes": [{"awq": awq}, {"gptq": {"bits": bits, "group_size": 64}}],
            },
            stages=(
                Stage(
                    name="input",
                    nbytes=269_060_552,
                    weights=WEIGHTS,
                    bits_per_weight=16.0,
                    quality=quality(29.35, 0.0, 0.412),
                    speed=speed("bf16 matmul", 1234.5, 21.9),
                ),
                Stage(
                    name="awq",
                    options=awq,
                    nbytes=packed,
                    weights=WEIGHTS,
                    bits_per_weight=8 * packed / WEIGHTS,
                    quality=quality(34.1, 0.152, 0.399),
                    speed=speed("int4 _weight_int4pack_mm_for_cpu", 1198.2, 41.3),
                    peak_memory=1_212_000_000,
                    seconds=201.3,
                    remarks=("20 samples of valid.txt were shorter than 512 tokens and were joined",),
                    ledger=ledger(blocks, bits, scale),
                    histograms=(
                        histogram("model.layers.1.mlp.down_proj", 16),
                        histogram("model.layers.0.self_attn.v_proj", 16),
                        histogram("model.layers.1.self_attn.o_proj", 16),
                    ),
                ),
                Stage(
                    name="gptq",
                    options={"bits": bits, "group_size": 64},
                    nbytes=packed,
                    weights=WEIGHTS,
                    bits_per_weight=8 * packed / WEIGHTS,
                    quality=quality(32.4, 0.0987, 0.38),
                    speed=speed("int4 _weight_int4pack_mm_for_cpu", 1201.0, 41.0),
                    peak_memory=1_400_000_000,
                    seconds=412.0,
                    ledger=ledger(blocks, bits, 0.7 * scale),
                ),
            ),
            loader="transformers.AutoModelForCausalLM.from_pretrained",
            verified="reloaded with transformers 5.23.0: largest logit difference 2.1e-05",
            checks=(
                Check(
                    text="transformers 5.23.0 loads it; its logits equal those of effcli",
                    passed=True,
                    numbers="largest logit difference 2.1e-05 (1.0e-06 relative), top-1 100.0%",
                ),
            ),
        )

    return make


@pytest.fixture
def report(make_report: Callable[..., Report]) -> Report:
    return make_report()


@pytest.fixture
def bare_report() -> Report:
    """A pass that measured nothing and compressed nothing."""
    return Report(
        effcli_version="0.1.0",
        model="sample:lm",
        output=None,
        machine="Linux",
        stages=(
            Stage(name="input", nbytes=1000, weights=500, bits_per_weight=16.0),
            Stage(name="rtn", nbytes=1000, weights=500, bits_per_weight=16.0),
        ),
    )
