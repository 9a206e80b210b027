from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch

from effcli import runtime
from effcli.errors import DataError, UnsupportedError, UserError
from effcli.files import locate as samples
from effcli.kernels.quantized_matmul import route_name
from effcli.language import latency
from effcli.language.model import LanguageModel
from effcli.language.modules import QuantizedLinear
from effcli.language.sweep import sweep
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep, Recipe

SAMPLE = samples.SAMPLES["sample:lm"]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("int4")
    sweep(SAMPLE, folder, PassStep.model_validate(parse_pass("linear:bits=4,group_size=32")), None, folder / "work")
    yield folder


def test_the_dense_sample() -> None:
    speed = latency.measure("sample:lm", prefill=16, decode=3)
    assert speed.kernel == speed.prefill_kernel == "torch linear (bfloat16)"
    assert speed.prefill_tokens == 16
    assert speed.prefill_tokens_per_second > speed.decode_tokens_per_second > 0
    assert speed.threads == torch.get_num_threads()
    assert speed.device


def test_names_the_kernels_that_run(compressed: Path) -> None:
    speed = latency.measure(compressed, prefill=64, decode=2)
    layer: Any = runtime.load(compressed).get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, QuantizedLinear)
    assert speed.kernel == route_name(layer.packed, 1, torch.bfloat16)
    assert speed.prefill_kernel == route_name(layer.packed, 64, torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "longest", "taken"),
    [
        ((None, None), None, (128, 32)),
        ((None, None), 4096, (128, 32)),
        ((None, None), 160, (128, 32)),
        ((None, None), 128, (103, 25)),
        ((None, None), 2, (1, 1)),
        ((120, None), 128, (120, 8)),
        ((None, 40), 64, (24, 40)),
        ((None, 40), None, (128, 40)),
        ((200, None), None, (200, 32)),
        ((500, 600), 64, (500, 600)),
    ],
)
def test_the_lengths_follow_the_model(
    given: tuple[int | None, int | None], longest: int | None, taken: tuple[int, int]
) -> None:
    assert latency.lengths(*given, longest) == taken


def test_a_model_of_short_sequences_is_timed_on_fewer_tokens(tmp_path: Path) -> None:
    source = architectures.make("gpt2", tmp_path / "in", n_positions=24)
    assert latency.measure(source).prefill_tokens == 20
    step = PassStep.model_validate(parse_pass("linear:bits=8,group_size=16"))
    measured = LanguageModel(Recipe(model=str(source), passes=(step,)), source)
    assert (measured.settings["evaluate"]["prefill"], measured.settings["evaluate"]["decode"]) == (20, 4)
    speed = measured.measure(source, first=True).speed
    assert speed is not None and speed.prefill_tokens == 20
    with pytest.raises(DataError, match="do not fit the 24"):
        latency.measure(source, prefill=128)


def test_the_threads_are_set_and_restored() -> None:
    former = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert latency.measure("sample:lm", prefill=4, decode=1, threads=1).threads == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(DataError):
            latency.measure("sample:lm", prefill=600, decode=1, threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(former)


def test_the_prompt_is_text_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    network = runtime.load("sample:lm")
    ids = latency.prompt(SAMPLE, network.config, 20, 1)
    assert ids.shape == (1, 20)
    shutil.copyfile(SAMPLE / "config.json", tmp_path / "config.json")
    other = latency.prompt(tmp_path, network.config, 20, 1)
    assert other.shape == (1, 20)
    assert int(other.max()) < 1024


def test_a_median_is_not_moved_by_one_slow_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a network that takes 2 s for a prompt and 1 s for a token, and once an hour for each."""
    ids = torch.zeros(1, 4, dtype=torch.int64)
    slow = {"prompt": 2, "token": 8}

    class Clocked:
        def forward(self, **_: Any) -> None: ...

        def __call__(self, **_: Any) -> Any: ...

    class Out:
        logits = torch.zeros(1, 1, 8)
        past_key_values = None

    def timed(device: torch.device, network: Any, input_ids: torch.Tensor, **_: Any) -> tuple[float, Any]:
        kind, seconds = ("prompt", 2.0) if input_ids.shape[1] > 1 else ("token", 1.0)
        slow[kind] -= 1
        return (3600.0 if slow[kind] == 0 else seconds), Out

    monkeypatch.setattr(latency, "_timed", timed)
    assert latency._time(Clocked(), ids, 5, torch.device("cpu")) == (2.0, 1.0)


def test_one_token_is_decoded_at_a_time_with_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    timed = latency._timed

    def watch(device: torch.device, network: Any, **arguments: Any) -> Any:
        cache = arguments.get("cache", arguments.get("past_key_values"))
        seen.append((arguments["input_ids"].shape[1], None if cache is None else int(cache.get_seq_length())))
        return timed(device, network, **arguments)

    monkeypatch.setattr(latency, "_timed", watch)
    latency.measure("sample:lm", prefill=8, decode=3)
    assert seen[:4] == [(8, None), (1, 8), (1, 9), (1, 10)]


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UnsupportedError, match="there is no device cuda:77"):
        latency.measure("sample:lm", device="cuda:77")
    with pytest.raises(UnsupportedError, match="there is no device gpu"):
        latency.measure("sample:lm", device="gpu")
    with pytest.raises(UnsupportedError, match="there is no device cuda:99999999999"):
        latency.measure("sample:lm", device="cuda:99999999999")
    assert latency.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("threads", [0, -1, 10**6, 2**40])
def test_threads_that_cannot_serve(threads: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(UserError, match=f"threads: {threads} cannot serve"):
        latency.measure("sample:lm", threads=threads)
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(compressed: Path) -> None:
    speed = latency.measure(compressed, prefill=16, decode=2, device="cuda")
    assert speed.device == torch.cuda.get_device_name()
    assert speed.decode_tokens_per_second > 0


@pytest.mark.parametrize("name", ["rwkv", "openai-gpt"])
def test_a_network_without_a_cache_is_not_timed(name: str, tmp_path: Path) -> None:
    source = architectures.make(name, tmp_path / "in")
    with pytest.raises(UnsupportedError, match=r"gives no key-value cache back.*\n?.*evaluate.latency=false"):
        latency.measure(source, prefill=8, decode=2)
    step = PassStep.model_validate(parse_pass("linear:bits=8,group_size=16"))
    network = LanguageModel(Recipe(model=str(source), passes=(step,)), source)
    found = network.measure(source, first=True)
    assert found.speed is None and "its speed was not measured" in found.remarks[-1]
    assert network.measure(source, first=False).remarks == ()
