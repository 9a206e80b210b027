"""The network without its weights: blocks and layers found in the modules, not listed per architecture.

The network is built from its config on the meta device. Its blocks are the children of the largest ModuleList; its
layers are the weights with inputs inside them. Where each parameter comes from in the files is worked out once, by
transformers' own renaming rules, so that a parameter can be read when its block is open.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from effcli.checkpoint import Checkpoint
from effcli.contract import Kind
from effcli.errors import CheckpointError, UnsupportedError
from effcli.formats import AffineWeight
from effcli.storage import Stored, network_config, stored_layers


@dataclass(frozen=True)
class LayerSite:
    """Where a layer stands in the network.

    name: the module's path, with `.index` appended for one matrix of a stacked parameter; parameter: the state-dict
    key of its weight; rows, columns: its shape as (out, in), whatever the storage; index: which matrix of a stack it
    is; transposed: stored as (in, out).
    """

    name: str
    kind: Kind
    parameter: str
    rows: int
    columns: int
    index: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def view(self, parameter: Tensor) -> Tensor:
        """This layer's weight as (out, in), a view of its parameter."""
        weight = parameter if self.index is None else parameter[self.index]
        return weight.t() if self.transposed else weight


def quiet_transformers() -> None:
    """Leave the terminal to effcli: transformers' progress bars and advice say nothing its user can act on."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


class Skeleton:
    """A causal language model on the meta device, its blocks and its layers.

    head: the module name of the output head, None without one; tied: whether it shares the input embedding's weight.
    """

    def __init__(self, path: Path, config: dict[str, Any], trust_remote_code: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        quiet_transformers()
        self.config = load_network_config(path, config, trust_remote_code)
        self.dtype: torch.dtype = self.config.dtype or torch.float32
        with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
            # Initialisers that warn about zero-sized or meta tensors say nothing about this network.
            warnings.simplefilter("ignore")
            try:
                self.model: nn.Module = AutoModelForCausalLM.from_config(
                    self.config,
                    dtype=self.dtype,
                    experts_implementation="eager",
                    trust_remote_code=trust_remote_code,
                )
            except Exception as error:  # whatever transformers says about the config
                raise UnsupportedError(
                    f"{path} is not a causal language model that transformers can build: {_first_line(error)}",
                    "this version compresses causal language models; config.json must be the one they were saved with",
                ) from error
        self.model.eval()
        self.model.tie_weights()
        head, inputs = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        self.head: str | None = next((name for name, m in self.model.named_modules() if m is head), None)
        self.tied = head is not None and inputs is not None and head.weight is inputs.weight
        self.embedding = next(f"{name}.weight" for name, m in self.model.named_modules() if m is inputs)
        self.block_path, self.blocks = find_blocks(self.model)
        self.block_names = [f"{self.block_path}.{k}" for k in range(len(self.blocks))]

    def block_layers(self, k: int) -> list[LayerSite]:
        """The layers of block k, in the order of its modules."""
        return list(find_layers(self.blocks[k], self.block_names[k]))

    def outer_layers(self) -> list[LayerSite]:
        """The layers outside the blocks: the output head, and projections around the stack."""
        inside = self.block_path + "."
        return [site for site in find_layers(self.model, "") if not site.name.startswith(inside)]

    def block_parameters(self, k: int) -> list[str]:
        """State-dict keys of block k, persistent buffers included."""
        prefix = self.block_names[k] + "."
        return [prefix + name for name in self.blocks[k].state_dict()]

    def outer_parameters(self) -> list[str]:
        """State-dict keys outside the blocks; a tied head is not named twice."""
        inside = self.block_path + "."
        names = [name for name in self.model.state_dict() if not name.startswith(inside)]
        if self.tied and self.head is not None:
            names = [name for name in names if name != f"{self.head}.weight"]
        return names


def load_network_config(path: Path, config: dict[str, Any], trust_remote_code: bool) -> Any:
    """The transformers config object of a network's own `config`; remote code only when trusted."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_type, code = config.get("model_type"), (config.get("auto_map") or {}).get("AutoConfig")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path / 'config.json'} has no model_type", "restore it from the original checkpoint")
    if code is not None and not trust_remote_code:
        raise UnsupportedError(
            f"{path} brings its own Python code ({model_type})",
            "read that code, then allow it with --trust-remote-code",
        )
    if code is None and model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"transformers does not know the model type {model_type!r}", "install a newer transformers"
        )
    try:
        if code is not None:
            built = get_class_from_dynamic_module(code, str(path)).from_dict(config)
            built.name_or_path = str(path)
            return built
        with tempfile.TemporaryDirectory() as folder:
            # By way of a file: that route knows about older names and special cases, and this file holds the config
            # alone where a compressed checkpoint's says more.
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            return AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers says about it
        raise CheckpointError(
            f"{path / 'config.json'} does not describe a network: {_first_line(error)}",
            "restore it from the original checkpoint",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList that holds the most parameters, and its path."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UnsupportedError(
            "the network has no repeated blocks (no ModuleList)", "this version compresses causal language models"
        )

    def size(item: tuple[str, nn.ModuleList]) -> int:
        return sum(parameter.numel() for parameter in item[1].parameters())

    # Of nested lists the outermost has at least as many parameters, and comes first.
    return max(lists, key=size)


def find_layers(root: nn.Module, prefix: str) -> Iterator[LayerSite]:
    """Every weight with inputs below `root`: linears, transformers' Conv1D, matrices of stacked expert parameters."""
    from transformers.pytorch_utils import Conv1D

    for path, module in root.named_modules():
        name = ".".join(part for part in (prefix, path) if part)
        if isinstance(module, nn.Linear):
            yield LayerSite(name, "linear", f"{name}.weight", module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            columns, rows = module.weight.shape
            yield LayerSite(name, "conv1d", f"{name}.weight", rows, columns, transposed=True)
        elif "Experts" in type(module).__name__:
            # The order in which the experts run: all matrices of expert 0, then of expert 1.
            stacks = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
            count = max((p.shape[0] for p in stacks.values()), default=0)
            transposed = bool(getattr(module, "is_transposed", False))
            for index in range(count):
                for own, parameter in stacks.items():
                    rows, columns = parameter.shape[1:] if not transposed else parameter.shape[:0:-1]
                    key = f"{name}.{own}"
                    yield LayerSite(f"{key}.{index}", "expert", key, rows, columns, index, transposed)


class Weights:
    """The parameters of a network, read from its checkpoint by their names in the modules."""

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        self.checkpoint = checkpoint
        self.skeleton = skeleton
        self._sources, self._converters, packed = _route(checkpoint, skeleton.model)
        self._packed = packed
        self.stored: dict[str, Stored] = stored_layers(
            checkpoint.config, {name: "weight_zero_point" in tensors for name, tensors in packed.items()}
        )
        self._sites: dict[str, list[LayerSite]] = {}
        for site in find_layers(skeleton.model, ""):
            self._sites.setdefault(site.parameter, []).append(site)

    def sites(self, parameter: str) -> list[LayerSite]:
        """The layers that a parameter holds: one, several for a stack of experts, or none."""
        return self._sites.get(parameter, [])

    def check_complete(self) -> None:
        """Raise `CheckpointError` when the files lack a parameter of the network, or hold it in another shape."""
        remedy = "download or copy the checkpoint again; config.json must be the one the weights were saved with"
        missing = self.missing()
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.path} lacks {len(missing)} of the network's parameters, the first is {missing[0]}",
                remedy,
            )
        for name, parameter in self.skeleton.model.state_dict().items():
            if name in self._sources and name not in self._converters:
                shape = self.checkpoint.entries[self._sources[name][0][1]].shape
                if shape != tuple(parameter.shape):
                    raise CheckpointError(
                        f"{self.checkpoint.path}: {name} has the shape {shape}, config.json asks for "
                        f"{tuple(parameter.shape)}",
                        remedy,
                    )

    def missing(self) -> list[str]:
        """Parameters that the network has and the files do not."""
        wanted = [n for k in range(len(self.skeleton.blocks)) for n in self.skeleton.block_parameters(k)]
        wanted += self.skeleton.outer_parameters()
        return [name for name in wanted if not self.has(name)]

    def unused(self) -> list[str]:
        """Tensors of the files that belong to no parameter, those left out that the network says it ignores."""
        known = self.skeleton.model.state_dict()
        ignored = getattr(self.skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        parts = {f"{site.name}.weight" for sites in self._sites.values() for site in sites}
        keys = [key for name, found in self._sources.items() if name not in known for _, key in found]
        return [key for key in keys if key not in parts and not any(re.search(pattern, key) for pattern in ignored)]

    def has(self, name: str) -> bool:
        """Whether the files hold a parameter: as a tensor, or every matrix of it on its own, packed or dense."""
        sites = self._sites.get(name, [])
        if name in self._converters and sites:
            # One file tensor per expert for each pattern, e.g. `experts.*.w1` and `experts.*.w3`.
            counts = Counter(pattern for pattern, _ in self._sources[name])
            return all(counts[pattern] == len(sites) for pattern in self._converters[name].source_patterns)
        if name in self._sources or not sites:
            return name in self._sources
        return all(site.name in self._packed or f"{site.name}.weight" in self._sources for site in sites)

    def packed(self, layer: str) -> AffineWeight | None:
        """The quantized weight of `layer` as it stands in the file, None for a dense one."""
        if layer not in self._packed:
            return None
        return AffineWeight.unpack(self.stored[layer].format, self.raw(layer))

    def raw(self, layer: str) -> dict[str, Tensor]:
        """The tensors of a packed layer by suffix, as they stand in the file."""
        return {suffix: self.checkpoint.read(key) for suffix, key in self._packed[layer].items()}

    def packed_bytes(self, layer: str) -> int:
        return sum(self.checkpoint.entries[key].nbytes for key in self._packed[layer].values())

    def parameter(self, name: str) -> Tensor:
        """One parameter in the network's own shape; compressed layers are dequantized."""
        sites = self._sites.get(name, [])
        if any(site.name in self._packed for site in sites):
            return self._restore(name, sites)
        if name not in self._sources:
            raise CheckpointError(
                f"{self.checkpoint.path} has no weights for {name}", "download or copy the checkpoint again"
            )
        return self._convert(name) if name in self._converters else self.checkpoint.read(self._sources[name][0][1])

    def _restore(self, name: str, sites: list[LayerSite]) -> Tensor:
        shape = self.skeleton.model.get_parameter(name).shape
        restored = torch.empty(shape, dtype=self.skeleton.dtype)
        for site in sites:
            packed = self.packed(site.name)
            dense = self.dense_matrix(site) if packed is None else packed.effective(self.skeleton.dtype)
            site.view(restored).copy_(dense)
        return restored

    def dense_matrix(self, site: LayerSite) -> Tensor:
        """One matrix (out, in) of a stack that stayed dense among packed ones."""
        return self.checkpoint.read(self._sources[f"{site.name}.weight"][0][1])

    def _convert(self, name: str) -> Tensor:
        converter = copy.deepcopy(self._converters[name])
        for pattern, key in self._sources[name]:
            converter.add_tensor(name, key, pattern, lambda key=key: self.checkpoint.read(key))
        result = converter.convert(name, model=self.skeleton.model, config=self.skeleton.config)
        value = result[name]
        value = value[0] if isinstance(value, list) else value
        return value.contiguous()  # type: ignore[no-any-return]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a dense parameter has in the file."""
        from effcli.checkpoint import DTYPES

        if name in self._sources:
            return DTYPES[self.checkpoint.entries[self._sources[name][0][1]].dtype]
        return self.skeleton.dtype

    @contextmanager
    def opened(self, module: nn.Module, prefix: str, names: list[str]) -> Iterator[nn.Module]:
        """`module` with the parameters `names` (full keys below `prefix`) in memory; they are freed afterwards."""
        self.fill(module, prefix, names)
        try:
            yield module
        finally:
            empty(module, prefix, names)

    def fill(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        """Read the parameters `names` (full keys below `prefix`) into `module`."""
        for name in names:
            value = self.parameter(name)
            # Integer buffers keep their dtype.
            dtype = self.skeleton.dtype if value.is_floating_point() else value.dtype
            place(module, name.removeprefix(prefix), value.to(dtype))


def place(module: nn.Module, path: str, value: Tensor) -> None:
    """Put `value` where the parameter or buffer `path` of `module` stands."""
    parent, _, own = path.rpartition(".")
    owner = module.get_submodule(parent)
    if own in owner._parameters:
        owner._parameters[own] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[own] = value


def empty(module: nn.Module, prefix: str, names: list[str]) -> None:
    """Give the parameters `names` back to the meta device."""
    for name in names:
        path = name.removeprefix(prefix)
        parent, _, own = path.rpartition(".")
        owner = module.get_submodule(parent)
        parameter = owner._parameters.get(own)
        if parameter is not None:
            owner._parameters[own] = nn.Parameter(parameter.to("meta"), requires_grad=False)


Sources = dict[str, list[tuple[str, str]]]


def _route(checkpoint: Checkpoint, model: nn.Module) -> tuple[Sources, dict[str, Any], dict[str, dict[str, str]]]:
    """Find the file tensors of every parameter.

    Returns parameter -> [(pattern, file key)], parameter -> converter for those that several file tensors make up,
    and layer -> {suffix: file key} for packed layers.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    own = network_config(checkpoint.config) is not checkpoint.config and "effcli" in checkpoint.config

    def rename(key: str) -> tuple[str, str | None]:
        if own:
            return key, None
        renamed, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if renamed not in state and key in state:
            renamed, pattern = rename_source_key(key, [], [], prefix, state)
        return renamed, pattern

    sources: Sources = {}
    chosen: dict[str, Any] = {}
    packed: dict[str, dict[str, str]] = {}
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")
    for key in sorted(checkpoint.entries, key=_natural):
        stem, _, suffix = key.rpartition(".")
        if suffix in suffixes and f"{stem}.weight_packed" in checkpoint.entries:
            layer = rename(f"{stem}.weight")[0].removesuffix(".weight")
            packed.setdefault(layer, {})[suffix] = key
            continue
        name, pattern = rename(key)
        if pattern is not None:
            chosen[name] = by_pattern[pattern]
        sources.setdefault(name, []).append((pattern or key, key))
    return sources, chosen, packed


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Sort key that puts expert 2 before expert 10, as the merging of experts into one stack needs."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
