"""What a plan promises is what a run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file

from effcli.errors import CheckpointError, SelectionError
from effcli.files.checkpoint import Checkpoint
from effcli.inputs.text import Windows
from effcli.language import plan
from effcli.language.plan import PlannedModel
from effcli.language.sweep import sweep
from effcli.language.weights import open_weights
from effcli.layers.result import PassResult
from effcli.run.plan import Plan, make
from effcli.run.recipe import Recipe, check


def recipe(source: Path, *steps: dict[str, Any]) -> Recipe:
    return check({"model": str(source), "passes": list(steps)})


def plan_of(made: Recipe) -> Plan:
    return make(made, PlannedModel(open_weights(Path(made.model)), made.calibration))


def carried_out(made: Recipe, folder: Path) -> tuple[PassResult, Path]:
    """What the last step made, and the checkpoint that the steps leave, without the rest of a run."""
    current = Path(made.model)
    ids = torch.randint(architectures.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    for number, step in enumerate(made.passes):
        target = folder / f"out-{number}"
        target.mkdir()
        result = sweep(current, target, step, Windows([ids]), folder / f"work-{number}")
        current = target
    return result, current


def tensor_bytes(path: Path) -> int:
    return sum(entry.nbytes for entry in Checkpoint.open(path).entries.values())


STEPS: dict[str, tuple[str, dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "linear": ("llama", {}, ({"linear": {"bits": 4}},)),
    "odd bits, channel": ("llama", {}, ({"linear": {"bits": 5, "granularity": "channel"}},)),
    "tensor, asymmetric": ("llama", {}, ({"linear": {"bits": 3, "granularity": "tensor"}},)),
    "symmetric": ("llama", {}, ({"linear": {"bits": 6, "group_size": 32, "symmetric": True}},)),
    "odd shapes": ("llama", {"intermediate_size": 67}, ({"linear": {"bits": 3, "granularity": "channel"}},)),
    "awq": ("qwen2", {}, ({"awq": {"bits": 3, "group_size": 32}},)),
    "conv1d": ("gpt2", {}, ({"linear": {"bits": 4}},)),
    "experts": ("mixtral", {}, ({"linear": {"bits": 4, "ignore": ["*.gate_up_proj.1"]}},)),
    "head": ("llama", {}, ({"linear": {"bits": 4, "lm_head": True}},)),
    "tied head": ("llama", {"tie_word_embeddings": True}, ({"linear": {"bits": 8, "lm_head": True}},)),
    "kept tied head": ("gemma2", {}, ({"linear": {"bits": 8}},)),
    "single layers": ("llama", {}, ({"linear": {"bits": 4, "layers": {"*.v_proj": {"bits": 8, "group_size": 16}}}},)),
    "scales alone": ("llama", {}, ({"awq": {"round": False}},)),
    "scales, then rounding": ("llama", {}, ({"awq": {"round": False}}, {"gptq": {"bits": 3, "scales": False}})),
    "int8 inputs": ("llama", {}, ({"linear": {"activations": "int8"}},)),
    "nf4": ("llama", {}, ({"nf4": {"double": True}},)),
    "tables": ("llama", {}, ({"kmeans": {"bits": 3, "huffman": False}},)),
    "two passes": (
        "llama",
        {},
        ({"awq": {"bits": 4, "ignore": ["*.down_proj"]}}, {"linear": {"ignore": ["*.self_attn.*", "*.gate_proj"]}}),
    ),
}


@pytest.mark.parametrize(("name", "changes", "steps"), STEPS.values(), ids=STEPS)
def test_planned_bytes_are_those_of_the_file(
    name: str, changes: dict[str, Any], steps: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    dtype = torch.float32 if name == "gpt2" else torch.bfloat16
    source = architectures.make(name, tmp_path / "model", dtype, **changes)
    made = recipe(source, *steps)
    planned = plan_of(made)
    assert planned.input_bytes == tensor_bytes(source)
    result, out = carried_out(made, tmp_path)
    assert planned.output_bytes == tensor_bytes(out)
    last = [row for row in planned.rows if row.step == planned.rows[-1].step]
    assert sorted((row.name, row.kind, row.format, row.nbytes) for row in last) == sorted(
        (row.name, row.kind, row.format, row.nbytes) for row in result.ledger
    )


def test_every_layer_has_a_row_for_every_step(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path)
    planned = plan_of(recipe(source, {"linear": {"bits": 8, "ignore": ["*.q_proj"]}}, {"linear": {"bits": 4}}))
    assert len(planned.rows) == 2 * 16
    first = {row.name: row for row in planned.rows[:16]}
    assert first["model.layers.0.self_attn.q_proj"].status == "keep"
    assert first["model.layers.0.self_attn.q_proj"].reason == "ignored by '*.q_proj'"
    assert first["model.layers.0.mlp.up_proj"].status == "compress"
    assert {row.format for row in planned.rows[16:] if row.status == "compress"} == {"int4 g64 asym"}


def test_a_scale_alone_is_a_change_and_no_compression(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model")
    planned = plan_of(recipe(source, {"smoothquant": {"ignore": ["*.1.*"]}}))
    assert {row.status for row in planned.rows if ".1." in row.name} == {"keep"}
    assert {row.status for row in planned.rows if ".0." in row.name} == {"change"}


def test_memory_counts_what_a_pass_makes_of_a_gram_matrix(tmp_path: Path) -> None:
    """The factors of the widest layer: three matrices of its inputs."""
    source = architectures.make("llama", tmp_path / "model", intermediate_size=96)
    with_factors, without = (plan_of(recipe(source, {name: {"group_size": 32}})) for name in ("gptq", "awq"))
    assert with_factors.memory_bytes - without.memory_bytes == 3 * 4 * 96**2


def test_a_layout_that_stock_loaders_refuse_is_said_beforehand(tmp_path: Path) -> None:
    planned = plan_of(recipe(architectures.make("gpt2", tmp_path), {"linear": {"bits": 4}}))
    assert any("which stock loaders refuse" in text and "Conv1D" in text for text in planned.remarks)


def test_what_would_fail_fails_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = architectures.make("llama", tmp_path)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    plan_of(recipe(source, {"awq": {"bits": 4}}))
    with pytest.raises(SelectionError, match="group size 48 does not divide"):
        plan_of(recipe(source, {"linear": {"bits": 8}}, {"awq": {"group_size": 48}}))
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        plan_of(recipe(source, {"linear": {"bits": 8}}))


def test_an_inspection_counts_every_matrix(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path, torch.bfloat16)
    found = plan.inspect(str(source), source)
    assert {row.name for row in found.rows} >= {"lm_head", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj"}
    assert sum(row.nbytes for row in found.rows) == tensor_bytes(source) - 5 * 64 * 2
    assert found.nbytes == (source / "model.safetensors").stat().st_size
    assert found.weights == sum(entry.nbytes // 2 for entry in Checkpoint.open(source).entries.values())


def test_a_tied_head_has_no_bytes_of_its_own(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path, torch.bfloat16, tie_word_embeddings=True)
    found = plan.inspect(str(source), source)
    assert sum(row.nbytes for row in found.rows) == tensor_bytes(source) - 5 * 64 * 2
    assert {row.name: row.nbytes for row in found.rows}["lm_head"] == 0


def test_what_the_network_does_not_use_has_a_row(tmp_path: Path) -> None:
    source = architectures.make_family("llava", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "mtp.weight": torch.ones(3, 5)}, source / "model.safetensors", {"format": "pt"})
    made = recipe(source, {"linear": {"bits": 8, "group_size": 16}})
    planned = plan_of(made)
    result, out = carried_out(made, tmp_path)
    assert planned.output_bytes == tensor_bytes(out)
    rows = {row.name: row for row in planned.rows}
    assert rows["mtp.weight"].nbytes == 60 and "no parameter of the network" in rows["mtp.weight"].reason
    assert rows.keys() == {row.name for row in result.ledger}
