"""Networks by the Python function that builds them, and every way in which that can go wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from effcli.errors import CheckpointError, UnsupportedError
from effcli.importers import is_factory, read, recognises
from effcli.importers.factory import load

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))

class Branching(Net):
    def forward(self, x):
        if x.mean() > 0:
            x = -x
        return super().forward(x)

def build():
    return Net()

def with_example():
    return Net(), torch.zeros(1, 1, 6, 6)

def branching():
    return Branching(), torch.zeros(1, 1, 6, 6)

def number():
    return 3

def odd():
    return Net(), "example"

def words():
    return nn.Embedding(3, 2), torch.zeros(1, 4, dtype=torch.long)

def failing():
    raise RuntimeError("no weights here\\nnor there")

def two():
    return Net(), torch.zeros(1, 1, 7, 7)

value = 3
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package in the current directory, forgotten again afterwards."""
    folder = tmp_path / "effcli_factories"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(SOURCE)
    (folder / "broken.py").write_text("import effcli_no_such_thing\n")
    (folder / "raising.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    assert sys.path == path
    for name in [name for name in sys.modules if name.startswith("effcli_factories")]:
        del sys.modules[name]


NETS = "effcli_factories.nets"


def weights(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    torch.manual_seed(0)
    conv, head = nn.Conv2d(1, 2, 3), nn.Linear(32, 3)
    tensors = {"conv.weight": conv.weight, "conv.bias": conv.bias, "head.weight": head.weight, "head.bias": head.bias}
    for name, value in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = nn.Parameter(value)
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_a_function_with_weights(tmp_path: Path) -> None:
    file = weights(tmp_path)
    graph = read(f"{NETS}:with_example", weights=file)
    again = read(f"{NETS}:build", weights=file, shape=(1, 6, 6))
    module = sys.modules[NETS].Net()
    load(module, file)
    inputs = torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        expected = module(inputs)
    for found in (graph, again):
        torch.testing.assert_close(found.run(inputs), expected)
    assert [site.name for site in graph.sites()] == ["conv", "head"]
    assert (graph.facts.shape, graph.facts.origin) == ((1, 6, 6), f"python {NETS}:with_example")


def test_which_names_are_factories(tmp_path: Path) -> None:
    for model in ("net:build", "a.b_c.d:E"):
        assert is_factory(model) and recognises(model)
    for model in ("sample:cnn", "org/name", "net", "net:", ":build", "a..b:c", "C:/models/x", "1net:build", "net:a.b"):
        assert not is_factory(model) and not recognises(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (f"{NETS}:build", "returns no example input, so its shape is unknown"),
        (f"{NETS}:number", "returns a int"),
        (f"{NETS}:odd", "returns a str as its example"),
        (f"{NETS}:words", "takes inputs of int64"),
        (f"{NETS}:failing", r"raises RuntimeError: no weights here \(nets.py:\d+ in failing\)"),
        (f"{NETS}:missing", f"{NETS} has no function missing"),
        (f"{NETS}:value", f"{NETS} has no function value"),
        (f"{NETS}:branching", r"torch.export cannot record the network: .* \(nets.py:\d+ in forward\)"),
        (f"{NETS}:two", r"torch.export cannot record the network: .* \(nets.py:\d+ in forward\)"),
        ("effcli_factories.none:build", "there is no module effcli_factories.none"),
        ("effcli_nothing.nets:build", "there is no module effcli_nothing"),
        ("effcli_factories.broken:build", "needs effcli_no_such_thing, which is not installed"),
        ("effcli_factories.raising:build", r"importing effcli_factories.raising raises ZeroDivisionError: division by"),
    ],
)
def test_what_is_wrong_with_a_function(model: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        read(model)
    assert "\n" not in caught.value.cause and caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head__bias": None, "conv__bias": None}, "lacks conv.bias, head.bias, which the network needs"),
        ({"tail__bias": torch.zeros(1)}, "has tail.bias, which the network does not know"),
        ({"head__bias": torch.zeros(4)}, r"head.bias has the shape \(4,\) in .*, the network needs \(3,\)"),
    ],
)
def test_weights_must_be_exactly_these(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    file = weights(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(f"{NETS}:with_example", weights=file)
    assert "\n" not in caught.value.cause and caught.value.remedy


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    pickled = tmp_path / "net.pt"
    torch.save(nn.Linear(2, 2).state_dict(), pickled)
    with pytest.raises(CheckpointError, match=r"is a pickle, not safetensors; effcli does not execute pickles"):
        read(f"{NETS}:with_example", weights=pickled)
    with pytest.raises(CheckpointError, match="is missing"):
        read(f"{NETS}:with_example", weights=tmp_path / "none.safetensors")


def test_shared_weights_need_one_name(tmp_path: Path) -> None:
    """safetensors writes a tensor once however many names it has."""
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    state = {"a.weight": torch.ones(3, 3), "a.bias": torch.zeros(3), "b.bias": torch.zeros(3)}
    save_file(state, tmp_path / "tied.safetensors")
    load(module, tmp_path / "tied.safetensors")
    torch.testing.assert_close(module["b"].weight.detach(), torch.ones(3, 3))
