"""What is gathered of a layer's inputs: sums over the calibration tokens, and no more than a pass asks for."""

from __future__ import annotations

import copy
import enum
import functools
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from effcli.errors import NumericsError, UnsupportedError
from effcli.layers.ranges import Observer

T = TypeVar("T")

# Tokens whose products are summed before they are added up in float32.
_CHUNK = 2048
# A Gram matrix is summed in three parts or more, of at least and at most so many rows.
_PARTS = 3
_NARROWEST = 64
_WIDEST = 256
# Rows of a candidate multiplied with it at once.
_ROWS = 1024
# Products that take more than a moment.
_MUCH = 1 << 28
# Inputs that a sample keeps.
_KEPT = 128


class Needs(enum.Flag):
    """What a pass must be given besides the weights. Flags combine; layers that read one input share what is gathered.

    The flags up to VALUES, and MEANS, are sums over the inputs of a layer, which `Statistics` holds.
    """

    NOTHING = 0
    NORMS = enum.auto()  # Σ x² of each input channel
    NONZERO = enum.auto()  # the share of inputs other than 0, by channel
    GRAM = enum.auto()  # X Xᵀ, and the mean |x| of each input channel
    EXTREMES = enum.auto()  # the least and the largest input of each channel
    SAMPLE = enum.auto()  # some of the inputs themselves
    VALUES = enum.auto()  # a histogram of all inputs
    GRADIENTS = enum.auto()  # Σ ∂L/∂W over the samples of the calibration data, L the loss of one
    SQUARED_GRADIENTS = enum.auto()  # Σ (∂L/∂W)² over the samples
    INPUTS = enum.auto()  # the calibration inputs of the network, for a pass that runs it
    DENSE = enum.auto()  # the network before its weights were first compressed, for a pass that compares with it
    ORIGINAL = enum.auto()  # the network as the run found it, for a pass that trains
    LABELS = enum.auto()  # the classes of the calibration inputs, for a pass that trains
    MEANS = enum.auto()  # the mean of each input channel
    INFLUENCE = enum.auto()  # how much each block turns the hidden states, for a pass that removes blocks

    @property
    def observes(self) -> bool:
        """Whether single layers or blocks must be looked at."""
        return bool(self.statistics | self.gradients | (self & Needs.INFLUENCE))

    @property
    def statistics(self) -> Needs:
        """What is asked for of the inputs of single layers."""
        return self & functools.reduce(operator.or_, (*_SUMS, Needs.GRAM, Needs.SAMPLE, Needs.VALUES))

    @property
    def gradients(self) -> Needs:
        """What is asked for of gradients."""
        return self & (Needs.GRADIENTS | Needs.SQUARED_GRADIENTS)


# Where sums stand that are no matrices.
_SUMS = {
    Needs.NORMS: ("_squares",),
    Needs.MEANS: ("_sums",),
    Needs.NONZERO: ("_nonzero",),
    Needs.EXTREMES: ("_low", "_high"),
}


class Gradients:
    """What the losses of single samples say of one weight: Σ ∂L/∂W and Σ (∂L/∂W)², float32 (out, in).

    needs: which of the two are summed up.
    """

    def __init__(self, shape: tuple[int, int], needs: Needs, device: torch.device | str = "cpu") -> None:
        self.needs = needs.gradients
        self.samples = 0
        self._sums = {need: torch.zeros(shape, device=device) for need in self.needs}
        self._sample = torch.zeros(shape, device=device)

    @staticmethod
    def of(sums: Mapping[Needs, Tensor], samples: int) -> Gradients:
        """What was summed up elsewhere."""
        made = Gradients((0, 0), Needs.NOTHING)
        made._sums, made.samples = dict(sums), samples
        for need in sums:
            made.needs |= need
        return made

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Take in inputs (..., in) and gradients at the outputs (..., out) of the sample at hand."""
        rows = gradients.reshape(-1, gradients.shape[-1]).float()
        self._sample.addmm_(rows.t(), inputs.reshape(-1, inputs.shape[-1]).float())

    def add_gradient(self, gradient: Tensor) -> None:
        """Take in ∂L/∂W (out, in) of the sample at hand."""
        self._sample += gradient

    def end_sample(self, samples: int = 1) -> None:
        """The next inputs are those of another sample. samples: how many they were together, without squares."""
        for need, total in self._sums.items():
            total += self._sample if need is Needs.GRADIENTS else self._sample.square()
        self._sample.zero_()
        self.samples += samples

    @property
    def sums(self) -> Mapping[Needs, Tensor]:
        """By what they are sums of, float32 (out, in)."""
        return self._sums

    def scaled(self, factor: Tensor) -> Gradients:
        """Those of a weight divided by factor, which broadcasts with (out, in): ∂L/∂(W / f) = f · ∂L/∂W."""
        powers = {Needs.GRADIENTS: factor, Needs.SQUARED_GRADIENTS: factor.square()}
        return Gradients.of({need: total * powers[need] for need, total in self._sums.items()}, self.samples)

    def chunk(self, count: int) -> list[Gradients]:
        """Equal parts of the rows."""
        parts = {need: total.chunk(count) for need, total in self._sums.items()}
        return [Gradients.of({need: part[k] for need, part in parts.items()}, self.samples) for k in range(count)]

    def check_finite(self, name: str) -> None:
        """Raise `NumericsError` when those of layer `name` are NaN or infinite."""
        if not all(bool(torch.isfinite(total).all()) for total in self._sums.values()):
            raise NumericsError(
                f"the gradients of {name} are NaN or infinite on the calibration data",
                "the checkpoint overflows or is damaged; check it with `effcli eval`",
            )


class Statistics:
    """What was gathered of the inputs of a layer, or of several that read the same.

    needs: what is gathered; the property of anything else raises `ValueError`. tokens: how many inputs were seen.
    """

    def __init__(self, features: int, needs: Needs = Needs.GRAM, device: torch.device | str = "cpu") -> None:
        self.needs = needs
        self.tokens = 0
        self._gram = _Gram(features, device) if Needs.GRAM in needs else None
        self._squares = torch.zeros(features, device=device)
        self._sums = torch.zeros(features, device=device)
        self._nonzero = torch.zeros(features, device=device)
        self._low, self._high = torch.zeros(features, device=device), torch.zeros(features, device=device)
        self._kept: list[Tensor] = []
        self._stride = 1
        self._values = Observer("inputs")
        self._finite = True
        self._gradients: Gradients | None = None
        self._remembered: dict[Hashable, Any] = {}

    @staticmethod
    def of(matrix: Tensor, magnitude_sum: Tensor, tokens: int) -> Statistics:
        """A Gram matrix that was summed elsewhere: matrix float32 (in, in), magnitude_sum float32 (in,)."""
        made = Statistics(len(magnitude_sum), Needs.NOTHING, matrix.device)
        made.needs, made.tokens = Needs.GRAM, tokens
        made._gram = _Gram.of(matrix, magnitude_sum)
        return made

    def tensors(self) -> dict[str, Tensor]:
        """All that was gathered but for a histogram, to be kept elsewhere; `read` makes it statistics again."""
        found = {"tokens": torch.tensor(self.tokens)}
        if self._gram is not None:
            found |= {"gram": self.matrix, "magnitudes": self._gram.magnitudes}
        for need, names in _SUMS.items():
            if need in self.needs:
                found |= {name: getattr(self, name) for name in names}
        return found | ({"_kept": self.sample} if Needs.SAMPLE in self.needs else {})

    @staticmethod
    def read(tensors: Mapping[str, Tensor], needs: Needs) -> Statistics:
        """What `tensors` returned of statistics that gathered `needs`."""
        made = Statistics(0, Needs.NOTHING)
        made.needs, made.tokens = needs & ~Needs.VALUES, int(tensors["tokens"])
        if "gram" in tensors:
            made._gram = _Gram.of(tensors["gram"], tensors["magnitudes"])
        for name in (name for names in _SUMS.values() for name in names if name in tensors):
            setattr(made, name, tensors[name])
        made._kept = [tensors["_kept"]] if "_kept" in tensors else []
        return made

    def add(self, inputs: Tensor) -> None:
        """Take in inputs (..., in)."""
        self.see(inputs)
        self.add_patches(inputs)

    def see(self, inputs: Tensor) -> None:
        """Count the inputs of a convolution as they come: its patches hold some of them several times, and padding."""
        if Needs.VALUES not in self.needs:
            return
        # NaN and infinity are left to `check_finite`, which knows the layer.
        self._finite &= bool(inputs.isfinite().all())
        if self._finite:
            self._values.add(inputs)

    def add_patches(self, patches: Tensor) -> None:
        """Take in patches (..., in) of inputs that `see` was shown."""
        rows = patches.reshape(-1, patches.shape[-1])
        if self._gram is not None:
            self._gram.add(rows)
        elif Needs.NORMS in self.needs:
            self._squares += rows.float().square().sum(0)
        if Needs.MEANS in self.needs:
            self._sums += rows.float().sum(0)
        if Needs.NONZERO in self.needs:
            self._nonzero += (rows != 0).sum(0)
        if Needs.EXTREMES in self.needs and len(rows):
            # Along the rows torch finds both at once many times slower.
            self._low = torch.minimum(self._low, rows.amin(0).float())
            self._high = torch.maximum(self._high, rows.amax(0).float())
        if Needs.SAMPLE in self.needs and len(rows):
            self._keep(rows)
        self._remembered.clear()
        self.tokens += len(rows)

    def _keep(self, rows: Tensor) -> None:
        while self.tokens + len(rows) > _KEPT * self._stride:
            self._stride *= 2
            self._kept = [self.sample[::2].clone()]
        self._kept.append(rows[-self.tokens % self._stride :: self._stride].float())

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once for all layers that share these inputs; new inputs make it anew."""
        if key not in self._remembered:
            self._remembered[key] = make()
        found: T = self._remembered[key]
        return found

    def _check(self, wanted: Needs) -> None:
        if wanted not in self.needs:
            raise ValueError(f"a pass reads {wanted.name} and does not ask for it in `needs`")

    @property
    def gram(self) -> _Gram:
        if self._gram is None:
            raise ValueError("a pass reads GRAM and does not ask for it in `needs`")
        return self._gram

    @property
    def matrix(self) -> Tensor:
        """G = X Xᵀ, float32 (in, in), summed over the tokens."""
        return self.gram.matrix

    @property
    def magnitude(self) -> Tensor:
        """Mean |x| of each channel, float32 (in,)."""
        return self.gram.magnitudes / max(self.tokens, 1)

    @property
    def squares(self) -> Tensor:
        """Σ x² of each channel over the tokens, float32 (in,)."""
        if self._gram is not None:
            return self._gram.total.diagonal()
        self._check(Needs.NORMS)
        return self._squares

    @property
    def mean(self) -> Tensor:
        """The mean of each channel over the tokens, float32 (in,)."""
        self._check(Needs.MEANS)
        return self._sums / max(self.tokens, 1)

    @property
    def nonzero(self) -> Tensor:
        """The share of the tokens whose input is not 0, by channel, float32 (in,) in [0, 1]."""
        self._check(Needs.NONZERO)
        return self._nonzero / max(self.tokens, 1)

    @property
    def low(self) -> Tensor:
        """The least input of each channel, float32 (in,), or 0 where all are above."""
        self._check(Needs.EXTREMES)
        return self._low

    @property
    def high(self) -> Tensor:
        """The largest input of each channel, float32 (in,), or 0 where all are below."""
        self._check(Needs.EXTREMES)
        return self._high

    @property
    def peak(self) -> Tensor:
        """max |x| of each channel, float32 (in,)."""
        return torch.maximum(-self.low, self.high)

    @property
    def sample(self) -> Tensor:
        """Every k-th of all inputs from the first on, float32 (n, in), k the least power of two that leaves n ≤ 128."""
        self._check(Needs.SAMPLE)
        return torch.cat(self._kept) if self._kept else self._low.new_zeros(0, len(self._low))

    @property
    def values(self) -> Observer:
        """The histogram of all inputs."""
        self._check(Needs.VALUES)
        return self._values

    def with_gradients(self, gradients: Gradients) -> Statistics:
        """The same of one layer, with its gradients."""
        made = copy.copy(self)
        made._gradients, made._remembered = gradients, {}
        return made

    @property
    def gradients(self) -> Gradients:
        """The gradients of the layer's weight as the pass is shown it."""
        if not self.needs.gradients:
            raise ValueError("a pass reads gradients and does not ask for them in `needs`")
        if self._gradients is None:
            raise UnsupportedError(
                "a pass asks for gradients, which are not gathered where its options are searched for",
                "give it options without `auto`",
            )
        return self._gradients

    @property
    def gradient(self) -> Tensor:
        """Σ ∂L/∂W over the samples, float32 (out, in); times W it is the loss's first-order change without a weight."""
        return self._of_gradients(Needs.GRADIENTS)

    @property
    def squared_gradient(self) -> Tensor:
        """Σ (∂L/∂W)² over the samples, float32 (out, in); times W² it is the sum of squares of W ∘ ∂L/∂W."""
        return self._of_gradients(Needs.SQUARED_GRADIENTS)

    def _of_gradients(self, wanted: Needs) -> Tensor:
        self._check(wanted)
        return self.gradients.sums[wanted]

    def with_rows_divided(self, factor: Tensor) -> Statistics:
        """The same for a weight whose rows were divided by factor (out,); inputs know nothing of it."""
        return self if self._gradients is None else self.with_gradients(self._gradients.scaled(factor.unsqueeze(1)))

    def check_finite(self, name: str) -> None:
        """Raise `NumericsError` when the inputs of layer `name` held NaN or infinity."""
        sums = [self._low, self._high, self._squares] if self._gram is None else [self._gram.total.diagonal()]
        if not self._finite or not all(bool(torch.isfinite(values).all()) for values in sums):
            raise NumericsError(
                f"the inputs of {name} are NaN or infinite on the calibration data",
                "the checkpoint overflows in its own dtype or is damaged; check it with `effcli eval`",
            )

    def rescaled(self, scale: Tensor) -> Statistics:
        """The statistics of the inputs divided by scale (in,), positive; without the histogram, which cannot follow."""
        inverse = 1.0 / scale.float()
        made = Statistics(len(scale), Needs.NOTHING, scale.device)
        made.needs, made.tokens = self.needs & ~Needs.VALUES, self.tokens
        if self._gram is not None:
            matrix = (self.matrix * inverse.unsqueeze(1)).mul_(inverse)
            made._gram = _Gram.of(matrix, self.gram.magnitudes * inverse)
        made._squares, made._nonzero = self._squares * inverse.square(), self._nonzero
        made._sums = self._sums * inverse
        made._low, made._high = self._low * inverse, self._high * inverse
        made._kept, made._stride = [rows * inverse for rows in self._kept], self._stride
        # The weight is multiplied by what its inputs are divided by.
        made._gradients = None if self._gradients is None else self._gradients.scaled(inverse)
        return made

    def working(self) -> Tensor:
        """G in the dtype that multiplies fastest here: for ranking candidates, where three digits are enough."""
        return self.matrix.to(fastest(self.matrix.device))

    def output_energy(self, difference: Tensor, quick: bool = False) -> float:
        """tr(D G Dᵀ) / tokens for D (out, in): the mean squared norm of D x over the calibration tokens.

        quick: where there is much to multiply, do it in `working`'s dtype, right to about three digits unless the terms
        cancel.
        """
        gram = self.working() if quick and difference.numel() * difference.shape[1] > _MUCH else self.matrix
        total = 0.0
        for start in range(0, difference.shape[0], _ROWS):
            rows = difference[start : start + _ROWS].float()
            product = (rows.to(gram.dtype) @ gram).float()
            total += float(product.mul_(rows).sum(1).sum(dtype=torch.float64))
        return total / max(self.tokens, 1)


def fastest(device: torch.device) -> torch.dtype:
    """The dtype that multiplies fastest on `device`, for products of which three digits are enough."""
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


class _Gram:
    """G = X Xᵀ and Σ|x|. The output error of a candidate Ŵ for W is tr((W - Ŵ) G (W - Ŵ)ᵀ), at no forward pass.

    total: float32 (in, in), below the diagonal filled in by `matrix`; magnitudes: float32 (in,).
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.magnitudes = torch.zeros(features, dtype=torch.float32, device=device)
        self._mirrored = True

    @staticmethod
    def of(total: Tensor, magnitudes: Tensor) -> _Gram:
        """What was summed elsewhere."""
        made = _Gram(0)
        made.total, made.magnitudes = total, magnitudes
        return made

    def add(self, rows: Tensor) -> None:
        """Take in rows (tokens, in). Chunks are multiplied in their dtype, bf16 or float32, and summed in float32.

        float16 is multiplied in float32: a sum of squares soon passes its largest number, 65504.
        """
        for start in range(0, rows.shape[0], _CHUNK):
            chunk = rows[start : start + _CHUNK]
            chunk = chunk.float() if chunk.dtype == torch.float16 else chunk
            for part in self._parts():
                total, left, right = self.total[part, part.start :], chunk[:, part].t(), chunk[:, part.start :]
                if chunk.dtype == torch.float32:
                    total.addmm_(left, right)
                else:
                    total += (left @ right).float()
            # A product with ones: far faster than a sum over the rows of a wide matrix.
            self.magnitudes += torch.ones(chunk.shape[0], device=chunk.device) @ chunk.abs().float()
        self._mirrored = False

    def _parts(self) -> list[slice]:
        """G is symmetric: rows of each part are summed from its diagonal on, which saves a third to a half."""
        width = min(max(-(-self.total.shape[0] // _PARTS), _NARROWEST), _WIDEST)
        return [slice(start, start + width) for start in range(0, self.total.shape[0], width)]

    @property
    def matrix(self) -> Tensor:
        if not self._mirrored:
            for part in self._parts():
                self.total[part.stop :, part] = self.total[part, part.stop :].t()
            self._mirrored = True
        return self.total


class GroupedStatistics:
    """What is gathered of the inputs of the groups of one convolution, side by side. tokens: of each group."""

    def __init__(
        self, groups: int, features: int, needs: Needs = Needs.GRAM, device: torch.device | str = "cpu"
    ) -> None:
        # Gram matrices alone are summed by one batched product.
        self._matrices = torch.zeros(groups, features, features, device=device) if needs == Needs.GRAM else None
        self._magnitudes = torch.zeros(groups, features, device=device)
        self._parts = tuple(Statistics(features, needs, device) for _ in range(groups if self._matrices is None else 0))
        self.tokens = 0

    def see(self, inputs: Tensor) -> None:
        """Show the inputs of all groups as they come; what is counted of them stands with the first group."""
        if self._parts:
            self._parts[0].see(inputs)

    def add(self, patches: Tensor) -> None:
        """Take in patches float32 (groups, tokens, in) of inputs that were seen."""
        self.tokens += patches.shape[1]
        if self._matrices is None:
            for part, own in zip(self._parts, patches, strict=True):
                part.add_patches(own)
            return
        self._matrices.baddbmm_(patches.mT, patches)
        self._magnitudes += patches.abs().sum(1)

    def each(self) -> tuple[Statistics, ...]:
        """The statistics of each group."""
        if self._matrices is None:
            return self._parts
        sums = zip(self._matrices, self._magnitudes, strict=True)
        return tuple(Statistics.of(matrix, own, self.tokens) for matrix, own in sums)


__all__ = ["Gradients", "GroupedStatistics", "Needs", "Statistics", "fastest"]
