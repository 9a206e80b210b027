"""What a pass remembers of a layer's inputs: sums over the calibration tokens, never the tokens themselves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from effcli.errors import NumericsError

T = TypeVar("T")

# Tokens whose products are summed before they are added up in float32.
_CHUNK = 2048
# A Gram matrix is summed in three parts or more, of at least and at most so many rows.
_PARTS = 3
_NARROWEST = 64
_WIDEST = 256
# Rows of a candidate multiplied with it at once.
_ROWS = 1024


class Gram:
    """G = X Xᵀ of a layer's inputs, and the mean magnitude of each channel.

    The output error of any candidate Ŵ for W is tr((W - Ŵ) G (W - Ŵ)ᵀ), so a search over candidates costs no
    forward pass.

    magnitude_sum: float32 (in,), Σ|x|; tokens: how many were seen.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._mirrored = True
        self.magnitude_sum = torch.zeros(features, dtype=torch.float32, device=device)
        self.tokens = 0
        self._remembered: dict[Hashable, Any] = {}

    @staticmethod
    def of(matrix: Tensor, magnitude_sum: Tensor, tokens: int) -> Gram:
        """What was summed elsewhere: matrix float32 (in, in), magnitude_sum float32 (in,)."""
        gram = Gram.__new__(Gram)
        gram._sum, gram._mirrored = matrix, True
        gram.magnitude_sum, gram.tokens = magnitude_sum, tokens
        gram._remembered = {}
        return gram

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once for all layers that share these inputs; new inputs make it anew."""
        if key not in self._remembered:
            self._remembered[key] = make()
        found: T = self._remembered[key]
        return found

    def add(self, inputs: Tensor) -> None:
        """Take in inputs (..., in). Chunks are multiplied in the inputs' dtype, bf16 or float32, and summed in float32.

        float16 is multiplied in float32: a sum of squares soon passes its largest number, 65504.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        for start in range(0, rows.shape[0], _CHUNK):
            chunk = rows[start : start + _CHUNK]
            chunk = chunk.float() if chunk.dtype == torch.float16 else chunk
            for part in self._parts():
                total, left, right = self._sum[part, part.start :], chunk[:, part].t(), chunk[:, part.start :]
                if chunk.dtype == torch.float32:
                    total.addmm_(left, right)
                else:
                    total += (left @ right).float()
            # A product with ones: far faster than a sum over the rows of a wide matrix.
            self.magnitude_sum += torch.ones(chunk.shape[0], device=chunk.device) @ chunk.abs().float()
        self._mirrored = False
        self._remembered.clear()
        self.tokens += rows.shape[0]

    def add_patches(self, patches: Tensor) -> None:
        """Take in patches (tokens, in) of inputs that `see` is shown whole."""
        self.add(patches)

    def see(self, inputs: Tensor) -> None:
        """Look at the inputs of a convolution as they come, of all its groups; nothing of them is kept here."""

    def _parts(self) -> list[slice]:
        """G is symmetric: rows of each part are summed from its diagonal on, which saves a third to a half."""
        width = min(max(-(-self._sum.shape[0] // _PARTS), _NARROWEST), _WIDEST)
        return [slice(start, start + width) for start in range(0, self._sum.shape[0], width)]

    @property
    def matrix(self) -> Tensor:
        """G, float32 (in, in), summed over the tokens."""
        if not self._mirrored:
            for part in self._parts():
                self._sum[part.stop :, part] = self._sum[part, part.stop :].t()
            self._mirrored = True
        return self._sum

    @property
    def magnitude(self) -> Tensor:
        """Mean |x| of each channel, float32 (in,)."""
        return self.magnitude_sum / max(self.tokens, 1)

    def check_finite(self, name: str) -> None:
        """Raise `NumericsError` when the inputs of layer `name` held NaN or infinity."""
        if not torch.isfinite(self._sum.diagonal()).all():
            raise NumericsError(
                f"the inputs of {name} are NaN or infinite on the calibration data",
                "the checkpoint overflows in its own dtype or is damaged; check it with `effcli eval`",
            )

    def rescaled(self, scale: Tensor) -> Gram:
        """The Gram matrix of the inputs divided by scale (in,)."""
        inverse = 1.0 / scale.float()
        matrix = (self.matrix * inverse.unsqueeze(1)).mul_(inverse)
        return Gram.of(matrix, self.magnitude_sum * inverse, self.tokens)

    def working(self) -> Tensor:
        """G in the dtype that multiplies fastest here: for ranking candidates, where three digits are enough."""
        gram = self.matrix
        fast = gram.is_cuda or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return gram.to(torch.bfloat16) if fast else gram

    def output_energy(self, difference: Tensor, quick: bool = False) -> float:
        """tr(D G Dᵀ) / tokens for D (out, in): the mean squared norm of D x over the calibration tokens.

        quick: multiply in `working`'s dtype, right to about three digits unless the terms cancel.
        """
        gram = self.working() if quick else self.matrix
        total = 0.0
        for start in range(0, difference.shape[0], _ROWS):
            rows = difference[start : start + _ROWS].float()
            product = (rows.to(gram.dtype) @ gram).float()
            total += float(product.mul_(rows).sum(1).sum(dtype=torch.float64))
        return total / max(self.tokens, 1)


class GroupedGram:
    """The Gram matrices of the groups of one convolution, summed side by side.

    matrices: float32 (groups, in, in); magnitude_sums: float32 (groups, in); tokens: how many each group has seen.
    """

    def __init__(self, groups: int, features: int) -> None:
        self.matrices = torch.zeros(groups, features, features)
        self.magnitude_sums = torch.zeros(groups, features)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Take in inputs float32 (groups, tokens, in)."""
        self.matrices.baddbmm_(inputs.mT, inputs)
        self.magnitude_sums += inputs.abs().sum(1)
        self.tokens += inputs.shape[1]

    def each(self) -> tuple[Gram, ...]:
        """One Gram per group."""
        return tuple(
            Gram.of(matrix, sums, self.tokens) for matrix, sums in zip(self.matrices, self.magnitude_sums, strict=True)
        )


class Observers:
    """A pass's own observers of the groups of one convolution, side by side."""

    def __init__(self, observers: Sequence[Gram]) -> None:
        self._observers = tuple(observers)

    @property
    def tokens(self) -> int:
        return self._observers[0].tokens

    def see(self, inputs: Tensor) -> None:
        """Show the inputs, as they come and once for all groups, to the first group's observer."""
        self._observers[0].see(inputs)

    def add(self, inputs: Tensor) -> None:
        """Take in patches float32 (groups, tokens, in) of inputs that were seen."""
        for observer, part in zip(self._observers, inputs, strict=True):
            observer.add_patches(part)

    def each(self) -> tuple[Gram, ...]:
        """One observer per group."""
        return self._observers
