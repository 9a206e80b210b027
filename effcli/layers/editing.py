"""A pass over parameters on a network of either kind: chooses the layers, changes them, and tells what changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effcli.errors import NumericsError
from effcli.formats import Mask, Quantized
from effcli.layers.contract import ParameterPass
from effcli.layers.edits import Edit, Place, slices
from effcli.layers.layer import LayerSite
from effcli.layers.network import Held
from effcli.layers.result import ratio
from effcli.layers.selection import ignored
from effcli.reports.report import LedgerRow
from effcli.reports.units import count

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep


class Edited:
    """A network whose parameters a pass gives new values. See `effcli.layers.selection.Layered`.

    edits: by the names of the network's places, without those of layers that a pattern ignores.
    """

    def __init__(
        self,
        step: PassStep,
        sites: Sequence[LayerSite],
        places: Mapping[str, Place],
        parts: Callable[[LayerSite], Sequence[str]] = lambda site: (),
    ) -> None:
        """parts: the places of the tensors that a layer's parameter is made of, where it is none by itself.

        Raises what the pass says of parameters that do not fit.
        """
        assert isinstance(step.config, ParameterPass)
        self._untouched = step.config.untouched
        self._sites, self._parts = list(sites), parts
        out = {site.name for site in sites if ignored(site, step.config)}
        # A part goes out with the last of the layers that are made of it.
        kept = {part for site in sites if site.name not in out for part in parts(site)}
        out |= {part for site in sites if site.name in out for part in parts(site)} - kept
        edits = step.config.edits(places)
        self.edits: Mapping[str, Edit] = {name: edit for name, edit in edits.items() if name not in out}

    def sites(self) -> list[LayerSite]:
        return self._sites

    def left_alone(self, step: str, lm_head: bool) -> Mapping[str, str]:
        return {site.name: self._untouched for site in self._sites if not self._touched(site)}

    def _touched(self, site: LayerSite) -> bool:
        return site.name in self.edits or any(part in self.edits for part in self._parts(site))


@dataclass
class Changed:
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


def change(name: str, edit: Edit, value: Tensor, packed: Quantized | None = None, keeps_zeros: bool = False) -> Changed:
    """Give a parameter its new value, in place and a few rows at a time; packed: as it is stored, None of a dense one.

    keeps_zeros: those of a dense matrix are what was removed, if `edit` guesses so; codes may stand for 0 as well.
    Raises `NumericsError` where the new value is not finite.
    """
    new, found, mask = edit.open(value), Changed(), Mask.of(packed)
    keeps_zeros &= value.ndim > 1 and (mask is not None or (packed is None and edit.guessed))
    for rows in slices(value.shape):
        before = value[rows].float()
        after = new(before.clone(), rows)
        moved = after - before
        if keeps_zeros:
            gone = before == 0 if mask is None else ~mask.kept[rows]
            found.lost += float(moved[gone].square().sum())
            after, moved = after.masked_fill_(gone, 0), moved.masked_fill_(gone, 0)
        found.before += float(before.square().sum())
        found.moved += float(moved.square().sum())
        value[rows] = after.to(value.dtype)
        if not bool(torch.isfinite(value[rows]).all()):
            dtype = str(value.dtype).removeprefix("torch.")
            raise NumericsError(
                f"{name} would hold NaN or infinity in {dtype}",
                "what it is changed by is broken, or too large for the dtype",
            )
    return found


@dataclass(frozen=True)
class Renewed:
    """A layer with a new weight. weight: as it is stored; error: ‖W' - W‖² / ‖W‖² of the new one and the old one."""

    weight: Quantized | Tensor
    notes: Mapping[str, Any]
    error: float

    def row(self, site: LayerSite, held: Held) -> LedgerRow:
        """The ledger's line; held: how the new weight is stored."""
        weight = self.weight
        floating = isinstance(weight, Tensor) or weight.format.floating
        notes = dict(self.notes)
        return held.row(site, "changed" if floating else "compressed", weight_error=self.error, notes=notes)


def renew(
    config: ParameterPass, site: LayerSite, edit: Edit, value: Tensor, packed: Quantized | None, dtype: torch.dtype
) -> Renewed:
    """Give a layer its new weight.

    value: the old one (out, in), float32 where it was compressed, which is changed; packed: as it was stored, None of a
    dense one; dtype: of a dense weight.
    """
    before = value.clone() if config.keeps_format and packed is not None else None
    found, mask = change(site.name, edit, value, packed, config.keeps_zeros), Mask.of(packed)
    new = value if packed is None else config.store(value, packed)
    new = new.to(dtype) if isinstance(new, Tensor) else new
    notes: dict[str, Any] = {**edit.notes, **found.notes()}
    if mask is not None and config.keeps_zeros:
        new = mask.over(new)
    elif mask is not None:
        notes["filled"] = int((~mask.kept).sum())
    if before is None or isinstance(new, Tensor) or new.format.floating:
        return Renewed(new, notes, ratio(found.moved, found.before))
    stored = new.effective(torch.float32)
    rounding = float((stored - value).square().sum())
    notes |= {
        "rounding": float(f"{ratio(rounding, float(value.square().sum())):.4g}"),
        "rounding_to_change": round(ratio(rounding, found.moved), 4),
    }
    return Renewed(new, notes, ratio(float((stored - before).square().sum()), found.before))


def told(ledger: Iterable[LedgerRow]) -> list[str]:
    """What became of the zeros of a pruned network, and what rounding again did to the changes."""
    rows, remarks = [row for row in ledger if "change" in row.notes], []
    lost = [row.notes["lost"] for row in rows if "lost" in row.notes]
    if lost:
        remarks.append(
            f"zeros stay zeros: {sum(lost) / len(lost):.1%} of the changes is lost, by their squares, a mean over "
            f"{count(len(lost), 'layer')}"
        )
    filled = sum(row.notes.get("filled", 0) for row in rows)
    if filled:
        remarks.append(f"{count(filled, 'weight')} that were removed are no longer 0: keep_zeros=true leaves them at 0")
    again = [row.notes["rounding_to_change"] for row in rows if "rounding_to_change" in row.notes]
    if again:
        remarks.append(
            f"rounded again, {count(len(again), 'layer')} err by {sum(again) / len(again):.1%} of the squares of the "
            "changes, in the mean"
        )
    return remarks


__all__ = ["Changed", "Edited", "Renewed", "change", "renew", "told"]
