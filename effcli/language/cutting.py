"""A pass that cuts, carried out on a language model: heads, feed-forwards and experts of its blocks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from effcli.errors import writing
from effcli.formats import Dense
from effcli.inputs.text import Windows
from effcli.language.backward import StoredGradients
from effcli.language.coupling import coupled, cut
from effcli.language.ledger import other_rows
from effcli.language.observing import StoredStatistics
from effcli.language.weights import Weights, open_weights
from effcli.layers.contract import CutPass
from effcli.layers.cutting import decide, offer, rows
from effcli.layers.layer import LayerSite
from effcli.layers.network import Held
from effcli.layers.result import PassResult, Progress
from effcli.layers.selection import choose
from effcli.layers.statistics import Gradients, Statistics

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

    windows: for gradients and statistics, which are those of the checkpoint as it is; work: a folder for what is
    unfinished; device: where blocks run for them. Raises what `effcli.language.coupling.cut` raises.
    """
    options = step.config
    assert isinstance(options, CutPass)
    progress(0, 2)
    weights = open_weights(source, trust_remote_code)
    choices = choose(weights.skeleton, step)
    offered = offer(step.name, options, coupled(weights), choices)
    with writing(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)

    def gradients(sites: Sequence[LayerSite]) -> Mapping[str, Gradients]:
        assert windows is not None
        count, names = len(weights.skeleton.blocks), {site.name for site in sites}
        blocks = [[site for site in weights.skeleton.block_layers(k) if site.name in names] for k in range(count)]
        where = device or weights.device
        stored = StoredGradients(source, blocks, None, windows.batches, offered.needs, work, trust_remote_code, where)
        return _BlockGradients(stored, blocks)

    def statistics(sites: Sequence[LayerSite]) -> Mapping[str, Sequence[Statistics]]:
        assert windows is not None
        needs, where = offered.needs.statistics, device or weights.device
        return StoredStatistics(source, sites, windows.batches, needs, work, trust_remote_code, where)

    decided = decide(step.name, options, offered, weights.parameter, gradients, statistics)
    progress(1, 2)
    cut(source, target, decided.cuts, work, trust_remote_code)
    after = open_weights(target, trust_remote_code)
    made = rows(
        weights.skeleton.sites(), after.skeleton.sites(), choices, lambda site: _held(after, site), decided.cuts
    )
    result = PassResult([*made, *other_rows(after)], remarks=list(decided.remarks))
    if after.skeleton.widths:
        result.remarks.append(
            "written in effcli's own layout, which effcli.load reads and stock loaders refuse: its blocks have "
            "different widths"
        )
    with writing(work):
        shutil.rmtree(work)
    progress(2, 2)
    return result


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
