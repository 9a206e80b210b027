"""A pass that trains, carried out on a language model: layers attached, the loop run, the trained weights written.

The network is in memory as a whole, in float32; layers that an earlier pass compressed run dense and stay as they are.
What is written is rounded once, to the dtype that each parameter had.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effcli.errors import DataError, NumericsError, UnfinishedError, UnsupportedError, behind, writing
from effcli.formats import Mask, Quantized, SparseWeight
from effcli.inputs.text import Windows
from effcli.language.editing import edit_model
from effcli.language.loading import load
from effcli.language.weights import Weights, open_weights
from effcli.layers.attaching import AttachedLayers, anew_if_damaged, told, training_key
from effcli.layers.contract import AttachPass, Layer, Needs, ParameterPass, TrainPass, finished
from effcli.layers.edits import Edit, Place
from effcli.layers.layer import LayerSite
from effcli.layers.result import PassResult, Progress
from effcli.layers.returned import Asked
from effcli.layers.selection import choose
from effcli.platform.rehearsal import cannot_tell
from effcli.reports.units import count
from effcli.run.recipe import PassStep
from effcli.training.loop import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The label of a token that is not learned.
_UNLEARNED = -100


@dataclass(frozen=True)
class TokenExamples:
    """Windows of text to learn from, tokens from those before them in a window.

    windows: token ids int64 (windows, length); learned: bool (windows, length), which of them are learned, at least one
    of each window; the first never is. None of all others.
    """

    windows: Tensor
    learned: Tensor | None = None
    # A label of each input there is not: those of `batches` are of each token.
    labels: None = None

    @staticmethod
    def of(windows: Windows, answers: bool) -> tuple[TokenExamples, list[str]]:
        """What there is to learn, and remarks; answers: of documents with prompts these alone.

        Raises `DataError` for text without any answer.
        """
        every = torch.cat(windows.batches)
        if windows.answers is None or not answers:
            return TokenExamples(every), []
        learned = torch.cat(windows.answers).clone()
        learned[:, 0] = False
        kept = learned.any(dim=1)
        if not bool(kept.any()):
            raise DataError("no window of the text holds a token that answers", "give answers, or learn all tokens")
        told = []
        if not bool(kept.all()):
            told.append(f"{int((~kept).sum())} of {count(len(kept), 'window')} hold no token that answers: left out")
        every, learned = every[kept], learned[kept]
        if not bool(learned[:, 1:].all()):
            share = float(learned[:, 1:].double().mean())
            told.append(f"learned are the answers alone, {share:.0%} of the tokens: learned=all takes prompts, too")
        return TokenExamples(every, learned), told

    def __len__(self) -> int:
        return len(self.windows)

    def batches(self, size: int, order: NDArray[np.int64] | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Windows int64 (at most `size`, length), and each token's label in their shape, -100 where none is learned."""
        rows = torch.arange(len(self)) if order is None else torch.from_numpy(order)
        for chosen in torch.split(rows, size):
            windows = self.windows[chosen]
            yield windows, windows if self.learned is None else windows.masked_fill(~self.learned[chosen], _UNLEARNED)


class TokenNetwork:
    """A causal language model in training. See `effcli.layers.learning.Learner`."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model

    def run(self, batch: Batch) -> Tensor:
        """Logits float32 (tokens that are learned, vocabulary)."""
        logits: Tensor = self.module(input_ids=batch.inputs, use_cache=False).logits
        logits = logits[:, :-1].flatten(0, 1)
        learned = _learned(batch)
        return (logits if bool(learned.all()) else logits[learned]).float()

    def labels(self, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return batch.labels[:, 1:].flatten()[_learned(batch)]


def _learned(batch: Batch) -> Tensor:
    """Which tokens but the first of each window are learned, bool (windows · (length - 1),)."""
    assert batch.labels is not None
    return batch.labels[:, 1:].flatten() != _UNLEARNED


@contextmanager
def recomputing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Have blocks keep their inputs alone, and compute what is in them once more on the way back."""
    blocks = list(blocks)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@dataclass(frozen=True)
class TrainingRequest:
    """A step that trains a language model; see `train_language`."""

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

    def seeded(self) -> TrainPass:
        """The options of the step, with a seed."""
        options = self.step.config
        assert isinstance(options, TrainPass)
        return options if options.seed is not None else options.model_copy(update={"seed": self.seed})

    def load(self, path: Path, packed: bool = False) -> PreTrainedModel:
        """A checkpoint in float32 that is not trained."""
        model = load(path, trust_remote_code=self.trust_remote_code, packed=packed, dtype="float32")
        return model.requires_grad_(False)

    def recomputing(self, model: nn.Module, weights: Weights) -> AbstractContextManager[None]:
        """A context in which the blocks of `model` are computed again on the way back, if the options say so."""
        wanted = self.seeded().recomputes
        return recomputing(map(model.get_submodule, weights.skeleton.block_names) if wanted else ())

    def how(self, data: TokenExamples) -> dict[str, Any]:
        """What `loop.train` is told besides what is trained."""
        seed, answers = self.seeded().seed, None if data.learned is None else int(data.learned.sum())
        return {
            "batch_size": self.batch_size,
            "device": self.device,
            "folder": self.work / "training",
            "key": training_key(self.source, self.step, [*data.windows.shape, self.batch_size, seed, answers]),
            "progress": self.progress,
        }


def train_weights(request: TrainingRequest) -> PassResult:
    """Carry out a step that trains the weights of layers; see `train_language`.

    Raises `UnfinishedError` for a snapshot that is damaged.
    """
    step, options = request.step, request.seeded()
    assert isinstance(options, AttachPass)
    weights = open_weights(request.source, request.trust_remote_code)
    choices = choose(weights.skeleton, step)
    chosen = {name: choice.config for name, choice in choices.items() if choice.config is not None}
    check_trainable(step.name, weights, chosen)
    sites = {site.name: site for site in weights.skeleton.sites() if site.name in chosen and site.index is None}
    stacked = [name for name in chosen if name not in sites]
    if not sites:
        raise UnsupportedError(f"{step.name} would train experts in stacks alone", "take in other layers")
    data, remarks = TokenExamples.of(request.windows, options.learns_answers)
    model = request.load(request.source)
    network = _TrainedModel(weights, model)
    teachers = {}
    if Needs.ORIGINAL in options.needs:
        teachers["original"] = _TrainedModel(weights, request.load(request.original))
    attached = AttachedLayers(step.name, network, options, teachers)
    with request.recomputing(model, weights):
        training = attached.train(sites, chosen, data, **request.how(data))
    values = _values(step.name, network, attached) if training.kept else {}
    filled = _filled(weights, {name: site for name, site in sites.items() if name in values}, values)
    left = attached.remarks
    made = Trained(ignore=options.ignore)
    made.keep(values)
    del model, network, teachers, attached
    result = _written(request, made)
    if left:
        remarks.append(f"{left[0]}{and_more(left, 'layer')}")
    if stacked:
        remarks.append(f"{stacked[0]}{and_more(stacked, 'expert')} of stacks stay as they are")
    if filled:
        names = list(filled)
        zeros = count(sum(filled.values()), "weight")
        remarks.append(f"{step.name} filled {zeros} of value zero, in {names[0]}{and_more(names, 'layer')}")
    result.remarks += [*remarks, told(training, options, changed=bool(values))]
    result.training = training
    return result


def and_more(names: Sequence[str], what: str) -> str:
    """How many names there are behind the first one, in brackets; empty where there is none."""
    return f" (and {count(len(names) - 1, f'more {what}')})" if len(names) > 1 else ""


def _written(request: TrainingRequest, made: Trained) -> PassResult:
    """What `edit_model` returns. What it left unfinished is thrown away where it is damaged; the training stays."""
    step, work = PassStep(name=request.step.name, config=made), request.work / "written"
    try:
        return edit_model(request.source, request.target, step, work, trust_remote_code=request.trust_remote_code)
    except UnfinishedError as error:
        failure = behind(error)
        if failure is not None:
            raise failure from error
    with writing(work):
        shutil.rmtree(work)
    return edit_model(request.source, request.target, step, work, trust_remote_code=request.trust_remote_code)


def _values(step: str, network: _TrainedModel, attached: AttachedLayers) -> dict[str, Tensor]:
    """The new values of layers, float32 (out, in), and of their biases, by their places."""
    values: dict[str, Tensor] = {}
    for name, (site, own, module) in attached.layers.items():
        bias = network.layer(name).bias
        if bias is not None and own.trains_biases:
            values[f"{name}.bias"] = bias.detach()
        if not own.trains_weights and not any(True for _ in module.parameters()):
            continue
        layer = network.read(site)
        outcome = finished(own, layer, module)
        if isinstance(outcome.weight, Quantized) or outcome.mask is not None:
            raise UnsupportedError(
                f"{step} leaves {name} compressed or with new zeros, which networks read as a graph take",
                "train the dense network, and compress it in a later step",
            )
        Asked(own, "finish", name).check_finite(outcome.weight)
        values[name] = outcome.weight.detach()
    broken = next((name for name, value in values.items() if not bool(value.isfinite().all())), None)
    if broken is not None:
        raise NumericsError(f"{broken} is NaN or infinite after the training", "lower learning_rate, or set clip")
    return values


def _filled(weights: Weights, sites: Mapping[str, LayerSite], values: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights of value 0 that no pass before has removed have another one now, by layer."""
    found = {}
    for name, site in sites.items():
        if weights.mask(name) is None:
            filled = int(((site.view(weights.parameter(site.parameter)) == 0) & (values[name] != 0)).sum())
            found.update({name: filled} if filled else {})
    return found


def train_language(
    how: Callable[[TrainingRequest], PassResult],
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

    how: what trains, `train_weights` or `train_adapter`; windows: to learn from; batch_size: of the recipe, in windows;
    original: the checkpoint before the first pass; work: a folder for snapshots and what is unfinished, from which the
    same request goes on; seed: where the options have none. Raises `DataError` without windows, `UserError` where no
    layer can be trained, `UnsupportedError` for an output head that shares the embedding's weight, and what
    `loop.train` raises.
    """
    if windows is None:
        raise DataError(f"{step.name} trains on text", "give calibration data")
    request = TrainingRequest(
        source, target, step, windows, batch_size, original, work, seed, device, trust_remote_code, progress
    )
    cannot_tell("a step runs all blocks, forward and backward, and a part of them does not tell its time")
    return anew_if_damaged(step.name, work, lambda: how(request))


class Trained(ParameterPass):
    """Parameters with the values that a training gave them. What earlier passes removed stays removed."""

    untouched: ClassVar[str] = "it is not trained"

    _values: Mapping[str, Tensor] = PrivateAttr(default_factory=dict)

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """values: float32, by the names of places."""
        self._values = values

    @property
    def keeps_zeros(self) -> bool:
        return True

    def edits(self, places: Mapping[str, Place]) -> Mapping[str, Edit]:
        return {name: Edit(_to(value), guessed=False) for name, value in self._values.items()}


def _to(value: Tensor) -> Callable[[Tensor], Callable[[Tensor, slice], Tensor]]:
    return lambda old: lambda before, rows: value[rows].to(before.dtype)


class _TrainedModel(TokenNetwork):
    """See `effcli.layers.attaching.Trainable`."""

    def __init__(self, weights: Weights, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._weights = weights

    def layer(self, name: str) -> Any:
        return self.module.get_submodule(name)

    def mask(self, name: str) -> Mask | None:
        return self._weights.mask(name)

    def read(self, site: LayerSite) -> Layer:
        stored: Any = self._weights.packed(site.name)
        stored = stored.values if isinstance(stored, SparseWeight) else stored
        stored = None if stored is None or stored.format.floating else stored
        weight = site.view(self.layer(site.name).weight.detach()).contiguous()
        biased = self.layer(site.name).bias is not None
        return Layer(site.name, site.kind, weight, torch.float32, stored, self.mask(site.name), has_bias=biased)


def check_trainable(step: str, weights: Weights, chosen: Collection[str]) -> None:
    """Raise `UnsupportedError` where an output head is to be trained whose weight is the embedding's."""
    head = weights.skeleton.head
    if weights.skeleton.tied and head in chosen:
        raise UnsupportedError(
            f"{step} cannot train {head}, whose weight is the input embedding's", "leave `lm_head` out"
        )


__all__ = [
    "TokenExamples",
    "TokenNetwork",
    "Trained",
    "TrainingRequest",
    "and_more",
    "check_trainable",
    "recomputing",
    "train_language",
    "train_weights",
]
