"""A pass that cuts, carried out on a language model: heads, feed-forwards and experts of its blocks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from effcli.errors import UnfinishedError, writing
from effcli.formats import Dense
from effcli.inputs.text import Windows
from effcli.language.backward import StoredGradients
from effcli.language.coupling import coupled, cut
from effcli.language.depth import cut_blocks, depth
from effcli.language.journal import Journal
from effcli.language.ledger import other_rows
from effcli.language.observing import StoredStatistics
from effcli.language.sweep import fingerprint, sweep
from effcli.language.weights import CPU, Weights, open_weights
from effcli.layers.contract import CutPass, Members, Needs
from effcli.layers.coupling import Coupled, Cut
from effcli.layers.cutting import Offered, decide, look, offer, rows
from effcli.layers.layer import LayerSite
from effcli.layers.network import Held
from effcli.layers.restoring import restoring
from effcli.layers.result import PassResult, Progress
from effcli.layers.selection import Choice, choose
from effcli.layers.statistics import Gradients
from effcli.options import Options
from effcli.platform.rehearsal import cannot_tell
from effcli.reports.report import LedgerRow

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep


def cut_model(
    source: Path,
    target: Path,
    step: PassStep,
    windows: Windows | None,
    work: Path,
    progress: Progress = lambda done, total: None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> PassResult:
    """Carry out `step`, whose pass cuts, on the checkpoint `source` and write `target`, a directory that exists.

    windows: for gradients and statistics, which are those of the checkpoint as it is, and for restoring what reads the
    removed channels; work: a folder for what is unfinished: when it holds unfinished work of the same request, that is
    continued. device: where blocks run. Raises what `effcli.language.coupling.cut` raises, and `UnfinishedError` when
    unfinished work is damaged.
    """
    cannot_tell("what is cut is decided over all blocks at once")
    weights = open_weights(source, trust_remote_code)
    journal = Journal.open(work, fingerprint(weights.checkpoint, step, windows))
    if journal.damage:
        raise UnfinishedError(journal.damage)
    run = _Cutting(source, weights, step, windows, journal, device or weights.device, progress)
    return run.carry_out(target)


def look_at(
    source: Path,
    weights: Weights,
    offered: Offered,
    batches: Sequence[Tensor],
    folder: Path,
    device: torch.device = CPU,
) -> Members:
    """What a pass asks for of the groups of a language model that it is offered.

    batches: token ids int64 (windows, length); folder: for what is kept as long as that is looked at; device: where
    blocks run.
    """
    skeleton = weights.skeleton
    trust, biases = skeleton.trust_remote_code, skeleton.model.state_dict().keys()

    def gradients(sites: Sequence[LayerSite]) -> Mapping[str, Gradients]:
        names = {site.name for site in sites}
        inside = [skeleton.block_layers(k) for k in range(len(skeleton.blocks))]
        blocks = [[site for site in block if site.name in names] for block in inside]
        stored = StoredGradients(source, blocks, None, batches, offered.needs, folder, trust, device)
        return _BlockGradients(stored, blocks)

    def statistics(sites: Sequence[LayerSite], needs: Needs = offered.needs.statistics) -> StoredStatistics:
        return StoredStatistics(source, sites, batches, needs, folder, trust, device)

    def influence() -> Tensor:
        return statistics([], Needs.NOTHING).influence

    def biased(site: LayerSite) -> bool:
        return f"{site.name}.bias" in biases

    return look(offered, weights.parameter, gradients, statistics, biased, influence)


class _Decision(Options):
    """What a pass decided. removed: the positions that go, scores: what each position counted, by group."""

    removed: dict[str, tuple[NonNegativeInt, ...]]
    scores: dict[str, tuple[float, ...]]
    remarks: tuple[str, ...]

    def cuts(self, groups: Iterable[Coupled]) -> list[Cut]:
        by_name = {group.name: group for group in groups}
        if not self.removed.keys() <= by_name.keys():
            raise UnfinishedError("what was to be cut is no group of this network")
        cuts = []
        for name, gone in self.removed.items():
            kept = torch.ones(by_name[name].count, dtype=torch.bool)
            if gone and gone[-1] >= len(kept):
                raise UnfinishedError(f"what was to be cut of {name} is none of its positions")
            kept[list(gone)] = False
            scores = torch.tensor(self.scores[name]) if name in self.scores else None
            cuts.append(Cut(by_name[name], kept, scores))
        return cuts


@dataclass
class _Cutting:
    """One step on its way."""

    source: Path
    weights: Weights
    step: PassStep
    windows: Windows | None
    journal: Journal
    device: torch.device
    progress: Progress

    def carry_out(self, target: Path) -> PassResult:
        step, weights, work = self.step, self.weights, self.journal.folder
        trust = weights.skeleton.trust_remote_code
        self.progress(0, 2)
        choices = choose(weights.skeleton, step)
        assert isinstance(step.config, CutPass)
        groups = [depth(weights, choices)] if step.config.depth else coupled(weights)
        offered = offer(step.name, step.config, groups, choices)
        if not self.journal.done:
            batches = () if self.windows is None else self.windows.batches
            decided = decide(step.config, offered, look_at(self.source, weights, offered, batches, work, self.device))
            removed = {one.coupled.name: tuple((~one.kept).nonzero().flatten().tolist()) for one in decided.cuts}
            scores = {one.coupled.name: one.scores.tolist() for one in decided.cuts if one.scores is not None}
            self.journal.record("decided", {"removed": removed, "scores": scores, "remarks": decided.remarks})
            self.journal.advance(1)
        decision = self.journal.recall(_Decision, "decided")
        cuts = decision.cuts(offered.groups)
        self.progress(1, 2)
        if step.config.depth and cuts:
            (one,) = cuts
            cut_blocks(self.source, target, one, work, trust)
            after = open_weights(target, trust)
            made = _renumbered(after, one, choices)
        else:
            restored = self._restored(offered, cuts)
            cut(self.source if restored is None else work / "restored", target, cuts, work, trust)
            after = open_weights(target, trust)
            before, fitted = weights.skeleton.sites(), [] if restored is None else restored.ledger
            made = rows(before, after.skeleton.sites(), choices, lambda site: _held(after, site), cuts, fitted)
        result = PassResult([*made, *other_rows(after)], remarks=list(decision.remarks))
        if after.skeleton.widths:
            result.remarks.append(
                "written in effcli's own layout, which effcli.load reads and stock loaders refuse: its blocks have "
                "different widths"
            )
        with writing(work):
            self.journal.remove()
        self.progress(2, 2)
        return result

    def _restored(self, offered: Offered, cuts: Sequence[Cut]) -> PassResult | None:
        """Write the network with its readers restored, and zeros for what goes, into the journal's folder.

        None where nothing is restored.
        """
        skeleton, work = self.weights.skeleton, self.journal.folder
        step = restoring(self.step, skeleton.sites(), offered, cuts)
        if step is None:
            return None
        with writing(work):
            shutil.rmtree(work / "restored", ignore_errors=True)
            (work / "restored").mkdir()

        def tell(done: int, total: int) -> None:
            self.progress(1 + done, 2 + total)

        sweeping, trust = work / "sweep", skeleton.trust_remote_code
        return sweep(self.source, work / "restored", step, self.windows, sweeping, tell, trust, self.device)


def _renumbered(after: Weights, cut: Cut, choices: Mapping[str, Choice]) -> list[LedgerRow]:
    """The ledger of a network that lost blocks; notes number each block as it was, and tell what it counted.

    after: the network that is left.
    """
    skeleton, group = after.skeleton, cut.coupled
    scores = [None] * group.count if cut.scores is None else [round(score, 6) for score in cut.scores.tolist()]
    made = []
    for j, k in enumerate(cut.kept.nonzero().flatten().tolist()):
        notes = {"block_before": k} if scores[k] is None else {"block_before": k, "influence": scores[k]}
        for site in skeleton.block_layers(j):
            was = f"{group.name}.{k}" + site.name.removeprefix(skeleton.block_names[j])
            reason = choices[was].reason or "its block stays"
            made.append(_held(after, site).row(site, "kept", reason=reason, notes=notes))
    for k in (~cut.kept).nonzero().flatten().tolist():
        notes = {} if scores[k] is None else {"influence": scores[k]}
        # It is named beside the block that has its number now.
        gone = LayerSite(f"{group.name}.{k} before", "linear", "", 0, 0)
        row = Held("none", 0).row(gone, "removed", notes=notes)
        made.append(row.model_copy(update={"kind": "block"}))
    for site in skeleton.outer_layers():
        made.append(_held(after, site).row(site, "kept", reason=choices[site.name].reason))
    return made


class _BlockGradients(Mapping[str, Gradients]):
    """The gradients of layers by name. Those of one block are in memory, the others on the disk."""

    def __init__(self, stored: StoredGradients, blocks: Sequence[Sequence[LayerSite]]) -> None:
        self._stored = stored
        self._block = {site.name: k for k, sites in enumerate(blocks) for site in sites}
        self._held: tuple[int, dict[str, Gradients]] = (-1, {})

    def __getitem__(self, name: str) -> Gradients:
        k = self._block[name]
        if self._held[0] != k:
            self._held = k, self._stored.of(k)
        return self._held[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._block)

    def __len__(self) -> int:
        return len(self._block)


def _held(weights: Weights, site: LayerSite) -> Held:
    dtype = weights.dtype_of(site.parameter)
    shared = weights.skeleton.tied and site.name == weights.skeleton.head
    return Held(str(Dense(dtype)), 0 if shared else site.rows * site.columns * dtype.itemsize)


__all__ = ["cut_model"]
