"""`merge`: equal to PEFT's `merge_and_unload` for each kind of adapter; what does not fit is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import effcli
import effcli.files.locate
from effcli.errors import (
    CheckpointError,
    DataError,
    EffcliError,
    NumericsError,
    RecipeError,
    SelectionError,
    UnsupportedError,
)
from effcli.files.checkpoint import Entry, read_entry
from effcli.formats import Mask
from effcli.language import verify
from effcli.language.beside import beside
from effcli.language.stream import Stream
from effcli.language.weights import open_weights
from effcli.reports.report import Report
from effcli.run import recipe
from effcli.run.recipe import PassStep

Make = Callable[..., Path]


ALL = "all-linear"
_LORA = {
    "lora": ("llama", dict(target_modules=ALL)),
    "rslora": ("qwen2", dict(target_modules=["q_proj", "down_proj"], use_rslora=True, lora_alpha=3)),
    "dora": ("qwen3", dict(target_modules=ALL, use_dora=True)),
    "bias": ("qwen2", dict(target_modules=["q_proj"], lora_bias=True, bias="all")),
    "norms": ("opt", dict(target_modules=["fc1"], modules_to_save=["final_layer_norm", "fc2"])),
    "head": ("mistral", dict(target_modules=["v_proj", "lm_head"], use_dora=True)),
    "head whole": ("llama", dict(target_modules=["v_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "embedding": ("llama", dict(target_modules=["embed_tokens", "o_proj"])),
    "embedding dora": ("llama", dict(target_modules=["embed_tokens", "o_proj"], use_dora=True)),
    "tokens": ("llama", dict(target_modules=["o_proj"], trainable_token_indices=[1, 1000])),
    "conv1d": ("gpt2", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "conv1d dora": ("gpt2", dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)),
    "fused qkv": ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj"])),
    "fused neox": ("gpt_neox", dict(target_modules=["query_key_value", "embed_out"])),
    "fused falcon": ("falcon_new", dict(target_modules=["query_key_value", "dense"])),
    "patterns": (
        "llama",
        dict(
            target_modules=["q_proj", "k_proj"],
            rank_pattern={"layers.1.self_attn.k_proj": 2, "q_proj": 4},
            alpha_pattern={r"layers\.0.*k_proj": 5},
        ),
    ),
    "regular expression": ("llama", dict(target_modules=r".*layers\.1\.mlp\.(up|down)_proj")),
    "one block": ("llama", dict(target_modules=["up_proj"], layers_to_transform=[1])),
    "experts": (
        "mixtral",
        dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    "one stack": ("mixtral", dict(target_modules=[], target_parameters=["mlp.experts.down_proj"], use_rslora=True)),
}
_OTHERS = {
    "ia3": ("llama", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3 bias": ("qwen2", IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"])),
    "ia3 conv1d": (
        "gpt2",
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
    "loha": ("llama", LoHaConfig(target_modules=["q_proj", "down_proj"], r=3, alpha=5)),
    "lokr": ("llama", LoKrConfig(target_modules=["q_proj", "down_proj"], r=3, alpha=5)),
    "lokr both": ("llama", LoKrConfig(target_modules=["up_proj"], r=2, decompose_both=True, decompose_factor=8)),
}
KINDS: dict[str, tuple[str, Any]] = {
    **{kind: (name, LoraConfig(r=4, **options)) for kind, (name, options) in _LORA.items()},
    **_OTHERS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_merges(kind: str, network: Make, tmp_path: Path) -> None:
    name, config = KINDS[kind]
    model = adapters.make(network(name), tmp_path / "adapter", config)
    beside = adapters.logits(model)
    result = adapters.merged(network(name), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    made = adapters.loaded(tmp_path / "out")
    torch.testing.assert_close(adapters.logits(made), beside, rtol=1e-4, atol=1e-4)
    expected = adapters.reference(model)
    found = made.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    changed = [row for row in result.ledger if row.status == "changed"]
    before = adapters.loaded(network(name)).state_dict()
    assert any(not torch.equal(before[key], value) for key, value in found.items())
    assert changed and all(row.notes["adapter"] and row.notes["change"] > 0 for row in changed)


TIED = {
    "the embedding": (dict(target_modules=["embed_tokens"]), True),
    "the head": (dict(target_modules=["lm_head"]), True),
    "both alike": (dict(target_modules=["embed_tokens"], ensure_weight_tying=True), False),
    "the embedding whole": (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), True),
    "both whole": (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), False),
    "tokens": (dict(target_modules=["q_proj"], trainable_token_indices=[7, 3], ensure_weight_tying=True), False),
    "neither": (dict(target_modules=["q_proj"]), False),
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_head_is_untied_where_it_must_be(kind: str, network: Make, tmp_path: Path) -> None:
    """PEFT adds what it learned of one of the two to both; the model that was trained had it in one."""
    options, unties = TIED[kind]
    source = network("llama", tie_word_embeddings=True)
    beside = adapters.logits(adapters.make(source, tmp_path / "adapter", LoraConfig(r=4, **options)))
    result = adapters.merged(source, tmp_path / "out", adapter=str(tmp_path / "adapter"))
    made = adapters.loaded(tmp_path / "out")
    torch.testing.assert_close(adapters.logits(made), beside, rtol=1e-4, atol=1e-4)
    assert (made.lm_head.weight is not made.model.embed_tokens.weight) == unties
    assert made.config.tie_word_embeddings == (not unties)
    assert any("was tied" in remark for remark in result.remarks) == unties
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == unties


@pytest.mark.parametrize("dora", [False, True])
def test_rounds_once(dora: bool, network: Make, tmp_path: Path) -> None:
    """A bf16 weight is the one nearest to the float64 product, but for ties that float32 sees elsewhere."""
    source = network("llama", torch.bfloat16)
    adapters.make(source, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"], use_dora=dora))
    adapters.merged(source, tmp_path / "out", adapter=str(tmp_path / "adapter"))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for block in range(2):
        name = f"model.layers.{block}.self_attn.q_proj"
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        exact = before[f"{name}.weight"].double() + 2 * b @ a
        if dora:
            magnitude = tensors[f"base_model.model.{name}.lora_magnitude_vector"].double()
            exact *= (magnitude / exact.norm(dim=1)).unsqueeze(1)
        found = after[f"{name}.weight"].double()
        half = torch.finfo(torch.bfloat16).eps / 2
        assert bool(((found - exact).abs() <= half * found.abs() * (1 + 1e-4)).all())
    others = [name for name in after if "q_proj" not in name]
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_experts_by_their_old_names(network: Make, tmp_path: Path) -> None:
    """An adapter of single experts, as they stand in the files, is merged into the stack that they make up."""
    source, name = network("mixtral"), "model.layers.1.block_sparse_moe.experts.2.w3"
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=generator), torch.randn(128, 4, generator=generator)
    folder = tmp_path / "adapter"
    folder.mkdir()
    keys = {f"base_model.model.{name}.lora_{part}.weight": value for part, value in (("A", a), ("B", b))}
    save_file(keys, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    before = adapters.loaded(source).state_dict()
    adapters.merged(source, tmp_path / "out", adapter=str(folder))
    after = adapters.loaded(tmp_path / "out").state_dict()
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    expected = before[stack].clone()
    expected[2, 128:] += 0.5 * b @ a
    torch.testing.assert_close(after[stack], expected)
    assert all(torch.equal(before[key], after[key]) for key in before if key != stack)
    adapters.merged(source, tmp_path / "ignored", adapter=str(folder), ignore=[f"{stack}.*"])
    ignored = adapters.loaded(tmp_path / "ignored").state_dict()
    assert all(torch.equal(before[key], ignored[key]) for key in before)


def test_factors_of_a_stack_are_read_once(network: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    adapters.make(network("mixtral"), tmp_path / "adapter", config)
    read = []

    def counted(entry: Entry) -> torch.Tensor:
        read.append(entry.begin)
        return read_entry(entry)

    monkeypatch.setattr("effcli.adapters.tensors.read_entry", counted)
    adapters.merged(network("mixtral"), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    assert len(read) == len(set(read)) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def _spoiled(folder: Path, spoil: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change the config and the tensors of an adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


_Q = "base_model.model.model.layers.1.self_attn.q_proj"
BAD: dict[str, tuple[Any, type[EffcliError], str]] = {
    "unknown keys": (
        lambda config, tensors: config.update(peft_version="9.9", use_spin=True, spins=[1], quiet=None),
        UnsupportedError,
        "PEFT 9.9: unknown keys spins, use_spin",
    ),
    "another product": (
        lambda config, tensors: config.update(use_qalora=True),
        UnsupportedError,
        "sets use_qalora",
    ),
    "another kind": (lambda config, tensors: config.update(peft_type="VERA"), UnsupportedError, "of the kind VERA"),
    "changed base": (
        lambda config, tensors: config.update(init_lora_weights="pissa_niter_4"),
        UnsupportedError,
        "init_lora_weights is pissa_niter_4",
    ),
    "rank": (lambda config, tensors: config.update(r=8), SelectionError, "have rank 4, its config says 8"),
    "rank of a pattern": (
        lambda config, tensors: config.update(rank_pattern={"layers.1.self_attn.q_proj": 3}),
        SelectionError,
        "model.layers.1.self_attn.q_proj: its tensors have rank 4, its config says 3",
    ),
    "missing target": (
        lambda config, tensors: [tensors.pop(f"{_Q}.lora_{part}.weight") for part in "AB"],
        SelectionError,
        "names model.layers.1.self_attn.q_proj as its target",
    ),
    "half of a target": (
        lambda config, tensors: tensors.pop(f"{_Q}.lora_A.weight"),
        SelectionError,
        "no lora_A for model.layers.1.self_attn.q_proj",
    ),
    "surplus target": (
        lambda config, tensors: tensors.update(
            {
                f"{_Q.replace('1', '7')}.lora_A.weight": torch.ones(4, 64),
                f"{_Q.replace('1', '7')}.lora_B.weight": torch.ones(64, 4),
            }
        ),
        SelectionError,
        "tensors for model.layers.7.self_attn.q_proj, which the network does not have",
    ),
    "shape": (
        lambda config, tensors: tensors.update({f"{_Q}.lora_B.weight": torch.ones(65, 4)}),
        SelectionError,
        r"it is made for \(65, 64\), and the network has \(64, 64\)",
    ),
    "ranks of the factors": (
        lambda config, tensors: tensors.update({f"{_Q}.lora_B.weight": torch.ones(64, 5)}),
        SelectionError,
        r"lora_A \(4, 64\) and lora_B \(64, 5\)",
    ),
    "something else": (
        lambda config, tensors: tensors.update({f"{_Q}.lora_magnitude_vector": torch.ones(64)}),
        SelectionError,
        "holds lora_magnitude_vector",
    ),
    "pattern": (lambda config, tensors: config.update(target_modules="(q_proj"), CheckpointError, "no pattern"),
    "not a number": (
        lambda config, tensors: tensors[f"{_Q}.lora_A.weight"].fill_(float("nan")),
        NumericsError,
        f"{_Q}.lora_A.weight holds NaN",
    ),
    "type": (lambda config, tensors: config.update(r="many"), CheckpointError, "r: "),
}


@pytest.mark.parametrize("what", BAD)
def test_refuses_by_name(what: str, network: Make, tmp_path: Path) -> None:
    spoil, kind, text = BAD[what]
    source, folder, out = network("llama"), tmp_path / "adapter", tmp_path / "out"
    adapters.make(source, folder, LoraConfig(r=4, target_modules=["q_proj"]))
    _spoiled(folder, spoil)
    with pytest.raises(kind, match=text):
        effcli.compress(source, {"merge": {"adapter": str(folder)}}, out, evaluate=False)
    assert not out.exists() and list(tmp_path.iterdir()) == [folder]


def test_adapter_of_another_model(network: Make, tmp_path: Path) -> None:
    adapters.make(network("gpt2"), tmp_path / "adapter", LoraConfig(r=4, target_modules=["c_attn"]))
    with pytest.raises(SelectionError, match=r"transformer\.h\.0\.attn\.c_attn and for 1 further place") as caught:
        adapters.merged(network("llama"), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    assert str(network("gpt2")) in caught.value.remedy


def test_reads_a_bin_without_running_it(network: Make, tmp_path: Path) -> None:
    source, folder = network("llama"), tmp_path / "adapter"
    adapters.make(source, folder, LoraConfig(r=4, target_modules=["q_proj"]))
    adapters.merged(source, tmp_path / "first", adapter=str(folder))
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    adapters.merged(source, tmp_path / "second", adapter=str(folder))
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    torch.save({"ran": _Bomb(tmp_path / "ran")}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        adapters.merged(source, tmp_path / "third", adapter=str(folder))
    assert not (tmp_path / "ran").exists()


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_from_the_command_line(network: Make, tmp_path: Path) -> None:
    """`--adapter` is a first step; the report tells of each layer, and the adapter's files are part of the request."""
    source, folder = network("llama"), tmp_path / "adapter"
    adapters.make(source, folder, LoraConfig(r=4, target_modules=["q_proj"]))
    made = recipe.from_arguments(str(source), passes=["linear:bits=8"], adapter=str(folder), no_eval=True)
    assert [step.name for step in made.passes] == ["merge", "linear"]
    assert folder in made.inputs
    report = effcli.compress(source, [], tmp_path / "out", adapter=str(folder), evaluate=False)
    rows = {row.name: row for row in report.stages[-1].ledger}
    notes = rows["model.layers.0.self_attn.q_proj"].notes
    assert notes == {"adapter": "LoRA", "rank": 4, "scaling": 2.0, "change": notes["change"]}
    assert rows["model.layers.0.self_attn.k_proj"].reason == "the adapter has nothing for it"
    assert str(folder) in report.data


def test_several_are_summed_with_their_weights(network: Make, tmp_path: Path) -> None:
    """As PEFT's `add_weighted_adapter` does with the combination `cat`, which is the exact sum."""
    source = network("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    for number in (0, 1):
        adapters.make(source, tmp_path / f"{number}", config, seed=number)
    model = PeftModel.from_pretrained(adapters.loaded(source), tmp_path / "0", adapter_name="0")
    model.load_adapter(tmp_path / "1", adapter_name="1")
    model.add_weighted_adapter(["0", "1"], [0.75, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    expected = adapters.reference(model)
    each = [{"path": str(tmp_path / "0"), "weight": 0.75}, {"path": str(tmp_path / "1"), "weight": 0.5}]
    result = adapters.merged(source, tmp_path / "out", adapters=each)
    found = adapters.loaded(tmp_path / "out").state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    changed = [row for row in result.ledger if row.status == "changed"]
    assert len(changed) == 4 and all(len(row.notes["adapters"]) == 2 for row in changed)


@pytest.mark.parametrize("combination", ["ties", "dare_ties"])
def test_combinations_give_the_same_twice(combination: str, network: Make, tmp_path: Path) -> None:
    source = network("llama", torch.bfloat16)
    for number, target in enumerate(("q_proj", "v_proj")):
        config = LoraConfig(r=4, target_modules=["k_proj", target])
        adapters.make(source, tmp_path / f"{number}", config, seed=number)
    each = [str(tmp_path / "0"), str(tmp_path / "1")]
    for out in ("first", "second"):
        adapters.merged(source, tmp_path / out, adapters=each, combination=combination, density=0.5)
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("first", "second"))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    changed = (
        first["model.layers.0.self_attn.k_proj.weight"]
        != load_file(source / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    )
    # Of two halves about three quarters of the places get anything.
    assert 0.6 < float(changed.float().mean()) < 0.85


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapter": "a", "adapters": ["b"]}, "name one adapter, or several"),
        ({"adapter": "a", "density": 0.5}, "are of several adapters"),
        ({"adapters": [{"path": "a", "wieght": 2}]}, "wieght"),
        ({"adapter": "a", "layers": {"*": {"adapter": "b"}}}, "belongs to the whole pass"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        recipe.from_arguments("model", passes={"merge": options})


@pytest.fixture
def small_adapter(network: Make, tmp_path: Path) -> Path:
    """On two projections, with changes as training makes them."""
    folder = tmp_path / "adapter"
    config = LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "down_proj"])
    adapters.make(network("llama", torch.bfloat16), folder, config)
    return folder


def test_a_pruned_base_keeps_its_zeros(network: Make, small_adapter: Path, tmp_path: Path) -> None:
    source = network("llama", torch.bfloat16)
    steps = {"magnitude": {"sparsity": 0.5}}
    effcli.compress(source, steps, tmp_path / "pruned", evaluate=False)
    given = {"adapter": str(small_adapter)}
    kept = adapters.merged(tmp_path / "pruned", tmp_path / "kept", **given, keep_zeros=True)
    filled = adapters.merged(tmp_path / "pruned", tmp_path / "filled", **given)
    before = open_weights(tmp_path / "pruned")
    after, other = open_weights(tmp_path / "kept"), open_weights(tmp_path / "filled")
    name = "model.layers.0.mlp.down_proj"
    zeros = before.parameter(f"{name}.weight") == 0
    assert zeros.float().mean() == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(after.parameter(f"{name}.weight") == 0, zeros)
    tensors = load_file(small_adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    delta = 0.25 * b @ a
    for found, masked in ((after, delta.masked_fill(zeros, 0)), (other, delta)):
        expected = (before.parameter(f"{name}.weight").float() + masked).to(torch.bfloat16)
        torch.testing.assert_close(found.parameter(f"{name}.weight"), expected)
    rows = {row.name: row for row in kept.ledger}
    share = float(delta[zeros].square().sum() / delta.square().sum())
    assert rows[name].notes["lost"] == pytest.approx(share, rel=1e-4)
    assert "sparse" in rows[name].format and rows["model.layers.0.mlp.up_proj"].status == "kept"
    assert any("of the changes is lost" in remark for remark in kept.remarks)
    assert {row.name: row for row in filled.ledger}[name].notes["filled"] == int(zeros.sum())
    assert any("no longer 0" in remark and "keep_zeros" in remark for remark in filled.remarks)


def test_zeros_of_a_dense_base_stay(network: Make, small_adapter: Path, tmp_path: Path) -> None:
    """As of a model that another tool pruned."""
    source = tmp_path / "source"
    shutil.copytree(network("llama", torch.bfloat16), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name][:, ::2] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    adapters.merged(source, tmp_path / "out", adapter=str(small_adapter), keep_zeros=True)
    made = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert int(made[:, ::2].count_nonzero()) == 0 and bool((made[:, 1::2] != tensors[name][:, 1::2]).any())


BASES: dict[str, Any] = {
    "affine": {"linear": {"bits": 4, "group_size": 32}},
    "symmetric": {"linear": {"bits": 8, "symmetric": True}},
    "int8 inputs": {"linear": {"activations": "int8"}},
    "nf4": "nf4",
    "double": {"nf4": {"double": True}},
    "tables": {"kmeans": {"bits": 4}},
    "2:4 of nf4": [{"magnitude": {"pattern": "2:4"}}, "nf4"],
}


@pytest.mark.parametrize("base", BASES)
def test_a_compressed_base(base: str, network: Make, small_adapter: Path, tmp_path: Path) -> None:
    """The adapter is added to what the codes stand for; the sum is dense, or rounded to the same format again."""
    source = network("llama", torch.bfloat16)
    effcli.compress(source, BASES[base], tmp_path / "base", evaluate=False)
    given = {"adapter": str(small_adapter), "keep_zeros": True}
    dense = adapters.merged(tmp_path / "base", tmp_path / "dense", **given)
    again = adapters.merged(tmp_path / "base", tmp_path / "again", **given, requantize="same")
    before, after, rounded = (open_weights(tmp_path / name) for name in ("base", "dense", "again"))
    tensors = load_file(small_adapter / "adapter_model.safetensors")
    rows = [{row.name: row for row in result.ledger} for result in (dense, again)]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        packed = before.packed(name)
        assert packed is not None
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        exact = packed.dequantize(torch.float32) + 0.25 * b @ a
        mask = Mask.of(packed)
        exact = exact if mask is None else exact.masked_fill(~mask.kept, 0)
        torch.testing.assert_close(after.parameter(f"{name}.weight"), exact.to(torch.bfloat16))
        made = rounded.packed(name)
        assert made is not None and made.format == packed.format
        assert rows[0][name].status == "changed" and rows[1][name].status == "compressed"
        error = float((made.dequantize(torch.float32) - exact).square().sum())
        assert rows[1][name].notes["rounding"] == pytest.approx(error / float(exact.square().sum()), rel=1e-3)
        # As near as the format itself comes to a weight.
        own = {row.name: row for row in Report.read(tmp_path / "base").stages[-1].ledger}[name].weight_error
        assert rows[1][name].notes["rounding"] < 1.6 * own
    untouched = "model.layers.0.mlp.up_proj"
    for other in (after, rounded):
        for suffix, tensor in before.raw(untouched).items():
            assert torch.equal(other.raw(untouched)[suffix], tensor)


def test_signs_are_not_rounded_again(network: Make, small_adapter: Path, tmp_path: Path) -> None:
    effcli.compress(network("llama", torch.bfloat16), "binary", tmp_path / "base", evaluate=False)
    with pytest.raises(UnsupportedError, match="not rounded to binary"):
        adapters.merged(tmp_path / "base", tmp_path / "out", adapter=str(small_adapter), requantize="same")


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("llama", dict(target_modules=["q_proj", "up_proj"]), {}),
        (
            "llama",
            dict(target_modules=["q_proj", "embed_tokens", "lm_head"], use_dora=True),
            {"tie_word_embeddings": True},
        ),
        ("mixtral", dict(target_modules=["v_proj"], target_parameters=["mlp.experts.down_proj"]), {}),
    ],
)
def test_beside_is_what_peft_runs(
    name: str, options: dict[str, Any], more: dict[str, Any], network: Make, tmp_path: Path
) -> None:
    """Block by block, with new values that are rounded nowhere."""
    source = network(name, **more)
    expected = adapters.logits(adapters.make(source, tmp_path / "adapter", LoraConfig(r=4, **options)))
    weights = beside(source, PassStep.model_validate({"merge": {"adapter": str(tmp_path / "adapter")}}))
    ids = torch.randint(1024, (2, 16), generator=torch.Generator().manual_seed(1))
    with Stream(weights, with_head=True) as stream, torch.inference_mode():
        hidden, calls = stream.enter(ids)
        for k, block in enumerate(weights.skeleton.blocks):
            prefix = f"{weights.skeleton.block_names[k]}."
            with weights.opened(block, prefix, weights.skeleton.block_parameters(k)):
                hidden = stream.through(k, hidden, calls[k])
        found = stream.leave(ids, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("again", [False, True])
def test_check_tells_what_rounding_costs(again: bool, tmp_path: Path) -> None:
    source = effcli.files.locate.SAMPLES["sample:lm"]
    config = LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "down_proj"])
    adapters.make(source, tmp_path / "adapter", config)
    evaluate = {"samples": 2, "length": 64, "latency": False}
    effcli.compress("sample:lm", "nf4", tmp_path / "base", evaluate=False)
    merge = {"adapter": str(tmp_path / "adapter"), "check": True, "requantize": "same" if again else "none"}
    report = effcli.compress(tmp_path / "base", {"merge": merge}, tmp_path / "out", evaluate=evaluate)
    stage = report.stages[-1]
    (told,) = [remark for remark in stage.remarks if remark.startswith("checked")]
    said = re.search(r"perplexity ([\d.]+) .* and ([\d.]+) as written; KL (\S+) nats", told)
    assert said is not None
    alone, written, kl = map(float, said.groups())
    assert written == pytest.approx(stage.quality.perplexity, abs=1e-3)
    assert (kl < 1e-3) != again
    assert abs(written / alone - 1) < (0.5 if again else 0.002)


def test_check_needs_a_text(network: Make, small_adapter: Path, tmp_path: Path) -> None:
    step = {"merge": {"adapter": str(small_adapter), "check": True}}
    with pytest.raises(DataError, match="check compares on that text"):
        effcli.compress(network("llama", torch.bfloat16), step, tmp_path / "out", evaluate=False)


VERIFIED: dict[str, tuple[str, Any, dict[str, Any], Any]] = {
    "norms, biases and the head": (
        "qwen2",
        LoraConfig(r=4, target_modules=["q_proj", "o_proj"], bias="all", modules_to_save=["norm", "lm_head"]),
        {},
        [],
    ),
    "a tied embedding": (
        "llama",
        LoraConfig(r=4, target_modules=["embed_tokens", "k_proj"]),
        {"tie_word_embeddings": True},
        [],
    ),
    "experts": ("mixtral", LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"]), {}, []),
    "rounded again": ("llama", LoraConfig(r=4, target_modules=["q_proj"]), {}, [{"linear": {"bits": 4}}]),
    "behind it": ("llama", LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), {}, []),
}


@pytest.mark.parametrize("what", VERIFIED)
def test_a_run_holds_it_against_its_input(what: str, network: Make, tmp_path: Path) -> None:
    """Whatever the adapter changes stands in the ledger, and nothing else has changed."""
    name, config, more, before = VERIFIED[what]
    source = network(name, torch.bfloat16, **more)
    adapters.make(source, tmp_path / "adapter", config)
    if before:
        effcli.compress(source, before, tmp_path / "base", evaluate=False)
        source = tmp_path / "base"
    steps: list[Any] = [{"merge": {"adapter": str(tmp_path / "adapter"), "requantize": "same" if before else "none"}}]
    steps += [{"linear": {"bits": 8}}] if what == "behind it" else []
    report = effcli.compress(source, steps, tmp_path / "out", evaluate=False)
    found = verify.verify(tmp_path / "out", against=source, stages=report.stages)
    assert found.against is not None and found.against.problem == ""
    assert found.against.changed + found.against.compressed > 0
