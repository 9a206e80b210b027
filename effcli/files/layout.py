"""Where compressed layers are described: the `quantization_config` of a stock checkpoint, or effcli's own layout.

A layer with a standard place is an affine linear without an explicit input scale: compressed-tensors'
`pack-quantized`, which stock transformers loads, with zero points as long as all layers have the same bits, or its
`int-quantized` where the inputs become int8 too. Any other compressed layer puts the whole checkpoint into effcli's own
layout, made so that stock loaders refuse it: the `model_type` is "effcli" and the weight files carry names that no
stock loader looks for. (An unknown `quant_method` alone would be ignored and random weights be loaded.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from effcli.errors import CheckpointError, UnsupportedError
from effcli.files.checkpoint import (
    OWN_STEM,
    STOCK_STEM,
    Entry,
    assemble,
    check_config,
    copy_companions,
    read_config,
    write_text,
)
from effcli.files.documents import check_model, says
from effcli.formats import FORMATS, Activations, Affine, Described, Packing, Scheme, Strategy, find, format_from_json
from effcli.formats.base import Bits, ByFormat, GroupSize
from effcli.layers.layer import Kind

LAYOUT_VERSION = 1
SHARD_BYTES = 4 << 30
OWN_TYPE = "effcli"
_RESTORE = "restore config.json from the original checkpoint"
# The folder of a trained adapter, beside the weights that it was trained on.
ADAPTER = "adapter"


class _Layer(Described):
    """A compressed layer as effcli's own layout describes it: its format's description, and where the layer stands."""

    kind: Kind
    input_scale: bool = Field(strict=True)

    def stored(self) -> Stored:
        """The layer itself."""
        return Stored(self.made(), self.kind, self.input_scale)


StoredLayer = Annotated[_Layer, ByFormat(tuple(FORMATS.values()), _Layer, find)]


class Own(BaseModel):
    """What stands under `effcli` in the config of effcli's own layout.

    config: of a language model, the network's own; widths: what single blocks of it say otherwise, by their number;
    facts: of a graph or an integer network.
    """

    model_config = ConfigDict(frozen=True)

    version: int
    kind: Literal["graph", "integer"] | None = None
    config: dict[str, Any] | None = None
    widths: dict[NonNegativeInt, dict[str, PositiveInt]] = Field(default_factory=dict)
    facts: dict[str, Any] | None = None
    layers: dict[str, StoredLayer]

    def stored(self) -> dict[str, Stored]:
        """The compressed layers by name."""
        return {name: layer.stored() for name, layer in self.layers.items()}


class _Weights(BaseModel):
    num_bits: Bits
    strategy: Strategy
    group_size: GroupSize | None = None


class _Inputs(BaseModel):
    dynamic: bool | str | None = None
    strategy: str | None = None


class _Group(BaseModel):
    targets: list[str]
    weights: _Weights
    input_activations: _Inputs | None = None


class _Quantization(BaseModel):
    """A `quantization_config` of compressed-tensors."""

    config_groups: dict[str, _Group]


# The keys of a `quantization_config` that are read or that change no value, by the part they stand in: each with the
# values that are understood, or None where all are. Anything else that is said there changes what the tensors mean.
_Known = Mapping[str, tuple[Any, ...] | None]
_NUMBERS: _Known = dict.fromkeys(("scale_dtype", "zp_dtype", "observer", "observer_kwargs", "strategy", "symmetric"))
_WEIGHTS: _Known = {
    **_NUMBERS,
    "num_bits": None,
    "group_size": None,
    "type": ("int",),
    # Any other order needs the group of every column, which stands in a tensor of its own.
    "actorder": ("weight", "static"),
}
_INPUTS: _Known = {**_NUMBERS, "num_bits": (8,), "type": ("int",), "dynamic": (True,)}
_TOP = (
    "config_groups",
    "dequantize",
    "format",
    "global_compression_ratio",
    "ignore",
    "quant_method",
    "quantization_status",
    "run_compressed",
    "use_optimized_inference",
    "version",
)


def _check_understood(found: Mapping[str, Any], known: _Known, place: str) -> None:
    """Refuse what one part of a `quantization_config` says and effcli does not understand."""
    for key, value in found.items():
        values = known.get(key, ())
        if says(value) and values is not None and value not in values:
            said = str(value) if isinstance(value, str | int | float) else "set"
            raise UnsupportedError(
                f"quantization_config in config.json: {place}{key} is {said}, which effcli does not read",
                "start from the original checkpoint",
            )


def _check_quantization(found: Mapping[str, Any]) -> None:
    """Refuse a `quantization_config`, of the right types, that says more of the tensors than is read of it."""
    sparsity = found.get("sparsity_config")
    dense = isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"
    _check_understood(found, dict.fromkeys((*_TOP, "sparsity_config") if dense else _TOP), "")
    for name, group in found["config_groups"].items():
        place = f"config_groups.{name}."
        known: _Known = {"targets": None, "weights": None, "input_activations": None, "format": (found["format"],)}
        _check_understood(group, known, place)
        _check_understood(group["weights"], _WEIGHTS, f"{place}weights.")
        inputs = group.get("input_activations")
        if inputs is None:
            continue
        place += "input_activations."
        _check_understood(inputs, _INPUTS, place)
        dynamic = bool(inputs.get("dynamic"))
        strategy = inputs.get("strategy") or "tensor"
        if strategy != ("token" if dynamic else "tensor"):
            _check_understood({"strategy": f"{strategy}, {'' if dynamic else 'not '}dynamic"}, {}, place)
        if dynamic and inputs.get("symmetric") is False:
            _check_understood({"symmetric": "false, dynamic"}, {}, place)


@dataclass(frozen=True)
class Stored:
    """How one compressed layer stands in the file."""

    format: Packing
    kind: Kind = "linear"
    input_scale: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**self.format.to_json(), "kind": self.kind, "input_scale": self.input_scale}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Stored:
        return Stored(format_from_json(data), data["kind"], data["input_scale"])

    @property
    def obstacle(self) -> str:
        """Why the standard format has no place for this layer; empty when it has one."""
        if self.kind == "conv1d":
            return "a Conv1D stores its weight transposed"
        if self.kind == "expert":
            return "an expert is a slice of a 3-D parameter"
        if self.kind != "linear":
            return f"a {self.kind} is not a linear"
        return self.format.standard_obstacle or ("its input scale is explicit" if self.input_scale else "")


_BOTH = "stock transformers reads packed layers or layers of int8 inputs, not both"
_MIXED = "stock transformers reads mixed bits only where all layers are symmetric"
_KEEPING = {_BOTH: "give int8 inputs to all layers or to none", _MIXED: "quantize with symmetric=true"}


def keeping_standard(reasons: Collection[str]) -> str:
    """What would spare layers these reasons not to stand in the standard format; empty where nothing would."""
    known = [_KEEPING[reason] for reason in reasons if reason in _KEEPING]
    if known:
        return known[0]
    if all(reason.endswith(_NO_FORMAT) for reason in reasons):
        return "choose a pass that stores integers, such as gptq or awq"
    return ""


# What a format says of itself that compressed-tensors, or transformers, has no place for.
_NO_FORMAT = ("has no place in compressed-tensors", "transformers reads no sparse weights")


def obstacles_of(layers: Mapping[str, Stored]) -> dict[str, str]:
    """The layers that the standard format has no place for, and why: each for itself, or because of the others."""
    alone = {name: stored.obstacle for name, stored in layers.items() if stored.obstacle}
    if alone:
        return alone
    formats = _standard(layers)
    integer = {name: format.rounds_inputs for name, format in formats.items()}
    if len(set(integer.values())) == 2:
        return _unusual(integer, _BOTH)
    if all(format.symmetric for format in formats.values()):
        return {}
    # Transformers reads zero points only when it dequantizes, and then takes every layer for one like the first.
    kinds = {name: (f.bits, f.symmetric, f.strategy == "tensor") for name, f in formats.items()}
    return _unusual(kinds, _MIXED)


def _standard(layers: Mapping[str, Stored]) -> dict[str, Scheme]:
    """The scheme of every layer that compressed-tensors has one for."""
    schemes = {name: stored.format.standard for name, stored in layers.items()}
    return {name: scheme for name, scheme in schemes.items() if scheme is not None}


def _unusual(kinds: Mapping[str, Hashable], reason: str) -> dict[str, str]:
    """`reason` for every layer that is not of the most frequent kind."""
    found = list(kinds.values())
    usual = max(found, key=found.count, default=None)
    return {name: reason for name, kind in kinds.items() if kind != usual}


def network_config(config: dict[str, Any]) -> dict[str, Any]:
    """The network's own config, without what describes compressed layers."""
    if config.get("model_type") == OWN_TYPE:
        network = own_part(config).config
        if network is None:
            raise CheckpointError("config.json is damaged: effcli.config is missing", _RESTORE)
        check_config(network, "effcli.config in config.json", _RESTORE)
        return dict(network)
    return {key: value for key, value in config.items() if key != "quantization_config"}


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """A network's config whose output head has a weight of its own."""
    config = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    return {**config, "text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else config


def is_own(config: dict[str, Any]) -> bool:
    return config.get("model_type") == OWN_TYPE


def own_part(config: dict[str, Any]) -> Own:
    """What stands under `effcli` in the config of effcli's own layout.

    Raises `CheckpointError` when it is damaged, `UnsupportedError` for another version of the layout, and for a format
    that neither effcli nor an installed package has.
    """
    found = config.get("effcli")
    version = found.get("version") if isinstance(found, dict) else None
    if isinstance(version, int) and version != LAYOUT_VERSION:
        raise UnsupportedError(
            f"the checkpoint has effcli layout {version}, this effcli reads {LAYOUT_VERSION}",
            "use the effcli that wrote it",
        )
    return check_model(Own, found, "effcli in config.json", remedy=_RESTORE)


def adapter_in(folder: Path) -> Path | None:
    """Where the adapter beside the weights of a checkpoint is; None where there is none."""
    found = folder / ADAPTER
    return found if (found / "adapter_config.json").is_file() else None


def check_alone(folder: Path) -> None:
    """Raise `UnsupportedError` for a checkpoint with an adapter beside its weights."""
    if adapter_in(folder) is not None:
        raise UnsupportedError(
            f"{folder} holds an adapter beside its weights, which are not all of the network",
            "add it to the weights first: effcli compress MODEL --pass merge",
        )


def rounds_inputs(config: dict[str, Any]) -> bool:
    """Whether the inputs of some layers of a language model's checkpoint become int8."""
    if is_own(config):
        return any(stored.format.rounds_inputs for stored in own_part(config).stored().values())
    return bool((config.get("quantization_config") or {}).get("format") == "int-quantized")


def holds(folder: Path, file: str, kind: str) -> bool:
    """Whether `folder` is a checkpoint in effcli's own layout, of this kind and with this file beside its config."""
    if not (folder / file).is_file() or not (folder / "config.json").is_file():
        return False
    config = read_config(folder)
    return is_own(config) and own_part(config).kind == kind


def stored_layers(config: dict[str, Any], packed: Mapping[str, bool]) -> dict[str, Stored]:
    """The compressed layers of a checkpoint, by module name.

    packed: names of modules that have a `weight_packed` tensor, and whether they have a `weight_zero_point`.
    """
    if is_own(config):
        return own_part(config).stored()
    quantization = config.get("quantization_config")
    if quantization is None:
        if packed:
            raise CheckpointError("the weights are packed but config.json has no quantization_config", "restore it")
        return {}
    known = quantization.get("format") in ("pack-quantized", "int-quantized")
    if quantization.get("quant_method") != "compressed-tensors" or not known:
        what = f"{quantization.get('quant_method')}/{quantization.get('format')}"
        raise UnsupportedError(
            f"the checkpoint is already quantized as {what}, which effcli does not read",
            "start from the original checkpoint",
        )
    groups = check_model(_Quantization, quantization, "quantization_config in config.json", remedy=_RESTORE)
    _check_quantization(quantization)
    return {name: Stored(_scheme_of(name, groups, zero)) for name, zero in packed.items()}


def _scheme_of(name: str, quantization: _Quantization, has_zero: bool) -> Affine:
    groups = quantization.config_groups.values()

    def matches(target: str) -> bool:
        try:
            return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name
        except re.error as error:
            raise CheckpointError(f"quantization_config in config.json: {target!r} is no pattern", _RESTORE) from error

    chosen = next((g for g in groups if any(matches(t) for t in g.targets)), None)
    chosen = chosen or next((g for g in groups if "Linear" in g.targets), None)
    if chosen is None:
        raise CheckpointError(f"no config group of quantization_config names {name}", "restore config.json")
    weights, inputs = chosen.weights, chosen.input_activations
    activations: Activations = "none" if inputs is None else "token" if inputs.dynamic else "tensor"
    try:
        return Affine(weights.num_bits, weights.strategy, weights.group_size or 0, not has_zero, activations)
    except ValueError as error:
        raise CheckpointError(f"quantization_config in config.json: {name}: {error}", _RESTORE) from error


def own_config(
    config: dict[str, Any], layers: Mapping[str, Stored], widths: Mapping[int, Mapping[str, int]] | None = None
) -> dict[str, Any]:
    """`config.json` of a checkpoint in effcli's own layout; widths: what single blocks say otherwise than `config`."""
    described: dict[str, Any] = {"version": LAYOUT_VERSION, "config": config}
    if widths:
        described["widths"] = {str(k): dict(values) for k, values in sorted(widths.items())}
    described["layers"] = {name: stored.to_json() for name, stored in sorted(layers.items())}
    return {"model_type": OWN_TYPE, "effcli": described}


def write_checkpoint(
    source: Path,
    target: Path,
    parts: Iterable[Path],
    config: dict[str, Any],
    carried: Mapping[str, Entry],
    names: Mapping[str, str],
) -> None:
    """Join the safetensors files `parts` into the checkpoint of a language model that `config` describes.

    target: a directory that exists; source: the checkpoint that its tokenizer and the like come from; carried: further
    tensors, which stand in files of `source`; names: what the stock layout calls tensors and layers otherwise than
    their modules, whose names they have in effcli's own.
    """
    copy_companions(source, target)
    own = is_own(config)
    assemble(parts, target, OWN_STEM if own else STOCK_STEM, SHARD_BYTES, carried, {} if own else names)
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_uniform(config: dict[str, Any]) -> None:
    """Raise `UnsupportedError` where blocks have widths of their own, which no config of transformers can say."""
    if own_widths(config):
        raise UnsupportedError(
            "its blocks differ in width, which a config of transformers cannot say",
            "effcli.load reads the checkpoint as it is; cut the same number from every block for other targets",
        )


def own_widths(config: dict[str, Any]) -> dict[int, dict[str, int]]:
    """What single blocks of a language model say otherwise than its config, by their number."""
    return own_part(config).widths if is_own(config) else {}


def standard_config(
    config: dict[str, Any], layers: Mapping[str, Stored], linears: Iterable[str], other: tuple[str, str] | None = None
) -> dict[str, Any]:
    """`config.json` of a stock checkpoint whose `layers` are packed; `linears` are all linear modules by name.

    Every group names its layers, so that no class name catches a linear that stayed dense, and the dense ones stand
    under `ignore`, without which the stock loader would look for their packed weights. other: the path of the blocks,
    and the path that another class has for them which loads the same files; layers are named both ways.
    """
    if not layers:
        return dict(config)
    by_format: dict[Scheme, list[str]] = {}
    for name, scheme in sorted(_standard(layers).items()):
        by_format.setdefault(scheme, []).append(name)
    groups = {}
    for number, (format, names) in enumerate(sorted(by_format.items(), key=lambda item: item[1][0])):
        groups[f"group_{number}"] = {
            "targets": _both(names, other),
            "weights": {
                "num_bits": format.bits,
                "type": "int",
                "symmetric": format.symmetric,
                "strategy": format.strategy,
                "group_size": format.group_size or None,
                "dynamic": False,
            },
            "input_activations": _inputs(format.activations),
            "output_activations": None,
        }
    integer = any(format.rounds_inputs for format in by_format)
    quantization: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if integer else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _both(sorted(set(linears) - layers.keys()), other),
    }
    if not integer and len({format.bits for format in by_format}) == 1:
        # Zero points load in transformers only through its dequantizing route, mixed bits only through the other.
        quantization["dequantize"] = True
    return {**config, "quantization_config": quantization}


def _both(names: list[str], other: tuple[str, str] | None) -> list[str]:
    """`names`, and those that begin with the first path of `other` with the second in its place."""
    if other is None:
        return names
    first, second = other
    return names + [second + name.removeprefix(first) for name in names if name.startswith(first + ".")]


def _inputs(activations: Activations) -> dict[str, Any] | None:
    """How compressed-tensors says that inputs become int8."""
    if activations == "none":
        return None
    dynamic = activations == "token"
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": dynamic,
        "strategy": activations,
        "dynamic": dynamic,
        "group_size": None,
    }
