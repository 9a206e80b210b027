"""An output next to its input: what was carried over is equal bit for bit, and whatever is not is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from effcli.cli import main
from effcli.files import locate as samples
from effcli.inputs.text import Windows
from effcli.language import verify
from effcli.language.against import compare, is_part, same
from effcli.language.sweep import sweep
from effcli.language.weights import open_weights
from effcli.reports.against import Against, Moved
from effcli.reports.report import Check, Report, Stage
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep

Change = Callable[[dict[str, Tensor]], None]
TOWER = "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight"
NORM = "model.language_model.layers.1.input_layernorm.weight"
EXTRA = "mtp.head.weight"


def compress(source: Path, target: Path, step: str) -> list[Stage]:
    """The stages of a run with one pass."""
    target.mkdir(parents=True)
    windows = Windows([torch.randint(3, 1000, (4, 24), generator=torch.Generator().manual_seed(0))])
    made = PassStep.model_validate(parse_pass(step))
    result = sweep(source, target, made, windows, target.parent / "work")
    first = Stage(name="input", nbytes=1, weights=1, bits_per_weight=32)
    return [first, first.model_copy(update={"name": made.name, "ledger": tuple(result.ledger)})]


def changed(folder: Path, change: Change) -> None:
    """Change the tensors of a checkpoint, which have the names of their modules here."""
    (file,) = folder.glob("*.safetensors")
    names = open_weights(folder).file_names()
    modules = {key: name for name, key in names.items()}
    tensors = {renamed(key, modules): tensor for key, tensor in load_file(file).items()}
    change(tensors)
    save_file({renamed(key, names): tensor for key, tensor in tensors.items()}, file, {"format": "pt"})


def renamed(key: str, names: dict[str, str]) -> str:
    layer, _, suffix = key.rpartition(".")
    return names.get(key, f"{names.get(layer, layer)}.{suffix}")


def swap(tensors: dict[str, Tensor], first: str, second: str) -> None:
    """Let two layers change places."""
    for name in [name for name in tensors if name.startswith(f"{first}.")]:
        other = name.replace(first, second)
        tensors[name], tensors[other] = tensors[other], tensors[name]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of text and images, with a head that it does not use."""
    folder = architectures.make_family("llava", tmp_path_factory.mktemp("against") / "in")
    changed(folder, lambda tensors: tensors.update({EXTRA: torch.tensor([1.0, torch.nan])}))
    return folder


@pytest.fixture(scope="module")
def run(source: Path) -> tuple[Path, list[Stage]]:
    out = source.parent / "out"
    return out, compress(source, out, "linear:bits=8,group_size=16,ignore=['*.o_proj']")


def test_all_of_it_is_compressed_or_equal(source: Path, run: tuple[Path, list[Stage]]) -> None:
    out, stages = run
    found = verify.verify(out, against=source, stages=stages)
    assert found.passed and found.against is not None
    assert found.against.network == "LlavaForConditionalGeneration"
    assert (found.against.equal, found.against.compressed, found.against.changed) == (53, 12, 0)
    assert found.against.moved is not None and 0 < found.against.moved.relative < 0.1
    assert "12 tensors compressed, 53 equal; the passes changed the logits by " in found.line
    assert json.loads(found.to_json())["against"]["equal"] == 53


def test_a_pass_that_scales_may_change_norms_and_no_more(source: Path, tmp_path: Path) -> None:
    stages = compress(source, tmp_path / "out", "awq:bits=4,group_size=16")
    found = compare(tmp_path / "out", source, stages)
    assert found.problem == "" and found.changed > 0 and found.compressed == 14
    changed(tmp_path / "out", lambda tensors: tensors[TOWER].neg_())
    assert compare(tmp_path / "out", source, stages).problem == f"{TOWER} was altered, which no pass was to touch"


def test_a_scaled_layer_is_held_against_the_error_of_the_report(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "in", torch.bfloat16)
    stages = compress(source, tmp_path / "out", "awq:bits=4,group_size=16")
    assert compare(tmp_path / "out", source, stages).problem == ""
    rows = {row.name: row for row in stages[1].ledger}
    faults: dict[str, Change] = {
        # Behind a norm, whose weights say what the scale was; and behind a layer, which do not.
        "layers.0.self_attn.q_proj": lambda t: t["model.layers.0.self_attn.q_proj.weight_scale"].mul_(1.2),
        "layers.0.mlp.down_proj": lambda t: swap(t, "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        "layers.0.mlp.up_proj": lambda t: swap(t, "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
    }
    for name, fault in faults.items():
        assert "up_proj" in name or "folded_into" in rows[f"model.{name}"].notes
        out = shutil.copytree(tmp_path / "out", tmp_path / name)
        changed(out, fault)
        assert f"model.{name} is not the input's" in compare(out, source, stages).problem


def test_a_packed_layer_that_the_report_calls_kept(source: Path, run: tuple[Path, list[Stage]]) -> None:
    out, (first, last) = run
    name = "model.language_model.layers.1.mlp.up_proj"
    rows = [row.model_copy(update={"status": "kept"}) if row.name == name else row for row in last.ledger]
    found = compare(out, source, [first, last.model_copy(update={"ledger": tuple(rows)})])
    assert found.problem.startswith(f"{name} is compressed otherwise than in the input")


def test_dense_experts_beside_packed_ones_are_compared(tmp_path: Path) -> None:
    source = architectures.make("mixtral", tmp_path / "in")
    stages = compress(source, tmp_path / "out", "linear:bits=8,group_size=16,ignore=['*experts.*.1']")
    assert compare(tmp_path / "out", source, stages).problem == ""
    (name,) = [row.name for row in stages[1].ledger if "0.mlp.experts.down_proj.1" in row.name]
    changed(tmp_path / "out", lambda tensors: tensors[f"{name}.weight"].neg_())
    assert compare(tmp_path / "out", source, stages).problem == f"{name}.weight was altered, which no pass was to touch"


def test_a_head_of_its_own_is_held_against_the_embedding(tmp_path: Path) -> None:
    source = architectures.make("gpt2", tmp_path / "in")
    stages = compress(source, tmp_path / "out", "linear:bits=8,group_size=16,lm_head=true")
    found = compare(tmp_path / "out", source, stages)
    assert found.problem == "" and found.compressed == 9
    changed(tmp_path / "out", lambda tensors: tensors["lm_head.weight_scale"].neg_())
    assert compare(tmp_path / "out", source, stages).problem.startswith("lm_head is not the input's")


FAULTS: dict[str, tuple[Change, str]] = {
    "tower": (lambda t: t[TOWER].add_(1e-3), f"{TOWER} was altered"),
    "norm": (lambda t: t[NORM].add_(1e-3), f"{NORM} was altered"),
    "kept layer": (
        lambda t: t["model.language_model.layers.0.self_attn.o_proj.weight"].neg_(),
        "model.language_model.layers.0.self_attn.o_proj.weight was altered",
    ),
    "dtype": (lambda t: t.update({TOWER: t[TOWER].bfloat16()}), f"{TOWER} is bfloat16 and was float32"),
    "lost": (lambda t: t.pop(TOWER), f"lacks 1 of the network's parameters, the first is {TOWER}"),
    "head lost": (lambda t: t.pop(EXTRA), f"1 tensor lost, such as {EXTRA}"),
    "head altered": (lambda t: t[EXTRA].neg_(), f"1 tensor altered, such as {EXTRA}"),
    "swapped": (
        lambda t: swap(t, "model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj"),
        "model.language_model.layers.0.mlp.up_proj is not the input's: its weight lies 2 off",
    ),
    "new": (lambda t: t.update({"new.weight": torch.ones(2)}), "1 tensor new, such as new.weight"),
}


@pytest.mark.parametrize(("change", "problem"), FAULTS.values(), ids=FAULTS)
def test_what_was_lost_or_altered_is_said(
    change: Change, problem: str, source: Path, run: tuple[Path, list[Stage]], tmp_path: Path
) -> None:
    out = shutil.copytree(run[0], tmp_path / "out")
    changed(out, change)
    found = compare(out, source, run[1])
    assert problem in found.problem
    assert str(found) == f"against its input: {found.problem}"


def test_another_class_is_another_network(source: Path, run: tuple[Path, list[Stage]], tmp_path: Path) -> None:
    other = architectures.make("llama", tmp_path / "llama")
    found = verify.verify(run[0], against=other)
    assert not found.passed and found.against is not None
    assert "names ['LlavaForConditionalGeneration'], the input's ['LlamaForCausalLM']" in found.against.problem
    assert found.against.moved is None


def test_parameters_that_transformers_would_make_up_are_a_fault(source: Path, tmp_path: Path) -> None:
    out = shutil.copytree(source, tmp_path / "out")
    changed(out, lambda tensors: tensors.pop(next(name for name in tensors if "pre_layrnorm" in name)))
    with pytest.raises(ValueError, match="it finds no weights for 1 parameter, such as"):
        verify.load_stock(out)


def test_the_same_bits() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    assert same(nan, nan.clone()) and not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same(torch.ones(2), torch.ones(2, 1)) and not same(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    assert same(torch.tensor(1), torch.tensor(1))


def test_the_report_names_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(samples.SAMPLES["sample:lm"], tmp_path / "in")
    out = tmp_path / "out"
    step = "linear:bits=8,group_size=32,lm_head=true"
    assert main(["compress", str(source), "--pass", step, "-q", "--no-eval", "-o", str(out)]) == 0
    capsys.readouterr()
    assert main(["verify", str(out)]) == 0
    assert "against its input: 43 tensors compressed" in capsys.readouterr().out
    source.rename(tmp_path / "moved")
    assert main(["verify", str(out)]) == 0
    assert f"not compared with its input {source}, which is not here" in capsys.readouterr().out
    assert main(["verify", str(out), "--against", str(tmp_path / "moved")]) == 0
    assert "against its input: 43 tensors compressed" in capsys.readouterr().out
    assert Report.read(out).model == str(source)


def test_in_words() -> None:
    found = Against(input="in", network="N", equal=2, compressed=1, changed=3)
    counts = "1 tensor compressed, 3 changed by the passes, 2 equal"
    assert str(found) == f"against its input, as N: {counts}"
    assert found.check == Check(text=f"against its input: {counts}", passed=True, numbers="both built as N")
    moved = Moved(inputs="random tokens", relative=0.0461, top1=0.891)
    told = "the passes changed the logits by 4.6% on random tokens; the largest one is the same in 89.1%"
    assert str(moved) == told
    check = Against(input="in", moved=moved).check
    assert (
        check.text == "against its input: outputs differ by 4.6% (tensors cannot be compared)" and check.passed is None
    )
    assert check.numbers == f"{told} (perplexity or accuracy tell what that costs)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_is_the_whole_without_entries_of_one_axis(dtype: torch.dtype) -> None:
    whole = torch.randn(300, 7, 5).to(dtype)
    whole[3] = whole[2]
    for axis in range(3):
        kept = torch.arange(whole.shape[axis]) % 3 > 0
        part = whole.index_select(axis, kept.nonzero().flatten())
        assert is_part(part, whole)
        assert not is_part(part.flip(axis), whole)
        changed = part.clone()
        changed[1, 1, 1] += 1
        assert not is_part(changed, whole)
        assert not is_part(whole, part)
    assert is_part(whole[:0], whole) and is_part(whole[:4, :4], whole)
    assert not is_part(whole[:4].double(), whole) and not is_part(whole, whole)
    assert not is_part(torch.zeros(2, dtype=dtype), whole)
