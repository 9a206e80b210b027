"""What the method of a pass returned, checked once where the engine takes it: a wrong answer names who gave it.

Types and shapes are looked at wherever a pass is asked. Whether the numbers of a weight are finite is told where they
are restored anyway: NaN or infinity in one of them stands in their sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, NoReturn, TypeVar

import torch
from pydantic_core import PydanticSerializationError, to_json
from torch import Tensor

from effcli.errors import PluginError
from effcli.formats import Mask, Pattern, Quantized
from effcli.formats.base import Numbers
from effcli.formats.sparse import SparseWeight
from effcli.platform import registry

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A question to a pass: its method, and the layer or whatever else it is about, empty where it is about none."""

    options: object
    method: str
    about: str = ""

    def refuse(self, came: str, wanted: str) -> NoReturn:
        """Raise `PluginError` for an answer `came` where the contract has `wanted`."""
        kind = type(self.options)
        name, package = registry.offered_as(kind, registry.PASSES)
        who = f"the pass {name!r} of the package {package}" if name else f"the pass {kind.__name__}"
        who += f" of the package {package}" if package and not name else ""
        about = f" for {self.about}" if self.about else ""
        remedy = f"report it to those who make {package}" if package else f"mend `{kind.__name__}.{self.method}`"
        raise PluginError(f"{who} returned {came} from `{self.method}`{about}; it must return {wanted}", remedy)

    def expect(self, value: T, kind: type | UnionType, wanted: str) -> T:
        """`value`, which must be a `kind`."""
        if not isinstance(value, kind):
            self.refuse(described(value), wanted)
        return value

    def check_notes(self, notes: Any) -> None:
        """Refuse notes that are no mapping by name, or that no report can hold."""
        wanted = "notes that JSON can hold, by their names"
        if not isinstance(notes, Mapping) or not all(isinstance(key, str) for key in notes):
            self.refuse(f"notes that are {described(notes)}", wanted)
        for key, value in notes.items():
            try:
                to_json(value)
            except (PydanticSerializationError, ValueError, RecursionError):
                self.refuse(f"the note {key!r} that is {described(value)}", wanted)

    def check_weight(self, weight: Any, shape: tuple[int, ...]) -> None:
        """Refuse what is no weight of this `shape`: neither quantized nor a floating tensor."""
        wanted = f"a weight {shape}, floating or in a format"
        if not isinstance(weight, Quantized | Tensor):
            self.refuse(f"a weight that is {described(weight)}", wanted)
        if tuple(weight.shape) != shape or (isinstance(weight, Tensor) and not weight.is_floating_point()):
            self.refuse(described(weight), wanted)

    def check_mask(self, mask: Any, before: Mask | None, weight: Quantized | Tensor) -> None:
        """Refuse a mask that is none of `weight`, and a weight that no mask can go around where there is one.

        before: what earlier passes kept.
        """
        if mask is not None:
            self.expect(mask, Mask, "a mask that is a `Mask`, or None")
            kept, shape = mask.kept, tuple(weight.shape)
            if not isinstance(kept, Tensor) or kept.dtype != torch.bool or tuple(kept.shape) != shape:
                self.refuse(f"a mask that is {described(kept)}", f"one that is bool {shape}")
            self.expect(mask.pattern, Pattern, "a mask whose pattern is a `Pattern`")
            try:
                mask.pattern.check(kept)
            except ValueError as error:
                self.refuse(f"a mask that is not of its pattern {mask.pattern} ({error})", "one that is")
        removed = mask is not None or before is not None
        if removed and not isinstance(weight, Tensor | Numbers | SparseWeight):
            self.refuse(described(weight), "a weight in a format of numbers, for some of its weights are removed")

    def check_shift(self, shift: Any, rows: int | None) -> None:
        """Refuse what cannot be added to the bias of a layer of so many rows, None where it takes none."""
        if shift is None:
            return
        if rows is None:
            self.refuse("a shift of its bias", "none, for the layer has no bias")
        if not isinstance(shift, Tensor) or not shift.is_floating_point() or tuple(shift.shape) != (rows,):
            self.refuse(f"a shift that is {described(shift)}", f"a floating one ({rows},)")
        if not bool(torch.isfinite(shift).all()):
            self.refuse("a shift with NaN or infinity", "finite numbers")

    def check_finite(self, restored: Tensor, total: float = math.nan) -> None:
        """Refuse a weight, restored as a floating matrix, with NaN or infinity in it.

        total: any sum over functions of all its numbers, where one is known: nothing is looked at if that is finite.
        """
        if math.isfinite(total) or bool(torch.isfinite(restored.sum(dtype=torch.float32))):
            return
        count = restored.numel() - int(torch.isfinite(restored).sum())
        if count:
            self.refuse(f"a weight with {count:,} NaN or infinite numbers", "finite ones")

    def check_factor(self, found: Any, columns: int) -> tuple[Tensor, Mapping[str, Any]]:
        """A factor for each of `columns` input channels, and notes."""
        wanted = f"a factor, finite and above 0, for each of {columns} input channels, and notes"
        if not isinstance(found, tuple) or len(found) != 2:
            self.refuse(described(found), wanted)
        factor, notes = found
        if not isinstance(factor, Tensor) or not factor.is_floating_point() or tuple(factor.shape) != (columns,):
            self.refuse(described(factor), wanted)
        wrong = int((~(torch.isfinite(factor) & (factor > 0))).sum())
        if wrong:
            self.refuse(f"{wrong:,} factors that are NaN, infinite or not above 0", wanted)
        self.check_notes(notes)
        return factor, notes

    def check_loss(self, loss: Any, trains: bool) -> Tensor:
        """A loss, floating and a single number; trains: gradients are taken of it."""
        wanted = "a scalar tensor"
        if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.numel() != 1:
            self.refuse(described(loss), wanted)
        if trains and not loss.requires_grad:
            self.refuse("a tensor without a gradient", f"{wanted} that hangs on what is trained")
        return loss

    def check_measured(self, found: Any) -> tuple[float, float]:
        """Two numbers."""
        try:
            part, whole = found
            return float(part), float(whole)
        except (TypeError, ValueError, RuntimeError):
            self.refuse(described(found), "two numbers")


def described(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Quantized):
        return f"a weight {tuple(value.shape)} stored as {value.format}"
    return "None" if value is None else f"of the type {type(value).__name__}"


__all__ = ["Asked", "described"]
