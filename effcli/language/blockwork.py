"""What happens to one open block: fold scales, compress its layers, collect tensors and ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
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
from effcli.layers.contract import Apply, Group, Layer, Needs, ScalingPass, Statistics, carry_out
from effcli.layers.layer import LayerSite
from effcli.layers.result import MATRIX, dense_row, histogram, layer_row, ratio
from effcli.layers.selection import Choice
from effcli.reports.report import Histogram, LedgerRow, Record


@dataclass
class Part:
    """What a block becomes on disk: its tensors, how its layers are stored, its share of the ledger."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    ledger: list[LedgerRow] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def keep(self, weights: Weights, key: str, choices: Mapping[str, Choice], value: Tensor | None = None) -> None:
        """Carry a parameter over: as it stands in the file, packed or dense, or with a new `value` of its dtype."""
        dtype = weights.dtype_of(key)
        sites = weights.sites(key)
        packed = [site for site in sites if site.name in weights.stored]
        if not packed:
            # Integer buffers keep their dtype; floating values return to the one they had in the file.
            self.tensors[key] = weights.parameter(key) if value is None else value.to(dtype).contiguous()
        for site in sites:
            if packed:
                self.keep_site(weights, site, choices)
            else:
                self.ledger.append(kept_row(weights, site, self.stored, dtype, choices[site.name].reason))
        if not sites and self.tensors[key].ndim > 1:
            shape = tuple(self.tensors[key].shape)
            self.ledger.append(dense_row(key, "embedding", shape, dtype, MATRIX))

    def keep_site(self, weights: Weights, site: LayerSite, choices: Mapping[str, Choice]) -> None:
        """Carry one layer over on its own, as where others of its parameter are packed."""
        if site.name in weights.stored:
            self.tensors.update({f"{site.name}.{suffix}": t for suffix, t in weights.raw(site.name).items()})
            self.stored[site.name] = weights.stored[site.name]
        else:
            partly = any(other.name in weights.stored for other in weights.sites(site.parameter))
            dense = weights.dense_matrix(site) if partly else site.view(weights.parameter(site.parameter))
            self.tensors[f"{site.name}.weight"] = dense.contiguous()
        dtype = weights.dtype_of(site.parameter)
        self.ledger.append(kept_row(weights, site, self.stored, dtype, choices[site.name].reason))

    def to_json(self) -> dict[str, Any]:
        return {
            "stored": {name: item.to_json() for name, item in self.stored.items()},
            "ledger": [row.model_dump(mode="json") for row in self.ledger],
            "histograms": [item.model_dump(mode="json") for item in self.histograms],
            "remarks": self.remarks,
        }


class PartRecord(Record):
    """A part without its tensors, as the journal keeps it."""

    stored: dict[str, StoredLayer]
    ledger: tuple[LedgerRow, ...]
    histograms: tuple[Histogram, ...]
    remarks: tuple[str, ...]

    def read(self) -> Part:
        stored = {name: layer.stored() for name, layer in self.stored.items()}
        return Part({}, stored, list(self.ledger), list(self.histograms), list(self.remarks))


class BlockWork:
    """Compresses the layers of one open block.

    Scales that are folded into layers this pass compresses are not written into their weights: they are kept in
    float32 beside them and applied when the layer is quantized, so that folding adds no rounding.
    """

    def __init__(
        self,
        weights: Weights,
        block: nn.Module,
        name: str,
        sites: Sequence[LayerSite],
        choices: Mapping[str, Choice],
        apply: Apply = carry_out,
    ) -> None:
        """apply: hands a layer to its pass, by default `carry_out`."""
        self.weights = weights
        self.apply = apply
        self.block = block
        self.prefix = name + "." if name else ""
        self.sites = {site.name: site for site in sites}
        self.choices = choices
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.explicit: dict[str, Tensor] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self.reasons: dict[str, str] = {}
        self.changed: set[str] = set()

    def compress(self, shared: Sequence[SharedInput], grams: Mapping[str, Statistics]) -> Part:
        """Fold what is to be folded, then compress every chosen layer."""
        for name, gram in grams.items():
            if gram.tokens == 0:
                self.reasons[name] = "no calibration token reached it: rounded without activations"
        for item in shared:
            self._scale(item, grams)
        part = Part()
        for key, current in self.block.state_dict().items():
            parameter = self.prefix + key
            sites = [site for site in self.weights.sites(parameter) if self._config(site.name) is not None]
            if not sites:
                value = current if parameter in self.changed else None
                part.keep(self.weights, parameter, self.choices, value)
                continue
            tensor = self.block.get_parameter(key)
            for site in self.weights.sites(parameter):
                if self._config(site.name) is None:
                    part.keep_site(self.weights, site, self.choices)
                else:
                    self.quantize(part, site, tensor, grams.get(site.name))
            self._join(part, parameter)
        return part

    def _join(self, part: Part, parameter: str) -> None:
        """Make one tensor again of a stack of experts none of which is packed."""
        sites = self.weights.sites(parameter)
        if sites[0].index is not None and not any(site.name in part.stored for site in sites):
            matrices = [part.tensors.pop(f"{site.name}.weight") for site in sites]
            part.tensors[parameter] = torch.stack([m.t() if sites[0].transposed else m for m in matrices])

    def _config(self, name: str) -> Any:
        choice = self.choices.get(name)
        return None if choice is None else choice.config

    def _scale(self, item: SharedInput, grams: Mapping[str, Statistics]) -> None:
        """Find the scale of one shared input and fold it, or say why not."""
        members = [self.sites[self.prefix + n] for n in item.consumers if self.prefix + n in self.sites]
        chosen = [s for s in members if isinstance(self._config(s.name), ScalingPass) and s.name in grams]
        if not chosen:
            return
        gram = grams[chosen[0].name]
        if gram.tokens == 0:
            return
        producer, reason = item.producer, item.reason
        if producer is not None:
            reason = self._obstacle(item, members, chosen)
        options = tuple(self._config(site.name) for site in chosen)
        explicit = bool(reason) and any(own.without_scale == "explicit" for own in options)
        if reason and not explicit:
            self._explain(chosen, f"unscaled: {reason}")
            return
        layers = tuple(self._layer(site, site.view(self._tensor(site))) for site in chosen)
        group = Group(layers, options, None if explicit or producer is None else producer.channel)
        scale, notes = options[0].scale(group, gram)
        if bool((scale == 1).all()):
            self._note(chosen, notes)
            return
        if explicit or producer is None:
            scale = scale.to(layers[0].dtype).float()
            for site in chosen:
                self.columns[site.name] = self.explicit[site.name] = scale
            self._explain(chosen, f"its scale stays explicit on its input: {reason}")
            self._note(chosen, notes)
            return
        if producer.how == "rows":
            name = self.prefix + producer.name
            factors = output_factors(producer, scale)
            self.rows[name] = self.rows.get(name, torch.ones_like(factors)) * factors
            changed = divide_bias(self.block, producer.name, factors)
        else:
            scale = divide_norm(self.block, producer, scale)
            norm = self.block.get_submodule(producer.name)
            changed = [f"{producer.name}.{own}" for own, _ in norm.named_parameters()]
        self.changed.update(self.prefix + key for key in changed)
        for site in chosen:
            self.columns[site.name] = scale
        self._scale_other_readers(item, scale)
        self._note(chosen, {**notes, "folded_into": producer.name})

    def _scale_other_readers(self, item: SharedInput, scale: Tensor) -> None:
        """Matrices that read the input and are no layers (a router) must follow the scale."""
        others = [name for name in item.consumers if self.prefix + name not in self.sites]
        matrices = {site.name: site for site in weights_with_inputs(self.block)}
        for name in others:
            scale_columns(self.block, matrices[name], scale)
            self.changed.add(self.prefix + matrices[name].parameter)

    def _obstacle(self, item: SharedInput, members: Sequence[LayerSite], chosen: Sequence[LayerSite]) -> str:
        """Why a pair that exists must not be used by this request; empty when it may."""
        left_out = [site.name for site in members if site not in chosen]
        if left_out:
            return f"{left_out[0]} reads the same input and is left alone"
        assert item.producer is not None
        name = self.prefix + item.producer.name
        if item.producer.how == "rows" and self._config(name) is None:
            return f"{name}, which produces its input, is left alone"
        return ""

    def _tensor(self, site: LayerSite) -> Tensor:
        return self.block.get_parameter(site.parameter.removeprefix(self.prefix))

    def _layer(self, site: LayerSite, weight: Tensor) -> Layer:
        return Layer(site.name, site.kind, weight.float(), self._scale_dtype(site))

    def _scale_dtype(self, site: LayerSite) -> torch.dtype:
        return self.weights.dtype_of(site.parameter)

    def _explain(self, sites: Sequence[LayerSite], reason: str) -> None:
        self.reasons.update({site.name: reason for site in sites})

    def _note(self, sites: Sequence[LayerSite], notes: Mapping[str, Any]) -> None:
        for site in sites:
            self.notes.setdefault(site.name, {}).update(notes)

    def _rescaled(self, gram: Statistics, columns: Tensor) -> Statistics:
        """The Gram matrix of the scaled input, one object for all layers that read it."""
        scaled = gram.remember("rescaled", lambda: (columns, gram.rescaled(columns)))
        return scaled[1] if scaled[0] is columns else gram.rescaled(columns)

    def quantize(self, part: Part, site: LayerSite, parameter: Tensor, gram: Statistics | None) -> None:
        """Hand one layer to the pass, store the outcome in `part` and in `parameter`."""
        config = self._config(site.name)
        original = site.view(parameter).float()
        columns, rows = self.columns.get(site.name), self.rows.get(site.name)
        explicit = self.explicit.get(site.name)
        scaled = original if columns is None else original * columns
        scaled = scaled if rows is None else scaled / rows.unsqueeze(1)
        layer = Layer(site.name, site.kind, scaled.contiguous(), self._scale_dtype(site))
        seen = gram if gram is None or columns is None else self._rescaled(gram, columns)
        outcome = self.apply(config, layer, () if seen is None else (seen,))
        weight = outcome.weight
        if isinstance(weight, Quantized):
            if explicit is not None:
                weight = weight.with_input_scale(explicit.to(layer.dtype))
            restored = weight.dequantize(torch.float32)
            part.stored[site.name] = Stored(weight.format, site.kind, explicit is not None)
            tensors = {f"{site.name}.{suffix}": tensor for suffix, tensor in weight.pack().items()}
            format = str(weight.format)
        else:
            restored = weight.float()
            # A dense weight takes an explicit scale into itself.
            dense = (restored if explicit is None else restored / explicit).to(layer.dtype)
            tensors = {f"{site.name}.weight": dense.t().contiguous() if site.kind == "conv1d" else dense}
            format = str(Dense(layer.dtype))
        part.tensors.update(tensors)
        difference = restored - scaled
        difference = difference if rows is None else difference * rows.unsqueeze(1)
        difference = difference if columns is None else difference / columns
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        part.ledger.append(
            layer_row(
                site,
                format,
                nbytes,
                "compressed" if isinstance(weight, Quantized) else "changed",
                reason=self.reasons.get(site.name, ""),
                weight_error=ratio(float(difference.square().sum()), float(original.square().sum())),
                output_error=None
                if gram is None or gram.tokens == 0 or Needs.GRAM not in gram.needs
                else ratio(gram.output_energy(difference), gram.output_energy(original, quick=True)),
                notes={**self.notes.get(site.name, {}), **outcome.notes},
            )
        )
        part.histograms.append(histogram(site.name, original, original + difference))
        # What later blocks see: a folded scale is undone by the producer, an explicit one by the layer itself.
        site.view(parameter).copy_(restored if explicit is None else restored / explicit)


def kept_row(
    weights: Weights, site: LayerSite, stored: Mapping[str, Stored], dtype: torch.dtype, reason: str
) -> LedgerRow:
    """The ledger's line for a layer that was left as it was."""
    if site.name in stored:
        nbytes = weights.packed_bytes(site.name)
        return layer_row(site, str(stored[site.name].format), nbytes, "kept", reason=reason)
    return dense_row(site.name, site.kind, site.shape, dtype, reason)
