"""A pass over parameters, carried out on a language model: block by block read, changed a few rows at a time, written.

Nothing runs through the network. In memory are the new tensors of one block and a few rows in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effcli.errors import NumericsError, UnfinishedError
from effcli.formats import Mask, Quantized
from effcli.language.journal import Journal
from effcli.language.ledger import tied_row
from effcli.language.open_block import Part, held
from effcli.language.parts import OUTSIDE, join, part_name, write_part
from effcli.language.sweep import fingerprint
from effcli.language.weights import Weights, open_weights
from effcli.layers.contract import ParameterPass
from effcli.layers.edits import Edit, slices
from effcli.layers.layer import LayerSite
from effcli.layers.network import Held
from effcli.layers.result import PassResult, Progress, check_tensor, dense_row, ratio
from effcli.layers.selection import Choice, choose
from effcli.platform import memory
from effcli.platform.rehearsal import counted
from effcli.reports.report import LedgerRow
from effcli.reports.units import count

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
    weights = open_weights(source, trust_remote_code)
    run = _Editing(weights, step, progress)
    journal = Journal.open(work, fingerprint(weights.checkpoint, step, None))
    if journal.damage:
        raise UnfinishedError(journal.damage)
    return run.carry_out(journal, target)


class Edited:
    """A language model whose parameters a pass gives new values. See `effcli.layers.selection.Layered`.

    edits: by the names of the model's places.
    """

    def __init__(self, weights: Weights, step: PassStep) -> None:
        assert isinstance(step.config, ParameterPass)
        self.weights = weights
        self._untouched = step.config.untouched
        self.edits: Mapping[str, Edit] = step.config.edits(weights.places())

    def sites(self) -> list[LayerSite]:
        return self.weights.skeleton.sites()

    def left_alone(self, step: str, lm_head: bool) -> Mapping[str, str]:
        return {site.name: self._untouched for site in self.sites() if not self._touched(site)}

    def _touched(self, site: LayerSite) -> bool:
        return site.name in self.edits or any(part in self.edits for part in self.weights.parts_of(site.parameter))

    @property
    def unties(self) -> bool:
        """Whether a head that shares the embedding's weight gets another one than the embedding."""
        skeleton = self.weights.skeleton
        if not skeleton.tied or skeleton.head is None:
            return False
        return (skeleton.head in self.edits) != (skeleton.embedding in self.edits)


@dataclass
class _Changed:
    """How much the new values of a parameter differ, as sums of squares.

    before: of the values as they were; moved: of what was added to them; lost: of what was to be added and was not, for
    a zero stays one.
    """

    before: float = 0.0
    moved: float = 0.0
    lost: float = 0.0

    def notes(self) -> dict[str, Any]:
        """The square of the change as a share of that of the weight, and what share of the change is lost."""
        lost = {"lost": round(ratio(self.lost, self.moved + self.lost), 6)} if self.lost else {}
        return {"change": float(f"{ratio(self.moved, self.before):.4g}"), **lost}


class _Editing:
    """One step on its way."""

    def __init__(self, weights: Weights, step: PassStep, progress: Progress) -> None:
        assert isinstance(step.config, ParameterPass)
        self.weights = weights
        self.skeleton = weights.skeleton
        self.config = step.config
        # Before any work: they may refuse.
        self.carried = weights.carried()
        edited = Edited(weights, step)
        self.choices: Mapping[str, Choice] = choose(edited, step)
        ignored = {name for name, choice in self.choices.items() if name in edited.edits and choice.config is None}
        self.edits = {name: edit for name, edit in edited.edits.items() if name not in ignored}
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
        result.remarks += _told(result.ledger)
        return result

    def _part(self, keys: Iterable[str]) -> Part:
        part = Part()
        for key in keys:
            self._carry(part, key)
        for name, tensor in part.tensors.items():
            check_tensor(tensor, name)
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
                row = self._row(site, own, self._changed(head, own))
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
            mask = Mask.of(packed)
            found = self._changed(site.name, value, packed)
            new = self._stored(site, value, packed, mask)
            part.put(weights, site, new)
            row, more = self._row(site, new, found), {}
            if isinstance(new, Quantized) and not new.format.floating:
                rounding = float((new.effective(torch.float32) - value).square().sum())
                more["rounding_to_change"] = round(ratio(rounding, found.moved), 4)
                row = row.model_copy(update={"weight_error": ratio(rounding, float(value.square().sum()))})
            if mask is not None and not self.config.keeps_zeros:
                more["filled"] = int((~mask.kept).sum())
            part.ledger.append(row.model_copy(update={"notes": {**row.notes, **more}}))
        part.join(sites)

    def _stored(
        self, site: LayerSite, value: Tensor, packed: Quantized | None, mask: Mask | None
    ) -> Quantized | Tensor:
        """The new weight of a layer, as it is to be stored; packed, mask: how the old one was, and what it kept."""
        new = value if packed is None else self.config.store(value, packed)
        if isinstance(new, Tensor):
            new = new.to(self.weights.dtype_of(site.parameter))
        return mask.over(new) if mask is not None and self.config.keeps_zeros else new

    def _row(self, site: LayerSite, new: Quantized | Tensor, found: _Changed) -> LedgerRow:
        """The ledger's line for a layer with a new weight."""
        floating = isinstance(new, Tensor) or new.format.floating
        notes = {**self.edits[site.name].notes, **found.notes()}
        return Held.of(new).row(site, "changed" if floating else "compressed", notes=notes)

    def _carry_other(self, part: Part, key: str) -> None:
        """A parameter that is no layer."""
        value = self._dense(key)
        found = self._changed(key, value)
        part.tensors[key] = value
        if value.ndim > 1:
            row = dense_row(key, "embedding", tuple(value.shape), value.dtype, "")
            notes = {**self.edits[key].notes, **found.notes()}
            part.ledger.append(row.model_copy(update={"status": "changed", "notes": notes}))

    def _edit_part(self, place: str, value: Tensor) -> Tensor:
        if place in self.edits:
            self._changed(place, value)
        return value

    def _changed(self, name: str, value: Tensor, packed: Quantized | None = None) -> _Changed:
        """Give a parameter its new value, in place; packed: as it is stored, None of a dense one.

        Where zeros are kept, those of a dense matrix are what was removed; the codes of others may stand for 0 as well.
        """
        new, found, mask = self.edits[name].open(value), _Changed(), Mask.of(packed)
        keeps = self.config.keeps_zeros and value.ndim > 1 and (packed is None or mask is not None)
        for rows in slices(value.shape):
            before = value[rows].float()
            after = new(before.clone(), rows)
            moved = after - before
            if keeps:
                gone = before == 0 if mask is None else ~mask.kept[rows]
                found.lost += float(moved[gone].square().sum())
                after, moved = after.masked_fill_(gone, 0), moved.masked_fill_(gone, 0)
            found.before += float(before.square().sum())
            found.moved += float(moved.square().sum())
            value[rows] = after.to(value.dtype)
        if not math.isfinite(found.moved):
            raise NumericsError(f"{name} would hold NaN or infinity", "the adapter is broken: train it again")
        return found

    def _dense(self, key: str) -> Tensor:
        """A parameter in the dtype that it has in the file, which nobody else holds."""
        return self.weights.parameter(key).to(self.weights.dtype_of(key))

    def _kept_row(self, name: str) -> LedgerRow:
        choice = self.choices[name]
        return held(self.weights, choice.site).row(choice.site, "kept", reason=choice.reason)


def _told(ledger: Iterable[LedgerRow]) -> list[str]:
    """What became of the zeros of a pruned network, and what rounding again did to the changes."""
    rows = [row for row in ledger if "change" in row.notes]
    told = []
    lost = [row.notes["lost"] for row in rows if "lost" in row.notes]
    if lost:
        told.append(
            f"zeros stay zeros: {sum(lost) / len(lost):.1%} of the changes is lost, by their squares, a mean over "
            f"{count(len(lost), 'layer')}"
        )
    filled = sum(row.notes.get("filled", 0) for row in rows)
    if filled:
        told.append(f"{count(filled, 'weight')} that were removed are no longer 0: keep_zeros=true leaves them at 0")
    again = [row.notes["rounding_to_change"] for row in rows if "rounding_to_change" in row.notes]
    if again:
        told.append(
            f"rounded again, {count(len(again), 'layer')} err by {sum(again) / len(again):.1%} of the squares of the "
            "changes, in the mean"
        )
    return told


__all__ = ["Edited", "edit_model"]
