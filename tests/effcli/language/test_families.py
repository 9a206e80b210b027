"""Networks of text and images, or of an encoder and a decoder: all of them is kept, or they are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from effcli import runtime
from effcli.cli import main
from effcli.errors import UnsupportedError
from effcli.inputs.text import Windows
from effcli.language.model import LanguageModel
from effcli.language.stream import Stream
from effcli.language.sweep import sweep
from effcli.language.verify import verify
from effcli.language.weights import open_weights
from effcli.layers.result import PassResult
from effcli.platform.huggingface import logits_of
from effcli.run.recipe import PassStep, check

LINEAR: dict[str, Any] = {"linear": {"bits": 8, "group_size": 16}}
AWQ: dict[str, Any] = {"awq": {"bits": 4, "group_size": 16}}


@pytest.fixture(scope="module", params=["llava", "mllama"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make_family(request.param, tmp_path_factory.mktemp("families") / request.param)


def windows() -> Windows:
    return Windows([torch.randint(3, 1000, (4, 24), generator=torch.Generator().manual_seed(0))])


def carry_out(source: Path, target: Path, step: dict[str, Any]) -> PassResult:
    target.mkdir()
    return sweep(source, target, PassStep.model_validate(step), windows(), target.parent / "work")


@pytest.mark.parametrize("step", [LINEAR, AWQ], ids=["linear", "awq"])
def test_all_that_stands_beside_the_blocks_is_carried_over(family: Path, step: dict[str, Any], tmp_path: Path) -> None:
    carry_out(family, tmp_path / "out", step)
    before, after = open_weights(family), open_weights(tmp_path / "out")
    assert type(before.skeleton.model).__name__ == before.skeleton.config.architectures[0]
    assert before.skeleton.parameters() == after.skeleton.parameters()
    names = before.skeleton.outer_parameters()
    assert any("vision" in name for name in names)
    assert all(after.parameter(name).equal(before.parameter(name)) for name in names)
    assert len(after.stored) == 14


def test_the_parts_of_a_forward_pass_give_what_the_whole_gives(family: Path) -> None:
    """Also where a block is passed over."""
    network = runtime.load(family)
    ids = windows().batches[0]
    with torch.inference_mode(), Stream(open_weights(family), with_head=True) as stream:
        hidden, calls = stream.enter(ids)
        for k, call in enumerate(calls):
            with stream.weights.opened(
                stream.skeleton.blocks[k], stream.skeleton.block_names[k] + ".", stream.skeleton.block_parameters(k)
            ):
                hidden = stream.through(k, hidden, call)
        torch.testing.assert_close(stream.leave(ids, hidden), logits_of(network, ids), rtol=1e-5, atol=1e-5)


def test_a_block_that_text_does_not_reach_is_said(tmp_path: Path) -> None:
    source = architectures.make_family("mllama", tmp_path / "model")
    result = carry_out(source, tmp_path / "out", AWQ)
    reasons = {row.name: row.reason for row in result.ledger}
    for layer in ("cross_attn.q_proj", "mlp.down_proj"):
        assert "no calibration token reached it" in reasons[f"model.language_model.layers.1.{layer}"]
    assert reasons["model.language_model.layers.0.self_attn.q_proj"] == ""


def test_the_model_card_names_the_class_that_loads_it(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = "linear:bits=8,group_size=16,symmetric=true"
    assert main(["compress", str(family), "--pass", step, "--no-eval", "-q", "-o", str(tmp_path / "out")]) == 0
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "from transformers import AutoTokenizer, AutoModelForImageTextToText" in code
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert type(found["model"]).__name__ == open_weights(family).skeleton.config.architectures[0]


def test_the_model_card_names_what_prepares_images(tmp_path: Path) -> None:
    source = architectures.make_family("llava", tmp_path / "in")
    network = LanguageModel(check({"model": str(source), "passes": [LINEAR]}), source)
    assert network.loaders(source) == ("AutoModelForImageTextToText", "AutoTokenizer")
    (source / "preprocessor_config.json").write_text("{}")
    assert network.loaders(source) == ("AutoModelForImageTextToText", "AutoProcessor")
    text = architectures.make("llama", tmp_path / "text")
    assert network.loaders(text) == ("AutoModelForCausalLM", "AutoTokenizer")


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 64, "num_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensor = {"shared.weight": torch.zeros(8, 64)}
    save_file(tensor, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration, an encoder and a decoder"):
        open_weights(tmp_path)


def test_a_class_that_does_not_run_on_text_is_refused() -> None:
    class NeedsAnImage(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, use_cache: bool) -> None: ...

    with pytest.raises(UnsupportedError, match=r"NeedsAnImage of transformers .* does not run on text alone: .*pixel"):
        logits_of(NeedsAnImage(), torch.zeros(1, 1, dtype=torch.int64))


COMMON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
COMMON |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}


def save_causal(folder: Path, family: str, **options: Any) -> Path:
    """A tiny causal model of a family of transformers, with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"is_decoder": True}),
        ("roberta", {"is_decoder": True}),
        ("sarvam_moe", {"num_key_value_heads": 2, "head_dim": 8}),
        ("hrm_text", {"head_dim": 8}),
    ],
)
def test_parameters_that_have_no_tensor_of_their_own_are_found(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """A bias that is tied to another one, and queries, keys and values that stand in one tensor."""
    source = save_causal(tmp_path / "model", family, **options)
    weights, stock = open_weights(source), AutoModelForCausalLM.from_pretrained(source)
    for name in weights.skeleton.parameters():
        assert torch.equal(weights.parameter(name), stock.state_dict()[name]), name
    result = carry_out(source, tmp_path / "out", {"linear": {"bits": 8, "group_size": 8}})
    assert sum(row.status == "compressed" for row in result.ledger) >= 12
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        before, after = stock(ids).logits, logits_of(runtime.load(tmp_path / "out"), ids)
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)
    left_out = set(weights.shared) & {
        key for file in (tmp_path / "out").glob("*.safetensors") for key in load_file(file)
    }
    assert not left_out


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("own", [False, True], ids=["head taken", "head of its own"])
def test_a_head_that_is_tied_no_more_keeps_its_bias(family: str, own: bool, tmp_path: Path) -> None:
    """A config that ties no head ties no bias either, so that both need a tensor."""
    source = save_causal(tmp_path / "model", family, is_decoder=True)
    head = open_weights(source).skeleton.head
    if own:
        tensors = load_file(source / "model.safetensors")
        shape = open_weights(source).skeleton.model.state_dict()[f"{head}.weight"].shape
        tensors[f"{head}.weight"] = torch.randn(shape)
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    step = {"linear": {"bits": 8, "group_size": 8, "lm_head": not own}}
    before = open_weights(source)
    carry_out(source, tmp_path / "out", step)
    after = open_weights(tmp_path / "out")
    assert (f"{head}" in after.stored) == (not own)
    assert torch.equal(after.parameter(f"{head}.bias"), before.parameter(f"{head}.bias"))
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        expected, found = (logits_of(runtime.load(folder), ids) for folder in (source, tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_layers_in_float32_that_share_a_scale_are_written(tmp_path: Path) -> None:
    source, target = save_causal(tmp_path / "model", "bert", is_decoder=True), tmp_path / "out"
    target.mkdir()
    step = PassStep.model_validate({"awq": {"bits": 4, "group_size": 8, "without_pair": "explicit"}})
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    result = sweep(source, target, step, Windows([ids]), tmp_path / "work")
    scaled = [row.name for row in result.ledger if row.reason.startswith("its scale stays explicit")]
    assert len([name for name in scaled if name.endswith(("query", "key", "value"))]) >= 3
    weights = open_weights(target)
    for name in scaled:
        packed = weights.packed(name)
        assert packed is not None and packed.input_scale is not None


def test_blocks_that_share_their_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_causal(tmp_path / "model", "llama")
    file = source / "model.safetensors"
    tensors = load_file(file)
    first, second = (f"model.layers.{k}.mlp.up_proj.weight" for k in (0, 1))
    del tensors[second]
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(LlamaForCausalLM, "all_tied_weights_keys", {second: first}, raising=False)
    monkeypatch.setattr(LlamaForCausalLM, "post_init", lambda self: None)
    with pytest.raises(UnsupportedError, match="shares its weight with model"):
        open_weights(source)


@pytest.mark.parametrize("family", ["llava", "mllama", "base"])
def test_tensors_keep_the_names_of_the_files(family: str, tmp_path: Path) -> None:
    """Where these are not the modules' names, as in checkpoints of text and images, and of a network without a head."""
    source = tmp_path / "model"
    if family == "base":
        torch.manual_seed(0)
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON, tie_word_embeddings=True))
        whole.model.save_pretrained(source)
    else:
        architectures.make_family(family, source)
    carry_out(source, tmp_path / "out", LINEAR)
    before, after = (
        {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        for folder in (source, tmp_path / "out")
    )
    assert any(key not in open_weights(source).skeleton.parameters() for key in before)
    kept = before.keys() & after.keys()
    assert all(torch.equal(before[key], after[key]) for key in kept)
    packed = {key.removesuffix("_packed") for key in after if key.endswith(".weight_packed")}
    assert before.keys() == kept | packed and len(packed) == 14
    found = verify(tmp_path / "out", against=source)
    assert found.passed and found.stock is not None, found.line
