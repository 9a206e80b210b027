"""The parameters of a network, read from its checkpoint when their block is open.

Where each one stands in the files is worked out once from the headers, by transformers' own renaming rules.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effcli.errors import CheckpointError, UnsupportedError
from effcli.files.checkpoint import DTYPES, Checkpoint, Entry
from effcli.files.foreign import ForeignLayout, foreign_layout
from effcli.files.layout import (
    Stored,
    check_alone,
    is_own,
    network_config,
    obstacles_of,
    own_part,
    own_widths,
    stored_layers,
    untied,
)
from effcli.formats import SUFFIXES, Mask, Quantized, Sparse, unpack
from effcli.language.experts import zeros_like
from effcli.language.skeleton import Skeleton, find_layers
from effcli.layers.edits import Place
from effcli.layers.input_rounding import round_inputs
from effcli.layers.layer import LayerSite
from effcli.platform.huggingface import replaced_class
from effcli.platform.rehearsal import counted

CPU = torch.device("cpu")


def open_weights(
    path: Path,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    device: torch.device = CPU,
    *,
    base: bool = False,
) -> Weights:
    """The network in `path`, dense or compressed, ready to be read block by block; every parameter must be there.

    dtype: what it is to be read in, such as float32; its own unless given. device: where it runs. base: read it without
    the adapter that may stand beside it. Raises `UnsupportedError` for one with an adapter otherwise.
    """
    if not base:
        check_alone(path)
    checkpoint = Checkpoint.open(path)
    config = network_config(checkpoint.config)
    if dtype is not None:
        config = {**{key: value for key, value in config.items() if key != "torch_dtype"}, "dtype": dtype}
    skeleton = Skeleton(path, config, trust_remote_code, own_widths(checkpoint.config))
    weights = Weights(checkpoint, skeleton, device)
    weights.check_complete()
    return weights


class Weights:
    """The parameters of a network, read from its checkpoint by their names in the modules.

    device: where parameters are while their block is open. What is read without opening a block is on the CPU.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, device: torch.device = CPU) -> None:
        self.checkpoint = checkpoint
        self.skeleton = skeleton
        self.device = device
        _move_buffers(skeleton.model, device)
        # How another tool stores the layers that it quantized.
        self._layout = foreign_layout(checkpoint.config)
        self._sources, self._converters, packed = _route(checkpoint, skeleton.model, self._layout)
        self._packed = packed
        self._sites: dict[str, list[LayerSite]] = {}
        for site in find_layers(skeleton.model, ""):
            self._sites.setdefault(site.parameter, []).append(site)
        self._by_name = known = {site.name: site for sites in self._sites.values() for site in sites}
        if self._layout is None:
            zeros = {name: "weight_zero_point" in tensors for name, tensors in packed.items()}
            stored = stored_layers(checkpoint.config, zeros)
        else:
            stored = self._described(self._layout)
        self.stored: dict[str, Stored] = {name: item for name, item in stored.items() if name in known}
        # Packed layers of the files that the network does not have.
        self.foreign: dict[str, Stored] = {name: item for name, item in stored.items() if name not in known}
        self.head_note = self._settle_head() if skeleton.tied else ""
        # Parameters that the files hold under the name of another, which they are tied to.
        self.shared: dict[str, str] = self._shared()

    def _described(self, layout: ForeignLayout) -> dict[str, Stored]:
        """The layers that another tool quantized, by name, in formats of effcli."""
        found = {}
        for name, keys in self._packed.items():
            site = self._by_name.get(name)
            if site is None:
                raise UnsupportedError(
                    f"{self.checkpoint.path} holds {name} quantized by {layout.name}, which is no layer of the network",
                    "start from the original checkpoint",
                )
            entries = {ending: self.checkpoint.entries[key] for ending, key in keys.items()}
            with self._reading(name, layout.name):
                format = layout.describe(entries, site.shape)
            found[name] = Stored(format, site.kind)
        return found

    @contextmanager
    def _reading(self, layer: str, format: object) -> Iterator[None]:
        """Map a `ValueError` over the tensors of a packed layer to a `CheckpointError`."""
        try:
            yield
        except ValueError as error:
            raise CheckpointError(
                f"{self.checkpoint.path} does not hold {layer} as {format}: {error}",
                "download or copy the checkpoint again",
            ) from error

    def _settle_head(self) -> str:
        """Tie the output head to the input embedding or not, as the files and the stock loader have it, and say so.

        The config alone does not decide: the files may hold a head of its own, or the shared weight as the head's only.
        """
        head, embedding = f"{self.skeleton.head}.weight", self.skeleton.embedding
        if head not in self._sources:
            if self.skeleton.head not in self._packed:
                return ""
        elif not self.has(embedding):
            # The stock loader ties whichever of the two is there.
            self._read_as(embedding, head)
            return f"the weight that {self.skeleton.head} and the input embedding share is stored as {embedding} now"
        elif self._same(head, embedding):
            return f"{head} is equal to the input embedding, which it is tied to: stored once, as {embedding}"
        self.skeleton.untie()
        return f"{head} differs from the input embedding although config.json ties them: kept as a head of its own"

    def _shared(self) -> dict[str, str]:
        """Have each parameter that is tied to another one, and not in the files, read from that one's tensor.

        Returns parameter -> the one it is tied to. Raises `UnsupportedError` for layers that share their weights.
        """
        tied: dict[str, str] = getattr(self.skeleton.model, "all_tied_weights_keys", {})
        shared = {}
        for name, other in tied.items():
            head = self.skeleton.tied and name == f"{self.skeleton.head}.weight"
            if head or self.has(name) or not self.has(other):
                continue
            layer = next(iter(self.sites(name)), None)
            if layer is not None or name.startswith(self.skeleton.block_path + "."):
                raise UnsupportedError(
                    f"{self.checkpoint.path}: {name} shares its weight with {other}, and effcli compresses each block "
                    "by itself",
                    "this version compresses networks whose blocks have weights of their own",
                )
            self._read_as(name, other)
            shared[name] = other
        return shared

    def _read_as(self, name: str, other: str) -> None:
        """Have parameter `name` read from what `other` is made of in the files."""
        self._sources[name] = self._sources[other]
        if other in self._converters:
            self._converters[name] = self._converters[other]

    def left_out(self, apart: bool = False) -> Mapping[str, str]:
        """The parameters of `shared` that what is written of this network needs no tensor of.

        apart: whether the output head gets a weight of its own there. A config that says so ties nothing at all.
        """
        apart = self.skeleton.was_tied and (apart or not self.skeleton.tied)
        return {} if apart else self.shared

    def _same(self, first: str, second: str) -> bool:
        """Whether two dense parameters are equal."""
        if any(site.name in self._packed for name in (first, second) for site in self.sites(name)):
            return False
        return torch.equal(
            self.parameter(first).to(self.skeleton.dtype), self.parameter(second).to(self.skeleton.dtype)
        )

    def network_config(self) -> dict[str, Any]:
        """The network's own config, which says of the head what the files say."""
        config = network_config(self.checkpoint.config)
        return untied(config) if self.skeleton.was_tied and not self.skeleton.tied else config

    def file_names(self) -> dict[str, str]:
        """Module name -> name in the files, of tensors and of layers whose parameters stand there under another one.

        What several tensors make up, or one that is split, has no name there.
        """
        counts = Counter(key for found in self._sources.values() for _, key in found)
        names = {
            name: found[0][1]
            for name, found in self._sources.items()
            if name not in self._converters and len(found) == 1 and counts[found[0][1]] == 1
        }
        for layer, packed in self._packed.items():
            suffix, key = next(iter(packed.items()))
            names[f"{layer}.weight"] = f"{key.removesuffix(f'.{suffix}')}.weight"
        layers = {name.removesuffix(".weight"): key.removesuffix(".weight") for name, key in names.items()}
        return {name: key for name, key in (names | layers).items() if name != key}

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
                keys = [key for _, key in self._sources[name]]
                if len(keys) > 1:
                    raise CheckpointError(
                        f"{self.checkpoint.path} holds {len(keys)} tensors for {name}: {', '.join(keys)}",
                        "take out those that do not belong to it",
                    )
                entry = self.checkpoint.entries[keys[0]]
                if parameter.is_floating_point() and not DTYPES[entry.dtype].is_floating_point:
                    raise CheckpointError(f"{self.checkpoint.path}: {name} holds {entry.dtype} integers", remedy)
                shape = entry.shape
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
        """Tensors of the files that belong to no parameter, whether or not the stock loader passes over them."""
        known = self.skeleton.model.state_dict()
        parts = {f"{site.name}.weight" for sites in self._sites.values() for site in sites}
        keys = [key for name, found in self._sources.items() if name not in known for _, key in found]
        keys = [key for key in keys if key not in parts]
        return keys + [
            key for layer, found in self._packed.items() if layer not in self._by_name for key in found.values()
        ]

    def carried(self) -> dict[str, Entry]:
        """The unused tensors by their names in the files, to stand in the output as they are.

        Raises `UnsupportedError` when they belong to another class, whose names for the parameters are not these.
        """
        unused, known = self.unused(), self.skeleton.model.state_dict()
        named = self.skeleton.config.architectures or ()
        prefix = getattr(self.skeleton.model, "base_model_prefix", "")
        renamed = [
            (key, name)
            for name, found in self._sources.items()
            if name in known and name not in self._converters
            for _, key in found
            if key not in (name, name.removeprefix(f"{prefix}."))
        ]
        built = type(self.skeleton.model).__name__
        if unused and renamed and built not in named:
            key, name = renamed[0]
            raise UnsupportedError(
                f"{self.checkpoint.path} holds {len(unused)} tensors, the first is {unused[0]}, that belong to "
                f"{next(iter(named), 'a class that config.json does not name')} and not to its language model {built}, "
                f"whose name for {key} is {name}",
                "save the language model on its own: load it with AutoModelForCausalLM, then `save_pretrained(...)`",
            )
        return {key: self.checkpoint.entries[key] for key in unused}

    def obstacles(self, stored: Mapping[str, Stored]) -> dict[str, str]:
        """The layers that have no place in the standard format when `stored` ones are, and why."""
        found = obstacles_of(stored)
        kind = replaced_class(self.skeleton.model)
        if kind is not None and not found:
            reason = f"in a quantized checkpoint stock transformers puts another class in the place of {kind}"
            return dict.fromkeys(stored, reason)
        split = next(filter(_splits_weights, _conversions(self.skeleton.model)), None)
        if split is not None and not found:
            names = " and ".join(split.target_patterns)
            return dict.fromkeys(stored, f"stock transformers splits a tensor into {names}, and a packed one it cannot")
        return found

    def of_blocks(self, count: int) -> dict[str, Entry]:
        """The tensors, by their names in the files, that the network without all but its first `count` blocks needs."""
        skeleton = self.skeleton
        names = skeleton.outer_parameters() + [name for k in range(count) for name in skeleton.block_parameters(k)]
        keys = {key for name in names for _, key in self._sources.get(name, ())}
        layers = {site.name for name in names for site in self.sites(name)}
        keys |= {key for layer in layers & self._packed.keys() for key in self._packed[layer].values()}
        keys |= {key for layer in layers for _, key in self._sources.get(f"{layer}.weight", ())}
        return {key: entry for key, entry in self.checkpoint.entries.items() if key in keys}

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

    def verbatim(self, name: str) -> dict[str, str]:
        """The tensors that a parameter is in the files, as it is, by the names that they have beside its module.

        Empty for one that is made of several, or a part of one.
        """
        if name in self._converters or self._layout is not None:
            return {}
        whole = {name: self._sources[name][0][1]} if name in self._sources else {}
        for site in () if whole else self.sites(name):
            if site.name in self._packed:
                whole |= {f"{site.name}.{suffix}": key for suffix, key in self._packed[site.name].items()}
            else:
                whole[f"{site.name}.weight"] = self._sources[f"{site.name}.weight"][0][1]
        return whole

    def packed(self, layer: str) -> Quantized | None:
        """The quantized weight of `layer` as it stands in the file, None for a dense one."""
        if layer not in self._packed:
            return None
        site, stored = self._by_name.get(layer), self.stored.get(layer)
        if site is None or stored is None:
            raise CheckpointError(
                f"{self.checkpoint.path} holds {layer} packed, of which config.json or the network knows nothing",
                "restore config.json from the original checkpoint",
            )
        with self._reading(layer, stored.format):
            if self._layout is not None:
                return self._layout.read(self._read_all(layer), site.shape)
            return unpack(stored.format, self._read_all(layer), site.shape)

    def raw(self, layer: str) -> dict[str, Tensor]:
        """The tensors of a packed layer by suffix, as effcli writes them."""
        found = None if self._layout is None else self.packed(layer)
        return self._read_all(layer) if found is None else found.pack()

    def _read_all(self, layer: str) -> dict[str, Tensor]:
        return {suffix: self.checkpoint.read(key) for suffix, key in self._packed[layer].items()}

    def packed_bytes(self, layer: str) -> int:
        """Bytes of a packed layer as effcli writes it."""
        if self._layout is not None:
            return self.stored[layer].format.nbytes(self._by_name[layer].shape, self.skeleton.dtype.itemsize)
        return sum(self.checkpoint.entries[key].nbytes for key in self._packed[layer].values())

    def places(self) -> dict[str, Place]:
        """All that may get a new value: layers, other parameters, tensors of the files that a parameter is made of."""
        skeleton, state = self.skeleton, self.skeleton.model.state_dict()
        head = f"{skeleton.head}.weight"
        found = {}
        for name in [*skeleton.parameters(), *([head] if skeleton.tied else [])]:
            for site in self.sites(name):
                own = site.name == skeleton.head
                tied = skeleton.embedding if own and skeleton.tied else ""
                found[site.name] = Place(site.shape, site.kind, head=own, tied=tied)
            if not self.sites(name):
                kind: Literal["embedding", "other"] = "embedding" if name == skeleton.embedding else "other"
                found[name] = Place(tuple(state[name].shape), kind)
        for key in {key for name in self._converters for _, key in self._sources[name]}:
            found.setdefault(key.removesuffix(".weight"), Place(self.checkpoint.entries[key].shape, "part"))
        return found

    def parts_of(self, name: str) -> list[str]:
        """The places of the tensors of the files that a parameter is made of; none where it is one by itself."""
        keys = self._sources[name] if name in self._converters else ()
        return [key.removesuffix(".weight") for _, key in keys]

    def parameter(self, name: str, edit: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
        """One parameter in the network's own shape; compressed layers are dequantized.

        edit: makes another one of each tensor of the files that the parameter is made of, given its place.
        """
        sites = self._sites.get(name, [])
        if any(site.name in self._packed for site in sites):
            return self._restore(name, sites)
        if name not in self._sources:
            raise CheckpointError(
                f"{self.checkpoint.path} has no weights for {name}", "download or copy the checkpoint again"
            )
        if name in self._converters:
            return self._convert(name, edit)
        return self.checkpoint.read(self._sources[name][0][1])

    def _restore(self, name: str, sites: list[LayerSite]) -> Tensor:
        shape = self.skeleton.model.get_parameter(name).shape
        restored = torch.empty(shape, dtype=self.skeleton.dtype)
        for site in sites:
            packed = self.packed(site.name)
            dense = self.dense_matrix(site) if packed is None else packed.effective(self.skeleton.dtype)
            site.view(restored).copy_(dense)
            if packed is not None and site.index is None:
                # The dense network computes as the packed one does, with inputs that are rounded where they are there.
                round_inputs(self.skeleton.model.get_submodule(site.name), packed)
        return restored

    def dense_matrix(self, site: LayerSite) -> Tensor:
        """One matrix (out, in) of a stack that stayed dense among packed ones."""
        return self.checkpoint.read(self._sources[f"{site.name}.weight"][0][1])

    def _convert(self, name: str, edit: Callable[[str, Tensor], Tensor] | None) -> Tensor:
        converter = copy.deepcopy(self._converters[name])

        def read(key: str) -> Tensor:
            value = self.checkpoint.read(key)
            return value if edit is None else edit(key.removesuffix(".weight"), value)

        for pattern, key in self._sources[name]:
            converter.add_tensor(name, key, pattern, lambda key=key: read(key))
        # Of several parameters that one tensor is split into, the first stands for all.
        first = _made_of(name, converter.target_patterns)[0]
        result = converter.convert(first, model=self.skeleton.model, config=self.skeleton.config)
        value = result[name]
        value = value[0] if isinstance(value, list) else value
        return value.contiguous()  # type: ignore[no-any-return]

    def mask(self, layer: str) -> Mask | None:
        """What an earlier pass kept of `layer`, on the device; None where it removed nothing."""
        stored = self.stored.get(layer)
        if stored is None or not isinstance(stored.format, Sparse):
            return None
        found = Mask.of(self.packed(layer))
        return None if found is None else found.to(self.device)

    def nonzeros(self) -> int:
        """How many of the parameters are not 0, tied ones counted once; one parameter is in memory at a time."""
        buffers = {name for name, _ in self.skeleton.model.named_buffers()}
        total = 0
        for name in self.skeleton.parameters():
            if name not in buffers:
                with counted(name):
                    total += self._nonzeros(name)
        return total

    def _nonzeros(self, name: str) -> int:
        sites = self.sites(name)
        if not any(site.name in self.stored for site in sites):
            return int(torch.count_nonzero(self.parameter(name)))
        parts = (self.packed(site.name) or self.dense_matrix(site) for site in sites)
        return sum(part.nonzeros if isinstance(part, Quantized) else int(torch.count_nonzero(part)) for part in parts)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a dense parameter has in the file."""

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
            with counted(name):
                value = self.parameter(name)
                # Integer buffers keep their dtype.
                dtype = self.skeleton.dtype if value.is_floating_point() else value.dtype
                place(module, name.removeprefix(prefix), value.to(self.device, dtype))


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Put the buffers that are in memory, such as the frequencies of position embeddings, on `device`."""
    for owner in module.modules():
        for name, value in owner._buffers.items():
            if value is not None and not value.is_meta:
                owner._buffers[name] = value.to(device)


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


@contextmanager
def zeros_for_weights(module: nn.Module, dtype: torch.dtype, device: torch.device = CPU) -> Iterator[None]:
    """Give the parameters of `module` that are not in memory zeros, which take up none until they are written.

    dtype: that of floating parameters; device: where the zeros are.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    for name in names:
        place(module, name, zeros_like(module.get_parameter(name), dtype).to(device))
    try:
        yield
    finally:
        empty(module, "", names)


Sources = dict[str, list[tuple[str, str]]]

# How tensors begin that say what a packed weight or the inputs and outputs of its layer mean.
_OF_PACKED = ("weight_", "input_", "output_")


def _route(
    checkpoint: Checkpoint, model: nn.Module, layout: ForeignLayout | None
) -> tuple[Sources, dict[str, Any], dict[str, dict[str, str]]]:
    """Find the file tensors of every parameter.

    Returns parameter -> [(pattern, file key)], parameter -> converter for those that several file tensors make up,
    and layer -> {suffix: file key} for packed layers.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    converters = _conversions(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    own = is_own(checkpoint.config)
    layers = own_part(checkpoint.config).stored() if own else {}
    described = {name: layer.format.suffixes for name, layer in layers.items()}

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
    for key in sorted(checkpoint.entries, key=_natural):
        found = None if layout is None else layout.split(key, checkpoint.entries)
        stem, suffix = found or key.rpartition(".")[::2]
        if found or suffix in described.get(stem, SUFFIXES if _is_packed(checkpoint, stem) else ()):
            layer = rename(f"{stem}.weight")[0].removesuffix(".weight")
            packed.setdefault(layer, {})[suffix] = key
            continue
        name, pattern = rename(key)
        if name not in state and suffix.startswith(_OF_PACKED) and _is_packed(checkpoint, stem):
            raise UnsupportedError(
                f"{checkpoint.path} holds {key} beside the packed weight, which effcli does not read",
                "start from the original checkpoint",
            )
        names = [name]
        if pattern is not None:
            names = _made_of(name, by_pattern[pattern].target_patterns)
            chosen |= dict.fromkeys(names, by_pattern[pattern])
        for each in names:
            sources.setdefault(each, []).append((pattern or key, key))
    return sources, chosen, packed


def _conversions(model: nn.Module) -> list[Any]:
    """How stock transformers makes parameters of `model` from several tensors, or several of one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]


def _made_of(name: str, targets: list[str]) -> list[str]:
    """Every parameter that the tensor of parameter `name` is split into; targets: the part of each one's name."""
    for target in targets:
        before, found, behind = name.partition(target)
        if found:
            return [f"{before}{other}{behind}" for other in targets]
    return [name]


def _splits_weights(converter: Any) -> bool:
    """Whether stock transformers looks for packed tensors too that it would have to split; it refuses that."""
    return len(converter.target_patterns) > 1 and any(name.endswith(".weight") for name in converter.source_patterns)


def _is_packed(checkpoint: Checkpoint, layer: str) -> bool:
    """Whether the files hold the weight of `layer` quantized: packed, or as int8 with a scale."""
    entries = checkpoint.entries
    if f"{layer}.weight_packed" in entries:
        return True
    weight = entries.get(f"{layer}.weight")
    return weight is not None and weight.dtype == "I8" and f"{layer}.weight_scale" in entries


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Sort key that puts expert 2 before expert 10, as the merging of experts into one stack needs."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
