"""Passes and measurements on another device than the CPU, one that is none and refuses what a GPU would refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import other_device
import pytest
import small_graphs
import torch
from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.files.checkpoint import Checkpoint
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.inputs.options import Evaluate
from effcli.inputs.text import Windows
from effcli.language.cutting import cut_model
from effcli.language.evaluate import Evaluation
from effcli.language.sweep import sweep
from effcli.layers.contract import Layer, LayerPass, Needs, Outcome, Statistics
from effcli.layers.result import PassResult
from effcli.run import pipeline
from effcli.run import recipe as recipes
from effcli.run.recipe import PassStep

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:at..frobenius_norm is deprecated")


@pytest.fixture(autouse=True)
def _no_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of another class cannot be viewed in inference mode."""
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode))


def present(elsewhere: bool) -> contextlib.AbstractContextManager[torch.device]:
    return other_device.present() if elsewhere else contextlib.nullcontext(CPU)


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {key: checkpoint.read(key) for key in checkpoint.entries}


def carried_out(folder: Path, run: Callable[[Path, Path, torch.device], PassResult]) -> list[dict[str, Tensor]]:
    """What `run` writes on the other device and on the CPU, whose ledgers are alike.

    run: with a target, a folder for what is unfinished, and the device.
    """
    made, targets = [], []
    for elsewhere in (True, False):
        targets.append(folder / f"target-{elsewhere}")
        targets[-1].mkdir()
        with present(elsewhere) as device:
            made.append(run(targets[-1], folder / f"work-{elsewhere}", device))
    assert_alike(*made)
    return [tensors(target) for target in targets]


def assert_alike(found: PassResult, expected: PassResult) -> None:
    """Other kernels round sums of activations otherwise; weights alone are rounded the same."""
    for mine, theirs in zip(found.ledger, expected.ledger, strict=True):
        errors = [row.model_dump(include={"weight_error", "output_error"}) for row in (mine, theirs)]
        assert mine.model_copy(update={**errors[1], "notes": {}}) == theirs.model_copy(update={"notes": {}})
        for key, error in errors[0].items():
            assert (error is None) == (errors[1][key] is None)
            assert error is None or error == pytest.approx(errors[1][key], rel=0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "step", "inputs"),
    [
        ("llama", {"linear": {"bits": 4, "group_size": 32}}, "original"),
        ("llama", {"awq": {"bits": 3, "group_size": 32, "without_pair": "explicit"}}, "compressed"),
        ("llama", {"gptq": {"bits": 3, "group_size": 32, "lm_head": True}}, "original"),
        ("mixtral", {"awq": {"bits": 4, "group_size": 32}}, "original"),
        ("llama", {"wanda": {"sparsity": 0.5, "allocation": "error"}}, "original"),
        ("llama", {"sparsegpt": {"pattern": "2:4"}}, "original"),
        ("llama", {"alps": {"sparsity": 0.5}}, "compressed"),
        ("llama", {"taylor": {"sparsity": 0.5}}, "original"),
    ],
)
def test_a_language_model(family: str, step: Any, inputs: str, tmp_path: Path) -> None:
    source = architectures.make(family, tmp_path / "model")
    checked = PassStep.model_validate(step)
    # More tokens than inputs of a layer: what is fitted to fewer hangs on the last bits of their sums.
    ids = torch.randint(100, (4, 4, 16), generator=torch.Generator().manual_seed(0))
    windows = Windows(list(ids), inputs) if checked.needs else None
    there, here = carried_out(
        tmp_path, lambda target, work, device: sweep(source, target, checked, windows, work, device=device)
    )
    assert {key: (t.shape, t.dtype) for key, t in there.items()} == {key: (t.shape, t.dtype) for key, t in here.items()}
    if windows is None:
        torch.testing.assert_close(there, here, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("step", "inputs"),
    [
        ({"linear": {"bits": 4}}, "original"),
        ({"awq": {"bits": 4, "without_pair": "explicit"}}, "compressed"),
        ({"gptq": {"bits": 3}}, "original"),
        ({"kmeans": {"bits": 3, "init": "kmeans++"}}, "original"),
        ("smoothquant", "compressed"),
        ({"magnitude": {"sparsity": 0.4, "allocation": "global"}}, "original"),
        ({"sparsegpt": {"sparsity": 0.4}}, "original"),
        ({"alps": {"sparsity": 0.4}}, "compressed"),
        ({"channels": {"ratio": 0.3}}, "original"),
        ({"channels": {"ratio": 0.3, "criterion": "lasso"}}, "compressed"),
        ({"channels": {"ratio": 0.3, "ranking": "network"}}, "original"),
    ],
)
def test_a_graph(step: Any, inputs: Any, tmp_path: Path) -> None:
    graph = small_graphs.separable()
    source = tmp_path / "source"
    source.mkdir()
    graph.save(source)
    checked = PassStep.model_validate(step)
    checked = checked.model_copy(update={"config": checked.config.for_graph()})
    batches = small_graphs.batches(graph, 12)
    carried_out(
        tmp_path, lambda target, work, device: graph_sweep(source, target, checked, batches, inputs, device=device)
    )
    there, here = (Graph.read(tmp_path / f"target-{elsewhere}") for elsewhere in (True, False))
    x = small_graphs.inputs(graph)
    torch.testing.assert_close(there.run(x), here.run(x), rtol=1e-2, atol=1e-2)
    with present(True) as device:
        torch.testing.assert_close(Graph.read(tmp_path / "target-True").to(device).run(x), there.run(x))


@pytest.mark.parametrize(
    "step",
    [
        {"channels": {"ratio": 0.5}},
        {"channels": {"ratio": 0.5, "criterion": "taylor"}},
        {"channels": {"ratio": 0.5, "criterion": "lasso", "what": "feed_forward"}},
        {"blocks": {"count": 1}},
    ],
)
def test_a_language_model_is_cut(step: Any, tmp_path: Path) -> None:
    source, checked = architectures.make("llama", tmp_path / "model"), PassStep.model_validate(step)
    windows = Windows(list(torch.randint(100, (2, 2, 8), generator=torch.Generator().manual_seed(0))), "original")
    there, here = carried_out(
        tmp_path, lambda target, work, device: cut_model(source, target, checked, windows, work, device=device)
    )
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2)


def test_evaluation(tmp_path: Path) -> None:
    source, changed = (architectures.make("llama", tmp_path / name) for name in ("model", "other"))
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("one two three " * 40)
    questions.write_text('{"query": "one", "choices": ["two", "three"], "gold": 0}\n' * 2)
    options = Evaluate(perplexity=str(text), choices=str(questions), length=16, samples=2)
    found = []
    for elsewhere in (True, False):
        folder = tmp_path / f"work-{elsewhere}"
        folder.mkdir()
        with present(elsewhere) as device:
            evaluation = Evaluation(source, options, folder, device=device)
            found.append([evaluation.measure(source), evaluation.measure(changed)])
    for there, here in zip(*found, strict=True):
        assert there.perplexity == pytest.approx(here.perplexity, rel=1e-3)
        assert there.kl == pytest.approx(here.kl, abs=1e-4) and there.accuracy == here.accuracy


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    recipe = recipes.from_arguments("sample:cnn", passes=["linear"], output=str(tmp_path / "out"), device="cuda:99")
    with pytest.raises(UnsupportedError, match="no device cuda:99 on this machine") as caught:
        pipeline.run(recipe)
    assert "--device cpu" in caught.value.remedy and not (tmp_path / "out").exists()


class Taylor(LayerPass):
    """Multiplies every weight with its gradient."""

    @property
    def needs(self) -> Needs:
        return Needs.GRADIENTS | Needs.SQUARED_GRADIENTS

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        return Outcome(layer.weight * seen.gradient + seen.squared_gradient)


def test_gradients(tmp_path: Path) -> None:
    source, graph = architectures.make("llama", tmp_path / "model"), small_graphs.separable()
    step = PassStep.model_validate({"linear": {}}).model_copy(update={"config": Taylor(lm_head=True)})
    windows = Windows([torch.arange(24).view(3, 8)])
    graph_step = step.model_copy(update={"config": Taylor()})
    (tmp_path / "graph").mkdir()
    graph.save(tmp_path / "graph")
    batches = small_graphs.batches(graph, 12)
    labelled = [(batch, torch.arange(len(batch)) % 4) for batch in batches()]
    found = []
    for elsewhere in (True, False):
        folders = [tmp_path / f"{kind}-{elsewhere}" for kind in ("language", "graph")]
        for folder in folders:
            folder.mkdir()
        with present(elsewhere) as device:
            sweep(source, folders[0], step, windows, tmp_path / f"work-{elsewhere}", device=device)
            more: Any = {"labelled": lambda: iter(labelled), "device": device}
            graph_sweep(tmp_path / "graph", folders[1], graph_step, batches, **more)
        found.append([tensors(folder) for folder in folders])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
