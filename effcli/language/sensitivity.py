"""What quantizing each layer of a language model alone costs, measured with one block in memory at a time.

`gram` needs one forward of the calibration windows, `fisher` three and a backward: blocks are opened from the last to
the first, each runs again on its spooled inputs, and the gradient of its outputs goes on to the block before. The loss
is that of tokens drawn from the network's own predictions, so that the mean square of its slope along an error is the
Fisher information in that direction, which is the second derivative of the divergence from the original too; a window
is one sample. `loss` puts one quantized layer at a time into the network and runs all windows to the end:
KL(original ‖ this) per token. Of the output head, which needs no network behind it, both ways measure that.

A pass that fits weights to inputs errs less on those inputs than on others, and the more so the fewer bits it has. So
where there are two batches or more, it is given the first half of them, and `fisher` and `loss` look at the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from effcli import memory
from effcli.contract import Needs, Scope, observer
from effcli.inputs.text import Windows
from effcli.language.blockwork import BlockWork, Part
from effcli.language.evaluate import kl
from effcli.language.forward import chunks, logits
from effcli.language.pairs import SharedInput, kind_of, leaders, probe_pairs
from effcli.language.spool import Spool
from effcli.language.stream import Call, Stream, WatchLayers
from effcli.language.weights import Weights, open_weights
from effcli.observers import Gram
from effcli.probe import Cost, Probe, Slopes, Trial
from effcli.reports.sensitivity import Way
from effcli.selection import Choice
from effcli.sites import LayerSite
from effcli.swept import Progress, check_finite

_SEED = 0


def layer_costs(
    path: Path,
    module: ModuleType,
    variants: Sequence[Mapping[str, Choice]],
    windows: Windows,
    work: Path,
    way: Way,
    progress: Progress = lambda done, total: None,
    trust_remote_code: bool = False,
) -> list[dict[str, Cost]]:
    """The cost of each layer that `variants` choose, one mapping by name for each variant.

    module: the pass; variants: every layer with its options, such as other bits in each variant; work: a folder for
    hidden states, those behind every block at once unless `way` is gram. Calibration windows always see the original
    network.
    """
    weights = open_weights(path, trust_remote_code)
    if way != "gram":
        # A small change of one layer must not drown in the rounding of all that follow; and many CPUs are far slower
        # at backward products of half precision.
        weights.skeleton.dtype = torch.float32
    with _Stream(weights, with_head=True) as stream:
        check_finite(weights.skeleton.model, "")
        return _Costs(stream, module, variants, windows, work, way, progress).carry_out()


class _Stream(Stream):
    """A stream whose way out can be differentiated."""

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) of hidden states (n, hidden) behind the last block, with a gradient."""
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64)
        with self._replaced(lambda k, *args, **kwargs: self._wrapped(hidden.unsqueeze(0))), torch.enable_grad():
            out: Tensor = self.skeleton.model(input_ids=ids, use_cache=False).logits
        return out[0]


@dataclass
class _Seen:
    """What was observed of one block. grams: by the first layer that reads an input; leaders: that layer's name."""

    shared: list[SharedInput]
    leaders: dict[str, str]
    grams: dict[str, Gram]

    @property
    def by_layer(self) -> dict[str, Gram]:
        return {name: self.grams[leader] for name, leader in self.leaders.items()}


class _Costs:
    def __init__(
        self,
        stream: _Stream,
        module: ModuleType,
        variants: Sequence[Mapping[str, Choice]],
        windows: Windows,
        work: Path,
        way: Way,
        progress: Progress,
    ) -> None:
        self.stream = stream
        self.weights: Weights = stream.weights
        self.skeleton = stream.skeleton
        self.module = module
        self.variants = variants
        configs = [choice.config for choices in variants for choice in choices.values() if choice.config is not None]
        halved = way != "gram" and any(config.needed is not Needs.NOTHING for config in configs)
        # For `fisher` a window is one sample of the gradient; for `loss`, several in a batch are faster.
        single = way == "fisher" or (halved and len(windows.batches) == 1)
        self.batches = [part for batch in windows.batches for part in (torch.split(batch, 1) if single else [batch])]
        # The numbers of the batches that the pass is given, and of those on which its cost is measured.
        self.given = self.measured = range(len(self.batches))
        if halved and len(self.batches) > 1:
            middle = len(self.batches) // 2
            self.given, self.measured = self.given[:middle], self.given[middle:]
        self.work = work
        self.way = way
        self.progress = progress
        self.count = len(self.skeleton.blocks)
        self.found: list[dict[str, Cost]] = [{} for _ in variants]
        self.calls: dict[tuple[int, ...], list[Call]] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.pairs: dict[str, list[SharedInput]] = {}

    def carry_out(self) -> list[dict[str, Cost]]:
        self._enter()
        steps = self.count + 1
        if self.way == "gram":
            for k in range(self.count):
                self.progress(k, steps)
                self._block(k, self._observe(k, propagate=True))
                self._spool(k).remove()
        else:
            for k in range(self.count):
                self._propagate(k)
            if self.way == "fisher":
                self._last_gradients()
            order = range(self.count) if self.way == "loss" else reversed(range(self.count))
            for number, k in enumerate(order):
                self.progress(number, steps)
                self._block(k, self._observe(k))
        self.progress(self.count, steps)
        self._head()
        self.progress(steps, steps)
        return self.found

    def _enter(self) -> None:
        for number, batch in enumerate(self.batches):
            hidden, calls = self.stream.enter(batch)
            if tuple(batch.shape) not in self.calls:
                # Tensors made in inference mode cannot take part in a backward pass; clones can.
                self.calls[tuple(batch.shape)] = [
                    Call(*tree_map_only(Tensor, Tensor.clone, (call.args, call.kwargs))) for call in calls
                ]
            if not self.shapes:
                self.shapes = [(*each.shape, hidden.shape[-1]) for each in self.batches]
            self._spool(0).write(number, hidden)

    def _spool(self, k: int) -> Spool:
        """The hidden states before block k."""
        return Spool(self.work / f"hidden-{k}.bin", self.shapes, self.skeleton.dtype)

    @property
    def _gradients(self) -> Spool:
        """The gradients at the hidden states before the last block that was seen."""
        return Spool(self.work / "gradients.bin", self.shapes, self.skeleton.dtype)

    def _opened(self, k: int) -> Any:
        name = self.skeleton.block_names[k] + "."
        return self.weights.opened(self.skeleton.blocks[k], name, self.skeleton.block_parameters(k))

    def _call(self, k: int, hidden: Tensor) -> Call:
        return self.calls[tuple(hidden.shape[:2])][k]

    def _propagate(self, k: int) -> None:
        outgoing = self._spool(k + 1)
        with self._opened(k), torch.inference_mode():
            for number, hidden in enumerate(self._spool(k)):
                outgoing.write(number, self.stream.through(k, hidden, self._call(k, hidden)))
        memory.trim()

    def _observe(self, k: int, propagate: bool = False) -> _Seen:
        """Run the windows that the pass is given through block k and sum up the inputs of its layers."""
        with self._opened(k):
            seen = self._start(k)
            incoming, outgoing = self._spool(k), self._spool(k + 1)
            with torch.inference_mode(), self._watch(k, lambda name, inputs, _: _add(seen, name, inputs)):
                for number in self.given:
                    hidden = incoming.read(number)
                    out = self.stream.through(k, hidden, self._call(k, hidden))
                    if propagate:
                        outgoing.write(number, out)
        return self._checked(seen)

    def _start(self, k: int) -> _Seen:
        sites = {site.name: site for site in self._taken(self.skeleton.block_layers(k))}
        configs = {name: self.variants[0][name].config for name in sites}
        shared, prefix = self._shared_inputs(k), self.skeleton.block_names[k] + "."
        leading = leaders(configs, prefix, shared, hasattr(self.module, "observer"))
        grams = {
            name: observer(self.module, configs[name], sites[name].columns) for name in dict.fromkeys(leading.values())
        }
        return _Seen(shared, leading, grams)

    def _watch(self, k: int, look: Callable[[str, Tensor, Tensor], None]) -> WatchLayers:
        sites = self._taken(self.skeleton.block_layers(k))
        return WatchLayers(self.skeleton.blocks[k], self.skeleton.block_names[k] + ".", sites, look)

    def _taken(self, sites: Sequence[LayerSite]) -> list[LayerSite]:
        return [site for site in sites if self.variants[0][site.name].config is not None]

    def _checked(self, seen: _Seen) -> _Seen:
        for name, gram in seen.grams.items():
            gram.check_finite(name)
        return seen

    def _shared_inputs(self, k: int) -> list[SharedInput]:
        """The shared inputs of block k, which is open; blocks of one kind have them in common."""
        kind = kind_of(self.skeleton.blocks[k])
        if kind not in self.pairs:
            self.pairs[kind] = probe_pairs(self.stream, k)
        return self.pairs[kind]

    def _block(self, k: int, seen: _Seen) -> None:
        """The costs of the layers of block k."""
        name, sites = self.skeleton.block_names[k], self.skeleton.block_layers(k)
        trials: list[dict[str, Trial]] = []
        for choices in self.variants:
            with self._opened(k), torch.inference_mode():
                probe = Probe(self.module, keep_weights=self.way != "gram")
                made = cast(ModuleType, probe)
                work = BlockWork(self.weights, made, self.skeleton.blocks[k], name, sites, choices)
                probe.factors = _factors(work)
                work.compress(seen.shared if self.module.Config.scope is Scope.GROUP else [], seen.by_layer)
            trials.append(probe.trials)
        for found, made_of in zip(self.found, trials, strict=True):
            found.update({layer: Cost(trial.output_error, trial.output_error) for layer, trial in made_of.items()})
        if self.way == "fisher":
            self._backward(k, trials)
        elif self.way == "loss":
            self._measure(k, trials)
        memory.trim()

    def _backward(self, k: int, trials: Sequence[Mapping[str, Trial]]) -> None:
        """Run the measured windows through block k and back; takes the slope of each loss along every trial's error.

        The gradients at the inputs of the block take the place of those behind it.
        """
        gradients = self._gradients
        with self._opened(k):
            weights = self._weights(k)
            with torch.inference_mode():
                slopes = {name: Slopes([_error(found[name], weights[name]) for found in trials]) for name in trials[0]}

            def look(name: str, inputs: Tensor, output: Tensor) -> None:
                if output.requires_grad:
                    seen = inputs.detach()
                    output.register_hook(lambda gradient: slopes[name].add(seen, gradient))  # type: ignore[no-untyped-call]

            incoming = self._spool(k)
            for number in self.measured:
                hidden = incoming.read(number)
                with torch.enable_grad(), self._watch(k, look):
                    out = self.stream.through(k, hidden.requires_grad_(), self._call(k, hidden))
                (gradient,) = torch.autograd.grad(out, hidden, gradients.read(number))
                gradients.write(number, gradient)
                for each in slopes.values():
                    each.end_sample()
        for name, each in slopes.items():
            for found, total in zip(self.found, each.squares, strict=True):
                found[name] = Cost(found[name].output_error, 0.5 * total / self._tokens)

    def _measure(self, k: int, trials: Sequence[Mapping[str, Trial]]) -> None:
        """Put each trial of block k into the network by itself and run the measured windows to the end."""
        entries = [
            (found, name, trial) for found, made in zip(self.found, trials, strict=True) for name, trial in made.items()
        ]
        size = len(self.measured)
        shapes = [self.shapes[number] for number in self.measured]
        spool = Spool(self.work / "trials.bin", shapes * len(entries), self.skeleton.dtype)
        incoming, last = self._spool(k), self._spool(self.count)
        with self._opened(k), torch.inference_mode():
            weights = self._weights(k)
            for number, (_, name, trial) in enumerate(entries):
                weight = weights[name]
                original = weight.clone()
                assert trial.weight is not None
                weight.copy_(trial.weight)
                for at, batch in enumerate(self.measured):
                    hidden = incoming.read(batch)
                    spool.write(number * size + at, self.stream.through(k, hidden, self._call(k, hidden)))
                weight.copy_(original)
        for j in range(k + 1, self.count):
            with self._opened(j), torch.inference_mode():
                for at, hidden in enumerate(spool):
                    spool.write(at, self.stream.through(j, hidden, self._call(j, hidden)))
        sums = [0.0] * len(entries)
        with torch.inference_mode():
            for at, batch in enumerate(self.measured):
                unchanged = last.read(batch).flatten(0, 1)
                for part in self._parts(batch):
                    original = _log_probabilities(logits(self.stream, unchanged[part]))
                    for number in range(len(entries)):
                        hidden = spool.read(number * size + at).flatten(0, 1)[part]
                        sums[number] += kl(original, _log_probabilities(logits(self.stream, hidden)))
        spool.remove()
        for (found, name, _), total in zip(entries, sums, strict=True):
            found[name] = Cost(found[name].output_error, max(0.0, total / self._tokens))

    def _weights(self, k: int) -> dict[str, Tensor]:
        """The weights (out, in) of the layers of block k, which is open: views of its parameters."""
        block, prefix = self.skeleton.blocks[k], self.skeleton.block_names[k] + "."
        sites = self._taken(self.skeleton.block_layers(k))
        return {site.name: site.view(block.get_parameter(site.parameter.removeprefix(prefix))) for site in sites}

    @property
    def _tokens(self) -> int:
        """How many tokens the cost is measured on."""
        return sum(self.batches[number].numel() for number in self.measured)

    def _parts(self, batch: int) -> Iterator[slice]:
        vocabulary = self.skeleton.config.get_text_config().vocab_size
        return chunks(self.batches[batch].numel(), vocabulary, self.batches[batch].shape[1])

    def _last_gradients(self) -> None:
        """The gradients behind the last block, of the loss of tokens drawn from the network's predictions."""
        generator = torch.Generator().manual_seed(_SEED)
        incoming, outgoing = self._spool(self.count), self._gradients
        for number in self.measured:
            hidden = incoming.read(number)
            flat = hidden.flatten(0, 1)
            gradient = torch.empty_like(flat)
            for part in self._parts(number):
                leaf = flat[part].clone().requires_grad_()
                out = self.stream.logits(leaf)
                pull = torch.softmax(out.detach().float(), dim=-1)
                drawn = torch.multinomial(pull, 1, generator=generator)
                pull.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=pull.dtype))
                (gradient[part],) = torch.autograd.grad(out, leaf, pull.to(out.dtype))
            outgoing.write(number, gradient.view(hidden.shape))

    def _head_site(self) -> LayerSite | None:
        """The output head, where it is to be quantized."""
        sites = {site.name: site for site in self.skeleton.outer_layers()}
        head = self.skeleton.head
        return sites[head] if head in sites and self.variants[0][head].config is not None else None

    def _head(self) -> None:
        site = self._head_site()
        if site is None:
            return
        gram = observer(self.module, self.variants[0][site.name].config, site.columns)
        watch = WatchLayers(self.skeleton.model, "", [site], lambda name, inputs, output: gram.add(inputs))
        incoming = self._spool(self.count)
        with torch.inference_mode():
            for number in self.given:
                with watch:
                    self.stream.leave(self.batches[number], incoming.read(number))
        gram.check_finite(site.name)
        parameter = self.weights.parameter(self.skeleton.embedding if self.skeleton.tied else site.parameter)
        for found, choices in zip(self.found, self.variants, strict=True):
            probe = Probe(self.module, keep_weights=self.way != "gram")
            work = BlockWork(self.weights, cast(ModuleType, probe), nn.Module(), "", [], choices)
            with torch.inference_mode():
                work.quantize(Part(), site, parameter.clone(), gram)
            trial = probe.trials[site.name]
            cost = trial.output_error if self.way == "gram" else self._head_divergence(site, trial)
            found[site.name] = Cost(trial.output_error, cost)

    def _head_divergence(self, site: LayerSite, trial: Trial) -> float:
        """KL per token of the network with another head."""
        head = self.skeleton.model.get_submodule(site.name)
        original, total = head.weight, 0.0
        incoming = self._spool(self.count)
        assert trial.weight is not None
        changed = nn.Parameter(trial.weight.to(self.skeleton.dtype), requires_grad=False)
        with torch.inference_mode():
            for batch in self.measured:
                hidden = incoming.read(batch).flatten(0, 1)
                for part in self._parts(batch):
                    found = []
                    for weight in (original, changed):
                        head.weight = weight
                        found.append(_log_probabilities(logits(self.stream, hidden[part])))
                    total += kl(found[0], found[1])
        head.weight = original
        return max(0.0, total / self._tokens)


def _add(seen: _Seen, name: str, inputs: Tensor) -> None:
    if name in seen.grams:
        seen.grams[name].add(inputs)


def _error(trial: Trial, weight: Tensor) -> Tensor:
    """How far the trial moves the weight; takes the place of the trial's own, for a block's are many."""
    assert trial.weight is not None
    return trial.weight.sub_(weight)


def _factors(work: BlockWork) -> Callable[[str], tuple[Tensor | None, Tensor | None]]:
    return lambda name: (work.rows.get(name), work.columns.get(name))


def _log_probabilities(values: Tensor) -> Tensor:
    return torch.log_softmax(values.float(), dim=-1)


__all__ = ["layer_costs"]
