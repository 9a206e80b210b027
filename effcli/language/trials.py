"""Every layer of a language model changed by itself, with one block in memory at a time.

Blocks are opened, what the pass needs of their inputs is summed up, and each layer is handed to the pass under every
variant of its options. What a trial costs is for subclasses of `Trials` to say (sensitivity.py).

A pass that fits weights to inputs errs less on those inputs than on others, and the more so the fewer bits it has. So
where there are two batches or more, it is given the first half of them, and costs are measured on the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effcli.errors import writing
from effcli.inputs.text import Windows
from effcli.language.backward import GradientStream, StoredGradients, differentiable
from effcli.language.calls import Call, kind_of
from effcli.language.evaluate import kl
from effcli.language.forward import chunks, logits
from effcli.language.open_block import OpenBlock, Part, open_head
from effcli.language.pairs import SharedInput, leaders, probe_pairs
from effcli.language.spool import Spool
from effcli.language.stream import WatchLayers
from effcli.language.weights import Weights
from effcli.layers.contract import Needs, Statistics
from effcli.layers.engine import LayerEngine, with_gradients
from effcli.layers.layer import LayerSite
from effcli.layers.result import Progress
from effcli.layers.selection import Choice, needs_of
from effcli.platform import memory
from effcli.platform.rehearsal import counted, few
from effcli.search.costs import Cost, Probe, Trial
from effcli.search.journal import SearchJournal


@dataclass
class _Seen:
    """What was observed of one block. grams: by the first layer that reads an input; leaders: that layer's name."""

    shared: list[SharedInput]
    leaders: dict[str, str]
    grams: dict[str, Statistics]

    @property
    def by_layer(self) -> dict[str, Statistics]:
        return {name: self.grams[leader] for name, leader in self.leaders.items()}


class Trials(ABC):
    """The trials of all variants, block after block, and what each costs: `costs`, one mapping for each variant.

    stream: entered, with its head; variants: every layer with its options; work: a folder for hidden states, those
    behind every block at once unless `measures` is off; journal: what an earlier try has found already.
    """

    # Whether costs are measured on windows that the pass was not given, and trials keep their weights.
    measures: ClassVar[bool] = True
    # Whether a batch must be a single window.
    single: ClassVar[bool] = False

    def __init__(
        self,
        stream: GradientStream,
        variants: Sequence[Mapping[str, Choice]],
        windows: Windows,
        work: Path,
        progress: Progress,
        journal: SearchJournal | None = None,
    ) -> None:
        self.stream = stream
        self.weights: Weights = stream.weights
        self.skeleton = stream.skeleton
        self.variants = variants
        needs = needs_of(variants)
        # Errors of outputs are told by the Gram matrix, whatever the pass reads.
        self.needs = needs | Needs.GRAM
        halved = self.measures and bool(needs)
        single = self.single or (halved and len(windows.batches) == 1)
        self.batches = [part for batch in windows.batches for part in (torch.split(batch, 1) if single else [batch])]
        # The numbers of the batches that the pass is given, and of those on which its cost is measured.
        self.given = self.measured = range(len(self.batches))
        if halved and len(self.batches) > 1:
            middle = len(self.batches) // 2
            self.given, self.measured = self.given[:middle], self.given[middle:]
        self.work = work
        self.gradients = self._gradients(needs)
        self.progress = progress
        self.journal = journal
        self.count = len(self.skeleton.blocks)
        self.costs: list[dict[str, Cost]] = [{} for _ in variants]
        self.shapes: list[tuple[int, ...]] = []
        self.pairs: dict[str, list[SharedInput]] = {}
        self._done = 0

    def _gradients(self, needs: Needs) -> StoredGradients | None:
        """The gradients of the layers that are taken, of the windows that the pass is given; None where none are."""
        if not needs.gradients:
            return None
        blocks = [self._taken(self.skeleton.block_layers(k)) for k in range(len(self.skeleton.blocks))]
        given = [self.batches[number] for number in self.given]
        path, trust = self.weights.checkpoint.path, self.skeleton.trust_remote_code
        # Apart from the hidden states and the gradients that costs are measured by.
        folder = self.work / "slopes"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        return StoredGradients(path, blocks, self._head_site(), given, needs, folder, trust)

    @abstractmethod
    def price(self, k: int, trials: Sequence[Mapping[str, Trial]]) -> None:
        """Put what the trials of block k cost, one mapping for each variant, into `costs`."""

    def pricing(self, k: int) -> int:
        """How often `price` calls `tick` for block k."""
        return 0

    def tick(self, steps: int = 1) -> None:
        """Tell of so many steps more: a block that all windows went through, its layers with the options of a variant,
        and what `price` counts.
        """
        self._done += steps
        own = sum(map(self._steps, range(self.count)))
        self.progress(self._done, own + self.count * self.measures + 1)

    def _steps(self, k: int) -> int:
        """How many steps block k takes, besides running it as it is on all windows."""
        return 1 + len(self.variants) + self.pricing(k)

    @property
    def order(self) -> Sequence[int]:
        """The blocks in the order in which they are taken."""
        return range(self.count)

    def start(self, done: int) -> None:
        """Make ready for the blocks of the order but for the first `done`, which are priced already."""
        if self.measures:
            for k in range(self.count):
                self._propagate(k)
                self.tick()

    def carry_out(self) -> list[dict[str, Cost]]:
        """Take all layers; returns `costs`."""
        self.tick(0)
        self._enter()
        self.take_blocks()
        self._once("head", self._head)
        self.tick()
        return self.costs

    def take_blocks(self) -> None:
        """Take the layers of all blocks."""
        # A gap would be of another try: what follows it is measured again.
        done = len(list(takewhile(lambda k: self._recall(_record(k)), self.order)))
        self.start(done)
        for number, k in enumerate(self.order):
            if number >= done:
                self._once(_record(k), partial(self._take_block, k), again=True)
                memory.trim()
            else:
                if not self.measures:
                    self._propagate(k)
                self.tick(self._steps(k))
            if not self.measures:
                self.hidden(k).remove()

    def _take_block(self, k: int) -> None:
        with counted(self.skeleton.block_names[k]):
            seen = self._observe(k)
            self.tick()
            self.price(k, self._tried(k, seen))

    def _recall(self, name: str) -> bool:
        """Whether costs were recorded under `name` by an earlier try of the same search; they are then taken over."""
        found = None if self.journal is None else self.journal.costs(name, len(self.variants))
        for costs, own in zip(self.costs, found or (), strict=False):
            costs.update(own)
        return found is not None

    def _once(self, name: str, price: Callable[[], None], again: bool = False) -> None:
        """Have layers priced and their costs recorded under `name`; not where they are, unless `again`."""
        if not again and self._recall(name):
            return
        before = set(self.costs[0])
        price()
        if self.journal is not None:
            new = [{layer: cost for layer, cost in costs.items() if layer not in before} for costs in self.costs]
            self.journal.record_costs(name, new)

    def _enter(self) -> None:
        for number in few(range(len(self.batches))):
            hidden, _ = self.stream.enter(self.batches[number])
            if not self.shapes:
                self.shapes = [(*each.shape, *hidden.shape[2:]) for each in self.batches]
                self.hidden(0).reserve()
            self.hidden(0).write(number, hidden)

    def hidden(self, k: int) -> Spool:
        """The hidden states before block k."""
        return Spool(self.work / f"hidden-{k}.bin", self.shapes, self.skeleton.dtype)

    def opened(self, k: int) -> Any:
        name = self.skeleton.block_names[k] + "."
        return self.weights.opened(self.skeleton.blocks[k], name, self.skeleton.block_parameters(k))

    def call(self, k: int, number: int) -> Call | None:
        """How block k is called for batch `number`; None for one that is passed over."""
        return differentiable(self.stream.call(k, self.batches[number]))

    def _propagate(self, k: int) -> None:
        incoming, outgoing = self.hidden(k), self.hidden(k + 1)
        outgoing.reserve()
        with counted(self.skeleton.block_names[k]), self.opened(k), torch.inference_mode():
            for number in few(range(len(incoming))):
                outgoing.write(number, self.stream.through(k, incoming.read(number), self.call(k, number)))
        memory.trim()

    def _observe(self, k: int) -> _Seen:
        """Run the windows that the pass is given through block k and sum up the inputs of its layers."""
        with self.opened(k):
            seen = self._start(k)
            incoming, outgoing = self.hidden(k), self.hidden(k + 1)
            if not self.measures:
                outgoing.reserve()
            with torch.inference_mode(), self.watch(k, lambda name, inputs, _: _add(seen, name, inputs)):
                for number in few(self.given):
                    hidden = incoming.read(number)
                    out = self.stream.through(k, hidden, self.call(k, number))
                    if not self.measures:
                        outgoing.write(number, out)
        return self._checked(seen)

    def _start(self, k: int) -> _Seen:
        sites = {site.name: site for site in self._taken(self.skeleton.block_layers(k))}
        shared, prefix = self._shared_inputs(k), self.skeleton.block_names[k] + "."
        leading = leaders(sites, prefix, shared)
        grams = {name: Statistics(sites[name].columns, self.needs) for name in dict.fromkeys(leading.values())}
        return _Seen(shared, leading, grams)

    def watch(self, k: int, look: Callable[[str, Tensor, Tensor], None]) -> WatchLayers:
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

    def _tried(self, k: int, seen: _Seen) -> list[dict[str, Trial]]:
        """What becomes of the layers of block k, for each variant."""
        block, prefix = self.skeleton.blocks[k], self.skeleton.block_names[k] + "."
        slopes = {} if self.gradients is None else self.gradients.of(k)
        observed = {name: with_gradients((gram,), slopes.get(name)) for name, gram in seen.by_layer.items()}
        trials = []
        for choices in self.variants:
            with self.opened(k), torch.inference_mode():
                probe = Probe(keep_weights=self.measures)
                home = OpenBlock(self.weights, block, prefix, Part(), seen.shared)
                probe.factors = home.factors.of
                engine = LayerEngine(home, choices, probe.apply)
                home.compress(engine, observed)
            trials.append(probe.stored(engine.row))
            self.tick()
        return trials

    def block_weights(self, k: int) -> dict[str, Tensor]:
        """The weights (out, in) of the layers of block k, which is open: views of its parameters."""
        block, prefix = self.skeleton.blocks[k], self.skeleton.block_names[k] + "."
        sites = self._taken(self.skeleton.block_layers(k))
        return {site.name: site.view(block.get_parameter(site.parameter.removeprefix(prefix))) for site in sites}

    def bias(self, k: int, name: str) -> Tensor:
        """The bias of a layer of block k that has one; the block is open."""
        own = name.removeprefix(self.skeleton.block_names[k] + ".")
        return self.skeleton.blocks[k].get_parameter(f"{own}.bias")

    @property
    def tokens(self) -> int:
        """How many tokens the cost is measured on."""
        return sum(self.batches[number].numel() for number in self.measured)

    def parts(self, batch: int) -> Iterator[slice]:
        vocabulary = self.skeleton.config.get_text_config().vocab_size
        return chunks(self.batches[batch].numel(), vocabulary, self.batches[batch].shape[1])

    def _head_site(self) -> LayerSite | None:
        """The output head, where it is to be quantized."""
        sites = {site.name: site for site in self.skeleton.outer_layers()}
        head = self.skeleton.head
        return sites[head] if head in sites and self.variants[0][head].config is not None else None

    def _head(self) -> None:
        site = self._head_site()
        if site is None:
            return
        gram = Statistics(site.columns, self.needs)
        watch = WatchLayers(self.skeleton.model, "", [site], lambda name, inputs, output: gram.add(inputs))
        incoming = self.hidden(self.count)
        with torch.inference_mode():
            for number in few(self.given):
                with watch:
                    self.stream.leave(self.batches[number], incoming.read(number))
        gram.check_finite(site.name)
        slopes = {} if self.gradients is None else self.gradients.of(self.count)
        parameter = self.weights.parameter(self.skeleton.embedding if self.skeleton.tied else site.parameter)
        for found, choices in zip(self.costs, self.variants, strict=True):
            probe = Probe(keep_weights=self.measures)
            with torch.inference_mode():
                home = open_head(self.weights, site, parameter.clone(), Part())
                engine = LayerEngine(home, choices, probe.apply)
                engine.compress(site.name, with_gradients((gram,), slopes.get(site.name)))
            trial = probe.stored(engine.row)[site.name]
            cost = self._head_divergence(site, trial) if self.measures else trial.output_error
            found[site.name] = trial.costing(cost)

    def _head_divergence(self, site: LayerSite, trial: Trial) -> float:
        """KL per token of the network with another head."""
        head = self.skeleton.model.get_submodule(site.name)
        original, total = head.weight, 0.0
        incoming = self.hidden(self.count)
        assert trial.weight is not None
        changed = nn.Parameter(trial.weight.to(self.skeleton.dtype), requires_grad=False)
        with torch.inference_mode():
            for batch in few(self.measured):
                hidden = incoming.read(batch).flatten(0, 1)
                for part in few([*self.parts(batch)]):
                    found = []
                    for weight in (original, changed):
                        head.weight = weight
                        found.append(log_probabilities(logits(self.stream, hidden[part])))
                    total += kl(found[0], found[1])
        head.weight = original
        return total / self.tokens


def _record(k: int) -> str:
    """The name of the record of block k."""
    return f"block-{k}"


def _add(seen: _Seen, name: str, inputs: Tensor) -> None:
    if name in seen.grams:
        seen.grams[name].add(inputs)


def log_probabilities(values: Tensor) -> Tensor:
    """In float32 along the last dimension."""
    return torch.log_softmax(values.float(), dim=-1)


__all__ = ["Trials", "log_probabilities"]
