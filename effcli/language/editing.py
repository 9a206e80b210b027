"""A pass over parameters, carried out on a language model: block by block read, changed a few rows at a time, written.

Nothing runs through the network. In memory are the new tensors of one block and a few rows in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effcli.errors import UnfinishedError, UserError
from effcli.files.layout import adapter_in
from effcli.language.journal import Journal
from effcli.language.ledger import tied_row
from effcli.language.open_block import Part, held
from effcli.language.parts import OUTSIDE, join, part_name, write_part
from effcli.language.sweep import fingerprint
from effcli.language.weights import Weights, open_weights
from effcli.layers.contract import ParameterPass
from effcli.layers.editing import Edited, change, renew, told
from effcli.layers.edits import Edit
from effcli.layers.layer import LayerSite
from effcli.layers.network import Held
from effcli.layers.result import PassResult, Progress, dense_row
from effcli.layers.selection import Choice, choose
from effcli.platform import memory
from effcli.platform.rehearsal import counted
from effcli.reports.report import LedgerRow

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep


def edit_model(
    source: Path,
    target: Path,
    step: PassStep,
    work: Path,
    progress: Progress = lambda done, total: None,
    trust_remote_code: bool = False,
) -> PassResult:
    """Carry out `step`, a pass over parameters, on the checkpoint `source` and write `target`, a directory that exists.

    work: a folder for what is unfinished; when it holds unfinished work of the same request, that is continued.
    Raises what the pass says of parameters that do not fit, and `UnfinishedError` when unfinished work is damaged.
    """
    weights = open_weights(source, trust_remote_code, base=takes_adapter(step))
    step = with_own_adapter(step, source)
    run = _Editing(weights, step, progress)
    journal = Journal.open(work, fingerprint(weights.checkpoint, step, None))
    if journal.damage:
        raise UnfinishedError(journal.damage)
    return run.carry_out(journal, target)


def takes_adapter(step: PassStep) -> bool:
    """Whether a step takes the adapter that stands beside the weights."""
    return isinstance(step.config, ParameterPass) and step.config.takes_adapter


def with_own_adapter(step: PassStep, source: Path) -> PassStep:
    """A step that is to take the adapter beside the weights of `source`, with that; any other as it is.

    Raises `UserError` where there is none.
    """
    if not takes_adapter(step):
        return step
    folder = adapter_in(source)
    if folder is None:
        raise UserError(
            f"{step.name} names no adapter, and none stands beside the weights",
            f"name one: {step.name}:adapter=DIR; or put a step before it that trains one",
        )
    assert isinstance(step.config, ParameterPass)
    return step.model_copy(update={"config": step.config.with_adapter(folder)})


def edited(weights: Weights, step: PassStep) -> Edited:
    """The model as `step`, a pass over parameters, chooses from it; raises what the pass says of it."""
    sites = weights.skeleton.sites()
    return Edited(step, sites, weights.places(), lambda site: weights.parts_of(site.parameter))


def unties(weights: Weights, edits: Mapping[str, Edit]) -> bool:
    """Whether a head that shares the embedding's weight gets another one than the embedding."""
    skeleton = weights.skeleton
    return skeleton.tied and (skeleton.head in edits) != (skeleton.embedding in edits)


class _Editing:
    """One step on its way."""

    def __init__(self, weights: Weights, step: PassStep, progress: Progress) -> None:
        assert isinstance(step.config, ParameterPass)
        self.weights = weights
        self.skeleton = weights.skeleton
        self.config = step.config
        # Before any work: they may refuse.
        self.carried = weights.carried()
        found = edited(weights, step)
        self.choices: Mapping[str, Choice] = choose(found, step)
        self.edits = found.edits
        self.progress = progress

    def carry_out(self, journal: Journal, target: Path) -> PassResult:
        blocks = len(self.skeleton.blocks)
        names = [part_name(k) for k in range(blocks)]
        if not all(journal.holds(name) for name in names[: journal.done]):
            journal.begin()
        for k in range(journal.done, blocks):
            self.progress(k, blocks)
            with counted(self.skeleton.block_names[k]):
                write_part(journal, names[k], self._part(self.skeleton.block_parameters(k)))
            journal.advance(k + 1)
            memory.trim()
        self.progress(blocks, blocks)
        part = self._outside()
        apart = self.skeleton.tied and f"{self.skeleton.head}.weight" in part.tensors
        write_part(journal, OUTSIDE, part)
        del part
        result = join(self.weights, journal, [*names, OUTSIDE], target, self.carried, apart)
        result.remarks += told(result.ledger)
        return result

    def _part(self, keys: Iterable[str]) -> Part:
        part = Part()
        for key in keys:
            self._carry(part, key)
        return part

    def _outside(self) -> Part:
        """What stands outside the blocks, with a head of its own where it is no longer the embedding."""
        skeleton, edits = self.skeleton, self.edits
        head, embedding = skeleton.head, skeleton.embedding
        # A head that is tied and gets the embedding's new value stays tied: that is known once both are there.
        apart = skeleton.tied and head is not None and (head in edits or embedding in edits)
        left_out = self.weights.left_out(apart)
        part = self._part(key for key in skeleton.outer_parameters() if key not in left_out)
        if head is None or not skeleton.tied:
            return part
        site = self.choices[head].site
        if apart:
            own, row = self._dense(embedding), self._kept_row(head)
            if head in edits:
                new = renew(self.config, site, edits[head], own, None, own.dtype)
                row = new.row(site, Held.of(own))
            if embedding not in part.tensors or not torch.equal(own, part.tensors[embedding]):
                part.tensors[f"{head}.weight"] = own
                part.ledger.append(row)
                part.remarks.append(f"{head} was tied to the input embedding; each has a weight of its own now")
                return part
        part.ledger.append(tied_row(site, skeleton.dtype, self.choices[head].reason))
        return part

    def _carry(self, part: Part, key: str) -> None:
        """Put a parameter into `part`, with its new value where it gets one."""
        weights, sites = self.weights, self.weights.sites(key)
        parts = [place for place in weights.parts_of(key) if place in self.edits]
        if parts and not any(site.name in self.edits for site in sites):
            part.keep(weights, key, self._kept_row, weights.parameter(key, self._edit_part))
        elif sites and any(site.name in self.edits for site in sites):
            self._carry_layers(part, key, sites)
        elif key in self.edits:
            self._carry_other(part, key)
        else:
            part.copy(weights, key, self._kept_row)

    def _carry_layers(self, part: Part, key: str, sites: list[LayerSite]) -> None:
        weights = self.weights
        whole = None if any(site.name in weights.stored for site in sites) else self._dense(key)
        for site in sites:
            packed = weights.packed(site.name)
            if site.name not in self.edits:
                part.keep_site(weights, site)
                part.ledger.append(self._kept_row(site.name))
                continue
            if packed is not None:
                value = packed.effective(torch.float32)
            else:
                value = weights.dense_matrix(site) if whole is None else site.view(whole)
            new = renew(self.config, site, self.edits[site.name], value, packed, weights.dtype_of(key))
            part.ledger.append(new.row(site, part.put(weights, site, new.weight)))
        part.join(sites)

    def _carry_other(self, part: Part, key: str) -> None:
        """A parameter that is no layer."""
        value = self._dense(key)
        found = change(key, self.edits[key], value, None, self.config.keeps_zeros)
        part.tensors[key] = value
        row = dense_row(key, "embedding" if value.ndim > 1 else "other", tuple(value.shape), value.dtype, "")
        notes = {**self.edits[key].notes, **found.notes()}
        part.ledger.append(row.model_copy(update={"status": "changed", "notes": notes}))

    def _edit_part(self, place: str, value: Tensor) -> Tensor:
        if place in self.edits:
            change(place, self.edits[place], value, None, self.config.keeps_zeros)
        return value

    def _dense(self, key: str) -> Tensor:
        """A parameter in the dtype that it has in the file, which nobody else holds."""
        return self.weights.parameter(key).to(self.weights.dtype_of(key))

    def _kept_row(self, name: str) -> LedgerRow:
        choice = self.choices[name]
        return held(self.weights, choice.site).row(choice.site, "kept", reason=choice.reason)


__all__ = ["edit_model", "edited", "takes_adapter", "unties", "with_own_adapter"]
