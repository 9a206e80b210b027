"""What a plan promises is what a run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import architectures
import pytest
import torch
from peft import LoraConfig
from plain_passes import HALVE, PRUNE, Halve, Trim, asking
from safetensors.torch import load_file, save_file

from effcli.adapters.config import AdapterConfig, read_adapter_config
from effcli.errors import CheckpointError, SelectionError, UserError
from effcli.files.checkpoint import Checkpoint
from effcli.inputs.text import Windows
from effcli.language import plan
from effcli.language.backward import StoredGradients
from effcli.language.cutting import cut_model
from effcli.language.plan import PlannedModel
from effcli.language.sweep import sweep
from effcli.language.weights import open_weights
from effcli.layers.contract import Needs
from effcli.layers.result import PassResult
from effcli.run.plan import Plan, make
from effcli.run.recipe import PassStep, Recipe, check


def recipe(source: Path, *steps: Any) -> Recipe:
    return check({"model": str(source), "passes": list(steps)})


def plan_of(made: Recipe) -> Plan:
    return make(made, PlannedModel(open_weights(Path(made.model)), made.calibration))


def calibrated(source: Path, step: Any, samples: int) -> Plan:
    """The plan of one step on windows of 16 tokens."""
    return plan_of(check({"model": str(source), "passes": [step], "calibration": {"samples": samples, "length": 16}}))


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


STEPS: dict[str, tuple[str, dict[str, Any], tuple[Any, ...]]] = {
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
    "no format": ("llama", {}, (HALVE,)),
    "compressed layers without a format": ("llama", {}, ({"linear": {"bits": 4}}, HALVE)),
    "compressed layers, scaled": ("llama", {}, ({"linear": {"bits": 4, "ignore": ["*.1.*"]}}, {"smoothquant": {}})),
    "tied head without a format": (
        "llama",
        {"tie_word_embeddings": True},
        (PassStep(name="halve", config=Halve(lm_head=True)),),
    ),
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
    name: str, changes: dict[str, Any], steps: tuple[Any, ...], tmp_path: Path
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


@pytest.mark.parametrize(
    "steps",
    [
        (PRUNE,),
        (PRUNE, {"linear": {"bits": 4}}),
        (PRUNE, {"kmeans": {"bits": 3, "huffman": False}}, HALVE),
        ({"linear": {"bits": 8}}, PRUNE),
    ],
)
def test_pruned_layers_have_their_formats_and_at_least_their_bytes(steps: tuple[Any, ...], tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.bfloat16)
    made = recipe(source, *steps)
    planned = plan_of(made)
    result, out = carried_out(made, tmp_path)
    rows = {row.name: row for row in planned.rows if row.step == planned.rows[-1].step}
    assert {name: row.format for name, row in rows.items()} == {row.name: row.format for row in result.ledger}
    assert sum("sparse" in row.format for row in result.ledger) == 14
    assert all(rows[row.name].nbytes >= row.nbytes for row in result.ledger)
    assert planned.output_bytes >= tensor_bytes(out)


@pytest.mark.parametrize("needs", [Needs.GRADIENTS, Needs.GRADIENTS | Needs.SQUARED_GRADIENTS])
def test_gradients_are_counted(needs: Needs, tmp_path: Path) -> None:
    """Without the output head, and without one layer of each block."""
    source = architectures.make("llama", tmp_path / "model")
    found, without = (
        calibrated(source, asking(asked, ignore=["*.up_proj"]), 8) for asked in (needs | Needs.GRAM, Needs.GRAM)
    )
    blocks = [row for row in found.rows if row.name.startswith("model.layers")]
    numbers = sum(row.shape[0] * row.shape[1] for row in blocks)
    taken = sum(row.shape[0] * row.shape[1] for row in blocks if row.status == "change")
    assert 0 < taken < numbers
    # A forward, another one of each block and a backward through it, and the gradients of the weights that are taken.
    assert found.operations - without.operations == 2 * 8 * 16 * (3 * numbers + taken)
    # Sums of a block while its layers are compressed.
    assert found.memory_bytes - without.memory_bytes >= len(needs) * 4 * taken / 2
    assert any("forwards, gradients and Gram" in text for text in found.remarks)
    assert any(text.startswith("disk: about") for text in found.remarks)
    assert not any(text.startswith("disk") or "gradients" in text for text in without.remarks)


def test_gradients_take_the_disk_that_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = architectures.make("llama", tmp_path / "model")
    step = asking(Needs.GRADIENTS | Needs.SQUARED_GRADIENTS, lm_head=True)
    sizes: list[int] = []
    keep = StoredGradients._keep

    def watched(self: StoredGradients, *args: Any) -> None:
        keep(self, *args)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / "work").iterdir()))

    monkeypatch.setattr(StoredGradients, "_keep", watched)
    (tmp_path / "out").mkdir()
    ids = torch.randint(architectures.VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(0))
    sweep(source, tmp_path / "out", step, Windows([ids]), tmp_path / "work")
    planned = calibrated(source, step, 24).disk_bytes
    assert len(sizes) == 3 and 0.9 * planned < max(sizes) < 1.1 * planned


def test_what_is_cut_is_planned_as_it_was(tmp_path: Path) -> None:
    """A pass that cuts sees no inputs of layers, and the gradients of one block at a time."""
    source = architectures.make("llama", tmp_path / "model")
    found, without = (
        calibrated(source, PassStep(name="trim", config=Trim(asks=needs.value)), 8)
        for needs in (Needs.SQUARED_GRADIENTS, Needs.NOTHING)
    )
    numbers = sum(row.shape[0] * row.shape[1] for row in found.rows if row.status == "cut")
    assert len(found.rows) == 16 and numbers == 2 * (2 * 64 + 2 * 32 + 3 * 128) * 64
    assert (without.operations, without.disk_bytes) == (0, 0)
    assert found.operations == 2 * 8 * 16 * 4 * numbers
    assert found.memory_bytes - without.memory_bytes >= 4 * numbers // 2
    assert found.output_bytes == found.input_bytes and any("upper bound" in text for text in found.remarks)
    (tmp_path / "out").mkdir()
    ids = torch.randint(architectures.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    step = PassStep(name="trim", config=Trim(asks=Needs.SQUARED_GRADIENTS.value))
    cut_model(source, tmp_path / "out", step, Windows([ids]), tmp_path / "work")
    assert tensor_bytes(tmp_path / "out") < found.output_bytes


def test_what_is_cut_and_restored_is_planned(tmp_path: Path) -> None:
    """To restore: a forward, Gram matrices of the layers that read channels, and the network with zeros, once more."""
    source = architectures.make("llama", tmp_path / "model")
    plain, restored, both, blocks = (
        calibrated(source, step, 8)
        for step in (
            {"channels": {"restore": False}},
            {"channels": {"criterion": "magnitude"}},
            {"channels": {}},
            {"blocks": {"count": 1}},
        )
    )
    assert (plain.operations, plain.disk_bytes) == (0, 0)
    grams = 2 * (64**2 + 128**2)
    forward = blocks.operations
    assert restored.operations == forward + 2 * 8 * 16 * grams and both.operations == 2 * restored.operations
    assert restored.disk_bytes == blocks.disk_bytes + restored.input_bytes
    assert both.disk_bytes == restored.disk_bytes + 4 * grams
    assert restored.memory_bytes > plain.memory_bytes


def test_hidden_states_take_two_files(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.bfloat16)
    found, without = (calibrated(source, step, 8) for step in ("awq", "linear"))
    assert (found.disk_bytes, without.disk_bytes) == (2 * 8 * 16 * 64 * 2, 0)


def test_a_layout_that_stock_loaders_refuse_is_said_beforehand(tmp_path: Path) -> None:
    planned = plan_of(recipe(architectures.make("gpt2", tmp_path), {"linear": {"bits": 4}}))
    assert any("which stock loaders refuse" in text and "Conv1D" in text for text in planned.remarks)
    assert (
        planned.layout.startswith("the output will load with effcli.load, not with transformers")
        and "Conv1D" in planned.layout
    )
    assert "--export safetensors:dequantize=true" in planned.layout and "what would keep it" not in planned.layout


@pytest.mark.parametrize(
    ("step", "keeping"),
    [
        ({"linear": {"bits": 4, "group_size": 32}}, None),
        ({"nf4": {}}, "choose a pass that stores integers, such as gptq or awq"),
        (
            {"linear": {"bits": 4, "group_size": 32, "layers": {"*.down_proj": {"bits": 8}}}},
            "quantize with symmetric=true",
        ),
    ],
)
def test_what_would_keep_the_standard_layout_is_said_beforehand(
    step: dict[str, Any], keeping: str | None, tmp_path: Path
) -> None:
    planned = plan_of(recipe(architectures.make("llama", tmp_path), step))
    assert keeping in planned.layout if keeping else planned.layout == ""


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


def test_nothing_is_cut_behind_sparse_layers(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model")
    steps = [PRUNE, PassStep(name="trim", config=Trim())]
    with pytest.raises(UserError, match="is stored as sparse bitmask, float32 before trim"):
        plan_of(check({"model": str(source), "passes": steps}))


@pytest.mark.parametrize(("targets", "tied"), [(["q_proj"], False), (["embed_tokens"], True)])
def test_a_merge_is_planned_as_it_is_written(targets: list[str], tied: bool, tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.bfloat16, tie_word_embeddings=tied)
    adapters.make(source, tmp_path / "adapter", LoraConfig(r=4, target_modules=targets))
    planned = plan_of(recipe(source, {"merge": {"adapter": str(tmp_path / "adapter")}}))
    changed = {row.name for row in planned.rows if row.status == "change"}
    assert changed == {row.name for row in planned.rows if row.name.endswith(targets[0])}
    adapters.merged(source, tmp_path / "out", adapter=str(tmp_path / "adapter"))
    assert planned.output_bytes == sum(entry.nbytes for entry in Checkpoint.open(tmp_path / "out").entries.values())


def test_an_adapter_is_read_once_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.bfloat16)
    adapters.make(source, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    read = []

    def counted(folder: Path) -> AdapterConfig:
        read.append(folder)
        return read_adapter_config(folder)

    monkeypatch.setattr("effcli.adapters.adapter.read_adapter_config", counted)
    plan_of(recipe(source, {"merge": {"adapter": str(tmp_path / "adapter")}}))
    assert read == [tmp_path / "adapter"]


def test_a_tied_head_that_is_ignored_stays_tied(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.bfloat16, tie_word_embeddings=True)
    adapters.make(source, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    options = {"adapter": str(tmp_path / "adapter"), "ignore": ["lm_head"]}
    planned = plan_of(recipe(source, {"merge": options}))
    adapters.merged(source, tmp_path / "out", **options)
    assert planned.output_bytes == tensor_bytes(tmp_path / "out") == tensor_bytes(source)


def test_a_training_is_planned_whole(tmp_path: Path) -> None:
    """Three times the forward in a step, one more for the teacher; errors before and after; all of it in memory."""
    source = architectures.make("llama", tmp_path / "model", torch.bfloat16)
    labels, original, twice = (
        calibrated(source, {"finetune": {"steps": 2, "batch_size": size, "towards": towards}}, 2 * size)
        for size, towards in ((3, "labels"), (3, "original"), (6, "labels"))
    )
    numbers = open_weights(source).skeleton.weights()
    # Norms inside the blocks are not counted.
    assert labels.operations == pytest.approx(2 * numbers * 6 * 16 * (3 + 2), rel=0.002)
    assert original.operations == pytest.approx(labels.operations * (4 + 2 * 2) / (3 + 2))
    assert twice.operations == 2 * labels.operations
    batch = twice.memory_bytes - labels.memory_bytes
    assert labels.memory_bytes - batch > 4 * numbers and original.memory_bytes - labels.memory_bytes > 4 * numbers
    assert "for the whole network in training" in labels.remarks[1]
    assert "for one block" in calibrated(source, "awq", 2).remarks[1]
