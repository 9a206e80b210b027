"""`merge` on networks read as a graph: convolutions as PEFT merges them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig
from torch import Tensor, nn

import effcli
from effcli.errors import SelectionError
from effcli.graphs.graph import Graph


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 1)
        self.third = nn.Conv2d(12, 12, 3, groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


def adapted(network: nn.Module, folder: Path, config: Any) -> Any:
    """The network with an adapter of random numbers, which is written to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(network), config)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
    return model.eval()


WHOLE = ["first", "second", "head"]
KINDS = {
    "lora": LoraConfig(r=4, target_modules=WHOLE),
    "dora": LoraConfig(r=4, target_modules=WHOLE, use_dora=True),
    "bias": LoraConfig(r=4, target_modules=WHOLE, lora_bias=True),
    "head": LoraConfig(r=4, target_modules=["first"], modules_to_save=["head"]),
    "ia3": IA3Config(target_modules=[*WHOLE, "third"], feedforward_modules=["first", "head"]),
    "loha": LoHaConfig(r=3, target_modules=WHOLE),
    "loha core": LoHaConfig(r=3, target_modules=WHOLE, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, target_modules=WHOLE),
    "lokr core": LoKrConfig(r=1, target_modules=WHOLE, use_effective_conv2d=True, decompose_factor=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_merges(kind: str, network: nn.Module, tmp_path: Path) -> None:
    model = adapted(network, tmp_path / "adapter", KINDS[kind])
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        beside, before = model(x), network(x)
    step = {"merge": {"adapter": str(tmp_path / "adapter")}}
    report = effcli.compress(network, step, tmp_path / "out", example=x, evaluate=False)
    graph = Graph.read(tmp_path / "out")
    torch.testing.assert_close(graph.run(x), beside, rtol=1e-4, atol=1e-4)
    assert float((before - beside).abs().max()) > 0.01
    merged = model.merge_and_unload()
    for name in WHOLE:
        found, expected = graph.layer(name), merged.get_submodule(name)
        torch.testing.assert_close(found.weight, expected.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-5, atol=1e-6)
    changed = {row.name for row in report.stages[-1].ledger if row.status == "changed"}
    assert changed == ({"first", "head"} if kind == "head" else set(WHOLE) | ({"third"} if kind == "ia3" else set()))


def test_groups_are_refused(network: nn.Module, tmp_path: Path) -> None:
    """PEFT does not merge them either."""
    adapted(network, tmp_path / "adapter", LoraConfig(r=4, target_modules=["third"]))
    step = {"merge": {"adapter": str(tmp_path / "adapter")}}
    with pytest.raises(SelectionError, match="does not fit third: lora_A"):
        effcli.compress(network, step, tmp_path / "out", example=torch.zeros(1, 3, 9, 9), evaluate=False)


@pytest.mark.parametrize("keep", [False, True])
def test_a_pruned_and_compressed_base(keep: bool, network: nn.Module, tmp_path: Path) -> None:
    x = torch.zeros(1, 3, 9, 9)
    adapted(network, tmp_path / "adapter", LoraConfig(r=4, target_modules=["second"]))
    steps: list[Any] = [{"magnitude": {"sparsity": 0.5}}, {"linear": {"bits": 4}}]
    effcli.compress(network, steps, tmp_path / "base", example=x, evaluate=False)
    options = {"adapter": str(tmp_path / "adapter"), "keep_zeros": keep, "requantize": "same" if keep else "none"}
    effcli.compress(tmp_path / "base", {"merge": options}, tmp_path / "out", evaluate=False)
    before, after = Graph.read(tmp_path / "base"), Graph.read(tmp_path / "out")
    removed, now = before.mask("second"), after.mask("second")
    assert removed is not None and (now is not None) == keep
    weight = after.layer("second").weight.view(12, 8)
    assert (int(weight[~removed.kept].count_nonzero()) == 0) == keep
    assert now is None or torch.equal(now.kept, removed.kept)
    assert ("second" in after.stored) == keep and "first" in after.stored
    assert not torch.equal(before.layer("second").weight, after.layer("second").weight)
