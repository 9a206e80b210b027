"""`bitfit`: the biases alone are trained, as a plain loop does it, beside weights in any format."""

from __future__ import annotations

from pathlib import Path

import architectures
import numpy as np
import pytest
import small_graphs
import torch
from safetensors.torch import load_file
from torch.nn import functional
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from effcli.errors import UserError
from effcli.graphs.graph import Graph
from effcli.graphs.training import train_graph
from effcli.inputs.text import Windows
from effcli.language.sweep import sweep
from effcli.language.training import train_language, train_weights
from effcli.language.weights import open_weights
from effcli.layers.result import PassResult
from effcli.run.recipe import PassStep

STEP = {
    "bitfit": {"steps": 3, "shuffle": False, "keep_best": False, "schedule": "constant", "learning_rate": 1e-2},
}


def windows() -> Windows:
    generator = torch.Generator().manual_seed(3)
    return Windows(list(torch.randint(architectures.VOCABULARY, (6, 12), generator=generator).split(4)))


def trained(source: Path, target: Path) -> PassResult:
    target.mkdir()
    work = target.with_name(f"{target.name}-work")
    step = PassStep.model_validate(STEP)
    return train_language(train_weights, source, target, step, windows(), batch_size=2, original=source, work=work)


def test_three_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    source = architectures.make("opt", tmp_path / "model", torch.float32)
    trained(source, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    sites = [site for site in open_weights(source).skeleton.sites() if not site.name.startswith("lm_head")]
    biases = [model.get_submodule(site.name).bias.requires_grad_() for site in sites]
    optimizer = torch.optim.Adam(biases, lr=1e-2)
    for batch in torch.cat(windows().batches).split(2):
        logits = model(input_ids=batch).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for key, value in model.state_dict().items():
        assert_close(written.state_dict()[key], value, rtol=1e-4, atol=2e-5)


def test_compressed_weights_stay_byte_for_byte(tmp_path: Path) -> None:
    source = architectures.make("qwen2", tmp_path / "model", torch.bfloat16)
    (tmp_path / "packed").mkdir()
    step = PassStep.model_validate({"linear": {"bits": 4, "group_size": 32}})
    sweep(source, tmp_path / "packed", step, windows(), tmp_path / "work")
    result = trained(tmp_path / "packed", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "out"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}
    assert any("o_proj stays as it is: it has no bias" in remark for remark in result.remarks)


def test_a_network_without_biases_is_refused(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.float32)
    with pytest.raises(UserError, match="finds no layer with a bias to train"):
        trained(source, tmp_path / "out")


def test_a_graph(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    (tmp_path / "source").mkdir()
    graph.save(tmp_path / "source")
    x = small_graphs.inputs(graph, 12)
    data = small_graphs.Held(x, np.arange(len(x)) % graph.run(x).shape[1])
    (tmp_path / "out").mkdir()
    step = PassStep.model_validate(STEP)
    result = train_graph(tmp_path / "source", tmp_path / "out", step, data, batch_size=4)
    before, after = (Graph.read(tmp_path / name).module.state_dict() for name in ("source", "out"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.endswith(".bias") for key in changed)
    assert {row.status for row in result.ledger if row.kind == "conv"} <= {"changed", "kept"}
