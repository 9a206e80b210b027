"""One pass over one checkpoint, block by block: observe, compress, write, free.

Open block k, run the spooled hidden states through it while the pass's observers look on, hand every layer to the
pass, write what came out, go on. The peak of memory is one block and its statistics, whatever the number of blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effcli.errors import DataError, UnfinishedError
from effcli.files.checkpoint import Checkpoint
from effcli.inputs.text import Windows
from effcli.language.backward import StoredGradients
from effcli.language.calls import kind_of
from effcli.language.journal import Journal
from effcli.language.ledger import tied_row
from effcli.language.open_block import OpenBlock, Part, open_head
from effcli.language.pairs import SharedInput, SharedInputs, leaders, probe_pairs
from effcli.language.parts import OUTSIDE, join, part_name, write_part
from effcli.language.skeleton import Skeleton
from effcli.language.spool import Spool
from effcli.language.stream import Stream, WatchLayers
from effcli.language.weights import CPU, Weights, open_weights
from effcli.layers.contract import Needs, ScalingPass, Statistics
from effcli.layers.engine import LayerEngine, Seen, with_gradients
from effcli.layers.layer import LayerSite
from effcli.layers.result import PassResult, Progress, check_finite, check_tensor
from effcli.layers.selection import choose, needs_of
from effcli.layers.survey import Survey
from effcli.options import Record
from effcli.platform import memory
from effcli.platform.rehearsal import counted, few

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep


def sweep(
    source: Path,
    target: Path,
    step: PassStep,
    windows: Windows | None,
    work: Path,
    progress: Progress = lambda done, total: None,
    trust_remote_code: bool = False,
    device: torch.device = CPU,
) -> PassResult:
    """Carry out `step` on the checkpoint `source` and write the checkpoint `target`, a directory that exists.

    work: a folder for what is unfinished; when it holds unfinished work of the same request, that is continued.
    device: where blocks run and passes compute, one block at a time.
    Raises `UnfinishedError` when that is damaged, and `DataError` where `step` needs windows and none are given.
    """
    if step.needs and windows is None:
        raise DataError(f"{step.name} looks at the inputs of the layers", "give calibration data")
    weights = open_weights(source, trust_remote_code, device=device)
    checkpoint = weights.checkpoint
    journal = Journal.open(work, fingerprint(checkpoint, step, windows))
    if journal.damage:
        raise UnfinishedError(journal.damage)
    run = _Sweep(weights, step, windows, journal, progress)
    run.blocks()
    run.outside()
    return run.finish(target)


# The record of what a survey found.
_SURVEY = "survey"


class _SurveyRecord(Record):
    """The options of the layers that a survey gave others, by name."""

    options: dict[str, dict[str, Any]]


def fingerprint(checkpoint: Checkpoint, step: PassStep, windows: Windows | None) -> str:
    """A digest of everything that decides the result: the input's files, the options, the calibration tokens."""
    digest = hashlib.sha256()
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    request = {
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "config": checkpoint.config,
        "step": step.model_dump(mode="json"),
        "inputs": windows.inputs if windows else None,
        "torch": torch.__version__,
    }
    digest.update(json.dumps(request, sort_keys=True, default=str).encode())
    for batch in windows.batches if windows else ():
        digest.update(repr(tuple(batch.shape)).encode() + batch.numpy().tobytes())
    return digest.hexdigest()


class _Sweep:
    def __init__(
        self, weights: Weights, step: PassStep, windows: Windows | None, journal: Journal, progress: Progress
    ) -> None:
        self.weights = weights
        self.skeleton: Skeleton = weights.skeleton
        self.step = step
        # Before any work: it may refuse.
        self.carried = weights.carried()
        self.choices = choose(self.skeleton, step)
        self.survey = Survey(self.choices)
        self.needs = needs_of([self.choices])
        self.windows = windows if self.needs.observes else None
        self.journal = journal
        self.progress = progress
        self.shapes: list[tuple[int, ...]] = []
        self.gradients = self._gradients(windows)
        if self.survey:
            self._look(windows if self.survey.needs.observes else None)

    def _gradients(self, windows: Windows | None) -> StoredGradients | None:
        """The gradients of the layers that are taken, made when they are first asked for; None where none are."""
        needs = (self.needs | self.survey.needs).gradients
        if windows is None or not needs:
            return None
        blocks = [self._taken(self.skeleton.block_layers(k)) for k in range(len(self.skeleton.blocks))]
        head = next((site for site in self._taken(self.skeleton.outer_layers())), None)
        path, trust = self.weights.checkpoint.path, self.skeleton.trust_remote_code
        folder, device = self.journal.folder, self.weights.device
        return StoredGradients(path, blocks, head, windows.batches, needs, folder, trust, device)

    def _look(self, windows: Windows | None) -> None:
        """Show every layer to the survey before the first is changed, once for a request, and choose anew.

        windows: None where it asks for nothing but the weights.
        """
        if not self.journal.has(_SURVEY):
            self.journal.begin()
            count = len(self.skeleton.blocks)
            if windows is None:
                for k in range(count):
                    self._look_at_block(k, None, None)
            else:
                with Stream(self.weights) as stream:
                    flow = _Flow.start(stream, windows, self.journal)
                    self.shapes = flow.shapes
                    for k in range(count):
                        self._look_at_block(k, stream, flow)
            for site in self.skeleton.outer_layers():
                if site.name in self.survey:
                    with torch.inference_mode():
                        seen = () if windows is None else (self._head_statistics(site, windows, self.survey.needs),)
                        self._show(self._open_head(site, Part()), [site], count, {site.name: seen})
            self._record_survey(self.survey.end())
        self.choices = self.survey.chosen(self.journal.recall(_SurveyRecord, _SURVEY).options)

    def _look_at_block(self, k: int, stream: Stream | None, flow: _Flow | None) -> None:
        self.progress(0, len(self.skeleton.blocks))
        name, block = self.skeleton.block_names[k], self.skeleton.blocks[k]
        sites = [site for site in self.skeleton.block_layers(k) if site.name in self.survey]
        parameters = self.skeleton.block_parameters(k)
        with counted(name), self.weights.opened(block, f"{name}.", parameters), torch.inference_mode():
            check_finite(block, name)
            grams: dict[str, Statistics] = {}
            if flow is not None and stream is not None:
                leading = self._leaders(k, sites, self._shared_inputs(k, stream))
                grams = flow.observe(stream, k, sites, leading, self.survey.needs, True)
            home = OpenBlock(self.weights, block, f"{name}.", Part())
            self._show(home, sites, k, {own: (gram,) for own, gram in grams.items()})
        memory.trim()

    def _show(self, home: OpenBlock, sites: Sequence[LayerSite], k: int, seen: Mapping[str, Seen]) -> None:
        """Show layers of block k, or the head behind the last; seen: of their inputs, by name."""
        gradients = {} if self.gradients is None else self.gradients.of(k)
        for site in sites:
            own = with_gradients(seen.get(site.name, ()), gradients.get(site.name))
            self.survey.look(home.read(site), own)

    def _record_survey(self, options: dict[str, dict[str, Any]]) -> None:
        self.journal.record(_SURVEY, {"options": options})

    def _taken(self, sites: Sequence[LayerSite]) -> list[LayerSite]:
        return [site for site in sites if self.choices[site.name].config is not None]

    def blocks(self) -> None:
        """Every block from the last finished one on."""
        count = len(self.skeleton.blocks)
        if not all(self.journal.holds(part_name(k)) for k in range(self.journal.done)):
            self._begin_anew()
        if self.windows is None:
            for k in range(self.journal.done, count):
                with counted(self.skeleton.block_names[k]):
                    self._block(k, None, None)
            return
        with Stream(self.weights) as stream:
            check_finite(self.skeleton.model, "")
            flow = _Flow.start(stream, self.windows, self.journal)
            if self.journal.done and not flow.spool(self.journal.done).whole():
                self._begin_anew()
                flow = _Flow.start(stream, self.windows, self.journal)
            self.shapes = flow.shapes
            for k in range(self.journal.done, count):
                with counted(self.skeleton.block_names[k]):
                    self._block(k, stream, flow)

    def _begin_anew(self) -> None:
        """Throw away the blocks that are done; what the survey found stays."""
        found = self.journal.recall(_SurveyRecord, _SURVEY).options if self.survey else {}
        self.journal.begin()
        if self.survey:
            self._record_survey(found)

    def _block(self, k: int, stream: Stream | None, flow: _Flow | None) -> None:
        self.progress(k, len(self.skeleton.blocks))
        name = self.skeleton.block_names[k]
        block, parameters = self.skeleton.blocks[k], self.skeleton.block_parameters(k)
        sites = self.skeleton.block_layers(k)
        gradients = {} if self.gradients is None else self.gradients.of(k)
        with self.weights.opened(block, name + ".", parameters), torch.inference_mode():
            check_finite(block, name)
            shared: list[SharedInput] = []
            grams: dict[str, Statistics] = {}
            if flow is not None and stream is not None:
                shared = self._shared_inputs(k, stream)
                leading = self._leaders(k, sites, shared)
                grams = flow.observe(stream, k, sites, leading, self.needs, flow.original)
            part = Part()
            home = OpenBlock(self.weights, block, name + ".", part, shared)
            seen = {name: with_gradients((gram,), gradients.get(name)) for name, gram in grams.items()}
            home.compress(LayerEngine(home, self.choices), seen)
            del grams, gradients, seen, home
            if flow is not None and stream is not None and not flow.original:
                flow.propagate(stream, k)
        write_part(self.journal, part_name(k), part)
        self.journal.advance(k + 1)
        del part
        memory.trim()

    def _leaders(self, k: int, sites: Sequence[LayerSite], shared: Sequence[SharedInput]) -> dict[str, str]:
        taken = [site.name for site in self._taken(sites)]
        return leaders(taken, self.skeleton.block_names[k] + ".", shared)

    def _shared_inputs(self, k: int, stream: Stream) -> list[SharedInput]:
        """The shared inputs of block k; blocks of one kind have them in common, so one of each is tried."""
        kind = kind_of(self.skeleton.blocks[k])
        # Remembered through a crash: a later block of the kind might decide a close case differently.
        record = f"pairs-{hashlib.sha256(kind.encode()).hexdigest()[:16]}"
        if not self.journal.has(record):
            self.journal.record(record, {"pairs": [pair.to_json() for pair in probe_pairs(stream, k)]})
        return self.journal.recall(SharedInputs, record).read()

    def outside(self) -> None:
        """What stands outside the blocks: embeddings, norms and the output head."""
        self.progress(len(self.skeleton.blocks), len(self.skeleton.blocks))
        head = self.skeleton.head
        sites = {site.name: site for site in self.skeleton.outer_layers()}
        taken = head is not None and head in sites and self.choices[head].config is not None
        part = Part()
        gram: Statistics | None = None
        gradients = {} if self.gradients is None else self.gradients.of(len(self.skeleton.blocks))
        outside = LayerEngine(OpenBlock(self.weights, nn.Module(), "", part), self.choices)
        with torch.inference_mode():
            if taken and head is not None and self.windows is not None:
                gram = self._head_statistics(sites[head], self.windows, self.needs)
            left_out = self.weights.left_out(apart=taken)
            for key in self.skeleton.outer_parameters():
                if key in left_out or (taken and key == f"{head}.weight"):
                    continue
                part.keep(self.weights, key, outside.row)
            for name, tensor in part.tensors.items():
                check_tensor(tensor, name)
            if head is not None and self.skeleton.tied and not taken:
                part.ledger.append(tied_row(sites[head], self.skeleton.dtype, self.choices[head].reason))
            if taken and head is not None:
                engine = LayerEngine(self._open_head(sites[head], part), self.choices)
                if isinstance(self.step.config, ScalingPass):
                    engine.explain([head], "unscaled: it stands outside the blocks")
                engine.compress(head, () if gram is None else with_gradients((gram,), gradients.get(head)))
                part.ledger.append(engine.row(head))
                part.histograms += engine.histograms
                if self.skeleton.tied:
                    part.remarks.append(
                        f"{head} was tied to the input embedding; it is stored on its own now, the embedding stays"
                    )
        write_part(self.journal, OUTSIDE, part)

    def _open_head(self, site: LayerSite, part: Part) -> OpenBlock:
        """The output head by itself, with the embedding's weight where they are tied."""
        key = self.skeleton.embedding if self.skeleton.tied else site.parameter
        weight = self.weights.parameter(key)
        check_tensor(weight, f"{site.name}.weight")
        return open_head(self.weights, site, weight, part)

    def _head_statistics(self, site: LayerSite, windows: Windows, needs: Needs) -> Statistics:
        """The statistics of the output head's inputs, from the hidden states behind the last block."""
        gram = Statistics(site.columns, needs, self.weights.device)
        with Stream(self.weights, with_head=True) as stream:
            file = self.journal.spool(len(self.skeleton.blocks))
            spool = Spool(file, self.shapes, self.skeleton.dtype, self.weights.device)
            watch = WatchLayers(self.skeleton.model, "", [site], lambda name, inputs, output: gram.add(inputs))
            for number in few(range(len(spool))):
                with watch:
                    stream.leave(windows.batches[number], spool.read(number))
        gram.check_finite(site.name)
        return gram

    def finish(self, target: Path) -> PassResult:
        """Join the parts into the target's shards and describe them in its config."""
        names = [part_name(k) for k in range(len(self.skeleton.blocks))] + [OUTSIDE]
        return join(self.weights, self.journal, names, target, self.carried)


@dataclass
class _Flow:
    """The calibration windows on their way through the blocks.

    shapes: of each batch's hidden states, (windows, length, ...).
    """

    windows: Windows
    journal: Journal
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    @property
    def original(self) -> bool:
        """Whether the original block's outputs go on, so that one forward both observes and propagates."""
        return self.windows.inputs == "original"

    @staticmethod
    def start(stream: Stream, windows: Windows, journal: Journal) -> _Flow:
        flow = _Flow(windows, journal, [], stream.skeleton.dtype, stream.weights.device)
        for number in few(range(len(windows.batches))):
            # What is done holds the hidden states; their width is asked of the first batch.
            if flow.shapes and journal.done:
                break
            hidden, _ = stream.enter(windows.batches[number])
            if not flow.shapes:
                flow.shapes = [(*each.shape, *hidden.shape[2:]) for each in windows.batches]
            if not journal.done:
                flow.spool(0).write(number, hidden)
        return flow

    def spool(self, k: int) -> Spool:
        return Spool(self.journal.spool(k), self.shapes, self.dtype, self.device)

    def observe(
        self,
        stream: Stream,
        k: int,
        sites: Sequence[LayerSite],
        leaders: Mapping[str, str],
        needs: Needs,
        propagate: bool,
    ) -> dict[str, Statistics]:
        """Run all windows through block k and sum up the inputs of its layers, once for all with the same leader."""
        prefix = stream.skeleton.block_names[k] + "."
        by_name = {site.name: site for site in sites}
        first = dict.fromkeys(leaders.values())
        grams = {leader: Statistics(by_name[leader].columns, needs, self.device) for leader in first}

        def add(name: str, inputs: Tensor, output: Tensor) -> None:
            grams[name].add(inputs)

        watched = [by_name[name] for name in grams]
        block = stream.skeleton.blocks[k]
        with WatchLayers(block, prefix, watched, add):
            self._run(stream, k, propagate)
        for name, gram in grams.items():
            gram.check_finite(name)
        return {name: grams[leader] for name, leader in leaders.items()}

    def propagate(self, stream: Stream, k: int) -> None:
        """Run all windows through block k as it is now."""
        self._run(stream, k, True)

    def _run(self, stream: Stream, k: int, propagate: bool) -> None:
        incoming, outgoing = self.spool(k), self.spool(k + 1)
        for number in few(range(len(incoming))):
            out = stream.through(k, incoming.read(number), stream.call(k, self.windows.batches[number]))
            if propagate:
                outgoing.write(number, out)
        if propagate:
            outgoing.sync()
