"""The `blocks` pass: blocks of least influence go, and stock transformers loads what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs
import torch
from torch.nn import functional
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import effcli
from effcli.errors import RecipeError, SelectionError, UserError
from effcli.graphs.plan import PlannedGraph
from effcli.inputs.options import Calibration
from effcli.inputs.text import Windows
from effcli.language.cutting import cut_model
from effcli.language.plan import PlannedModel
from effcli.language.verify import verify
from effcli.language.weights import open_weights
from effcli.layers.result import PassResult
from effcli.layers.selection import choose
from effcli.reports.report import Stage
from effcli.run.recipe import PassStep

BLOCKS = {"num_hidden_layers": 5}


def step(**options: Any) -> PassStep:
    return PassStep.model_validate({"blocks": options})


def tokens() -> torch.Tensor:
    return torch.randint(architectures.VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))


def removed(source: Path, folder: Path, **options: Any) -> tuple[Path, PassResult]:
    target = folder / "target"
    target.mkdir(parents=True)
    result = cut_model(source, target, step(**options), Windows([tokens()], "original"), folder / "work")
    assert not (folder / "work").exists()
    return target, result


def influences(source: Path) -> list[float]:
    """1 - cos around every block, from the hidden states that stock transformers returns."""
    network = AutoModelForCausalLM.from_pretrained(source).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    blocks = network.get_decoder().layers if hasattr(network.get_decoder(), "layers") else network.get_decoder().h
    for block in blocks:
        block.register_forward_hook(
            lambda module, given, kwargs, out: seen.append(
                (given[0] if given else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        network(tokens())
    return [float(1 - functional.cosine_similarity(x, y, dim=-1).mean()) for x, y in seen]


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "opt", "gpt_neox", "gpt2", "falcon", "bloom", "mixtral"],
)
def test_what_is_left_is_the_network_without_these_blocks(name: str, tmp_path: Path) -> None:
    changes = {"n_layer": 5} if name in ("gpt2", "bloom") else dict(BLOCKS)
    if name == "gemma2":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    if name in ("qwen2", "qwen3"):
        changes["layer_types"] = ["full_attention"] * 5
    source = architectures.make(name, tmp_path / "source", **changes)
    target, result = removed(source, tmp_path, count=2)
    scores = influences(source)
    kept = sorted(sorted(range(5), key=scores.__getitem__)[2:])
    before = AutoModelForCausalLM.from_pretrained(source).eval()
    after = AutoModelForCausalLM.from_pretrained(target).eval()
    parent = before.get_decoder()
    own = "layers" if hasattr(parent, "layers") else "h"
    left = [getattr(parent, own)[k] for k in kept]
    for j, block in enumerate(left):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = j
    setattr(parent, own, torch.nn.ModuleList(left))
    before.config.num_hidden_layers = len(left)
    parent.config.num_hidden_layers = len(left)
    if getattr(before.config, "layer_types", None):
        before.config.layer_types = [before.config.layer_types[k] for k in kept]
    with torch.no_grad():
        assert_close(after(tokens(), use_cache=False).logits, before(tokens(), use_cache=False).logits)
    noted = {row.notes["block_before"]: row.notes["influence"] for row in result.ledger if "block_before" in row.notes}
    assert sorted(noted) == kept
    gone = {row.name: row.notes["influence"] for row in result.ledger if row.status == "removed"}
    assert [int(name.split()[0].rpartition(".")[2]) for name in gone] == sorted(set(range(5)) - set(kept))
    for k, score in enumerate(scores):
        found = {**noted, **{int(name.split()[0].rpartition(".")[2]): value for name, value in gone.items()}}[k]
        assert found == pytest.approx(score, abs=1e-4)


def stage(result: PassResult) -> Stage:
    return Stage.model_construct(ledger=tuple(result.ledger), histograms=())


def test_the_output_is_compared_with_its_input(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "source", **BLOCKS)
    target, result = removed(source, tmp_path, count=2, ignore=["model.layers.0.*"])
    checked = verify(target, against=source, stages=[stage(result)])
    assert checked.passed, checked.line
    assert {row.notes.get("block_before") for row in result.ledger if row.name.startswith("model.layers.0.")} == {0}

    from safetensors.torch import load_file, save_file

    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    checked = verify(target, against=source, stages=[stage(result)])
    assert not checked.passed and "model.layers.1.mlp.up_proj" in checked.line


def test_blocks_go_twice_and_are_compressed_then(tmp_path: Path) -> None:
    """Numbers of blocks are followed through both steps, and the compressed layers behind them."""
    source = architectures.make("llama", tmp_path / "source", **BLOCKS)
    text = " ".join(f"word{k % 97} of many" for k in range(3000))
    (tmp_path / "text.txt").write_text(text)
    report = effcli.compress(
        source,
        ["blocks:count=1", "blocks:count=1", "linear:bits=8,group_size=32"],
        tmp_path / "out",
        calibration={"data": str(tmp_path / "text.txt"), "samples": 2, "length": 32},
        evaluate=False,
    )
    assert [one.weights for one in report.stages] == sorted((one.weights for one in report.stages), reverse=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3
    assert verify(tmp_path / "out", against=source).passed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 5}, "blocks would remove 5 of 5 blocks, and one must stay"),
        ({"ratio": 0.05}, "a ratio of 0.05 of 5 blocks removes none"),
        (
            {"count": 3, "ignore": ["*.0.mlp.*", "*.1.mlp.*", "*.2.mlp.*"]},
            "3 blocks are to go and 2 may: block 0 stays",
        ),
    ],
)
def test_bad_input_is_refused_in_the_plan(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "source", **BLOCKS)
    planned = PlannedModel(open_weights(source), Calibration())
    made = step(**options)
    with pytest.raises(SelectionError, match=said):
        planned.take(made, choose(planned.layered(made), made))


def test_graphs_have_no_blocks() -> None:
    planned, made = PlannedGraph(small_graphs.residual(), Calibration()), step()
    with pytest.raises(UserError, match="blocks finds no blocks that can be cut"):
        planned.take(made, choose(planned.layered(made), made))


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0])
def test_ratios_are_shares(ratio: float) -> None:
    with pytest.raises(RecipeError, match="ratio"):
        step(ratio=ratio)


def test_a_count_and_a_ratio_are_refused() -> None:
    with pytest.raises(RecipeError, match="`count` takes the place of `ratio`"):
        step(ratio=0.5, count=1)
    made = step(count=1)
    assert PassStep.model_validate(made.model_dump(mode="json")).config.model_dump() == made.config.model_dump()


def test_lists_of_block_numbers_are_shortened(tmp_path: Path) -> None:
    """Bamba's config numbers the blocks that attend; the others are mamba blocks."""
    source = architectures.make("bamba", tmp_path / "source", num_hidden_layers=4, attn_layer_indices=[2])
    target, _ = removed(source, tmp_path, count=1, ignore=["model.layers.[023].*"])
    config = AutoModelForCausalLM.from_pretrained(target).config
    assert config.num_hidden_layers == 3 and config.attn_layer_indices == [1]


def test_blocks_that_follow_their_number_are_refused(tmp_path: Path) -> None:
    """Every second block has experts, which this config says by a step: without the first they would be the others."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024)
    experts = dict(num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32, decoder_sparse_step=2)
    config = AutoConfig.for_model("qwen2_moe", num_hidden_layers=4, **sizes, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    planned = PlannedModel(open_weights(tmp_path / "source"), Calibration())
    made = step(count=1)
    with pytest.raises(UserError, match="blocks finds no blocks that can be cut") as error:
        planned.take(made, choose(planned.layered(made), made))
    assert "would be another one as" in error.value.remedy
