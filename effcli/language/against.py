"""Hold a compressed checkpoint against its input: every tensor carried over bit for bit, or compressed.

Both are built as the class that the input's config names, and compared tensor by tensor: never more than one of each is
in memory. What may differ follows from the ledger of the run where there is one: layers that it took, by no more than
the error it measured, and inside the blocks norms and biases where a pass folded scales into them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from effcli.errors import EffcliError
from effcli.language.folding import Folds, distance
from effcli.language.weights import Weights, open_weights
from effcli.layers.layer import LayerSite
from effcli.layers.result import Progress
from effcli.platform.rehearsal import counted
from effcli.reports.against import Against
from effcli.reports.report import LedgerRow, Stage
from effcli.reports.units import count


def compare(
    path: Path,
    source: Path,
    stages: Sequence[Stage],
    trust_remote_code: bool = False,
    progress: Progress = lambda done, total: None,
) -> Against:
    """The tensors of the checkpoint `path` next to those of its input `source`.

    stages: of the run between the two; empty where nothing is known of it. progress: told of each tensor.
    """
    try:
        before, after = (open_weights(each, trust_remote_code, base=True) for each in (source, path))
        return _Comparison(before, after, stages).run(str(source), progress)
    except EffcliError as error:
        return Against(input=str(source), problem=error.cause)


class _Comparison:
    def __init__(self, before: Weights, after: Weights, stages: Sequence[Stage]) -> None:
        self.before = before
        self.after = after
        # Without a record of the run nothing inside the blocks is known to have been left alone.
        self.known = any(stage.ledger for stage in stages)
        self.moved, rows = _renumbered(stages, before, after)
        self.taken = {row.name for row in rows if row.status != "kept"}
        # Layers that lost channels, those of which nothing else is known to have changed, and those that are gone.
        self.cut = {row.name for row in rows if "shape_before" in row.notes}
        others = {row.name for row in rows if row.status != "kept" and "shape_before" not in row.notes}
        self.restored = {row.name for row in rows if "unrestored_error" in row.notes}
        self.only_cut = self.cut - others - self.restored
        self.removed = {row.name for row in rows if row.status == "removed"}
        self.folds = Folds(before, after, rows)
        self.outer = set(before.skeleton.outer_parameters())
        self.shapes = tuple(
            {name: value.shape for name, value in weights.skeleton.model.state_dict().items()}
            for weights in (before, after)
        )

    def run(self, source: str, progress: Progress) -> Against:
        network = type(self.before.skeleton.model).__name__
        problem = self._classes() or self._names() or self._carried()
        if problem:
            return Against(input=source, network=network, problem=problem)
        counts = {"equal": len(self.before.carried()), "compressed": 0, "changed": 0}
        names = self.before.skeleton.parameters()
        if self.before.skeleton.tied and not self.after.skeleton.tied:
            names.append(f"{self.before.skeleton.head}.weight")
        for number, name in enumerate(names):
            progress(number, len(names))
            if self.moved is not None and name.startswith(f"{self.before.skeleton.block_path}."):
                found = self._moved(name)
                if found not in counts:
                    return Against(input=source, network=network, problem=found)
                counts[found] += 1
                continue
            if self._gone(name):
                counts["changed"] += 1
                continue
            with counted(name):
                found = self._parameter(name)
            if found not in counts:
                return Against(input=source, network=network, problem=found)
            counts[found] += 1
        return Against(input=source, network=network, **counts)

    def _classes(self) -> str:
        """How the classes differ that the two configs name."""
        first, second = (list(w.skeleton.config.architectures or ()) for w in (self.before, self.after))
        if first != second:
            return f"its config names {second or 'no class'}, the input's {first or 'no class'}"
        first, second = ([type(w.skeleton.model).__name__] for w in (self.before, self.after))
        return f"it is built as {second[0]}, the input as {first[0]}" if first != second else ""

    def _names(self) -> str:
        """Which parameters one has and the other does not."""
        before, after = (set(weights.skeleton.parameters()) for weights in (self.before, self.after))
        if self.before.skeleton.tied and not self.after.skeleton.tied:
            # The embedding stays, the head is one of its own now.
            after.discard(f"{self.after.skeleton.head}.weight")
        if self.moved is not None:
            before = {new for new in map(self._now, before) if new}
        return _difference({name for name in before if not self._gone(name)}, after)

    def _now(self, name: str) -> str:
        """What a parameter of the input is called without the blocks that are gone; empty where it went with one."""
        path = self.before.skeleton.block_path
        if self.moved is None or not name.startswith(f"{path}."):
            return name
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        return f"{path}.{self.moved[int(number)]}.{rest}" if int(number) in self.moved else ""

    def _moved(self, name: str) -> str:
        """What became of a parameter of a block of a network that lost blocks."""
        new = self._now(name)
        if not new:
            return "changed"
        if any(site.name in self.after.stored for site in self.after.sites(new)):
            return "compressed"
        first, second = (_Matrices(weights, own).whole() for weights, own in ((self.before, name), (self.after, new)))
        if same(first, second):
            return "equal"
        taken = any(site.name in self.taken for site in self.after.sites(new)) or not self.after.sites(new)
        return "changed" if taken else _altered(new, first, second)

    def _gone(self, name: str) -> bool:
        """Whether the report says that the layer of a parameter was removed as a whole."""
        return name.rpartition(".")[0] in self.removed and name not in self.shapes[1]

    def _carried(self) -> str:
        """Which tensors that no parameter is made of are lost, new or altered."""
        before, after = self.before.carried(), self.after.carried()
        problem = _difference(set(before), set(after))
        if problem:
            return problem
        altered = [
            name for name in before if not same(self.before.checkpoint.read(name), self.after.checkpoint.read(name))
        ]
        return f"{count(len(altered), 'tensor')} altered, such as {altered[0]}" if altered else ""

    def _parameter(self, name: str) -> str:
        """What became of one parameter: equal, compressed, changed, or what is wrong with it."""
        if self.cut and self.shapes[0].get(name) != self.shapes[1].get(name):
            return self._shorter(name)
        sites = self.after.sites(name)
        packed = [site for site in sites if site.name in self.after.stored]
        if packed and all(self._same_packed(site.name) for site in packed) and len(packed) == len(sites):
            return "equal"
        before = _Matrices(self.before, name)
        after = _Matrices(self.after, name)
        if not packed and same(before.whole(), after.whole()):
            return "equal"
        if sites:
            found = {self._layer(site, before, after) for site in sites}
            return next((what for what in found if what not in _RANK), "") or max(found, key=_RANK.index)
        layer, _, own = name.rpartition(".")
        if name in self.taken:
            return "changed"
        if self._may_change(name) or (own == "bias" and layer in self.restored):
            return "changed"
        return _altered(name, before.whole(), after.whole())

    def _shorter(self, name: str) -> str:
        """What became of a parameter that lost channels, as of a parameter."""
        sites = self.after.sites(name)
        if any(site.name in self.after.stored for site in sites):
            return "compressed"
        whole = not sites and self.folds.scaled(name)
        if whole or any(site.name not in self.only_cut for site in sites):
            return "changed"
        before, after = (_Matrices(weights, name).whole() for weights in (self.before, self.after))
        return "changed" if is_part(after, before) else f"{name} is not a part of the input's"

    def _layer(self, site: LayerSite, before: _Matrices, after: _Matrices) -> str:
        """What became of one layer, as of a parameter."""
        packed = site.name in self.after.stored
        if packed and self._same_packed(site.name):
            return "equal"
        first, second = before.matrix(site), after.matrix(site)
        if not packed and site.name not in self.before.stored and same(first, second):
            return "equal"
        found = "compressed" if packed else "changed"
        if site.name in self.taken:
            return self._stray(site.name, first, second) or found
        outside = site.parameter in self.outer and site.name != self.before.skeleton.head
        if not self.known and (packed or not outside):
            return found
        if packed:
            return f"{site.name} is compressed otherwise than in the input, and the report says that it was kept"
        return _altered(f"{site.name}.weight", first, second)

    def _stray(self, layer: str, first: Tensor, second: Tensor) -> str:
        """What is wrong with a layer that was taken: that it lies further off than the run measured."""
        limit = self.folds.limit(layer)
        if limit is None:
            return ""
        dtype = self.before.skeleton.dtype
        found = distance(first.to(dtype).float(), second.float(), self.folds.columns(layer), self.folds.rows(layer))
        # NaN lies outside of every limit.
        if found <= limit:
            return ""
        return f"{layer} is not the input's: its weight lies {found:.2g} off, and at most {limit:.2g} by the report"

    def _same_packed(self, layer: str) -> bool:
        if layer not in self.before.stored or self.before.stored[layer] != self.after.stored[layer]:
            return False
        before, after = self.before.raw(layer), self.after.raw(layer)
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)

    def _may_change(self, name: str) -> bool:
        """Whether a parameter that is no layer may have other values."""
        return name not in self.outer and (not self.known or self.folds.scaled(name))


# Rows whose digests are taken at a time.
_ROWS = 256
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# From the least to the most that can become of a layer.
_RANK = ("equal", "changed", "compressed")


class _Matrices:
    """The layers of one parameter of a network, which is read once."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.weights = weights
        self.name = name
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """The parameter, dequantized where it is packed."""
        if self._whole is None:
            skeleton = self.weights.skeleton
            shared = skeleton.tied and self.name == f"{skeleton.head}.weight"
            self._whole = self.weights.parameter(skeleton.embedding if shared else self.name)
        return self._whole

    def matrix(self, site: LayerSite) -> Tensor:
        """One layer as (out, in): float32 when it is packed, else of the dtype that it has in the file."""
        packed = self.weights.packed(site.name)
        if packed is not None:
            return packed.effective(torch.float32)
        if any(other.name in self.weights.stored for other in self.weights.sites(self.name)):
            return self.weights.dense_matrix(site)
        return site.view(self.whole())


def _altered(name: str, before: Tensor, after: Tensor) -> str:
    if before.dtype != after.dtype:
        return f"{name} is {_dtype(after)} and was {_dtype(before)}"
    return f"{name} was altered, which no pass was to touch"


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)))


def is_part(part: Tensor, whole: Tensor) -> bool:
    """Whether `part` is `whole` without some entries along one axis, bit for bit.

    Where they differ along several axes only the number of axes and the sizes are compared.
    """
    if part.dtype != whole.dtype or part.ndim != whole.ndim:
        return False
    axes = [axis for axis in range(part.ndim) if part.shape[axis] != whole.shape[axis]]
    if any(part.shape[axis] > whole.shape[axis] for axis in axes) or len(axes) != 1:
        return len(axes) > 1
    wanted, left = (_digests(tensor.movedim(axes[0], 0)).tolist() for tensor in (part, whole))
    found, place = [], 0
    for digest in wanted:
        try:
            place = left.index(digest, place) + 1
        except ValueError:
            return False
        found.append(place - 1)
    return same(whole.index_select(axes[0], torch.tensor(found, dtype=torch.int64)), part)


def _digests(tensor: Tensor) -> Tensor:
    """A number for each entry of the first axis, int64 (n,), equal where the entries are equal bit for bit."""
    rows = tensor.reshape(len(tensor), math.prod(tensor.shape[1:])).contiguous().view(_INTEGERS[tensor.dtype.itemsize])
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=torch.Generator().manual_seed(0))
    return torch.cat([(part.long() * factors).sum(1) for part in torch.split(rows, _ROWS)])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _renumbered(
    stages: Sequence[Stage], before: Weights, after: Weights
) -> tuple[dict[int, int] | None, list[LedgerRow]]:
    """The block of `after` by that of `before`, and the rows of all stages; None where no stage removed blocks.

    Rows of stages before such a one are left out: their layers have other names by now.
    """
    moved: dict[int, int] | None = None
    rows: list[LedgerRow] = []
    for stage in stages:
        named = [row for row in stage.ledger if "block_before" in row.notes]
        if named:
            path = f"{after.skeleton.block_path}."
            now = {int(row.notes["block_before"]): int(row.name.removeprefix(path).partition(".")[0]) for row in named}
            known = {k: k for k in range(len(before.skeleton.blocks))} if moved is None else moved
            moved = {first: now[then] for first, then in known.items() if then in now}
            rows = []
        rows += stage.ledger
    return moved, rows


def _difference(before: set[str], after: set[str]) -> str:
    found = []
    for names, what in ((before - after, "lost"), (after - before, "new")):
        if names:
            found.append(f"{count(len(names), 'tensor')} {what}, such as {min(names)}")
    return ", ".join(found)
