"""Widths of language models: found by experiment, cut so that what is left computes what it did with zeros there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from coupled_cuts import random_cuts, zero
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import effcli
from effcli.errors import CheckpointError, UnsupportedError, UserError
from effcli.exporters.onnx import ONNX
from effcli.exporters.safetensors import Safetensors
from effcli.files.checkpoint import Checkpoint
from effcli.language import coupling
from effcli.language.coupling import Width, coupled, cut
from effcli.language.cutting import cut_model
from effcli.language.sweep import sweep
from effcli.language.verify import verify
from effcli.language.weights import open_weights
from effcli.layers.coupling import Cut
from effcli.run.recipe import PassStep

HEADS = ("num_attention_heads", "num_key_value_heads")
LLAMA = {"attention heads": 2, "feed-forward": 128}
FEED_FORWARD = {"feed-forward": 256}
EXPECTED: dict[str, dict[str, int]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": LLAMA,
    "phi3": LLAMA,
    "gpt2": FEED_FORWARD,
    "opt": {"feed-forward": 128},
    "gpt_neox": {"feed-forward": 128},
    "falcon": FEED_FORWARD,
    "falcon_new": FEED_FORWARD,
    "bloom": {},
    "mixtral": {**LLAMA, "experts": 4},
}


def checkpoint(name: str, folder: Path, **changes: Any) -> Path:
    """A small network with weights large enough that every channel counts."""
    torch.manual_seed(0)
    config = architectures.config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + noise / 4 if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    network.save_pretrained(folder)
    return folder


def widths(source: Path) -> list[Width]:
    return [width for width in coupled(open_weights(source)) if not width.reason]


def logits(network: nn.Module) -> Tensor:
    ids = torch.arange(40).view(2, 20) * 7
    with torch.no_grad():
        found: Tensor = network.double()(ids).logits
    return found


def stock(folder: Path) -> nn.Module:
    found: nn.Module = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    return found


def carry_out(source: Path, target: Path, cuts: list[Cut]) -> Path:
    target.mkdir()
    work = target.with_name(f"{target.name}-work")
    work.mkdir()
    cut(source, target, cuts, work)
    assert not list(work.iterdir())
    return target


def silent(source: Path, cuts: list[Cut]) -> Tensor:
    """What the network computes with all that goes set to zero."""
    network = effcli.load(source, packed=False)
    zero(network.state_dict(), cuts)
    return logits(network)


def alike(groups: list[Width], make: Callable[[Width], Tensor]) -> list[Cut]:
    """The same positions in every block."""
    kept: dict[str, Tensor] = {}
    return [Cut(group, kept.setdefault(str(dict(group.keys)), make(group))) for group in groups]


def halved(group: Width) -> Tensor:
    return torch.randperm(group.count, generator=torch.Generator().manual_seed(group.count)) < group.count // 2


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_alike_are_said_by_the_config(name: str, tmp_path: Path) -> None:
    """Heads and feed-forwards of every architecture whose config has names for them; stock transformers loads it."""
    source = checkpoint(name, tmp_path / "source")
    found = widths(source)
    counts = {group.name.partition(" ")[2]: group.count for group in found}
    assert counts == EXPECTED[name]
    assert len(found) == 2 * len(counts)
    dense = [group for group in found if "experts" not in group.name]
    if not dense:
        return
    cuts = alike(dense, halved)
    target = carry_out(source, tmp_path / "target", cuts)
    expected = silent(source, cuts)
    network = stock(target)
    torch.testing.assert_close(logits(network), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(effcli.load(target)), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(stock(source)), expected, rtol=1e-2, atol=1e-2)
    for group in dense:
        for key, each in group.keys.items():
            assert getattr(network.config, key) == each * (group.count // 2)


def test_what_a_config_cannot_say_is_refused(tmp_path: Path) -> None:
    source = checkpoint("gpt2", tmp_path / "source")
    (group,) = [group for group in coupled(open_weights(source)) if group.reason]
    assert group.name == "transformer.h attention heads"
    assert "must be divisible by num_heads" in group.reason and not group.members


def test_a_key_head_drags_its_query_heads_and_biases(tmp_path: Path) -> None:
    source = checkpoint("qwen2", tmp_path / "source")
    group = widths(source)[0]
    assert (group.count, dict(group.keys), dict(group.fixed)) == (
        2,
        dict(zip(HEADS, (2, 1), strict=True)),
        {"head_dim": 16},
    )
    found = {member.parameter.rpartition("self_attn.")[2]: member for member in group.members}
    assert {name: (member.axis, member.position.bincount().tolist()) for name, member in found.items()} == {
        "q_proj.weight": (0, [32, 32]),
        "q_proj.bias": (0, [32, 32]),
        "k_proj.weight": (0, [16, 16]),
        "k_proj.bias": (0, [16, 16]),
        "v_proj.weight": (0, [16, 16]),
        "v_proj.bias": (0, [16, 16]),
        "o_proj.weight": (1, [32, 32]),
    }


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_query_heads_of_one_key(name: str, tmp_path: Path) -> None:
    """Where all query heads share one key and value, these stay and query heads go one by one."""
    source = checkpoint(name, tmp_path / "source", num_key_value_heads=1)
    groups = [group for group in widths(source) if "heads" in group.name]
    assert [(group.count, dict(group.keys)) for group in groups] == [(4, {"num_attention_heads": 1})] * 2
    assert {member.parameter.split(".")[-2] for member in groups[0].members} == {"q_proj", "o_proj"}
    cuts = alike(groups, lambda _: torch.tensor([True, False, name == "qwen2", True]))
    target = carry_out(source, tmp_path / "target", cuts)
    torch.testing.assert_close(logits(stock(target)), silent(source, cuts), rtol=1e-4, atol=1e-5)
    if name == "llama":
        # Its config takes no number of heads that does not divide the hidden width.
        three = alike(groups, lambda _: torch.tensor([True, False, True, True]))
        with pytest.raises(UnsupportedError, match=r"with these widths: .*hidden size \(64\) is not"):
            carry_out(source, tmp_path / "three", three)


def test_fused_projections(tmp_path: Path) -> None:
    """Phi-3 keeps queries, keys and values in one matrix, and gate and up in another."""
    heads, feed_forward = widths(checkpoint("phi3", tmp_path / "source"))[:2]
    fused = next(member for member in heads.members if "qkv" in member.parameter)
    assert fused.position.tolist() == [0] * 32 + [1] * 32 + [0] * 16 + [1] * 16 + [0] * 16 + [1] * 16
    fused = next(member for member in feed_forward.members if "gate_up" in member.parameter)
    assert fused.position.tolist() == [*range(128), *range(128)]


class Without(TorchFunctionMode):
    """Tokens never choose the experts that are cut: their logits are -inf."""

    def __init__(self, gates: dict[int, Tensor]) -> None:
        super().__init__()
        self.gates = gates

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and id(args[1]) in self.gates:
            return out.masked_fill(~self.gates[id(args[1])], -torch.inf)
        return out


@contextmanager
def without_experts(network: nn.Module, cuts: list[Cut]) -> Iterator[None]:
    names = {
        member.parameter: one.kept for one in cuts for member in one.coupled.members if ".gate." in member.parameter
    }
    with Without({id(network.get_parameter(name)): kept for name, kept in names.items()}):
        yield


def test_experts(tmp_path: Path) -> None:
    source = checkpoint("mixtral", tmp_path / "source")
    groups = [group for group in widths(source) if "experts" in group.name]
    cuts = alike(groups, lambda _: torch.tensor([True, False, True, True]))
    target = carry_out(source, tmp_path / "target", cuts)
    network = stock(source).double()
    with without_experts(network, cuts):
        expected = logits(network)
    assert not torch.allclose(logits(network), expected, rtol=1e-2, atol=1e-2)
    smaller = stock(target)
    assert smaller.config.num_local_experts == 3
    torch.testing.assert_close(logits(smaller), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="would have 1 expert, of which each token takes 2"):
        few = alike(groups, lambda _: torch.tensor([True, False, False, False]))
        carry_out(source, tmp_path / "few", few)


def grouped(folder: Path, groups: int) -> Path:
    """A small DeepSeek-V3 whose second block routes 16 experts in groups."""
    torch.manual_seed(0)
    heads = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
    experts = dict(n_routed_experts=16, num_experts_per_tok=2, n_group=groups, topk_group=1, n_shared_experts=1)
    common = {**architectures._COMMON, "num_key_value_heads": 4}
    config = AutoConfig.for_model(
        "deepseek_v3", **common, **heads, **experts, moe_intermediate_size=32, first_k_dense_replace=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_several_widths_of_one_kind_have_names_of_their_own(tmp_path: Path) -> None:
    """Each expert of Qwen2-MoE has a feed-forward, and the shared one another: both are cut."""
    torch.manual_seed(0)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40)
    config = AutoConfig.for_model("qwen2_moe", **architectures._COMMON, **experts)
    source, target, work = (tmp_path / name for name in ("source", "target", "work"))
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    target.mkdir()
    step = PassStep.model_validate(
        {"channels": {"ratio": 0.25, "what": "feed_forward", "criterion": "magnitude", "restore": False}}
    )
    cut_model(source, target, step, None, work)
    found = {group.name.partition(" ")[2]: group.count for group in widths(target) if group.kind == "feed_forward"}
    assert found == {
        "feed-forward (moe_intermediate_size)": 18,
        "feed-forward (shared_expert_intermediate_size)": 30,
    }


def test_experts_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one expert the groups are unequal: refused by the config, by the trial, and when a network is built."""
    source = grouped(tmp_path / "grouped", 4)
    found = coupled(open_weights(source))
    assert [width.reason for width in found if "experts" in width.name] == [
        "its experts are routed in 4 groups of equal size (n_group)"
    ]
    assert {width.count for width in found if not width.reason} == {4, 128, 32}
    monkeypatch.setattr(coupling, "_GROUPS", ())
    (experts,) = (width for width in coupled(open_weights(source)) if "experts" in width.name)
    assert experts.reason.startswith("a block of this width does not run: ") and not experts.members
    (experts,) = (width for width in widths(grouped(tmp_path / "plain", 1)) if "experts" in width.name)
    assert experts.count == 16
    with pytest.raises(UnsupportedError, match=r"cannot be built with these widths: .* does not run: "):
        carry_out(source, tmp_path / "target", [Cut(experts, torch.arange(16) != 3)])


def test_blocks_of_different_widths_are_in_the_own_layout(tmp_path: Path) -> None:
    source = checkpoint("llama", tmp_path / "source")
    groups = widths(source)
    cuts = random_cuts(groups[:1] + groups[3:])
    target = carry_out(source, tmp_path / "target", cuts)
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "effcli"
    feed_forward = int(cuts[1].kept.sum())
    assert config["effcli"]["widths"] == {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        "1": {"intermediate_size": feed_forward},
    }
    expected = silent(source, cuts)
    torch.testing.assert_close(logits(effcli.load(target)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="effcli"):
        stock(target)
    # Later passes keep the widths, and no other layout has a place for them.
    assert verify(target).passed
    step = PassStep.model_validate({"linear": {"bits": 8, "group_size": 16}})
    (tmp_path / "packed").mkdir()
    sweep(target, tmp_path / "packed", step, None, tmp_path / "packed-work")
    torch.testing.assert_close(logits(effcli.load(tmp_path / "packed", packed=False)), expected, rtol=0.2, atol=0.2)
    for exporter in (Safetensors(dequantize=True), ONNX()):
        with pytest.raises(UnsupportedError, match="its blocks differ in width"):
            exporter.export(target, tmp_path / "exported")
    # Cut further until the blocks are alike again, which config.json can say.
    again = widths(target)
    assert [group.count for group in again] == [128, 2, feed_forward]
    kept = [torch.arange(128) < feed_forward, torch.tensor([True, False]), torch.ones(feed_forward, dtype=torch.bool)]
    alike_again = [Cut(group, own) for group, own in zip(again, kept, strict=True)]
    last = carry_out(target, tmp_path / "last", alike_again)
    assert json.loads((last / "config.json").read_text())["intermediate_size"] == feed_forward
    torch.testing.assert_close(logits(stock(last)), silent(target, alike_again), rtol=1e-4, atol=1e-5)


def test_nothing_cut_and_cut_twice(tmp_path: Path) -> None:
    source = checkpoint("llama", tmp_path / "source")
    groups = [group for group in widths(source) if "feed" in group.name]
    one, two = (torch.rand(128, generator=torch.Generator().manual_seed(seed)) < 0.7 for seed in (1, 2))
    both = carry_out(source, tmp_path / "both", [Cut(group, one & two) for group in groups])
    first = carry_out(source, tmp_path / "first", [Cut(group, one) for group in groups])
    left = [group for group in widths(first) if "feed" in group.name]
    second = carry_out(first, tmp_path / "second", [Cut(group, two[one]) for group in left])
    nothing = carry_out(second, tmp_path / "nothing", [])
    all_of_it = [Cut(group, torch.ones(group.count, dtype=torch.bool)) for group in widths(second)]
    everything = carry_out(second, tmp_path / "everything", all_of_it)
    for folder in (second, nothing, everything):
        for file in ("config.json", "model.safetensors"):
            assert (folder / file).read_bytes() == (both / file).read_bytes()


def test_the_dtype_stays(tmp_path: Path) -> None:
    source = tmp_path / "source"
    config = LlamaConfig(**{**architectures._COMMON, "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    target = carry_out(source, tmp_path / "target", random_cuts(widths(source)))
    assert {entry.dtype for entry in Checkpoint.open(target).entries.values()} == {"BF16"}


def test_groups_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    source = checkpoint("llama", tmp_path / "source")
    cuts = random_cuts(widths(source))
    target = carry_out(source, tmp_path / "target", cuts)
    with pytest.raises(UserError, match="is not coupled in"):
        carry_out(target, tmp_path / "again", cuts)


def test_damaged_widths(tmp_path: Path) -> None:
    source = checkpoint("llama", tmp_path / "source")
    target = carry_out(source, tmp_path / "target", random_cuts(widths(source)[:1]))
    config = json.loads((target / "config.json").read_text())
    for wrong in ({"7": {"intermediate_size": 8}}, {"0": {"intermediate_size": 0}}, {"x": {}}, {"0": {}}):
        config["effcli"]["widths"] = wrong
        (target / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            open_weights(target)
