"""A pass that trains, carried out on a language model: layers attached, the loop run, the trained weights written.

The network is in memory as a whole, in float32; layers that an earlier pass compressed run dense and stay as they are.
What is written is rounded once, to the dtype that each parameter had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PrivateAttr
from torch import Tensor, nn

from effcli.errors import DataError, NumericsError, UnsupportedError, UserError
from effcli.formats import Mask, Quantized, SparseWeight
from effcli.inputs.text import Windows
from effcli.language.editing import edit_model
from effcli.language.loading import load
from effcli.language.weights import Weights, open_weights
from effcli.layers.attaching import AttachedLayers, anew_if_damaged, told, training_key
from effcli.layers.contract import Layer, Needs, ParameterPass, TrainPass, finished
from effcli.layers.edits import Edit, Place
from effcli.layers.input_rounding import straight_through
from effcli.layers.layer import LayerSite
from effcli.layers.result import PassResult, Progress
from effcli.layers.returned import Asked
from effcli.layers.selection import choose
from effcli.platform.rehearsal import cannot_tell
from effcli.run.recipe import PassStep
from effcli.training import loop
from effcli.training.loop import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TokenExamples:
    """Windows of text to learn from, every token but the first of each from those before it.

    windows: token ids int64 (windows, length).
    """

    windows: Tensor

    @staticmethod
    def of(windows: Windows) -> TokenExamples:
        return TokenExamples(torch.cat(windows.batches))

    @property
    def labels(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.windows.numpy()
        return found

    def __len__(self) -> int:
        return len(self.windows)

    def batches(self, size: int, order: NDArray[np.int64] | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        rows = torch.arange(len(self)) if order is None else torch.from_numpy(order)
        for chosen in torch.split(rows, size):
            yield self.windows[chosen], self.windows[chosen]


@dataclass(frozen=True)
class _Request:
    """A step that trains; see `train_language`."""

    source: Path
    target: Path
    step: PassStep
    windows: Windows
    batch_size: int
    original: Path
    work: Path
    seed: int
    device: str
    trust_remote_code: bool
    progress: Progress

    def carry_out(self) -> PassResult:
        """Raises `UnfinishedError` for a snapshot in `work` that is damaged."""
        cannot_tell("a step runs all blocks, forward and backward, and a part of them does not tell its time")
        options = self.step.config
        assert isinstance(options, TrainPass)
        if options.seed is None:
            options = options.model_copy(update={"seed": self.seed})
        weights = open_weights(self.source, self.trust_remote_code)
        choices = choose(weights.skeleton, self.step)
        chosen = {name: choice.config for name, choice in choices.items() if choice.config is not None}
        _check(self.step.name, weights, chosen)
        sites = {site.name: site for site in weights.skeleton.sites() if site.name in chosen and site.index is None}
        data = TokenExamples.of(self.windows)
        network = _TrainedModel(weights, self._load(self.source))
        teachers = {}
        if Needs.ORIGINAL in options.needs:
            teachers["original"] = _TrainedModel(weights, self._load(self.original))
        attached = AttachedLayers(network, options, teachers)
        values: dict[str, Tensor] = {}
        with loop.seeded(options.seed or 0), attached.to(sites, chosen), straight_through(network.module):
            if not attached.layers:
                raise UserError(f"{self.step.name} finds no layer with a {options.takes} to train", options.remedy)
            training = loop.train(
                attached.objective(),
                data,
                options,
                batch_size=self.batch_size,
                device=self.device,
                folder=self.work / "training",
                key=training_key(self.source, self.step, [*data.windows.shape, self.batch_size, options.seed]),
                progress=self.progress,
            )
        attached.set_training(False)
        if training.kept:
            values = self._values(network, attached)
        made = Trained(ignore=options.ignore)
        made.keep(values, any(weights.mask(name) is not None for name in values))
        left = attached.remarks
        del network, teachers, attached
        result = edit_model(
            self.source,
            self.target,
            PassStep(name=self.step.name, config=made),
            self.work / "written",
            trust_remote_code=self.trust_remote_code,
        )
        if left:
            more = f" (and {len(left) - 1} more layers)" if len(left) > 1 else ""
            result.remarks.append(f"{left[0]}{more}")
        stacked = [name for name in chosen if name not in sites]
        if stacked:
            result.remarks.append(f"{stacked[0]} and {len(stacked) - 1} more experts of stacks stay as they are")
        result.remarks.append(told(training, options, changed=bool(values)))
        result.training = training
        return result

    def _load(self, path: Path) -> PreTrainedModel:
        model = load(path, trust_remote_code=self.trust_remote_code, packed=False).float()
        return model.requires_grad_(False)

    def _values(self, network: _TrainedModel, attached: AttachedLayers) -> dict[str, Tensor]:
        """The new values of layers, float32 (out, in), and of their biases, by their places."""
        values: dict[str, Tensor] = {}
        for name, (site, own, module) in attached.layers.items():
            layer = network.read(site)
            outcome = finished(own, layer, module)
            if isinstance(outcome.weight, Quantized) or outcome.mask is not None:
                raise UnsupportedError(
                    f"{self.step.name} leaves {name} compressed or with new zeros, which networks read as a graph take",
                    "train the dense network, and compress it in a later step",
                )
            Asked(own, "finish", name).check_finite(outcome.weight)
            values[name] = outcome.weight.detach()
            bias = network.layer(name).bias
            if bias is not None and own.trains_biases:
                values[f"{name}.bias"] = bias.detach()
        broken = next((name for name, value in values.items() if not bool(value.isfinite().all())), None)
        if broken is not None:
            raise NumericsError(f"{broken} is NaN or infinite after the training", "lower learning_rate, or set clip")
        return values


def train_language(
    source: Path,
    target: Path,
    step: PassStep,
    windows: Windows | None,
    *,
    batch_size: int,
    original: Path,
    work: Path,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = lambda done, total: None,
) -> PassResult:
    """Carry out a step that trains on the checkpoint `source` and write `target`, a directory that exists.

    windows: to learn from; batch_size: of the recipe, in windows; original: the checkpoint before the first pass; work:
    a folder for snapshots and what is unfinished, from which the same request goes on; seed: where the options have
    none. Raises `DataError` without windows, `UserError` where no layer can be trained, `UnsupportedError` for an
    output head that shares the embedding's weight, and what `loop.train` raises.
    """
    if windows is None:
        raise DataError(f"{step.name} trains on text", "give calibration data")
    request = _Request(
        source, target, step, windows, batch_size, original, work, seed, device, trust_remote_code, progress
    )
    return anew_if_damaged(step.name, work, request.carry_out)


class Trained(ParameterPass):
    """Parameters with the values that a training gave them."""

    untouched: ClassVar[str] = "it is not trained"

    _values: Mapping[str, Tensor] = PrivateAttr(default_factory=dict)
    _masked: bool = PrivateAttr(default=False)

    def keep(self, values: Mapping[str, Tensor], masked: bool) -> None:
        """values: float32, by the names of places; masked: whether earlier passes removed weights of some."""
        self._values, self._masked = values, masked

    @property
    def keeps_zeros(self) -> bool:
        return self._masked

    def edits(self, places: Mapping[str, Place]) -> Mapping[str, Edit]:
        return {name: Edit(_to(value)) for name, value in self._values.items()}


def _to(value: Tensor) -> Callable[[Tensor], Callable[[Tensor, slice], Tensor]]:
    return lambda old: lambda before, rows: value[rows].to(before.dtype)


class _TrainedModel:
    """See `effcli.layers.attaching.Trainable`. Of a window every token but the first is learned."""

    def __init__(self, weights: Weights, model: PreTrainedModel) -> None:
        self._weights = weights
        self.module: nn.Module = model

    def layer(self, name: str) -> Any:
        return self.module.get_submodule(name)

    def mask(self, name: str) -> Mask | None:
        return self._weights.mask(name)

    def read(self, site: LayerSite) -> Layer:
        stored: Any = self._weights.packed(site.name)
        stored = stored.values if isinstance(stored, SparseWeight) else stored
        stored = None if stored is None or stored.format.floating else stored
        weight = site.view(self.layer(site.name).weight.detach()).contiguous()
        return Layer(site.name, site.kind, weight, torch.float32, stored, self.mask(site.name))

    def run(self, batch: Batch) -> Tensor:
        """Logits float32 (n · (length - 1), vocabulary)."""
        logits: Tensor = self.module(input_ids=batch.inputs, use_cache=False).logits
        return logits[:, :-1].float().flatten(0, 1)

    def labels(self, batch: Batch) -> Tensor | None:
        return None if batch.labels is None else batch.labels[:, 1:].flatten()


def _check(name: str, weights: Weights, chosen: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for an output head whose weight is the embedding's."""
    head = weights.skeleton.head
    if weights.skeleton.tied and head in chosen:
        raise UnsupportedError(
            f"{name} cannot train {head}, whose weight is the input embedding's", "leave `lm_head` out"
        )


__all__ = ["TokenExamples", "Trained", "train_language"]
