"""Bad input, as a user meets it: one clear line with a remedy, exit 1, nothing half-written, the input untouched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from effcli.cli import main
from effcli.files import locate as samples

SMALL = ["--set=calibration.samples=4", "--set=calibration.length=64", "--no-eval", "--quiet"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the sample model that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(samples.resolve("sample:lm"), folder)
    return folder


@pytest.fixture
def refuses(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `effcli compress` on the damaged model and holds it against what every refusal must be."""

    def run(*arguments: str, output: Path | None = None, steps: tuple[str, ...] = ("--pass=awq",)) -> str:
        out = output or tmp_path / "out"
        before, others = digest(model), set(tmp_path.iterdir())
        assert main(["compress", str(model), *steps, "-o", str(out), *SMALL, *arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        stages, _, error = captured.err.partition("error: ")
        assert error and all(line.startswith("input: ") for line in stages.splitlines())
        assert "Traceback" not in captured.err
        assert digest(model) == before
        left = {path.name for path in set(tmp_path.iterdir()) - others}
        # Unfinished work stays for a second try only where the disk was at fault.
        kept = {f".{out.name}.effcli"} if "no space left on the disk" in captured.err else set()
        assert left == kept
        return captured.err

    return run


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def edit(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(weights(model))
    tensors[name] = change(tensors[name])
    save_file(tensors, weights(model), {"format": "pt"})


def test_truncated_shard(model: Path, refuses: Callable[..., str]) -> None:
    os.truncate(weights(model), weights(model).stat().st_size - 1000)
    message = refuses()
    assert "truncated" in message and "again" in message


def test_header_longer_than_the_file(model: Path, refuses: Callable[..., str]) -> None:
    data = weights(model).read_bytes()
    weights(model).write_bytes(struct.pack("<Q", 1 << 40) + data[8:])
    assert "header claims" in refuses()


def test_missing_shard(model: Path, refuses: Callable[..., str]) -> None:
    index = {"weight_map": {name: "model-00001-of-00002.safetensors" for name in load_file(weights(model))}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    weights(model).unlink()
    assert "shard model-00001-of-00002.safetensors is missing" in refuses()


def test_missing_parameter(model: Path, refuses: Callable[..., str]) -> None:
    tensors = load_file(weights(model))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights(model))
    assert "model.layers.1.mlp.up_proj.weight" in refuses()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights(model: Path, refuses: Callable[..., str], value: float) -> None:
    name = "model.layers.2.mlp.gate_proj.weight"

    def poison(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = value
        return weight

    edit(model, name, poison)
    assert name in refuses()
    assert name in refuses(steps=("--pass=linear",))


def test_nan_activations(model: Path, refuses: Callable[..., str]) -> None:
    edit(model, "model.layers.1.input_layernorm.weight", lambda weight: torch.full_like(weight, 3e38))
    assert "NaN or infinite on the calibration data" in refuses()


def test_pickle_where_weights_are_expected(model: Path, refuses: Callable[..., str]) -> None:
    torch.save({"a": torch.ones(3)}, model / "pytorch_model.bin")
    weights(model).unlink()
    message = refuses()
    assert "does not execute pickles" in message and "save_pretrained" in message


def test_pickle_under_a_safe_name(model: Path, refuses: Callable[..., str]) -> None:
    torch.save({"a": torch.ones(3)}, weights(model))
    assert "is a pickle" in refuses()


def test_empty_calibration_text(tmp_path: Path, refuses: Callable[..., str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "is empty" in refuses("--calib", str(empty))


def test_missing_calibration_text(tmp_path: Path, refuses: Callable[..., str]) -> None:
    assert "no text file" in refuses("--calib", str(tmp_path / "none.txt"))


def test_sequence_longer_than_the_models(refuses: Callable[..., str]) -> None:
    message = refuses("--set=calibration.length=1000")
    assert "longer than the 512" in message and "calibration.length=512" in message


def test_group_size_that_divides_nothing(refuses: Callable[..., str]) -> None:
    message = refuses("--group-size", "100")
    assert "group size 100 does not divide" in message and "64, " in message


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--set=passes.0.ignore=['*.donw_proj']", ("matches no layer", "down_proj")),
        ("--set=passes.0.layers={'*.k_prj': {bits: 8}}", ("matches no layer", "k_proj")),
        ("--set=passes.0.layers={'*.k_proj': {bitz: 8}}", ("bitz", "did you mean 'bits'?")),
        ("--set=calibration.sampels=8", ("calibration.sampels", "did you mean 'samples'?")),
    ],
)
def test_names_that_are_not_there(refuses: Callable[..., str], argument: str, parts: tuple[str, ...]) -> None:
    message = refuses(argument)
    assert [part for part in parts if part not in message] == []


def test_unknown_pass(refuses: Callable[..., str]) -> None:
    assert "did you mean 'awq'?" in refuses(steps=("--pass=awk",))


def test_output_that_exists(tmp_path: Path, refuses: Callable[..., str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "--overwrite" in refuses()
    assert (out / "precious.txt").read_text() == "mine"


def test_output_is_the_input(model: Path, refuses: Callable[..., str]) -> None:
    assert "is the model itself" in refuses("--overwrite", output=model)


def test_output_is_a_file(tmp_path: Path, refuses: Callable[..., str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refuses()


def test_read_only_output(tmp_path: Path, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the answer of the system is put in its place.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "choose a writable --output" in refuses()


def test_no_space_known_beforehand(refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = refuses()
    assert "no space left" in message and "free some space" in message


def test_no_space_while_writing(
    model: Path, refuses: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effcli.files import checkpoint

    calls = iter(range(100))

    def fail(*arguments: object, **options: object) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_file(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_file", fail)
    message = refuses()
    assert "no space left on the disk" in message and "free some space" in message


def test_code_that_comes_with_a_model_does_not_run(model: Path, refuses: Callable[..., str], tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "--trust-remote-code" in refuses()
    assert not (tmp_path / "ran").exists()


def test_unknown_architecture(model: Path, refuses: Callable[..., str]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    assert "lama" in refuses()


def test_a_misspelt_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "sampel:lm", "--pass=linear", "-o", str(tmp_path / "out")]) == 1
    assert "did you mean 'sample:lm'" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["c", "onnx", "safetensors", "pt2"])
def test_an_export_of_nothing(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing"), "--to", target]) == 1
    assert f"{tmp_path / 'nothing'} does not exist" in capsys.readouterr().err
