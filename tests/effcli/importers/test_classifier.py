"""Hugging Face image classifiers: which directories they are, and what is said of those that cannot be read."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_architectures
from safetensors.torch import load_file, save_file

from effcli.errors import CheckpointError, EffcliError, UnsupportedError
from effcli.graphs.graph import class_names
from effcli.importers import read, recognises
from effcli.inputs.preprocess import Preprocess


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_architectures.make("resnet", tmp_path_factory.mktemp("resnet"))


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["ResNetForImageClassification"], "model_type": "resnet"}, True),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, False),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, False),
        ({"model_type": "resnet"}, True),
        ({"model_type": "llama"}, False),
        ({"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 224, 224]}}, True),
        ({"model_type": "effcli", "effcli": {"kind": "graph"}}, True),
        ({"model_type": "effcli", "effcli": {"config": {}}}, False),
        ([1], False),
        ({}, False),
    ],
)
def test_which_directories_are_classifiers(tmp_path: Path, config: Any, expected: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert recognises(tmp_path) is expected


def test_recognising_a_model_imports_little(source: Path) -> None:
    code = (
        f"import sys; from effcli.importers import recognises; assert recognises({str(source)!r});"
        "print(*[name for name in ('torch', 'transformers', 'pydantic', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_names_of_classes() -> None:
    assert class_names({"id2label": {"10": "k", "2": "c", "0": "a"}}) == ("a", "c", "k")
    assert class_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) is None
    assert class_names({"classes": ["a", 2], "id2label": {"0": "x"}}) == ("a", "2")
    assert class_names({}) is None


def test_the_size_of_an_image(folder: Path) -> None:
    """The processor's before the config's, the caller's before both."""
    assert read(folder).facts.shape == (3, 32, 32)
    described = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 40, "width": 48},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    graph = read(folder)
    assert graph.facts.shape == (3, 40, 48) and graph.facts.preprocess.std == 0.25
    assert read(folder, shape=(3, 64, 32)).facts.shape == (3, 64, 32)
    given = Preprocess(resize=36, crop=(32, 32), scale=1 / 127.5, mean=1)
    facts = read(folder, preprocess=given).facts
    assert facts.shape == (3, 32, 32) and facts.preprocess == given
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Unheard"}))
    assert read(folder, preprocess=given).facts == facts
    (folder / "preprocessor_config.json").unlink()
    edit(folder, lambda config: config.pop("image_size"))
    with pytest.raises(UnsupportedError, match="says nothing of the size of its images"):
        read(folder)


def test_half_precision_is_widened(folder: Path) -> None:
    whole = read(folder).run(torch.ones(1, 3, 32, 32))
    tensors(folder, lambda state: state.update({k: v.half() for k, v in state.items() if v.is_floating_point()}))
    graph = read(folder)
    assert graph.facts.remarks == ("weights in float16 were widened to float32",)
    torch.testing.assert_close(graph.run(torch.ones(1, 3, 32, 32)), whole, rtol=0, atol=0.05)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


HEAD = "classifier.1.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no \*.safetensors file"),
        (_pickle, "holds only pickled weights"),
        (_truncate, "is truncated"),
        (lambda folder: tensors(folder, lambda state: state.pop(HEAD)), f"lacks {HEAD}"),
        (
            lambda folder: tensors(folder, lambda state: state.update(extra=torch.zeros(1))),
            "holds what the network does not have: extra",
        ),
        (
            lambda folder: tensors(folder, lambda state: state.update({HEAD: torch.zeros(2, 2)})),
            "transformers cannot load",
        ),
        (lambda folder: edit(folder, lambda c: c.update(model_type="resnext99")), "does not know the model type"),
        (lambda folder: edit(folder, lambda c: c.update(depths="many")), "config.json does not describe a network"),
        (lambda folder: edit(folder, lambda c: c.update(quantization_config={})), "is already quantized"),
        (
            lambda folder: edit(folder, lambda c: c.update(auto_map={"AutoConfig": "code.Config"})),
            "brings its own Python code",
        ),
    ],
)
def test_what_cannot_be_read_has_one_line(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(EffcliError, match=message) as caught:
        read(folder)
    assert isinstance(caught.value, CheckpointError | UnsupportedError)
    assert "\n" not in caught.value.cause and caught.value.remedy


def test_timm_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else find_spec(name, *rest)
    )
    for change in ({"model_type": "timm_wrapper"}, {"architecture": "resnet18", "pretrained_cfg": {}}):
        (folder / "config.json").write_text(json.dumps(change | {"architectures": ["ForImageClassification"]}))
        with pytest.raises(UnsupportedError, match="is a network of timm, which is not installed") as caught:
            read(folder)
        assert caught.value.remedy == "pip install timm"
