"""Descriptions of compressed layers that came from outside: each damaged one is refused with the key that is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effcli.errors import CheckpointError, UnsupportedError
from effcli.files import layout as storage
from effcli.files.layout import Stored, network_config, own_config, rounds_inputs, standard_config, stored_layers
from effcli.formats import Affine, AffineWeight, Bitmask, Codebook, Sparse, unpack
from effcli.platform.huggingface import load_network_config

LAYERS = {"a": Stored(Affine(4, "group", 32)), "b": Stored(Codebook("kmeans", 4, "tensor"))}
OWN = own_config({"model_type": "llama"}, LAYERS)
STOCK = standard_config({"model_type": "llama"}, {"a": LAYERS["a"]}, ["a", "b"])


def changed(config: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    made = copy.deepcopy(config)
    change(made)
    return made


def test_what_is_written_is_read() -> None:
    assert stored_layers(OWN, {}) == LAYERS
    assert network_config(OWN) == {"model_type": "llama"}
    assert not rounds_inputs(OWN)
    assert stored_layers(STOCK, {"a": True}) == {"a": LAYERS["a"]}


# A config as effcli has written it since layout 1: it must stay readable, and be written again as it is.
WRITTEN = {
    "model_type": "effcli",
    "effcli": {
        "version": 1,
        "config": {"model_type": "llama"},
        "layers": {
            "affine": {
                "format": "affine", "bits": 4, "strategy": "group", "group_size": 32, "symmetric": False,
                "activations": "none", "kind": "linear", "input_scale": True,
            },
            "integer": {
                "format": "affine", "bits": 8, "strategy": "channel", "group_size": 0, "symmetric": True,
                "activations": "token", "kind": "conv1d", "input_scale": False,
            },
            "nf4": {
                "format": "codebook", "codebook": "nf4", "bits": 4, "strategy": "group", "group_size": 64,
                "double": True, "huffman": False, "dtype": "bfloat16", "kind": "expert", "input_scale": False,
            },
            "shared": {
                "format": "codebook", "codebook": "kmeans", "bits": 5, "strategy": "tensor", "group_size": 0,
                "double": False, "huffman": True, "dtype": None, "kind": "conv", "input_scale": False,
            },
        },
    },
}  # fmt: skip
READ = {
    "affine": Stored(Affine(4, "group", 32), "linear", True),
    "integer": Stored(Affine(8, "channel", 0, True, "token"), "conv1d"),
    "nf4": Stored(Codebook("nf4", 4, "group", 64, double=True, dtype=torch.bfloat16), "expert"),
    "shared": Stored(Codebook("kmeans", 5, "tensor", huffman=True), "conv"),
}


def test_a_config_of_layout_1_is_read_and_written_again_as_it_is() -> None:
    assert stored_layers(WRITTEN, {}) == READ
    assert json.dumps(own_config({"model_type": "llama"}, READ)) == json.dumps(WRITTEN)
    assert rounds_inputs(WRITTEN)
    # What an older effcli left out.
    older = changed(WRITTEN, lambda config: config["effcli"]["layers"]["affine"].pop("activations"))
    assert stored_layers(older, {}) == READ


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda own: own["layers"]["a"].pop("group_size"), "group_size: missing"),
        (lambda own: own["layers"]["a"].update(bits=9), "bits: should be less than or equal to 8"),
        (lambda own: own["layers"]["a"].update(bits=[4]), "layers.a.*bits"),
        (lambda own: own["layers"]["a"].update(group_size=0), "a group size belongs to the strategy"),
        (lambda own: own["layers"]["a"].update(group_size=10**30), "group_size"),
        (lambda own: own["layers"]["a"].update(format="sparse"), "layers.a"),
        (lambda own: own["layers"]["b"].update(codebook="nf5"), "codebook"),
        (lambda own: own["layers"]["b"].update(dtype="load"), "dtype"),
        (lambda own: own["layers"]["b"].update(kind="table"), "kind"),
        (lambda own: own.update(layers=[]), "layers"),
        (lambda own: own.pop("layers"), "layers: missing"),
        (lambda own: own.update(kind={}), "kind"),
    ],
)
def test_a_damaged_description(change: Callable[[Any], Any], cause: str) -> None:
    config = changed(OWN, lambda config: change(config["effcli"]))
    for read in (network_config, rounds_inputs, lambda found: stored_layers(found, {})):
        with pytest.raises(CheckpointError, match=cause):
            read(config)


def test_a_format_that_no_package_has() -> None:
    config = changed(OWN, lambda config: config["effcli"]["layers"]["a"].update(format="shift"))
    for read in (network_config, rounds_inputs, lambda found: stored_layers(found, {})):
        with pytest.raises(UnsupportedError, match="there is no format 'shift'") as caught:
            read(config)
        assert caught.value.remedy == "install the package that offers the format"
    with pytest.raises(UnsupportedError, match="there is no format 'shift'"):
        Stored.from_json(config["effcli"]["layers"]["a"])
    # Only formats of numbers stand within a sparse one, and all of them are effcli's.
    sparse = {**Sparse(Bitmask(), Affine(4, "channel")).to_json(), "kind": "linear", "input_scale": False}
    sparse["values"] = {**sparse["values"], "format": "shift"}
    with pytest.raises(CheckpointError, match=r"layers.a.*'shift'"):
        network_config(changed(OWN, lambda config: config["effcli"]["layers"].update(a=sparse)))


def test_a_description_without_a_network_or_of_another_version() -> None:
    with pytest.raises(CheckpointError, match=r"effcli.config is missing"):
        network_config(changed(OWN, lambda config: config["effcli"].pop("config")))
    with pytest.raises(CheckpointError, match=r"effcli.config in config.json is damaged: architectures"):
        network_config(changed(OWN, lambda config: config["effcli"]["config"].update(architectures=[True])))
    with pytest.raises(UnsupportedError, match="layout 2"):
        network_config(changed(OWN, lambda config: config["effcli"].update(version=2)))
    with pytest.raises(CheckpointError, match="should hold an object"):
        network_config({"model_type": storage.OWN_TYPE})


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda found: found["config_groups"]["group_0"].pop("targets"), "targets: missing"),
        (lambda found: found["config_groups"]["group_0"].update(targets=["re:("]), "is no pattern"),
        (lambda found: found["config_groups"]["group_0"]["weights"].update(num_bits=99), "num_bits"),
        (lambda found: found["config_groups"]["group_0"]["weights"].update(strategy="block"), "strategy"),
        (lambda found: found["config_groups"]["group_0"]["weights"].update(group_size=None), "a group size belongs"),
        (lambda found: found.update(config_groups=[]), "config_groups"),
    ],
)
def test_a_damaged_quantization_config(change: Callable[[Any], Any], cause: str) -> None:
    config = changed(STOCK, lambda config: change(config["quantization_config"]))
    with pytest.raises(CheckpointError, match=cause):
        stored_layers(config, {"a": True})


INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda top, group: group["weights"].update(actorder="group"), r"group_0\.weights\.actorder is group"),
        (lambda top, group: group["weights"].update(actorder=True), "actorder is True"),
        (lambda top, group: group["weights"].update(type="float"), "type is float"),
        (lambda top, group: group["weights"].update(dynamic=True), r"weights\.dynamic is True"),
        (lambda top, group: group["weights"].update(block_structure=[2, 4]), "block_structure is set"),
        (lambda top, group: group.update(format="nvfp4-pack-quantized"), "format is nvfp4-pack-quantized"),
        (lambda top, group: group.update(format="int-quantized"), "format is int-quantized"),
        (lambda top, group: group.update(output_activations=INPUTS), "output_activations is set"),
        (lambda top, group: group.update(input_activations=INPUTS | {"num_bits": 4}), "num_bits is 4"),
        (lambda top, group: group.update(input_activations=INPUTS | {"type": "float"}), "type is float"),
        (lambda top, group: group.update(input_activations=INPUTS | {"dynamic": "local"}), "dynamic is local"),
        (lambda top, group: group.update(input_activations=INPUTS | {"strategy": "group"}), "strategy is group"),
        (lambda top, group: group.update(input_activations=INPUTS | {"strategy": "tensor"}), "strategy is tensor"),
        (lambda top, group: group.update(input_activations=INPUTS | {"dynamic": False}), "strategy is token, not dy"),
        (lambda top, group: group.update(input_activations=INPUTS | {"symmetric": False}), "symmetric is false"),
        (lambda top, group: top.update(transform_config={"config_groups": {"R4": {"type": "hadamard"}}}), "transform"),
        (lambda top, group: top.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set"),
        (lambda top, group: top.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is set"),
        (lambda top, group: top.update(moe_sparsity_config={"experts": 2}), "moe_sparsity_config is set"),
        (lambda top, group: top.update(rotation="spin"), "rotation is spin, which effcli does not read"),
    ],
)
def test_what_a_quantization_config_says_beyond_what_is_read(change: Callable[[Any, Any], Any], cause: str) -> None:
    def both(config: dict[str, Any]) -> None:
        change(config["quantization_config"], config["quantization_config"]["config_groups"]["group_0"])

    with pytest.raises(UnsupportedError, match=cause):
        stored_layers(changed(STOCK, both), {"a": True})


def test_what_a_quantization_config_says_without_changing_a_value() -> None:
    def harmless(config: dict[str, Any]) -> None:
        config["quantization_config"].update(
            kv_cache_scheme=None,
            transform_config={"config_groups": {}},
            sparsity_config={"format": "dense", "global_sparsity": 0.1},
            moe_sparsity_config=None,
            global_compression_ratio=1.5,
            version="0.10.2",
            later=False,
        )
        group = config["quantization_config"]["config_groups"]["group_0"]
        group.update(format="pack-quantized")
        group["weights"].update(
            actorder="weight",
            observer="mse",
            observer_kwargs={"maxshrink": 0.2},
            block_structure=None,
            scale_dtype="torch.float16",
            zp_dtype="torch.int8",
        )

    assert stored_layers(changed(STOCK, harmless), {"a": True}) == {"a": LAYERS["a"]}


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"num_hidden_layers": 10**29}, "num_hidden_layers"),
        ({"text_config": {"n_layer": 20_000}}, r"text_config\.n_layer"),
        ({"hidden_size": 1e12}, "hidden_size"),
        ({"head_dim": 10**7}, "head_dim"),
    ],
)
def test_sizes_beyond_every_network(sizes: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is .*, more than"):
        load_network_config(Path("model"), {"model_type": "llama"} | sizes, False)


def test_tensors_that_are_not_what_the_layer_is_described_as() -> None:
    format = Affine(4, "group", 32)
    codes, scale = torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2)
    packed = AffineWeight(format, codes, scale, zero=torch.zeros(8, 2, dtype=torch.uint8)).pack()
    assert unpack(format, packed, (8, 64)).shape == (8, 64)
    damaged: list[tuple[dict[str, Any], str]] = [
        ({**packed, "weight_shape": torch.tensor([2**40, 64])}, "weight_shape is"),
        ({**packed, "weight_packed": packed["weight_packed"][:, :4]}, "weight_packed is"),
        ({**packed, "weight_scale": packed["weight_scale"].to(torch.int32)}, "weight_scale is"),
        ({**packed, "weight_scale": packed["weight_scale"][:, :1]}, "weight_scale has 8 numbers, not 16"),
        ({name: tensor for name, tensor in packed.items() if name != "weight_scale"}, "weight_scale is missing"),
    ]
    for tensors, cause in damaged:
        with pytest.raises(ValueError, match=cause):
            unpack(format, tensors, (8, 64))
