"""Snapshots of a training: what is written comes back bit for bit, and what is damaged is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effcli.errors import UnfinishedError, UnsupportedError
from effcli.training import snapshot
from effcli.training.snapshot import Snapshot


def record(**more: Any) -> Snapshot:
    fields: dict[str, Any] = {
        "key": "k",
        "step": 3,
        "scale": 0.1 + 0.2,
        "least": 1e-17,
        "kept": 2,
        "pending": 1 / 3,
        "since": 1,
        "curve": ((1, 0.7), (2, 1 / 7)),
        "errors": ((0, 2.0),),
        "scalars": {0: {"count": 4, "rate": 0.1, "on": True, "none": None}},
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
    }
    return Snapshot(**{**fields, **more})


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    tensors = {"now/a": torch.randn(3, 5), "now/empty": torch.zeros(0), "random/cpu": torch.get_rng_state()}
    assert snapshot.load(folder, "k") is None
    snapshot.save(folder, record(), tensors)
    found = snapshot.load(folder, "k")
    assert found is not None
    assert found[0] == record() and type(found[0].scalars[0]["count"]) is int
    assert set(found[1]) == set(tensors) and all(torch.equal(found[1][name], tensors[name]) for name in tensors)
    assert snapshot.load(folder, "another") is None


def test_the_last_one_counts_and_is_alone(tmp_path: Path) -> None:
    for step in (3, 7):
        snapshot.save(tmp_path, record(step=step), {"now/a": torch.full((2,), float(step))})
    found = snapshot.load(tmp_path, "k")
    assert found is not None and found[0].step == 7 and found[1]["now/a"].tolist() == [7, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshot.json", "step-7.safetensors"]


def test_tensors_without_their_record_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot.save(tmp_path, record(step=3), {"now/a": torch.ones(2)})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(snapshot, "write_text", killed)
        snapshot.save(tmp_path, record(step=4), {"now/a": torch.zeros(2)})
    found = snapshot.load(tmp_path, "k")
    assert found is not None and found[0].step == 3 and found[1]["now/a"].tolist() == [1, 1]


def test_damage(tmp_path: Path) -> None:
    snapshot.save(tmp_path, record(), {"now/a": torch.ones(2)})
    file = tmp_path / "step-3.safetensors"
    whole = file.read_bytes()
    for data in (whole[:20], b"", b"x" * len(whole)):
        file.write_bytes(data)
        with pytest.raises(UnfinishedError, match="is damaged"):
            snapshot.load(tmp_path, "k")
    file.unlink()
    with pytest.raises(UnfinishedError, match="is damaged"):
        snapshot.load(tmp_path, "k")
    text = json.loads((tmp_path / "snapshot.json").read_text())
    for data in (b"{", json.dumps({**text, "step": -1}).encode(), json.dumps({**text, "more": 1}).encode()):
        (tmp_path / "snapshot.json").write_bytes(data)
        with pytest.raises(UnfinishedError, match=r"snapshot\.json"):
            snapshot.load(tmp_path, "k")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam])
def test_the_state_of_an_optimizer(kind: Any) -> None:
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    networks = [nn.Linear(4, 3) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [kind(network.parameters(), lr=0.1, **more) for network in networks]
    inputs = torch.randn(6, 4)

    def step(k: int) -> None:
        optimizers[k].zero_grad()
        networks[k](inputs).square().sum().backward()
        optimizers[k].step()

    for _ in range(3):
        step(0)
    networks[1].load_state_dict(networks[0].state_dict())
    tensors, scalars = snapshot.optimizer_state(optimizers[0])
    snapshot.restore_optimizer(optimizers[1], {name: tensor.clone() for name, tensor in tensors.items()}, scalars)
    for _ in range(2):
        step(0)
        step(1)
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_that_is_no_tensor_and_no_number() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["history"] = [1, 2]
    with pytest.raises(UnsupportedError, match="SGD keeps history, a list"):
        snapshot.optimizer_state(optimizer)
