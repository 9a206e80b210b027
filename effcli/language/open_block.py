"""One open block of a language model, as the engine works on it, and what becomes of it on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from effcli.files.layout import Stored, StoredLayer
from effcli.formats import Dense, Quantized
from effcli.language.pairs import (
    SharedInput,
    divide_bias,
    divide_norm,
    output_factors,
    scale_columns,
    weights_with_inputs,
)
from effcli.language.weights import Weights
from effcli.layers.contract import Layer
from effcli.layers.engine import LayerEngine, Seen
from effcli.layers.layer import LayerSite
from effcli.layers.network import Factors, Held, Readers
from effcli.layers.result import MATRIX, dense_row
from effcli.options import Record
from effcli.reports.report import Histogram, LedgerRow


@dataclass
class Part:
    """What a block becomes on disk: its tensors, how its layers are stored, its share of the ledger.

    copied: tensors that stay as they are in the files, by their names here: their names there.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    ledger: list[LedgerRow] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def keep(self, weights: Weights, key: str, row: Callable[[str], LedgerRow], value: Tensor | None = None) -> None:
        """Carry a parameter over: as it stands in the file, packed or dense, or with a new `value` of its dtype.

        row: the ledger's line for a layer.
        """
        dtype = weights.dtype_of(key)
        sites = weights.sites(key)
        packed = [site for site in sites if site.name in weights.stored]
        if not packed:
            # Integer buffers keep their dtype; floating values return to the one they had in the file.
            self.tensors[key] = weights.parameter(key) if value is None else value.to("cpu", dtype).contiguous()
        for site in sites:
            if packed:
                self.keep_site(weights, site)
            self.ledger.append(row(site.name))
        if not sites:
            self._add_matrix(key, tuple(self.tensors[key].shape), dtype)

    def copy(self, weights: Weights, key: str, row: Callable[[str], LedgerRow]) -> None:
        """Carry a parameter over without reading it, where the files hold it as it is; see `keep`."""
        found = weights.verbatim(key)
        if not found:
            self.keep(weights, key, row)
            return
        self.copied |= found
        sites = weights.sites(key)
        for site in sites:
            if site.name in weights.stored:
                self.stored[site.name] = weights.stored[site.name]
            self.ledger.append(row(site.name))
        if not sites:
            self._add_matrix(key, weights.checkpoint.entries[found[key]].shape, weights.dtype_of(key))

    def _add_matrix(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """The ledger's line for a parameter that is no layer, where it is a matrix."""
        if len(shape) > 1:
            self.ledger.append(dense_row(key, "embedding", shape, dtype, MATRIX))

    def keep_site(self, weights: Weights, site: LayerSite) -> None:
        """Carry one layer over on its own, as where others of its parameter are packed."""
        if site.name in weights.stored:
            self.tensors.update({f"{site.name}.{suffix}": t for suffix, t in weights.raw(site.name).items()})
            self.stored[site.name] = weights.stored[site.name]
        else:
            partly = any(other.name in weights.stored for other in weights.sites(site.parameter))
            dense = weights.dense_matrix(site) if partly else site.view(weights.parameter(site.parameter))
            self.tensors[f"{site.name}.weight"] = dense.contiguous()

    def put(self, weights: Weights, site: LayerSite, weight: Quantized | Tensor) -> Held:
        """Store a new weight (out, in) of a layer: compressed, as it is, or dense, in the dtype of the old one."""
        if isinstance(weight, Quantized):
            self.stored[site.name] = Stored(weight.format, site.kind, weight.input_scale is not None)
            tensors = {f"{site.name}.{suffix}": tensor.cpu() for suffix, tensor in weight.pack().items()}
            format = str(weight.format)
        else:
            dense = weight.to("cpu", weights.dtype_of(site.parameter))
            tensors = {f"{site.name}.weight": dense.t().contiguous() if site.kind == "conv1d" else dense}
            format = str(Dense(dense.dtype))
        self.tensors.update(tensors)
        return Held(format, sum(tensor.nbytes for tensor in tensors.values()))

    def join(self, sites: Sequence[LayerSite]) -> None:
        """Make one tensor again of a stack of experts none of which is packed."""
        if sites[0].index is not None and not any(site.name in self.stored for site in sites):
            matrices = [self.tensors.pop(f"{site.name}.weight") for site in sites]
            self.tensors[sites[0].parameter] = torch.stack([m.t() if sites[0].transposed else m for m in matrices])

    def to_json(self) -> dict[str, Any]:
        return {
            "copied": self.copied,
            "stored": {name: item.to_json() for name, item in self.stored.items()},
            "ledger": [row.model_dump(mode="json") for row in self.ledger],
            "histograms": [item.model_dump(mode="json") for item in self.histograms],
            "remarks": self.remarks,
        }


def held(weights: Weights, site: LayerSite) -> Held:
    """How a layer is stored in the checkpoint that a pass begins with."""
    if site.name in weights.stored:
        return Held(str(weights.stored[site.name].format), weights.packed_bytes(site.name))
    dtype = weights.dtype_of(site.parameter)
    return Held(str(Dense(dtype)), site.rows * site.columns * dtype.itemsize)


class PartRecord(Record):
    """A part without its tensors, as the journal keeps it."""

    copied: dict[str, str] = Field(default_factory=dict)
    stored: dict[str, StoredLayer]
    ledger: tuple[LedgerRow, ...]
    histograms: tuple[Histogram, ...]
    remarks: tuple[str, ...]

    def read(self) -> Part:
        stored = {name: layer.stored() for name, layer in self.stored.items()}
        return Part({}, self.copied, stored, list(self.ledger), list(self.histograms), list(self.remarks))


class OpenBlock:
    """See `effcli.layers.network.Network`. What becomes of the block's layers is written into `part`.

    Factors that are folded into layers are not written into their weights: they are kept in float32 beside them and
    applied when the layer is read, so that folding adds no rounding. Norms and biases are divided in place.
    """

    def __init__(
        self, weights: Weights, block: nn.Module, prefix: str, part: Part, shared: Sequence[SharedInput] = ()
    ) -> None:
        """prefix: of the names inside `block`, with a dot at its end; shared: the inputs that its layers share."""
        self.factors = Factors()
        self.part = part
        self._weights = weights
        self._block = block
        self._prefix = prefix
        self._shared = shared
        # The parameters besides the layers' weights that a factor has changed.
        self._changed: set[str] = set()
        self._layers = {site.name for key in block.state_dict() for site in weights.sites(prefix + key)}

    def readers(self) -> list[Readers]:
        found = []
        for number, item in enumerate(self._shared):
            names = tuple(name for name in self._full(item.consumers) if name in self._layers)
            producer = item.producer
            if producer is None:
                found.append(Readers(number, names, None, item.reason))
            else:
                channel = producer.channel.to(self._weights.device)
                produces = self._prefix + producer.name if producer.how == "rows" else ""
                found.append(Readers(number, names, producer.name, produces=produces, channel=channel))
        return found

    def _full(self, names: Iterable[str]) -> list[str]:
        return [self._prefix + name for name in names]

    def read(self, site: LayerSite) -> Layer:
        weight = site.view(self._parameter(site)).float()
        scaled = self.factors.scaled(site.name, weight).contiguous()
        mask = self._weights.mask(site.name)
        dtype, biased = self._weights.dtype_of(site.parameter), self._bias(site) is not None
        return Layer(site.name, site.kind, scaled, dtype, mask=mask, biased=biased)

    def _bias(self, site: LayerSite) -> nn.Parameter | None:
        """The bias of a layer; None where it has none, as a matrix of a stack."""
        if site.index is not None:
            return None
        own = site.name.removeprefix(self._prefix.removesuffix(".")).removeprefix(".")
        return self._block.get_submodule(own)._parameters.get("bias")

    def shift(self, site: LayerSite, shift: Tensor) -> None:
        bias = self._bias(site)
        assert bias is not None
        bias.add_(shift.to(bias.dtype))
        self._changed.add(f"{site.name}.bias")

    def _parameter(self, site: LayerSite) -> Tensor:
        return self._block.get_parameter(site.parameter.removeprefix(self._prefix))

    def divide(self, readers: Readers, factor: Tensor) -> Tensor:
        item = self._shared[readers.number]
        producer = item.producer
        assert producer is not None
        if producer.how == "rows":
            outputs = output_factors(producer, factor)
            self.factors.divide(readers.produces, outputs)
            changed = divide_bias(self._block, producer.name, outputs)
        else:
            factor = divide_norm(self._block, producer, factor)
            norm = self._block.get_submodule(producer.name)
            changed = [f"{producer.name}.{own}" for own, _ in norm.named_parameters()]
        # Matrices that read the input and are no layers (a router) must follow the factor.
        others = [name for name in item.consumers if self._prefix + name not in self._layers]
        matrices = {site.name: site for site in weights_with_inputs(self._block)} if others else {}
        for name in others:
            scale_columns(self._block, matrices[name], factor)
            changed.append(matrices[name].parameter)
        self._changed.update(self._full(changed))
        return factor

    def multiply(self, site: LayerSite, factor: Tensor) -> None:
        self.factors.columns[site.name] = factor

    def write(self, site: LayerSite, weight: Quantized | Tensor, effective: Tensor) -> Held:
        written = self.part.put(self._weights, site, weight)
        # What later blocks see: a folded factor is undone by the producer, an explicit one by the layer itself.
        site.view(self._parameter(site)).copy_(effective)
        return written

    def held(self, site: LayerSite) -> Held:
        return held(self._weights, site)

    def compress(self, engine: LayerEngine, seen: Mapping[str, Seen]) -> None:
        """Fold what `engine` folds, compress every layer that it takes and keep the rest of the block.

        seen: of the inputs of the layers, by name.
        """
        scaled = engine.scale(seen)
        for key, current in self._block.state_dict().items():
            parameter = self._prefix + key
            sites = self._weights.sites(parameter)
            if all(engine.options(site.name) is None for site in sites):
                value = current if parameter in self._changed else None
                self.part.keep(self._weights, parameter, engine.row, value)
                continue
            for site in sites:
                if engine.options(site.name) is None:
                    self.part.keep_site(self._weights, site)
                else:
                    engine.compress(site.name, scaled.get(site.name, ()))
                self.part.ledger.append(engine.row(site.name))
            self.part.join(sites)
        self.part.histograms += engine.histograms


def open_head(weights: Weights, site: LayerSite, weight: Tensor, part: Part) -> OpenBlock:
    """The output head `site` by itself, with `weight` (out, in) for its own."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight.to(weights.device), requires_grad=False)
    return OpenBlock(weights, holder, f"{site.name}.", part)
