"""The templates of docs/templates do what docs/extending.md says of them, each as a package of its own."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import packages
import pytest
import torch

from effcli.cli import main
from effcli.errors import CheckpointError
from effcli.formats import unpack
from effcli.graphs.graph import Graph
from effcli.language.weights import open_weights
from effcli.layers import contract

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "docs" / "templates"
SMALL_TEXT = ("--set", "calibration.samples=2", "--set", "calibration.length=32")
SMALL_IMAGES = ("--set", "calibration.samples=32")

Install = Callable[[str, str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a template as a package that offers its class under a name."""

    def make(template: str, group: str, name: str, kind: str) -> None:
        text = (TEMPLATES / f"{template}_template.py").read_text(encoding="utf-8")
        module = f"effcli_own_{template}"
        packages.install(
            tmp_path / "site", f"effcli-own-{template}", {group: {name: f"{module}:{kind}"}}, {f"{module}.py": text}
        )
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return make


def layers(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that the passes of the templates change, as matrices."""
    if (folder / "graph.json").is_file():
        graph = Graph.read(folder)
        return {site.name: graph.layer(site.name).weight.flatten(1) for site in graph.sites()}
    weights = open_weights(folder)
    names = [name for name in weights.skeleton.parameters() if re.search(r"layers\..*_proj\.weight$", name)]
    return {name: weights.parameter(name) for name in names}


@pytest.mark.parametrize(
    ("template", "kind"), [("pass", "Magnitude"), ("statistic", "Usual")], ids=("magnitude", "usual")
)
@pytest.mark.parametrize(("model", "small"), [("sample:cnn", SMALL_IMAGES), ("sample:lm", SMALL_TEXT)])
def test_passes(template: str, kind: str, model: str, small: tuple[str, ...], install: Install, tmp_path: Path) -> None:
    install(template, "effcli.passes", "prune", kind)
    out = tmp_path / "out"
    assert main(["plan", model, "--pass", "prune"]) == 0
    assert main(["compress", model, "--pass", "prune:sparsity=0.25", *small, "--no-eval", "-o", str(out)]) == 0
    found = layers(out)
    assert len(found) > 10
    for name, weight in found.items():
        zeros = (weight == 0).sum(1)
        assert bool((zeros >= int(0.25 * weight.shape[1])).all()), name
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["software"][f"effcli-own-{template}"] == "1.0"
    assert {row["status"] for row in report["stages"][1]["ledger"]} <= {"changed", "kept"}
    assert main(["run", str(out / "recipe.yaml"), "--no-eval", "-o", str(tmp_path / "again")]) == 0
    again = layers(tmp_path / "again")
    assert all(torch.equal(weight, again[name]) for name, weight in found.items())


def test_the_pass_is_short_and_prunes_the_smallest(install: Install) -> None:
    assert len((TEMPLATES / "pass_template.py").read_text(encoding="utf-8").splitlines()) < 40
    from effcli.layers.contract import UNSEEN, Layer

    kind = runpy.run_path(str(TEMPLATES / "pass_template.py"))["Magnitude"]
    weight = torch.tensor([[3.0, -1.0, 2.0, -4.0], [0.5, 0.25, -2.0, 1.0]])
    layer = Layer("layer", "linear", weight, torch.float32)
    outcome = kind(sparsity=0.5).apply(layer, UNSEEN)
    assert outcome.mask.over(outcome.weight).dequantize().tolist() == [[3.0, 0.0, 0.0, -4.0], [0.0, 0.0, -2.0, 1.0]]
    assert bool(kind(sparsity=0).apply(layer, UNSEEN).mask.kept.all())


@pytest.mark.parametrize("taylor", [False, True], ids=["magnitude", "taylor"])
@pytest.mark.parametrize(("model", "small"), [("sample:cnn", SMALL_IMAGES), ("sample:lm", SMALL_TEXT)])
def test_channels_are_cut(
    model: str,
    small: tuple[str, ...],
    taylor: bool,
    install: Install,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights, bytes and multiplications fall, later passes follow, and what was written loads."""
    install("cut", "effcli.passes", "narrow", "Narrow")
    out, again = tmp_path / "out", tmp_path / "again"
    step = f"narrow:ratio=0.25,taylor={str(taylor).lower()}"
    command = ["compress", model, "--pass", step, "--pass", "linear:bits=8", *small]
    assert main([*command, "-o", str(out)]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    before, cut, rounded = report["stages"]
    assert cut["weights"] < 0.9 * before["weights"] and cut["nbytes"] < 0.9 * before["nbytes"]
    assert cut["macs"] < 0.9 * before["macs"] and rounded["nbytes"] < 0.7 * cut["nbytes"]
    changed = [row for row in cut["ledger"] if row["status"] == "changed"]
    assert len(changed) > 10 and all(row["shape"] != row["notes"]["shape_before"] for row in changed)
    assert report["verified"].startswith("verified: ")
    if taylor:
        return
    assert main(["plan", model, "--pass", step]) == 0
    assert main(["run", str(out / "recipe.yaml"), "--no-eval", "-o", str(again)]) == 0
    first, second = layers(out), layers(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    wrong = ["compress", model, "--pass", "linear", "--pass", step, "-o", str(tmp_path / "none")]
    capsys.readouterr()
    assert main(wrong) == 1
    assert "narrow removes channels, and linear before it has compressed layers" in " ".join(
        capsys.readouterr().err.split()
    )


def test_training(install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels are learnt; and other layers make up for what rounding cost, by the outputs of the original network."""
    assert len((TEMPLATES / "train_template.py").read_text(encoding="utf-8").splitlines()) < 60
    install("train", "effcli.passes", "tune", "FineTune")
    small = ("--set", "calibration.samples=64", "--set", "calibration.batch_size=16", "--no-eval")
    learnt, restored = tmp_path / "learnt", tmp_path / "restored"
    assert main(["plan", "sample:cnn", "--pass", "tune"]) == 0
    command = ["compress", "sample:cnn", *small]
    assert main([*command, "--pass", "tune:epochs=4", "-o", str(learnt)]) == 0
    rounded = ["--pass", "linear:bits=3,ignore=[stage3.*,head]", "--pass", "tune:epochs=2,labels=false"]
    assert main([*command, *rounded, "-o", str(restored)]) == 0
    assert "8 steps, loss" in capsys.readouterr().out
    for out, factor in ((learnt, 0.7), (restored, 0.7)):
        training = json.loads((out / "report.json").read_text(encoding="utf-8"))["stages"][-1]["training"]
        errors = dict(training["errors"])
        assert errors[training["kept"]] < factor * errors[0] and len(training["curve"]) == training["steps"]
    ledger = json.loads((restored / "report.json").read_text(encoding="utf-8"))["stages"][-1]["ledger"]
    assert {row["status"] for row in ledger if row["format"].startswith("int3")} == {"kept"}
    assert {row["status"] for row in ledger if not row["format"].startswith("int3")} == {"changed"}
    with np.load(ROOT / "effcli" / "data" / "cnn" / "evaluation.npz") as data:
        unlabelled = {"images": data["images"][:32]}
    np.savez(tmp_path / "unlabelled.npz", **unlabelled)
    calib = ["--calib", str(tmp_path / "unlabelled.npz"), "--no-eval", "-o", str(tmp_path / "none")]
    assert main(["compress", "sample:cnn", "--pass", "tune", *calib]) == 1
    assert "unlabelled.npz has no labels" in capsys.readouterr().err
    assert main(["run", str(learnt / "recipe.yaml"), "--no-eval", "-o", str(tmp_path / "again")]) == 0
    again = layers(tmp_path / "again")
    assert all(torch.equal(weight, again[name]) for name, weight in layers(learnt).items())
    assert main(["compress", "sample:lm", "--pass", "tune", "--no-eval", "-o", str(tmp_path / "none")]) == 1
    assert "tune takes networks read as a graph; sample:lm is a language model" in capsys.readouterr().err


def test_the_training_leaves_compressed_layers() -> None:
    from effcli.layers.contract import UNSEEN, Layer
    from effcli.passes.quantize.linear import Linear

    tune = runpy.run_path(str(TEMPLATES / "train_template.py"))["FineTune"]()
    floating = Layer("layer", "linear", torch.randn(4, 8), torch.float32)
    stored = Linear().for_graph().apply(floating, UNSEEN).weight
    assert tune.attach(floating) is not None
    assert tune.attach(dataclasses.replace(floating, stored=stored)) is None


SHIFT_PASS = '''

from effcli.layers.contract import Layer, LayerPass, Outcome, Statistics
from effcli.formats import Packing


class Shifts(LayerPass):
    """Rounds weights to powers of two."""

    @property
    def format(self) -> Packing:
        return Shift(torch.float32)

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        return Outcome(Shift(layer.dtype).quantize(layer.weight))
'''


@pytest.mark.parametrize(("model", "small"), [("sample:cnn", SMALL_IMAGES), ("sample:lm", SMALL_TEXT)])
def test_a_format_of_a_package(
    model: str,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Written, read again and computed with where the package is installed, and refused by name where it is not."""
    text = (TEMPLATES / "format_template.py").read_text(encoding="utf-8") + SHIFT_PASS
    groups = {"effcli.formats": {"shift": "effcli_shift:Shift"}, "effcli.passes": {"shifts": "effcli_shift:Shifts"}}
    packages.install(tmp_path / "site", "effcli-shift", groups, {"effcli_shift.py": text})
    out, again = tmp_path / "out", tmp_path / "again"
    with monkeypatch.context() as installed:
        installed.syspath_prepend(tmp_path / "site")
        assert main(["compress", model, "--pass", "shifts", *small, "-o", str(out)]) == 0
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert {row["format"] for row in report["stages"][1]["ledger"] if row["status"] == "compressed"} == {"shift4"}
        assert report["stages"][1]["nbytes"] < report["stages"][0]["nbytes"]
        assert report["verified"].startswith("verified: ")
        assert main(["verify", str(out)]) == 0
        assert main(["compress", str(out), "--pass", "linear:bits=8", *small, "--no-eval", "-o", str(again)]) == 0
    sys.modules.pop("effcli_shift")
    capsys.readouterr()
    assert main(["verify", str(out)]) == 1
    captured = capsys.readouterr()
    assert "there is no format 'shift'" in captured.err + captured.out
    assert "restore config.json" not in captured.err + captured.out
    assert main(["compress", str(out), "--pass", "linear", *small, "--no-eval", "-o", str(tmp_path / "none")]) == 1
    assert "there is no format 'shift'" in capsys.readouterr().err


def test_an_exporter(install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install("exporter", "effcli.exporters", "npz", "Npz")
    out = tmp_path / "out"
    assert main(["compress", "sample:cnn", "--pass", "fold", "--export", "npz", "--no-eval", "-o", str(out)]) == 0
    state = Graph.read(out).module.state_dict()
    with np.load(out / "exports" / "npz" / "weights.npz") as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {name: state[name].tolist() for name in state}
    capsys.readouterr()
    assert main(["export", str(out), "--to", "npz", "--half", "-o", str(tmp_path / "half")]) == 0
    shown = capsys.readouterr().out
    assert "written to" in shown and next(iter(state)) in shown
    with np.load(tmp_path / "half" / "weights.npz") as arrays:
        assert {arrays[name].dtype for name in arrays} == {np.dtype(np.float16)}
    assert main(["export", str(out), "--to", "npz", "-o", str(tmp_path / "half")]) == 1
    assert main(["export", str(out), "--to", "npz", "--overwrite", "-o", str(tmp_path / "half")]) == 0
    assert main(["export", str(out), "--to", "npz", "--hal", "-o", str(tmp_path / "other")]) == 1
    assert "npz has no option 'hal'" in capsys.readouterr().err


def test_a_run_says_that_a_name_is_taken(install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install("pass", "effcli.passes", "fold", "Magnitude")
    assert main(["compress", "sample:cnn", "--pass", "fold", "--no-eval", "-o", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the pass 'fold' is effcli's own; that of effcli-own-pass is not used" in said


def test_the_guide_names_what_there_is() -> None:
    guide = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https)([^)#]+)\)", guide)
    assert {path.name for path in TEMPLATES.glob("*.py")} <= {Path(link).name for link in links}
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    blocks = [tomllib.loads(block)["project"] for block in re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)]
    offered = {group: points for block in blocks for group, points in block["entry-points"].items()}
    assert offered == {
        "effcli.passes": {"smallest": "effcli_magnitude:Magnitude"},
        "effcli.exporters": {"npz": "effcli_npz:Npz"},
        "effcli.formats": {"shift": "effcli_shift:Shift"},
    }
    for name in re.findall(r"`([A-Z][A-Za-z]+Pass)`", guide):
        assert hasattr(contract, name), name


def test_an_importer(tmp_path: Path) -> None:
    read_chain = runpy.run_path(str(TEMPLATES / "importer_template.py"))["read_chain"]
    generator = torch.Generator().manual_seed(0)
    sizes = {"0.weight": (8, 6), "0.bias": (8,), "1.weight": (3, 8), "1.bias": (3,)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    file = tmp_path / "chain.npz"
    np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    graph = read_chain(file)
    inputs = torch.randn(5, 6, generator=generator)
    hidden = (inputs @ tensors["0.weight"].t() + tensors["0.bias"]).relu()
    assert torch.allclose(graph.run(inputs), hidden @ tensors["1.weight"].t() + tensors["1.bias"], atol=1e-5)
    (tmp_path / "chain").mkdir()
    graph.save(tmp_path / "chain")
    assert (
        main(["compress", str(tmp_path / "chain"), "--pass", "linear", "--no-eval", "-o", str(tmp_path / "out")]) == 0
    )
    for damaged in ({}, {"0.weight": np.zeros((2, 2))}, {"0.weight": np.zeros(3), "0.bias": np.zeros(3)}):
        np.savez(file, **damaged)
        with pytest.raises(CheckpointError, match="holds no chain of linear layers"):
            read_chain(file)
    file.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="holds no chain of linear layers"):
        read_chain(file)


def test_a_format() -> None:
    template = runpy.run_path(str(TEMPLATES / "format_template.py"))
    format = template["Shift"](torch.float32)
    weight = torch.tensor([[1.0, -0.5, 0.3, 0.0], [8.0, 4.0, -0.126, 0.01]])
    made = format.quantize(weight)
    assert made.dequantize().tolist() == [[1.0, -0.5, 0.25, 0.0], [8.0, 4.0, -0.125, 0.0]]
    packed = made.pack()
    assert set(packed) <= format.suffixes and made.nbytes == format.nbytes((2, 4)) == 2 * 4 + 2 + 16
    assert torch.equal(unpack(format, packed, (2, 4)).dequantize(), made.dequantize())
    assert type(format).from_json(format.to_json()) == format
    with pytest.raises(ValueError, match="dtype"):
        type(format).from_json({"format": "shift", "dtype": "int8"})
    for suffix in packed:
        with pytest.raises(ValueError, match=f"{suffix} is missing"):
            unpack(format, {key: tensor for key, tensor in packed.items() if key != suffix}, (2, 4))
    assert torch.equal(made.join([made]).dequantize(), torch.cat([made.dequantize()] * 2))
    assert made.with_input_scale(torch.ones(4)).pack().keys() == {*packed, "input_scale"}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 40, generator=generator)
    ratios = format.quantize(weight).dequantize() / weight
    assert bool(((ratios == 0) | (ratios.log2().abs() <= 0.5 + 1e-6)).all())
    assert bool(((ratios == 0) == (weight.abs() < 2**-6.5 * weight.abs().log2().round().amax(1, True).exp2())).all())
