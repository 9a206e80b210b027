"""One pass over one checkpoint: what it writes, that it goes on after a crash, and that it says everything."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import effcli
from effcli import runtime
from effcli.errors import NumericsError
from effcli.files import layout
from effcli.files.checkpoint import Checkpoint, read_config
from effcli.files.layout import is_own, network_config
from effcli.inputs.text import Windows
from effcli.language import parts, sweep, verify
from effcli.language.journal import Journal
from effcli.language.weights import open_weights
from effcli.layers.contract import Group, Layer, Outcome
from effcli.layers.result import PassResult
from effcli.passes.quantize import awq
from effcli.run.recipe import PassStep

LINEAR = {"linear": {"bits": 4}}
AWQ = {"awq": {"bits": 4}}


def windows(inputs: str = "original") -> Windows:
    """Two shapes of batches, as when the last one is smaller."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 16), (3, 16), (1, 16))
    return Windows([torch.randint(architectures.VOCABULARY, shape, generator=generator) for shape in shapes], inputs)


def carry_out(
    source: Path, target: Path, step: dict[str, Any], calibration: Windows | None = None, **more: Any
) -> PassResult:
    target.mkdir(exist_ok=True)
    work = target.with_name(target.name + "-work")
    made = sweep.sweep(source, target, PassStep.model_validate(step), calibration or windows(), work)
    assert not work.exists()
    return made


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def logits(model: Any) -> Tensor:
    ids = torch.randint(architectures.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids).logits.float()


def original(source: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager").eval())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks in bf16."""
    folder = tmp_path_factory.mktemp("llama")
    return architectures.make("llama", folder / "model", torch.bfloat16, num_hidden_layers=4)


@pytest.fixture(scope="module")
def finished(llama: Path) -> Callable[..., Path]:
    """The output of an uninterrupted run."""
    made: dict[str, Path] = {}

    def find(inputs: str = "original") -> Path:
        if inputs not in made:
            made[inputs] = llama.parent / inputs
            carry_out(llama, made[inputs], AWQ, windows(inputs))
        return made[inputs]

    return find


class Crash(BaseException):
    pass


def crash_at(where: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop when block k has begun, when its part is written but not recorded, or when its record is but not it."""
    sound_write, sound_advance = parts.write_shard, Journal.advance

    def write(file: Path, tensors: dict[str, Tensor]) -> None:
        if where == "part" and file.name == f"block-{k:05d}.safetensors":
            raise Crash
        sound_write(file, tensors)

    def advance(self: Journal, done: int) -> None:
        if where == "journal" and done == k + 1:
            raise Crash
        sound_advance(self, done)

    def assemble(*_: Any) -> None:
        raise Crash

    monkeypatch.setattr(parts, "write_shard", write)
    monkeypatch.setattr(Journal, "advance", advance)
    if where == "assemble":
        monkeypatch.setattr(layout, "assemble", assemble)


@pytest.mark.parametrize("inputs", ["original", "compressed"])
@pytest.mark.parametrize(("where", "k"), [("part", 0), ("part", 2), ("journal", 1), ("journal", 3), ("assemble", 4)])
def test_after_a_crash_it_goes_on(
    where: str,
    k: int,
    inputs: str,
    llama: Path,
    finished: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, work, step = tmp_path / "out", tmp_path / "work", PassStep.model_validate(AWQ)
    out.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(where, k, patch)
        sweep.sweep(llama, out, step, windows(inputs), work)
    assert not list(out.glob("*.safetensors"))
    told: list[tuple[int, int]] = []
    sweep.sweep(llama, out, step, windows(inputs), work, lambda *args: told.append(args))
    assert told == [(done, 4) for done in range(k, 5)]
    assert digest(out) == digest(finished(inputs))
    assert not work.exists()


@pytest.mark.parametrize("lost", ["hidden-*.bin", "block-00000.safetensors", "block-00001.json"])
def test_unfinished_work_that_lacks_a_file_is_begun_anew(
    lost: str, llama: Path, finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work, step = tmp_path / "out", tmp_path / "work", PassStep.model_validate(AWQ)
    out.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at("journal", 2, patch)
        sweep.sweep(llama, out, step, windows(), work)
    for file in work.glob(lost):
        file.unlink()
    told: list[tuple[int, int]] = []
    sweep.sweep(llama, out, step, windows(), work, lambda *args: told.append(args))
    assert told[0] == (0, 4)
    assert digest(out) == digest(finished("original"))


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from effcli.run.recipe import PassStep
from effcli.language.sweep import sweep
from effcli.inputs.text import Windows

def progress(done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(int(sys.argv[4]))
source, out, work = map(Path, sys.argv[1:4])
batches = torch.load(out / "batches")
sweep(source, out, PassStep.model_validate({"awq": {"bits": 4}}), Windows(batches), work, progress)
"""


def test_after_kill_9_it_goes_on(llama: Path, finished: Callable[..., Path], tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    torch.save(windows().batches, out / "batches")
    command = [sys.executable, "-c", KILLED, str(llama), str(out), str(work), str(torch.get_num_threads())]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    (out / "batches").unlink()
    told: list[int] = []
    sweep.sweep(llama, out, PassStep.model_validate(AWQ), windows(), work, lambda done, total: told.append(done))
    assert told[0] == 3
    assert digest(out) == digest(finished())


def changed_text() -> Windows:
    other = windows()
    other.batches[1][0, 0] ^= 1
    return other


def other_shape() -> Windows:
    return Windows([batch.view(-1, 8) for batch in windows().batches])


@pytest.mark.parametrize(
    ("step", "calibration"),
    [
        ({"awq": {"bits": 3}}, windows),
        ({"awq": {"bits": 4, "ignore": ["*.q_proj"]}}, windows),
        (AWQ, changed_text),
        (AWQ, other_shape),
        (AWQ, lambda: windows("compressed")),
    ],
)
def test_another_request_starts_anew(
    step: dict[str, Any],
    calibration: Callable[[], Windows],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at("journal", 2, patch)
        sweep.sweep(llama, out, PassStep.model_validate(AWQ), windows(), work)
    told: list[int] = []

    def stop(done: int, total: int) -> None:
        told.append(done)
        raise Crash

    with pytest.raises(Crash):
        sweep.sweep(llama, out, PassStep.model_validate(step), calibration(), work, stop)
    assert told == [0]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"fingerprint": 1}'])
def test_a_damaged_journal_starts_anew(damage: bytes, tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "work", "abc")
    journal.advance(3)
    assert Journal.open(tmp_path / "work", "abc").done == 3
    (tmp_path / "work" / "journal.json").write_bytes(damage)
    assert Journal.open(tmp_path / "work", "abc").done == 0


def test_as_many_blocks_are_counted_as_the_model_has(llama: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    step = PassStep.model_validate(LINEAR)
    sweep.sweep(llama, tmp_path / "out", step, None, tmp_path / "work", lambda *done: told.append(done))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_run_again_gives_the_same_bytes(llama: Path, finished: Callable[..., Path], tmp_path: Path) -> None:
    before = digest(llama)
    carry_out(llama, tmp_path / "again", AWQ)
    assert digest(tmp_path / "again") == digest(finished())
    assert digest(finished()) != digest(finished("compressed"))
    assert digest(llama) == before


ACCOUNTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("llama", {}, LINEAR),
    "linear with head": ("llama", {}, {"linear": {"bits": 3, "lm_head": True}}),
    "tied": ("llama", {"tie_word_embeddings": True}, LINEAR),
    "tied with head": ("llama", {"tie_word_embeddings": True}, {"awq": {"lm_head": True}}),
    "awq": ("llama", {}, {"awq": {"bits": 4, "ignore": ["*.q_proj"]}}),
    "conv1d": ("gpt2", {}, {"awq": {"without_pair": "explicit"}}),
    "experts": ("mixtral", {}, {"awq": {"ignore": ["*.gate_up_proj.1"]}}),
    "projections outside": ("opt", {"word_embed_proj_dim": 32}, LINEAR),
}


@pytest.mark.parametrize(("name", "changes", "step"), ACCOUNTED.values(), ids=ACCOUNTED)
def test_the_ledger_accounts_for_every_byte(
    name: str, changes: dict[str, Any], step: dict[str, Any], tmp_path: Path
) -> None:
    source = architectures.make(name, tmp_path / "model", torch.bfloat16, **changes)
    result = carry_out(source, tmp_path / "out", step)
    entries = Checkpoint.open(tmp_path / "out").entries
    packed = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_scale")
    vectors = sum(e.nbytes for name, e in entries.items() if len(e.shape) == 1 and not name.endswith(packed))
    assert sum(row.nbytes for row in result.ledger) + vectors == sum(entry.nbytes for entry in entries.values())
    names = [row.name for row in result.ledger]
    assert len(set(names)) == len(names)
    skeleton = open_weights(source, False).skeleton
    layers = {site.name for k in range(2) for site in skeleton.block_layers(k)} | {
        s.name for s in skeleton.outer_layers()
    }
    assert layers <= set(names)
    for row in result.ledger:
        assert row.status == "compressed" or row.reason
        assert row.bits_per_weight == pytest.approx(8 * row.nbytes / torch.Size(row.shape).numel())


@pytest.mark.parametrize("symmetric", [False, True])
def test_linear_by_another_computation(symmetric: bool, llama: Path, tmp_path: Path) -> None:
    step = {"linear": {"bits": 3, "group_size": 32, "symmetric": symmetric, "ignore": ["*.k_proj"]}}
    result = carry_out(llama, tmp_path / "out", step)
    before, after = load_file(llama / "model.safetensors"), open_weights(tmp_path / "out", False)
    rows = {row.name: row for row in result.ledger}
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if "proj" not in name or "k_proj" in name:
            torch.testing.assert_close(after.parameter(name), weight, rtol=0, atol=0)
            continue
        groups = weight.double().view(weight.shape[0], -1, 32)
        low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
        width = 2 * torch.maximum(-low, high) if symmetric else high - low
        scale = (width / 7).float().bfloat16().double()
        zero = torch.full_like(low, 4) if symmetric else (-low / scale).round()
        restored = (((groups / scale).round() + zero).clamp(0, 7) - zero) * scale
        torch.testing.assert_close(after.parameter(name), restored.view_as(weight).bfloat16(), rtol=0, atol=0)
        assert rows[module].format == f"int3 g32 {'sym' if symmetric else 'asym'}"
        error = (restored.view_as(weight) - weight).square().sum() / weight.double().square().sum()
        assert rows[module].weight_error == pytest.approx(float(error), rel=1e-4)


def fold_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `awq` fold random scales and quantize nothing."""

    def scale(config: awq.AWQ, group: Group, seen: Any) -> tuple[Tensor, dict[str, float]]:
        width = group.layers[0].weight.shape[1]
        values = torch.rand(width, generator=torch.Generator().manual_seed(seed + width)) * 1.5 + 0.5
        return group.tied(values), {"alpha": 0.5}

    def apply(config: awq.AWQ, layer: Layer, seen: Any) -> Outcome:
        return Outcome(layer.weight)

    monkeypatch.setattr(awq.AWQ, "scale", scale)
    monkeypatch.setattr(awq.AWQ, "apply", apply)


@pytest.mark.parametrize("without_pair", ["unscaled", "explicit"])
@pytest.mark.parametrize("name", architectures.NAMES)
def test_folded_scales_leave_the_network_as_it_was(
    name: str, without_pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with no quantization to hide behind; the output is a plain checkpoint that transformers loads."""
    source = architectures.make(name, tmp_path / "model")
    fold_alone(3, monkeypatch)
    result = carry_out(source, tmp_path / "out", {"awq": {"group_size": 32, "without_pair": without_pair}})
    monkeypatch.undo()
    folded = [row for row in result.ledger if "folded_into" in row.notes]
    assert len(folded) >= 2 * 3
    unfolded = [row for row in result.ledger if row.status == "compressed" and row not in folded]
    assert all(row.reason.startswith(("unscaled: ", "its scale stays explicit")) for row in unfolded)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert sum(key in after and not after[key].equal(value) for key, value in before.items()) >= 2 * 4
    torch.testing.assert_close(original(tmp_path / "out"), original(source), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "falcon"])
def test_awq_at_eight_bits_changes_little(name: str, tmp_path: Path) -> None:
    source = architectures.make(name, tmp_path / "model")
    result = carry_out(source, tmp_path / "out", {"awq": {"bits": 8, "group_size": 16, "clip": False}})
    expected, actual = original(source), logits(runtime.load(tmp_path / "out", packed=False))
    assert float((actual - expected).norm() / expected.norm()) < 0.02
    assert all(
        row.output_error is not None and row.output_error < 1e-4 for row in result.ledger if row.status != "kept"
    )


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "mixtral"])
def test_scales_without_a_producer_stay_on_the_input(name: str, tmp_path: Path) -> None:
    source = architectures.make(name, tmp_path / "model")
    step = {"awq": {"bits": 3, "group_size": 32, "without_pair": "explicit"}}
    result = carry_out(source, tmp_path / "out", step)
    explicit = [row for row in result.ledger if row.reason.startswith("its scale stays explicit")]
    assert explicit
    assert is_own(read_config(tmp_path / "out"))
    assert any("which effcli.load reads and stock loaders refuse" in text for text in result.remarks)
    weights = open_weights(tmp_path / "out", False)
    for row in explicit:
        packed = weights.packed(row.name)
        assert packed is not None
        assert (packed.input_scale is not None) == (row.notes["alpha"] > 0)
        if packed.input_scale is not None:
            dense = packed.dequantize(torch.float32) / packed.input_scale
            torch.testing.assert_close(packed.effective(torch.float32), dense, rtol=0, atol=0)
    reference = logits(runtime.load(tmp_path / "out", packed=False))
    torch.testing.assert_close(logits(runtime.load(tmp_path / "out")), reference, rtol=1e-3, atol=1e-3)
    with pytest.raises(Exception, match="effcli"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_second_pass_leaves_packed_layers_as_they_are(llama: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    carry_out(llama, first, {"awq": {"bits": 3, "symmetric": True, "ignore": ["*.down_proj"]}})
    rest = ["*.self_attn.*", "*.gate_proj", "*.up_proj"]
    result = carry_out(first, second, {"linear": {"bits": 8, "symmetric": True, "ignore": rest}})
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    for name, tensor in before.items():
        if "down_proj" not in name:
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
    formats = {row.name: (row.format, row.status) for row in result.ledger}
    assert formats["model.layers.3.mlp.up_proj"] == ("int3 g64 sym", "kept")
    assert formats["model.layers.3.mlp.down_proj"] == ("int8 g64 sym", "compressed")
    stock = AutoModelForCausalLM.from_pretrained(second).eval()
    torch.testing.assert_close(logits(stock), logits(runtime.load(second, packed=False)), rtol=0.02, atol=0.02)


def test_a_second_awq_does_not_fold_into_what_packed_layers_read(llama: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    carry_out(llama, first, {"linear": {"bits": 4, "ignore": ["*.v_proj", "*.down_proj"]}})
    result = carry_out(
        first, second, {"awq": {"bits": 4, "ignore": ["*.q_proj", "*.k_proj", "*.o_proj", "*.gate_proj", "*.up_proj"]}}
    )
    rows = {row.name: row for row in result.ledger}
    assert rows["model.layers.0.self_attn.v_proj"].reason.endswith("reads the same input and is left alone")
    assert rows["model.layers.0.mlp.down_proj"].reason.endswith("which produces its input, is left alone")
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight_packed"):
        assert after[name].equal(before[name])


def test_experts_that_no_calibration_token_reached(tmp_path: Path) -> None:
    """One token repeated goes to the same two of the four experts at every place."""
    source = architectures.make("mixtral", tmp_path / "model")
    calibration = Windows([torch.full((2, 16), 7)])
    result = carry_out(source, tmp_path / "out", {"awq": {"bits": 4}}, calibration)
    experts = {row.name: row for row in result.ledger if row.name.startswith("model.layers.0.mlp.experts.")}
    unused = {name for name, row in experts.items() if row.output_error is None}
    assert len(experts) == 8
    assert len(unused) == 4
    for name in unused:
        assert experts[name].reason == "no calibration token reached it: rounded without activations"
        assert experts[name].format == "int4 g64 asym"
    assert torch.isfinite(logits(runtime.load(tmp_path / "out", packed=False))).all()


def test_experts_that_stay_dense_load_with_the_stock_loader(tmp_path: Path) -> None:
    source = architectures.make("mixtral", tmp_path / "model")
    carry_out(source, tmp_path / "out", {"linear": {"bits": 8, "ignore": ["*.experts.*"]}})
    assert not is_own(read_config(tmp_path / "out"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    torch.testing.assert_close(
        logits(stock), logits(runtime.load(tmp_path / "out", packed=False)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("step", [{"linear": {"bits": 4, "lm_head": True}}, {"awq": {"bits": 4, "lm_head": True}}])
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head(tied: bool, step: dict[str, Any], tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", tie_word_embeddings=tied)
    result = carry_out(source, tmp_path / "out", step)
    row = next(row for row in result.ledger if row.name == "lm_head")
    assert (row.format, row.status) == ("int4 g64 asym", "compressed")
    assert (row.output_error is not None) == ("awq" in step)
    assert row.reason == ("unscaled: it stands outside the blocks" if "awq" in step else "")
    assert any("was tied to the input embedding" in text for text in result.remarks) == tied
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False
    before, weights = load_file(source / "model.safetensors"), open_weights(tmp_path / "out", False)
    embedding = before["model.embed_tokens.weight"]
    assert weights.parameter("model.embed_tokens.weight").equal(embedding)
    head = embedding if tied else before["lm_head.weight"]
    restored = weights.parameter("lm_head.weight")
    assert float((restored - head).norm() / head.norm()) == pytest.approx((row.weight_error or 0) ** 0.5, rel=1e-3)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        logits(stock), logits(runtime.load(tmp_path / "out", packed=False)), rtol=1e-4, atol=1e-4
    )


def tied_but(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A network whose config ties the head, with other tensors in its file."""
    source = architectures.make("llama", folder, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize("step", [{"linear": {"bits": 8}}, {"awq": {"bits": 8, "lm_head": True}}])
def test_a_head_that_differs_from_the_embedding_is_kept_though_the_config_ties_them(
    step: dict[str, Any], tmp_path: Path
) -> None:
    head = torch.randn(architectures.VOCABULARY, 64, generator=torch.Generator().manual_seed(2)) * 0.1
    source = tied_but(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": head}))
    result = carry_out(source, tmp_path / "out", step)
    assert any("lm_head.weight differs from the input embedding" in text for text in result.remarks)
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False
    weights = open_weights(tmp_path / "out", False)
    if "linear" in step:
        assert weights.parameter("lm_head.weight").equal(head)
    expected = original(source)
    for network in (AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), runtime.load(tmp_path / "out")):
        assert float((logits(network) - expected).norm() / expected.norm()) < 0.03


def test_a_tied_weight_that_the_file_names_after_the_head_is_read(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source = tied_but(tmp_path / "model", rename)
    embedding = load_file(source / "model.safetensors")["lm_head.weight"]
    result = carry_out(source, tmp_path / "out", LINEAR)
    assert any("share is stored as model.embed_tokens.weight" in text for text in result.remarks)
    assert open_weights(tmp_path / "out", False).parameter("model.embed_tokens.weight").equal(embedding)
    torch.testing.assert_close(logits(runtime.load(source)), original(source), rtol=1e-5, atol=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        logits(stock), logits(runtime.load(tmp_path / "out", packed=False)), rtol=1e-4, atol=1e-4
    )


def test_an_equal_copy_of_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    source = tied_but(
        tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    result = carry_out(source, tmp_path / "out", LINEAR)
    assert any("lm_head.weight is equal to the input embedding" in text for text in result.remarks)
    assert open_weights(tmp_path / "out", False).skeleton.tied


@pytest.mark.parametrize(
    "step", [{"linear": {"bits": 8}}, AWQ, {"linear": {"bits": 8, "layers": {"*.o_proj": {"bits": 4}}}}]
)
def test_every_tensor_beside_the_language_model_is_carried_over(step: dict[str, Any], tmp_path: Path) -> None:
    """Images' tower as part of the network that the config names, other heads as tensors that it does not use."""
    source = architectures.make_multimodal(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.layers.0.weight"], tensors["mtp.norm.weight"] = torch.randn(3, 5), torch.ones(3, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = carry_out(source, tmp_path / "out", step)
    assert any("carried over as stored, unused by this network: 2 tensors" in text for text in result.remarks)
    rows = {row.name: row for row in result.ledger}
    assert rows["mtp.layers.0.weight"].nbytes == 60 and "carried over" in rows["mtp.norm.weight"].reason
    carry_out(tmp_path / "out", tmp_path / "again", {"linear": {"bits": 8, "ignore": ["*.q_proj"]}})
    for folder in (tmp_path / "out", tmp_path / "again"):
        written = Checkpoint.open(folder)
        for name, tensor in tensors.items():
            if "visual" in name or "mtp" in name:
                assert written.read(name).equal(tensor)
        assert network_config(written.config)["architectures"] == ["Qwen3_5ForConditionalGeneration"]
        assert verify.verify(folder).passed
        packed = {name.removesuffix("_packed") for name in written.entries if name.endswith("weight_packed")}
        assert tensors.keys() <= {*written.entries, *packed}


@pytest.mark.parametrize("options", [{}, {"symmetric": True, "layers": {"*.o_proj": {"bits": 4}}}])
def test_the_class_for_the_text_alone_loads_the_same_layers(options: dict[str, Any], tmp_path: Path) -> None:
    """Mixed bits stay packed in the stock loader, which finds packed layers by the names of the class it builds."""
    source = architectures.make_multimodal(tmp_path / "model")
    carry_out(source, tmp_path / "out", {"linear": {"bits": 8, **options}})
    reference = logits(runtime.load(tmp_path / "out", packed=False))
    for loader in (AutoModelForCausalLM, AutoModelForImageTextToText):
        torch.testing.assert_close(logits(loader.from_pretrained(tmp_path / "out").eval()), reference)


def test_packed_layers_that_the_network_does_not_have_stay_as_they_are(llama: Path, tmp_path: Path) -> None:
    carry_out(llama, tmp_path / "first", LINEAR)
    config = read_config(tmp_path / "first")
    (tmp_path / "first" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    result = carry_out(tmp_path / "first", tmp_path / "out", {"linear": {"bits": 8}})
    before, after = load_file(tmp_path / "first" / "model.safetensors"), Checkpoint.open(tmp_path / "out")
    last = {name: tensor for name, tensor in before.items() if name.startswith("model.layers.3.")}
    assert any(name.endswith("weight_packed") for name in last)
    assert all(after.read(name).equal(tensor) for name, tensor in last.items())
    assert verify.verify(tmp_path / "out").passed
    assert any(f"carried over as stored, unused by this network: {len(last)} t" in text for text in result.remarks)


MIXTURES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "one format": ({}, {}, True),
    "symmetric": ({"symmetric": True}, {}, True),
    "symmetric, mixed bits": ({"symmetric": True}, {"bits": 8}, True),
    "symmetric, mixed groups": ({"symmetric": True}, {"group_size": 32}, True),
    "mixed groups": ({}, {"group_size": 32}, True),
    "a channel among groups": ({}, {"granularity": "channel"}, True),
    "mixed bits": ({}, {"bits": 8}, False),
    "mixed symmetry": ({}, {"symmetric": True}, False),
    "a tensor among groups": ({}, {"granularity": "tensor"}, False),
    "one tensor": ({"granularity": "tensor"}, {}, True),
}


@pytest.mark.parametrize(("options", "override", "standard"), MIXTURES.values(), ids=MIXTURES)
def test_what_stock_transformers_can_read_is_written_for_it(
    options: dict[str, Any], override: dict[str, Any], standard: bool, llama: Path, tmp_path: Path
) -> None:
    """It reads zero points only where all layers have the same bits; else the layout is effcli's own, and says so."""
    step = {"linear": {"bits": 4, **options, "layers": {"*.down_proj": override} if override else {}}}
    result = carry_out(llama, tmp_path / "out", step)
    assert is_own(read_config(tmp_path / "out")) != standard
    reference = logits(runtime.load(tmp_path / "out", packed=False))
    if standard:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(logits(stock), reference, rtol=0.02, atol=0.02)
    else:
        assert any("mixed bits only where all layers are symmetric" in text for text in result.remarks)


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [LINEAR, AWQ, {"linear": {"lm_head": True}}], ids=str)
@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight",
     "model.norm.weight", "lm_head.weight"],
)  # fmt: skip
def test_a_weight_that_is_no_number_is_named(
    name: str, step: dict[str, Any], value: float, llama: Path, tmp_path: Path
) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    source = rewritten(llama, tmp_path / "model", damage)
    before = digest(source)
    (tmp_path / "out").mkdir()
    with pytest.raises(NumericsError) as caught:
        sweep.sweep(source, tmp_path / "out", PassStep.model_validate(step), windows(), tmp_path / "work")
    assert caught.value.cause == f"{name} holds NaN or infinity"
    assert caught.value.remedy
    assert digest(source) == before
    assert list((tmp_path / "out").iterdir()) == []


def test_activations_that_overflow_name_the_layer(llama: Path, tmp_path: Path) -> None:
    """Every weight is finite; their product is not."""

    def enlarge(tensors: dict[str, Tensor]) -> None:
        for own in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{own}.weight"] *= 1e25

    source = rewritten(llama, tmp_path / "model", enlarge)
    (tmp_path / "out").mkdir()
    with pytest.raises(NumericsError, match=r"the inputs of model\.layers\.1\.mlp\.down_proj are NaN or infinite"):
        sweep.sweep(source, tmp_path / "out", PassStep.model_validate(AWQ), windows(), tmp_path / "work")
    assert list((tmp_path / "out").iterdir()) == []


def test_large_activations_in_float16_are_no_overflow(tmp_path: Path) -> None:
    """A sum of squares passes 65504 long before an activation does."""
    source = architectures.make("llama", tmp_path / "model", torch.float16)

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"] *= 200

    result = carry_out(rewritten(source, tmp_path / "large", enlarge), tmp_path / "out", AWQ)
    assert all(row.output_error is not None for row in result.ledger if row.status == "compressed")


def test_tensors_that_the_network_does_not_use_are_carried_and_said(llama: Path, tmp_path: Path) -> None:
    source = rewritten(llama, tmp_path / "model", lambda tensors: tensors.update({"model.mtp.weight": torch.ones(2)}))
    result = carry_out(source, tmp_path / "out", LINEAR)
    assert any("model.mtp.weight" in text for text in result.remarks)
    assert Checkpoint.open(tmp_path / "out").read("model.mtp.weight").equal(torch.ones(2))


def test_float32_parts_of_a_bf16_network_keep_their_dtype(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].float() + 1e-4

    source = rewritten(llama, tmp_path / "model", widen)
    carry_out(source, tmp_path / "out", LINEAR)
    kept = Checkpoint.open(tmp_path / "out").read(name)
    torch.testing.assert_close(kept, load_file(source / "model.safetensors")[name], rtol=0, atol=0)


def test_several_shards(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 60_000)
    carry_out(llama, tmp_path / "out", LINEAR)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    reference = logits(runtime.load(tmp_path / "out", packed=False))
    torch.testing.assert_close(logits(stock), reference, rtol=0.02, atol=0.02)


def test_where_the_stock_loader_replaces_a_class_the_layout_is_our_own(tmp_path: Path) -> None:
    source = architectures.make("llama4_text", tmp_path / "model")
    report = effcli.compress(source, ["linear:bits=4,group_size=32"], tmp_path / "out", evaluate=False)
    assert any("in the place of Llama4TextExperts" in remark for remark in report.stages[-1].remarks)
    assert is_own(read_config(tmp_path / "out"))
    result = verify.verify(tmp_path / "out")
    assert result.passed, result.line
