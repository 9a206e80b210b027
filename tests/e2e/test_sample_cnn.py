"""What ships as `sample:cnn` is whole, says the truth about itself, and is what the example makes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import effcli

FOLDER = Path(effcli.__file__).parent / "data" / "cnn"
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_sample_cnn.py"
FILES = {"README.md", "calibration.npz", "config.json", "evaluation.npz", "model.pt2", "preprocessor_config.json"}

# The first folder of an absolute path, as a traceback or a build leaves it in a file.
MACHINE = re.compile(rb"/(work|home|root|tmp|usr|opt|mnt|var|Users|private|workspace)/")


@pytest.fixture(scope="module")
def network() -> Callable[[Tensor], Tensor]:
    module = torch.export.load(FOLDER / "model.pt2").module()

    def run(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([module(part) for part in torch.split(inputs, 500)])

    return run


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_sample_cnn", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    return found


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Network inputs float32 (n, 1, 28, 28), by the shipped preprocessor_config.json, and labels int64 (n,)."""
    how = json.loads((FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert how["do_rescale"] and how["do_normalize"] and not how["do_resize"]
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    inputs = (images.double() * how["rescale_factor"] - how["image_mean"][0]) / how["image_std"][0]
    return inputs.float()[:, None], labels.long()


def top1(network: Callable[[Tensor], Tensor], path: Path) -> float:
    inputs, labels = read(path)
    return float((network(inputs).argmax(1) == labels).double().mean())


def test_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == FILES | {"LICENSE"}
    assert sizes["model.pt2"] < 1_000_000
    assert sum(sizes.values()) < 1_500_000


def test_accuracy_is_the_recorded_one(network: Callable[[Tensor], Tensor]) -> None:
    assert top1(network, FOLDER / "evaluation.npz") == config()["top1"]["evaluation.npz"] > 0.92


@pytest.mark.slow
def test_accuracy_on_all_test_images(network: Callable[[Tensor], Tensor], asset: Callable[[str], Path]) -> None:
    # One image may fall to the other side when a machine sums in another order.
    found = top1(network, asset("fashion_mnist") / "test.npz")
    assert found == pytest.approx(config()["top1"]["test.npz"], abs=1.5e-4)


def test_readme_says_what_the_config_says() -> None:
    readme, recorded = (FOLDER / "README.md").read_text(encoding="utf-8"), config()
    assert f"{recorded['parameters']:,} parameters" in readme
    assert f"{recorded['top1']['test.npz']:.2%} on the 10,000" in readme
    assert f"{recorded['top1']['evaluation.npz']:.1%} on the 1,000" in readme


@pytest.mark.parametrize("batch", [1, 7])
def test_any_batch_size(network: Callable[[Tensor], Tensor], batch: int) -> None:
    inputs, _ = read(FOLDER / "calibration.npz")
    logits = network(inputs[:batch])
    assert logits.shape == (batch, len(config()["classes"]))
    torch.testing.assert_close(logits, network(inputs)[:batch], rtol=1e-4, atol=1e-4)


def test_images(asset: Callable[[str], Path]) -> None:
    for name, count, source in [("calibration.npz", 256, "train.npz"), ("evaluation.npz", 1000, "test.npz")]:
        with np.load(FOLDER / name) as file, np.load(asset("fashion_mnist") / source) as whole:
            images, labels = file["images"], file["labels"]
            known = {image.tobytes(): label for image, label in zip(whole["images"], whole["labels"], strict=True)}
        assert images.shape == (count, 28, 28) and labels.shape == (count,)
        assert images.dtype == labels.dtype == np.uint8
        assert len({image.tobytes() for image in images}) == count
        assert [known[image.tobytes()] for image in images] == labels.tolist()
    # Top-1 on the test images weighs all classes alike.
    assert np.bincount(labels).tolist() == [100] * 10


def test_operators_that_it_is_here_to_exercise() -> None:
    program = torch.export.load(FOLDER / "model.pt2")
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    convolutions = [node.args for node in program.graph.nodes if str(node.target) == "aten.conv2d.default"]
    # Arguments of aten.conv2d: input, weight, bias, stride, padding, dilation, groups.
    assert sum(len(each) > 6 and each[6] > 1 for each in convolutions) == 2
    assert sum(len(each) > 3 and each[3] == [2, 2] for each in convolutions) == 4
    assert names.count("aten.batch_norm.default") == len(convolutions) == 15
    assert {"aten.relu.default", "aten.relu6.default", "aten.add.Tensor", "aten.mean.dim"} <= set(names)
    assert names.count("aten.linear.default") == 1
    assert sum(parameter.numel() for parameter in program.parameters()) == config()["parameters"]


def test_no_path_of_the_machine_that_made_it() -> None:
    for path in FOLDER.iterdir():
        assert MACHINE.search(path.read_bytes()) is None, path.name
    with zipfile.ZipFile(FOLDER / "model.pt2") as archive:
        for name in archive.namelist():
            assert MACHINE.search(archive.read(name)) is None, name
    traces = [node.meta.get("stack_trace", "") for node in torch.export.load(FOLDER / "model.pt2").graph.nodes]
    files = set(re.findall(r'File "([^"]+)"', "\n".join(traces)))
    # Torch's own lines stay recognisable, so that an error names a line of the example.
    assert all(file == SCRIPT.name or file.startswith("site-packages/torch/") for file in files)
    assert SCRIPT.name in files


def test_is_the_network_of_the_example(network: Callable[[Tensor], Tensor], script: ModuleType) -> None:
    model = script.SmallResNet().eval()
    model.load_state_dict(torch.export.load(FOLDER / "model.pt2").state_dict)
    with np.load(FOLDER / "calibration.npz") as file:
        images = torch.from_numpy(file["images"])
    with torch.inference_mode():
        torch.testing.assert_close(
            model(script.normalise(images)), network(read(FOLDER / "calibration.npz")[0]), rtol=1e-4, atol=1e-4
        )
    assert list(script.CLASSES) == config()["classes"]


def test_augmentation_moves_and_mirrors(script: ModuleType) -> None:
    torch.manual_seed(0)
    images = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    images[:, 10, 20] = 200
    _, rows, columns = script.augment(images).nonzero().unbind(1)
    # Column 20 is column 7 of the mirrored image.
    around = [(row, column + move) for row in range(8, 13) for column in (20, 7) for move in range(-2, 3)]
    assert len(rows) == 2000
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == set(around)


def test_example_makes_the_same_files(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    for name in ("train.npz", "test.npz"):
        images = random.integers(0, 256, (300, 28, 28), dtype=np.uint8)
        np.savez(tmp_path / name, images=images, labels=np.arange(300) % 10)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), str(out), "--epochs", "5", "--batch", "60"])
    script.main()
    assert {path.name for path in out.iterdir()} == FILES
    assert torch.export.load(out / "model.pt2").module()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    with np.load(out / "evaluation.npz") as file:
        assert np.bincount(file["labels"]).tolist() == [30] * 10
    assert "epoch   5" in capsys.readouterr().out
