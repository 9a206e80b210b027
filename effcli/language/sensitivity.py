"""What changing each layer of a language model alone costs, by prediction or by measurement.

`gram` needs one forward of the calibration windows, `fisher` three and a backward: blocks are opened from the last to
the first, each runs again on its spooled inputs, and the gradient of its outputs goes on to the block before. The loss
is that of tokens drawn from the network's own predictions, so that the mean square of its slope along an error is the
Fisher information in that direction, which is the second derivative of the divergence from the original too. A window
with its tokens drawn once is one sample. `loss` puts one changed layer at a time into the network and runs all
windows to the end: KL(original ‖ this) per token. Of the output head, which needs no network behind it, both ways
measure that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effcli.errors import UnfinishedError
from effcli.inputs.text import Windows
from effcli.language.backward import Backward, GradientStream
from effcli.language.coupling import coupled
from effcli.language.cutting import look_at
from effcli.language.evaluate import kl
from effcli.language.forward import logits
from effcli.language.spool import Spool
from effcli.language.trials import Trials, log_probabilities
from effcli.language.weights import open_weights
from effcli.layers.contract import Members
from effcli.layers.coupling import Coupled
from effcli.layers.cutting import Offered
from effcli.layers.result import Progress, check_finite
from effcli.layers.selection import Choice, choose
from effcli.platform.rehearsal import cannot_tell
from effcli.reports.sensitivity import Unit, Way
from effcli.search.costs import Cost, Slopes, Trial, steadied
from effcli.search.journal import SearchJournal

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep

_SEED = 0
# Samples of the gradient, in all windows together, that bring a layer's cost within about a fifth of its mean.
_SAMPLES = 64


def layer_costs(
    path: Path,
    variants: Sequence[Mapping[str, Choice]],
    windows: Windows,
    work: Path,
    way: Way,
    progress: Progress = lambda done, total: None,
    trust_remote_code: bool = False,
    journal: SearchJournal | None = None,
) -> list[dict[str, Cost]]:
    """The cost of each layer that `variants` choose, one mapping by name for each variant.

    variants: every layer with its options, such as other bits in each variant; work: a folder for
    hidden states, those behind every block at once unless `way` is gram, which must be the same for a second try with
    one `journal`. Calibration windows always see the original network.
    """
    weights = open_weights(path, trust_remote_code)
    if way != "gram":
        # A small change of one layer must not drown in the rounding of all that follow; and many CPUs are far slower
        # at backward products of half precision.
        weights.skeleton.dtype = torch.float32
    with GradientStream(weights, with_head=True) as stream:
        check_finite(weights.skeleton.model, "")
        return _WAYS[way](stream, variants, windows, work, progress, journal).carry_out()


class PricedLanguageModel:
    """See `effcli.run.network.Priced`."""

    unit: Unit = "nats"

    def __init__(self, source: Path, windows: Windows, remarks: tuple[str, ...], trust_remote_code: bool) -> None:
        opened = open_weights(source, trust_remote_code)
        self.weights = opened.skeleton.weights()
        self.samples = sum(len(batch) for batch in windows.batches)
        self.inputs = sum(batch.numel() for batch in windows.batches)
        self.remarks = remarks
        self._source = source
        self._windows = windows
        self._trust = trust_remote_code
        self._opened, self._skeleton = opened, opened.skeleton
        self.macs: Mapping[str, int] = {site.name: site.rows * site.columns for site in opened.skeleton.sites()}

    def choose(self, step: PassStep) -> dict[str, Choice]:
        return choose(self._skeleton, step)

    def itemsize(self, choice: Choice) -> int:
        return self._opened.dtype_of(choice.site.parameter).itemsize

    def coupled(self) -> Sequence[Coupled]:
        return coupled(self._opened)

    def look_at(self, offered: Offered, folder: Path) -> Members:
        return look_at(self._source, self._opened, offered, self._windows.batches, folder)

    def extent(self, parameter: str) -> tuple[int, int]:
        count = self._skeleton.model.state_dict()[parameter].numel()
        return count, count * self._opened.dtype_of(parameter).itemsize

    def costs(
        self,
        variants: Sequence[Mapping[str, Choice]],
        way: Way,
        work: Path,
        progress: Progress,
        journal: SearchJournal | None,
    ) -> list[dict[str, Cost]]:
        return layer_costs(self._source, variants, self._windows, work, way, progress, self._trust, journal)


class _OutputError(Trials):
    """The relative squared error of the layer's outputs, which the Gram matrix of its inputs tells."""

    measures = False

    def price(self, k: int, trials: Sequence[Mapping[str, Trial]]) -> None:
        for costs, made in zip(self.costs, trials, strict=True):
            costs.update({name: trial.costing(trial.output_error) for name, trial in made.items()})


class _Fisher(Trials):
    """Half the mean squared slope of the loss along the layer's error."""

    single = True

    def take_blocks(self) -> None:
        super().take_blocks()
        self.costs = steadied(self.costs, 2 / (self.draws * max(len(self.measured), 1)))

    @property
    def draws(self) -> int:
        """How often the tokens of each measured window are drawn."""
        return -(-_SAMPLES // max(len(self.measured), 1))

    @property
    def order(self) -> Sequence[int]:
        """From the last to the first, as gradients go."""
        return range(self.count)[::-1]

    def start(self, done: int) -> None:
        super().start(done)
        windows = {number: self.batches[number] for number in self.measured}
        self._backward = Backward(self.stream, windows, self.hidden, self.work, self.draws)
        if not done:
            self._backward.begin(_Drawn(self.draws))
        elif done < self.count and not self._backward.behind(self.order[done]).whole():
            raise UnfinishedError(f"{self._backward.behind(self.order[done]).file} is not whole")

    def pricing(self, k: int) -> int:
        return len(self.measured)

    def price(self, k: int, trials: Sequence[Mapping[str, Trial]]) -> None:
        """Take the losses back through block k; takes the slope of each along every trial's error."""
        with self.opened(k):
            weights = self.block_weights(k)
            with torch.inference_mode():
                slopes = {name: Slopes([_error(found[name], weights[name]) for found in trials]) for name in trials[0]}
            self._backward.through(k, self._taken(self.skeleton.block_layers(k)), slopes, self.tick)
        if self.journal is not None and self.measured:
            self._backward.behind(k - 1).sync()
        for name, each in slopes.items():
            for costs, made, total in zip(self.costs, trials, each.squares, strict=True):
                costs[name] = made[name].costing(0.5 * total / (self.draws * self.tokens))


class _Drawn:
    """The losses of tokens drawn from the network's own predictions."""

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self._generator = torch.Generator().manual_seed(_SEED)

    def __call__(self, number: int, logits: Tensor, part: slice) -> Iterator[Tensor]:
        predicted = torch.softmax(logits.float(), dim=-1)
        drawn = torch.multinomial(predicted, self.draws, replacement=True, generator=self._generator)
        for tokens in drawn.unbind(1):
            # The gradient of -log p at the logits: the prediction less the token.
            predicted.scatter_add_(1, tokens[:, None], torch.full_like(predicted[:, :1], -1))
            yield predicted
            predicted.scatter_add_(1, tokens[:, None], torch.ones_like(predicted[:, :1]))


class _Loss(Trials):
    """How far the predictions move with this layer changed and all others as they are."""

    def pricing(self, k: int) -> int:
        """One for each block that the trials run through, and one for the head."""
        return self.count - k + 1

    def price(self, k: int, trials: Sequence[Mapping[str, Trial]]) -> None:
        """Put each trial of block k into the network by itself and run the measured windows to the end."""
        cannot_tell("each layer is tried in all blocks behind it")
        entries = [
            (costs, name, trial) for costs, made in zip(self.costs, trials, strict=True) for name, trial in made.items()
        ]
        size = len(self.measured)
        shapes = [self.shapes[number] for number in self.measured]
        spool = Spool(self.work / "trials.bin", shapes * len(entries), self.skeleton.dtype)
        incoming, last = self.hidden(k), self.hidden(self.count)
        with self.opened(k), torch.inference_mode():
            weights = self.block_weights(k)
            for number, (_, name, trial) in enumerate(entries):
                bias = None if trial.shift is None else self.bias(k, name)
                with _with_trial(weights[name], bias, trial):
                    for at, batch in enumerate(self.measured):
                        hidden = incoming.read(batch)
                        spool.write(number * size + at, self.stream.through(k, hidden, self.call(k, batch)))
        self.tick()
        for j in range(k + 1, self.count):
            with self.opened(j), torch.inference_mode():
                for at, hidden in enumerate(spool):
                    batch = self.measured[at % size]
                    spool.write(at, self.stream.through(j, hidden, self.call(j, batch)))
            self.tick()
        sums = [0.0] * len(entries)
        with torch.inference_mode():
            for at, batch in enumerate(self.measured):
                unchanged = last.read(batch).flatten(0, 1)
                for part in self.parts(batch):
                    original = log_probabilities(logits(self.stream, unchanged[part]))
                    for number in range(len(entries)):
                        hidden = spool.read(number * size + at).flatten(0, 1)[part]
                        sums[number] += kl(original, log_probabilities(logits(self.stream, hidden)))
        self.tick()
        spool.remove()
        for (costs, name, trial), total in zip(entries, sums, strict=True):
            costs[name] = trial.costing(total / self.tokens)


@contextmanager
def _with_trial(weight: Tensor, bias: Tensor | None, trial: Trial) -> Iterator[None]:
    """A layer that has the weight of a trial in between; bias: of the layer, where the trial shifts it."""
    changed = [weight] if bias is None else [weight, bias]
    before = [own.clone() for own in changed]
    assert trial.weight is not None
    weight.copy_(trial.weight)
    if bias is not None and trial.shift is not None:
        bias.add_(trial.shift)
    yield
    for own, value in zip(changed, before, strict=True):
        own.copy_(value)


def _error(trial: Trial, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """How far the trial moves the weight and the bias; takes the place of the trial's own, for a block's are many."""
    assert trial.weight is not None
    return trial.weight.sub_(weight), trial.shift


_WAYS: dict[Way, type[Trials]] = {"gram": _OutputError, "fisher": _Fisher, "loss": _Loss}

__all__ = ["PricedLanguageModel", "layer_costs"]
