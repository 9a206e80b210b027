from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effcli import runtime
from effcli.checkpoint import Checkpoint
from effcli.errors import CheckpointError, OutputError, UnsupportedError
from effcli.exporters import safetensors as exporter
from effcli.language.sweep import sweep
from effcli.overrides import parse_pass
from effcli.recipe import PassStep

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
    exporter.export(source, tmp_path / "new" / "target")
    expected = files(source)
    # What belongs to the run and not to the checkpoint stays behind.
    del expected["report.json"]
    assert files(tmp_path / "new" / "target") == expected
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "target"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_dense_weights_load_with_the_stock_loader(kind: str, compressed: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, target = compressed(kind), tmp_path / "dense"
    exporter.export(source, target, exporter.Config(dequantize=True))
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
    exporter.export(compressed("llama"), tmp_path / "one", exporter.Config(dequantize=True))
    monkeypatch.setattr(exporter, "SHARD_BYTES", 20_000)
    exporter.export(compressed("llama"), tmp_path / "many", exporter.Config(dequantize=True))
    exporter.export(tmp_path / "many", tmp_path / "copied")
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert len(files(tmp_path / "many")) > len(files(tmp_path / "one")) + 2
    assert files(tmp_path / "copied") == files(tmp_path / "many")
    for name in one.entries:
        torch.testing.assert_close(many.read(name), one.read(name), rtol=0, atol=0)


def test_a_dense_checkpoint_is_copied(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    source = compressed("llama").parent / "source"
    exporter.export(source, tmp_path / "target", exporter.Config(dequantize=True))
    assert files(tmp_path / "target") == files(source)


@pytest.mark.parametrize(("kind", "reason"), [("gpt2", "Conv1D"), ("mixtral", "3-D parameter")])
def test_layers_without_a_place_are_named(
    kind: str, reason: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        exporter.export(compressed(kind), tmp_path / "target")
    assert reason in caught.value.cause and ".0." in caught.value.cause and " more " in caught.value.cause
    assert "--dequantize" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    source, target = compressed("llama"), tmp_path / "target"
    exporter.export(source, target)
    (target / "note.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        exporter.export(source, target)
    assert (target / "note.txt").exists()
    exporter.export(source, target, overwrite=True)
    assert not (target / "note.txt").exists()
    assert list(tmp_path.iterdir()) == [target]


def test_overwrite_spares_what_is_no_checkpoint(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds no export"):
        exporter.export(compressed("llama"), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_the_source_is_never_replaced(compressed: Callable[[str], Path]) -> None:
    source = compressed("llama")
    before = files(source)
    for target in (source, source.parent):
        with pytest.raises(OutputError, match="holds the checkpoint"):
            exporter.export(source, target, overwrite=True)
    assert files(source) == before


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot write to")])
def test_a_disk_that_fails_leaves_nothing_behind(
    number: int, message: str, compressed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = compressed("llama"), tmp_path / "target"
    exporter.export(source, target)
    before = files(target)

    def fail(*_: Any) -> None:
        raise OSError(number, "the disk")

    monkeypatch.setattr(exporter.shutil, "copyfile", fail)
    with pytest.raises(OutputError, match=message):
        exporter.export(source, target, overwrite=True)
    assert files(target) == before
    assert list(tmp_path.iterdir()) == [target]


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        exporter.export(tmp_path, tmp_path / "target")
