"""Greedy decoding writes what transformers' own does, the same each time, and ends where the network ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch

from effcli import runtime
from effcli.files import locate as samples
from effcli.inputs import text
from effcli.inputs.tokens import Reader
from effcli.language.continuations import GIVEN, TEXTS, WRITTEN, continuations, greedy
from effcli.language.model import LanguageModel
from effcli.run.recipe import Recipe

SAMPLE = samples.SAMPLES["sample:lm"]


def windows(reader: Reader, count: int = 4, length: int = 24) -> list[torch.Tensor]:
    return text.windows(samples.EVALUATION_TEXT, reader, count, length).batches(3)


def test_the_sample_writes_what_transformers_writes() -> None:
    network: Any = runtime.load("sample:lm")
    reader = Reader.open(SAMPLE)
    given = windows(reader)
    found = continuations(network, given, reader)
    assert len(found) == TEXTS
    for row, each in zip(torch.cat(given), found, strict=False):
        ids = row[:GIVEN].unsqueeze(0)
        expected = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=WRITTEN)
        assert each.prompt == reader.tokenizer.decode(ids[0])
        assert each.text == reader.tokenizer.decode(expected[0, GIVEN:])
        assert len(each.text) > 20
    assert continuations(runtime.load("sample:lm"), given, reader) == found


def test_decoding_ends_with_the_text() -> None:
    network: Any = runtime.load("sample:lm")
    ids = torch.cat(windows(Reader.open(SAMPLE)))[:1, :GIVEN]
    whole = greedy(network, ids, 8)
    assert len(whole) == 8
    network.generation_config.eos_token_id = [whole[3]]
    assert greedy(network, ids, 8) == whole[: whole.index(whole[3])]
    assert greedy(network, ids, 0) == []


def test_a_short_context_is_kept(tmp_path: Path) -> None:
    source = architectures.make("gpt2", tmp_path / "in", n_positions=24)
    reader = Reader(Reader.open(SAMPLE).tokenizer, 1024, 24)
    network: Any = runtime.load(source)
    assert len(continuations(network, windows(reader), reader)) == TEXTS
    assert len(continuations(network, [torch.tensor([[1, 2]])], reader)) == 1


@pytest.mark.parametrize(
    ("keys", "texts"),
    [({}, TEXTS), ({"latency": False}, 0), ({"perplexity": False}, 0), ({"samples": 2}, 2)],
)
def test_texts_are_written_where_quality_and_speed_are_measured(
    keys: dict[str, Any], texts: int, tmp_path: Path
) -> None:
    evaluate = {"samples": 4, "length": 32, "prefill": 4, "decode": 1} | keys
    recipe = Recipe.model_validate({"model": "sample:lm", "evaluate": evaluate, "passes": ["linear"]})
    network = LanguageModel(recipe, SAMPLE)
    network.open(tmp_path)
    assert len(network.measure(SAMPLE, first=True).continuations) == texts
    assert network.measure(SAMPLE, first=False, quality=False).continuations == ()
