"""A network of either kind in training: its layers run with the weights that a pass makes of their own."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effcli.errors import UnfinishedError, UserError, behind, writing
from effcli.files.digest import of_folder
from effcli.formats import Mask
from effcli.layers.contract import Attached, AttachPass, Layer, Pass, TrainPass
from effcli.layers.input_rounding import straight_through
from effcli.layers.layer import LayerSite
from effcli.layers.learning import Learner, Learning
from effcli.layers.result import PassResult
from effcli.layers.returned import Asked, described
from effcli.reports.report import Training
from effcli.reports.units import count
from effcli.training import loop
from effcli.training.loop import Examples, Objective

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep

# An error that changes by less than this share between two measurements has settled.
_SETTLED = 0.01


class Trainable(Learner, Protocol):
    """A network in memory whose layers can be trained."""

    def layer(self, name: str) -> Any:
        """The module that has the weight of a layer, and its bias or None."""

    def mask(self, name: str) -> Mask | None:
        """What earlier passes kept of a layer."""

    def read(self, site: LayerSite) -> Layer:
        """A layer as a pass sees it."""


class AttachedLayers:
    """A network whose layers run with the weights that a pass makes of their own.

    name: of the pass; layers: by name the site, the options, and what they attach; remarks: why other chosen layers
    stay as they are.
    """

    def __init__(self, name: str, network: Trainable, options: AttachPass, teachers: Mapping[str, Trainable]) -> None:
        self.name = name
        self.network = network
        self.options = options
        self.learning = Learning(network, options, teachers, self.set_training)
        self.layers: dict[str, tuple[LayerSite, AttachPass, nn.Module]] = {}
        self.remarks: list[str] = []

    def train(self, sites: Mapping[str, LayerSite], chosen: Mapping[str, Pass], data: Examples, **how: Any) -> Training:
        """Train the layers `sites`, by name, whose options are `chosen`; how: what `loop.train` is told besides.

        Raises `UserError` where no layer can be trained, and what `loop.train` raises.
        """
        with loop.seeded(self.options.seed or 0), self._attached(sites, chosen), straight_through(self.network.module):
            if not self.layers:
                raise UserError(f"{self.name} finds no layer with a {self.options.takes} to train", self.options.remedy)
            training = loop.train(self._objective(), data, self.options, **how)
        self.set_training(False)
        return training

    @contextmanager
    def _attached(self, sites: Mapping[str, LayerSite], chosen: Mapping[str, Pass]) -> Iterator[None]:
        """Attach to the layers; afterwards they are as they were, but for what was trained of them."""
        try:
            for name, site in sites.items():
                own = chosen[name]
                assert isinstance(own, AttachPass)
                asked = Asked(own, "attach", name)
                module = asked.expect(own.attach(self.network.read(site)), nn.Module | None, "a module, or None")
                if module is None:
                    self.remarks.append(f"{name} stays as it is: it has no {self.options.takes}")
                    continue
                layer = self.network.layer(name)
                mask = self.network.mask(name)
                kept = None if mask is None else mask.kept
                parametrize.register_parametrization(layer, "weight", _Matrix(module, site, kept, asked))
                layer.parametrizations.weight.original.requires_grad_(own.trains_weights)
                if layer.bias is not None:
                    layer.bias.requires_grad_(own.trains_biases)
                self.layers[name] = site, own, module
            yield
        finally:
            for name in self.layers:
                layer = self.network.layer(name)
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
                for parameter in layer.parameters():
                    parameter.requires_grad_(False)

    def _objective(self) -> Objective:
        parameters = {
            name: [own for own in self.network.layer(name).parameters() if own.requires_grad] for name in self.layers
        }
        return self.learning.objective(self.options.optimizer(parameters), self._advance, self.options.counts)

    def _advance(self, progress: float) -> bool:
        attached = {}
        for name, (site, _, module) in self.layers.items():
            layer: Any = self.network.layer(name)
            weight = site.view(layer.parametrizations.weight.original.detach())
            attached[name] = Attached(module, weight, None if layer.bias is None else layer.bias.detach())
        with torch.no_grad():
            made = self.options.advance(attached, progress)
        return Asked(self.options, "advance").expect(made, bool, "True or False")

    def set_training(self, training: bool) -> None:
        """Whether what is attached runs as in training; see `Learning`."""
        for _, _, module in self.layers.values():
            module.train(training)


class _Matrix(nn.Module):
    """The weight that runs, in the shape of the layer's parameter, made by a module that takes matrices (out, in).

    kept: bool (out, in), which weights an earlier pass kept; the others stay 0. None where it removed nothing. asked:
    whose module it is.
    """

    kept: Tensor | None

    def __init__(self, inner: nn.Module, site: LayerSite, kept: Tensor | None, asked: Asked) -> None:
        super().__init__()
        self.inner = inner
        self.site = site
        self.asked = asked
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        made: Any = self.inner(self.site.view(weight))
        shape = self.site.shape
        if not isinstance(made, Tensor) or not made.is_floating_point() or tuple(made.shape) != shape:
            self.asked.refuse(f"a module that gives {described(made)}", f"one that gives a floating weight {shape}")
        if self.kept is not None:
            made = made.masked_fill(~self.kept, 0)
        found: Tensor = made.t() if self.site.transposed else made.view(weight.shape)
        return found


def told(training: Training, options: TrainPass, changed: bool, what: str = "the weights") -> str:
    """What a training came to, and what to change where it ended too soon; changed: whether any of `what` did."""
    (_, first), *_, (_, last) = training.errors
    # A rehearsal does not come to its last step.
    least = dict(training.errors).get(training.kept, last)
    where = " that were held out" if options.hold_out else ""
    found = f"{options.measured}{where}: {first:.3g} before training, {least:.3g} after"
    if not changed:
        lost = f"{count(training.steps, 'step')} at a learning rate of {options.learning_rate} made no error smaller"
        found = f"{what} stay as they are: {lost}"
    if training.searched:
        again = sum(times for _, times in training.searched)
        found += f"; {count(len(training.searched), 'line search')} took {count(again, 'further step')}"
    if training.stopped:
        return f"{found}; it ended early with what it had at step {training.kept}: {training.stopped}"
    # Where rounds remove weights, the error before them is no measure.
    compared = not isinstance(options, AttachPass) or options.counts(0.0)
    return found + _advice(training.errors, options) if compared else found


def _advice(errors: Sequence[tuple[int, float]], options: TrainPass) -> str:
    """What to change where the training ended too soon or lowered no error, as a clause; empty where it settled.

    errors: at each step that was measured, the first before training.
    """
    longer = f"`epochs` (now {options.epochs})" if options.steps is None else f"`steps` (now {options.steps})"
    rate = f"`learning_rate` (now {options.learning_rate:g})"
    (_, first), *_, (_, last) = errors
    least, before_last = min(error for _, error in errors), errors[-2][1]
    if least == first == 0:
        return ""
    if least == first:
        worse = last > first * (1 + _SETTLED)
        return f"; lower {rate}" if worse else f"; raise {rate} or {longer}"
    if last == least and last < before_last * (1 - _SETTLED):
        return f", and it still fell: raise {longer}, or {rate}"
    return ""


def anew_if_damaged(name: str, work: Path | None, carry_out: Callable[[], PassResult]) -> PassResult:
    """What `carry_out` returns; where its snapshot in `work` is damaged it is thrown away, and a remark says so.

    name: of the pass.
    """
    try:
        return carry_out()
    except UnfinishedError as error:
        failure = behind(error)
        if failure is not None:
            # The snapshot may be whole: the same command reads it once the machine does.
            raise failure from error
        assert work is not None
        damage = error.cause
    with writing(work):
        shutil.rmtree(work)
    result = carry_out()
    result.remarks.append(f"{name} trained anew, for unfinished training cannot be continued: {damage}")
    return result


def training_key(source: Path, step: PassStep, numbers: Sequence[int | str | None]) -> str:
    """What decides how a training goes, as far as one folder of snapshots may see it change."""
    request = {
        "step": step.model_dump(mode="json"),
        "source": of_folder(source),
        "numbers": list(numbers),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


__all__ = ["AttachedLayers", "Trainable", "anew_if_damaged", "told", "training_key"]
