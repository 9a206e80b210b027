"""Networks without their weights: blocks, layers, and where each parameter stands in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from effcli.errors import CheckpointError, UnsupportedError
from effcli.files.checkpoint import Checkpoint
from effcli.files.layout import network_config
from effcli.formats import Affine, AffineWeight
from effcli.language.skeleton import Skeleton, find_blocks, find_layers
from effcli.language.sweep import sweep
from effcli.language.weights import Weights
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep


def opened(path: Path) -> Weights:
    checkpoint = Checkpoint.open(path)
    return Weights(checkpoint, Skeleton(path, network_config(checkpoint.config)))


BLOCKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "falcon_new": "transformer.h",
    "bloom": "transformer.h",
    "mixtral": "model.layers",
}


@pytest.mark.parametrize("name", architectures.NAMES)
def test_every_parameter_is_the_one_transformers_loads(name: str, tmp_path: Path) -> None:
    """Renamed keys and merged experts included: Mixtral is saved expert by expert and runs stacked."""
    weights = opened(architectures.make(name, tmp_path, torch.bfloat16))
    skeleton = weights.skeleton
    assert weights.missing() == []
    assert skeleton.block_path == BLOCKS.get(name, "model.layers")
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    names = skeleton.outer_parameters() + [key for k in range(2) for key in skeleton.block_parameters(k)]
    tied = {f"{skeleton.head}.weight"} if skeleton.tied else set()
    assert set(names) | tied == set(reference)
    for key in names:
        torch.testing.assert_close(weights.parameter(key), reference[key], rtol=0, atol=0)


def test_mixtral_is_stored_expert_by_expert(tmp_path: Path) -> None:
    """What the test above relies on. Eleven experts: number 10 must not be sorted before number 2."""
    weights = opened(architectures.make("mixtral", tmp_path, num_local_experts=11))
    assert "model.layers.0.block_sparse_moe.experts.10.w1.weight" in weights.checkpoint.entries
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for own in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{own}"
        torch.testing.assert_close(weights.parameter(key), reference[key], rtol=0, atol=0)


def layer_names(path: Path) -> dict[str, tuple[str, tuple[int, int]]]:
    skeleton = opened(path).skeleton
    prefix = skeleton.block_names[0] + "."
    return {site.name.removeprefix(prefix): (site.kind, site.shape) for site in skeleton.block_layers(0)}


def test_layers_of_llama(tmp_path: Path) -> None:
    assert layer_names(architectures.make("llama", tmp_path)) == {
        "self_attn.q_proj": ("linear", (64, 64)),
        "self_attn.k_proj": ("linear", (32, 64)),
        "self_attn.v_proj": ("linear", (32, 64)),
        "self_attn.o_proj": ("linear", (64, 64)),
        "mlp.gate_proj": ("linear", (128, 64)),
        "mlp.up_proj": ("linear", (128, 64)),
        "mlp.down_proj": ("linear", (64, 128)),
    }


def test_layers_of_gpt2_are_named_by_their_inputs_and_outputs(tmp_path: Path) -> None:
    assert layer_names(architectures.make("gpt2", tmp_path)) == {
        "attn.c_attn": ("conv1d", (192, 64)),
        "attn.c_proj": ("conv1d", (64, 64)),
        "mlp.c_fc": ("conv1d", (256, 64)),
        "mlp.c_proj": ("conv1d", (64, 256)),
    }


def test_experts_come_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    layers = layer_names(architectures.make("mixtral", tmp_path))
    experts = [name for name in layers if "experts" in name]
    assert experts == [f"mlp.experts.{own}.{k}" for k in range(4) for own in ("gate_up_proj", "down_proj")]
    assert layers["mlp.experts.gate_up_proj.3"] == ("expert", (256, 64))
    assert layers["mlp.experts.down_proj.0"] == ("expert", (64, 128))


def test_a_transposed_site_is_a_view_of_its_parameter() -> None:
    from transformers.pytorch_utils import Conv1D

    (site,) = find_layers(Conv1D(3, 2), "h")
    parameter = torch.zeros(2, 3)
    site.view(parameter)[2, 1] = 5
    assert site.shape == (3, 2)
    assert parameter[1, 2] == 5


def test_the_head_stands_outside_the_blocks(tmp_path: Path) -> None:
    skeleton = opened(architectures.make("llama", tmp_path)).skeleton
    assert [site.name for site in skeleton.outer_layers()] == ["lm_head"]
    assert (skeleton.head, skeleton.tied, skeleton.embedding) == ("lm_head", False, "model.embed_tokens.weight")
    assert set(skeleton.outer_parameters()) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_a_tied_head_is_named_once(tmp_path: Path) -> None:
    weights = opened(architectures.make("llama", tmp_path, tie_word_embeddings=True))
    assert weights.skeleton.tied
    assert "lm_head.weight" not in weights.checkpoint.entries
    assert "lm_head.weight" not in weights.skeleton.outer_parameters()
    assert [site.name for site in weights.skeleton.outer_layers()] == ["lm_head"]
    weights.check_complete()


def test_blocks_are_the_children_of_the_largest_list() -> None:
    network = nn.Module()
    network.small = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    network.outer = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8)]) for _ in range(2)])
    name, found = find_blocks(network)
    assert (name, len(found)) == ("outer", 2)
    with pytest.raises(UnsupportedError, match="no repeated blocks"):
        find_blocks(nn.Linear(2, 2))


def rewrite(path: Path, change: Any) -> None:
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_integers_for_floating_weights_are_named(tmp_path: Path) -> None:
    architectures.make("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].short()}))
    weights = opened(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds I16 integers"):
        weights.check_complete()


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    architectures.make("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    weights = opened(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks 1 of .* model\.layers\.1\.mlp\.up_proj\.weight"):
        weights.check_complete()
    with pytest.raises(CheckpointError, match="has no weights for"):
        weights.parameter("model.layers.1.mlp.up_proj.weight")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    architectures.make("mixtral", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        opened(tmp_path).check_complete()


def test_a_shape_that_config_does_not_promise_is_named(tmp_path: Path) -> None:
    architectures.make("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(128, 63)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight.*\(128, 63\).*\(128, 64\)"):
        opened(tmp_path).check_complete()


def config_of(path: Path, **changes: Any) -> Skeleton:
    config = json.loads((path / "config.json").read_text()) | changes
    return Skeleton(path, {key: value for key, value in config.items() if value is not None})


def test_configs_that_are_no_language_model(tmp_path: Path) -> None:
    architectures.make("llama", tmp_path)
    with pytest.raises(CheckpointError, match="has no model_type"):
        config_of(tmp_path, model_type=None)
    with pytest.raises(UnsupportedError, match="does not know the model type 'lama'"):
        config_of(tmp_path, model_type="lama")
    with pytest.raises(UnsupportedError, match="not a causal language model"):
        Skeleton(tmp_path, {"model_type": "resnet"})
    for wrong in ({"hidden_size": "many"}, {"hidden_size": -64}, {"hidden_act": "gelo"}, {"num_attention_heads": 0}):
        with pytest.raises((CheckpointError, UnsupportedError)):
            config_of(tmp_path, **wrong)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_of_the_config(key: str, tmp_path: Path) -> None:
    architectures.make("llama", tmp_path)
    assert config_of(tmp_path, **{"dtype": None, key: "bfloat16"}).dtype == torch.bfloat16
    assert config_of(tmp_path, dtype=None).dtype == torch.float32


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path, marker = architectures.make("llama", tmp_path / "model"), tmp_path / "marker"
    (path / "own_code.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="brings its own Python code") as caught:
        Skeleton(path, config)
    assert "--trust-remote-code" in caught.value.remedy
    assert not marker.exists()
    skeleton = Skeleton(path, config, trust_remote_code=True)
    assert type(skeleton.model).__name__ == "OwnForCausalLM"
    assert marker.exists()
    # As in effcli's own layout, where the network's config does not stand at the top of config.json.
    (path / "config.json").write_text("{}")
    assert type(Skeleton(path, config, trust_remote_code=True).model).__name__ == "OwnForCausalLM"


def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    architectures.make("gpt2", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"wte.weight": tensors["transformer.wte.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"holds 2 tensors for transformer\.wte"):
        opened(tmp_path).check_complete()


def test_a_decoder_smaller_than_the_tower_beside_it_has_the_blocks(tmp_path: Path) -> None:
    source = architectures.make_multimodal(tmp_path, vision_depth=40)
    assert opened(source).skeleton.block_path == "model.language_model.layers"


@pytest.mark.parametrize("named", [["Qwen3_5TextModel"], None])
def test_tensors_of_a_class_that_cannot_be_built_are_refused(named: list[str] | None, tmp_path: Path) -> None:
    source = architectures.make_multimodal(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": named}))
    with pytest.raises(UnsupportedError, match=r"holds 33 tensors, the first is model\.visual\.") as caught:
        opened(source).carried()
    assert "on its own" in caught.value.remedy


def test_tensors_that_no_parameter_takes_are_listed(tmp_path: Path) -> None:
    architectures.make("llama", tmp_path)
    assert opened(tmp_path).unused() == []
    extra = {"model.layers.2.mtp.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    rewrite(tmp_path, lambda tensors: tensors.update(extra))
    assert "model.layers.2.mtp.weight" in opened(tmp_path).unused()


def test_a_caller_gets_transformers_logging_back() -> None:
    from transformers.utils import logging as hf_logging

    from effcli import runtime

    before = hf_logging.get_verbosity()
    try:
        hf_logging.set_verbosity_info()
        hf_logging.enable_progress_bar()
        runtime.load("sample:lm")
        assert hf_logging.get_verbosity() == hf_logging.INFO
        assert hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("BertModel", "is an encoder"),
        ("BertForMaskedLM", "fill-in"),
        ("BertForSequenceClassification", "classifies texts"),
    ],
)
def test_an_encoder_is_refused_for_what_it_is(name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"holds a {name}, which .*{what}.*not a causal language model"):
        Skeleton(tmp_path, {"model_type": "bert", "architectures": [name]})


def test_a_bert_with_a_causal_head_is_taken(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True, "vocab_size": 64}
    assert type(Skeleton(tmp_path, config | small).model).__name__ == "BertLMHeadModel"


def test_a_linear_layer_with_a_forward_of_its_own_stays_dense() -> None:
    class Router(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).softmax(-1)

    class Capped(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).clamp(-100, 100)

    layers = torch.nn.Sequential(torch.nn.Linear(2, 3), Router(2, 3), Capped(2, 3, bias=False))
    plain, *others = find_layers(layers, "")
    assert plain.obstacle == ""
    assert [site.obstacle for site in others] == [
        f"{name} computes more than a linear layer" for name in ("Router", "Capped")
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_that_writes_the_linear_product_otherwise_is_a_linear_layer(bias: bool) -> None:
    class Written(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            product = input @ self.weight.T
            return product if self.bias is None else product + self.bias

    with torch.device("meta"):
        layer = Written(7, 4, bias=bias)
    (site,) = find_layers(torch.nn.Sequential(layer), "")
    assert site.obstacle == "" and site.shape == (4, 7)
    assert layer.weight.shape == (4, 7) and layer.in_features == 7


class _Experts(torch.nn.Module):
    """Two stacks of three experts each, of 2 inputs and 2 outputs, so that no shape says which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.ones(3, 2, 2))
        self.down = torch.nn.Parameter(torch.ones(3, 2, 2))

    def forward(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in index.unique():
            token, choice = torch.where(index == expert)
            found = self.one(self.one(x[token], self.up[expert]), self.down[expert])
            out.index_add_(0, token, found * scores[token, choice, None])
        return out

    def one(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class ByLinearExperts(_Experts):
    def one(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight)


class ByProductExperts(_Experts):
    def one(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight


class TurnedExperts(_Experts):
    def one(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, weight.transpose(0, 1))


class TurnedLinearExperts(_Experts):
    def one(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight.T)


class SummingExperts(_Experts):
    def one(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nd,df->nf", x, weight)


class ScalingExperts(_Experts):
    def one(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ (weight * 2)


class PickingExperts(_Experts):
    def forward(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return (x[:, None] * self.up[index[:, 0]]).sum(-1) @ self.down[0]


class WholeExperts(_Experts):
    def forward(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nd,edf->nf", x, self.up)


class GroupedExperts(_Experts):
    def forward(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, self.up, offs=torch.tensor([1, 1, 2], dtype=torch.int32))


class StrangeExperts(_Experts):
    def forward(self, x: torch.Tensor, a: int, b: int, c: int, d: int) -> torch.Tensor:
        return x


class IdleExperts(_Experts):
    def forward(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return x @ self.up[0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "transposed"),
    [(ByLinearExperts, False), (ByProductExperts, True), (TurnedExperts, False), (TurnedLinearExperts, True)],
)
def test_the_order_of_a_stack_is_seen_where_it_is_multiplied(
    kind: type[_Experts], transposed: bool, device: str
) -> None:
    sites = list(find_layers(kind().to(device), "experts"))
    assert [site.name for site in sites[:3]] == ["experts.up.0", "experts.down.0", "experts.up.1"]
    assert {(site.transposed, site.obstacle) for site in sites} == {(transposed, "")}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (SummingExperts, "does more with its weights than multiply with those of one expert (einsum)"),
        (ScalingExperts, "does more with its weights than multiply with those of one expert (mul)"),
        (PickingExperts, "does more with its weights than multiply with those of one expert (__getitem__)"),
        (WholeExperts, "multiplies all experts at once (einsum)"),
        (GroupedExperts, "multiplies all experts at once (_grouped_mm)"),
        (StrangeExperts, "could not be tried: it takes other arguments"),
    ],
)
def test_experts_that_do_what_is_not_understood_stay_dense(kind: type[_Experts], why: str) -> None:
    assert {site.obstacle for site in find_layers(kind(), "experts")} == {f"{kind.__name__} {why}"}


def test_a_stack_that_is_not_multiplied_stays_dense() -> None:
    up, down = list(find_layers(IdleExperts(), "experts"))[:2]
    assert up.transposed and not up.obstacle
    assert down.obstacle == "IdleExperts does not multiply an input with it"


def test_experts_multiplied_at_once_are_read_by_inputs_and_outputs_and_stay_dense() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.zeros(1, 2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x, self.up)

    (site,) = find_layers(Experts(), "experts")
    assert site.shape == (3, 2) and site.transposed and "all experts at once" in site.obstacle


def packed(source: Path, target: Path, step: str) -> Path:
    """The network in `source`, compressed by one pass into `target`."""
    target.mkdir()
    sweep(source, target, PassStep.model_validate(parse_pass(step)), None, target.parent / "work")
    return target


def test_a_tensor_that_says_more_of_a_packed_weight_is_refused(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "in")
    out = packed(source, tmp_path / "out", "linear:bits=4,group_size=32,symmetric=true")
    name = "model.layers.0.self_attn.q_proj.weight_g_idx"
    rewrite(out, lambda tensors: tensors.update({name: torch.arange(64, dtype=torch.int32) // 32}))
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight_g_idx beside the packed weight"):
        opened(out)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_tensors_that_no_layer_takes_are_carried_over(name: str, tmp_path: Path) -> None:
    """In effcli's own layout, too, where the config describes each layer and may not describe these."""
    source = architectures.make(name, tmp_path / "in")
    first = packed(source, tmp_path / "first", "linear:bits=4,group_size=32,symmetric=true,ignore=['*.1.*']")
    weight = AffineWeight(
        Affine(4, "group", 32, symmetric=True), torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2)
    )
    extra = {f"visual.proj.{suffix}": tensor for suffix, tensor in weight.pack().items()}
    if name == "llama":
        config = json.loads((first / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["targets"].append("visual.proj")
        (first / "config.json").write_text(json.dumps(config))
    rewrite(first, lambda tensors: tensors.update(extra))
    assert set(opened(first).carried()) == set(extra)
    again = packed(first, tmp_path / "again", "linear:bits=4,group_size=32,symmetric=true")
    found = Checkpoint.open(again)
    for key, tensor in extra.items():
        assert torch.equal(found.read(key), tensor)
