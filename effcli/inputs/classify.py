"""What a network's outputs are worth: accuracy, confusion, agreement with the original, and signal to noise.

Scores are sums over batches, so that any number of inputs is measured in the memory of one. Of equal logits the lowest
class counts as the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effcli.errors import DataError, NumericsError
from effcli.reports.report import Classification, ClassRow
from effcli.reports.units import count

_TOP = 5
# Beyond so many classes a report would be mostly confusion matrix.
_CONFUSION_CLASSES = 100


class Scores:
    """Sums over batches of outputs.

    classifier: whether the outputs are logits (n, classes). Those of other networks, such as an auto-encoder's
    reconstruction, may have any shape (n, ...), and only their signal to noise is measured.
    """

    def __init__(self, classifier: bool = True) -> None:
        self.classifier = classifier
        self._inputs = 0
        self._compared = 0
        self._agreeing = 0
        self._among_top = 0
        # Of each class: inputs taken for it rightly, inputs of it, inputs taken for it.
        self._counts: Tensor | None = None
        # (class, class it was taken for), for few classes.
        self._confusion: Tensor | None = None
        self._signal = 0.0
        self._noise = 0.0

    def add(self, outputs: Tensor, labels: Tensor | None = None, original: Tensor | None = None) -> None:
        """Count one batch: outputs (n, ...), labels int64 (n,), the original network's outputs (n, ...).

        `NumericsError` when outputs are NaN or infinite; `DataError` for a label that is none of the classes, and for
        an original of another shape.
        """
        if labels is not None and len(labels) != len(outputs):
            raise DataError(
                f"the network gives {count(len(outputs), 'output')} for {count(len(labels), 'input')}",
                "export the network so that each input gives one output",
            )
        _check_finite(outputs, "the network")
        self._inputs += len(outputs)
        if original is not None:
            if original.shape != outputs.shape:
                raise DataError(
                    f"the outputs have shape {tuple(outputs.shape)}, the original's {tuple(original.shape)}",
                    "compare with the network that this one was made from",
                )
            _check_finite(original, "the original network")
            self._compare(outputs, original)
        if labels is not None and self.classifier:
            self._count(outputs, labels)

    def result(self, names: Sequence[str] | None = None) -> Classification:
        """The figures so far; classes are called `names` (classes,), or by their numbers.

        Without labels there is no accuracy, without an original neither agreement nor signal to noise. `top5` is None
        for five classes or fewer, of which it says nothing; the confusion matrix is left out beyond a hundred. `sqnr`
        is infinite when all outputs equal the original's.
        """
        found: dict[str, float | None] = {}
        rows: tuple[ClassRow, ...] = ()
        matrix: tuple[tuple[int, ...], ...] = ()
        if self._compared:
            found["sqnr"] = decibels(self._signal, self._noise)
            found["agreement"] = self._agreeing / self._compared if self.classifier else None
        if self._counts is not None and (count := int(self._counts[1].sum())):
            classes = self._counts.shape[1]
            top1 = int(self._counts[0].sum()) / count
            found["top1"] = top1
            found["top1_stderr"] = math.sqrt(top1 * (1 - top1) / (count - 1)) if count > 1 else 0.0
            found["top5"] = self._among_top / count if classes > _TOP else None
            rows = class_rows(self._counts, names)
            if self._confusion is not None:
                matrix = tuple(tuple(row) for row in self._confusion.tolist())
        return Classification(images=self._inputs, classes=rows, confusion=matrix, **found)

    def _compare(self, outputs: Tensor, original: Tensor) -> None:
        self._compared += len(outputs)
        self._signal += float(original.double().square().sum())
        self._noise += float((original.double() - outputs.double()).square().sum())
        if self.classifier:
            self._agreeing += int((outputs.argmax(1) == original.argmax(1)).sum())

    def _count(self, logits: Tensor, labels: Tensor) -> None:
        classes = logits.shape[1]
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise DataError(
                f"a label is {int(wrong[0])}, the network's classes are 0 to {classes - 1}",
                "give labels of the classes that the network was trained on",
            )
        taken = logits.argmax(1)
        places = (labels[taken == labels], labels, taken)
        counts = torch.stack([torch.bincount(place, minlength=classes) for place in places])
        self._counts = counts if self._counts is None else self._counts + counts
        if classes <= _CONFUSION_CLASSES:
            pairs = torch.bincount(labels * classes + taken, minlength=classes * classes)
            confusion = pairs.view(classes, classes)
            self._confusion = confusion if self._confusion is None else self._confusion + confusion
        self._among_top += int((ranks(logits, labels) < _TOP).sum())


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the right one, int64 (n,): logits (n, classes), labels int64 (n,)."""
    right = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > right) | ((logits == right) & lower)).sum(1)


def decibels(signal: float, noise: float) -> float:
    """10 log10 of two sums of squares; infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def class_rows(counts: Tensor, names: Sequence[str] | None = None) -> tuple[ClassRow, ...]:
    """Recall and precision of each class from counts (3, classes): rightly taken for it, of it, taken for it."""
    classes = counts.shape[1]
    if names is None:
        names = [str(k) for k in range(classes)]
    if len(names) != classes:
        raise DataError(f"{len(names)} names for {classes} classes", "give one name per class")
    right, images, taken = counts.tolist()
    return tuple(
        ClassRow(name=name, images=n, recall=hits / n if n else None, precision=hits / m if m else None)
        for name, hits, n, m in zip(names, right, images, taken, strict=True)
    )


def _check_finite(outputs: Tensor, whose: str) -> None:
    if not bool(outputs.isfinite().all()):
        raise NumericsError(
            f"the outputs of {whose} hold NaN or infinite values",
            "look for the layer of the largest error in the ledger",
        )
