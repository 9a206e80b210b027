"""What a plan asks of a language model, and what such a model consists of: from headers, no weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import PrivateAttr

from effcli.errors import SelectionError, UserError
from effcli.files.layout import Stored, adapter_in, keeping_standard
from effcli.formats import Dense, Packing, Sparse
from effcli.inputs import text
from effcli.inputs.options import Calibration
from effcli.inputs.tokens import longest_sequence
from effcli.language.adapting import taken
from effcli.language.coupling import coupled
from effcli.language.depth import depth
from effcli.language.editing import edited, takes_adapter, unties, with_own_adapter
from effcli.language.ledger import other_rows
from effcli.language.training import check_trainable
from effcli.language.weights import Weights, open_weights
from effcli.layers.contract import AdapterPass, AttachPass, CutPass, ParameterPass, TrainPass
from effcli.layers.cutting import offer
from effcli.layers.editing import Edited
from effcli.layers.edits import Edit, Place
from effcli.layers.layer import LayerSite
from effcli.layers.selection import Choice, Layered, needs_of
from effcli.layers.statistics import Needs
from effcli.layers.survey import Survey
from effcli.reports.units import count, size
from effcli.run.plan import FLOAT, Effort, Inspection, Row, forwards
from effcli.run.recipe import PassStep

# Numbers that a token leaves for the way back, as a share of the inputs and outputs of all layers: as measured.
_ALIVE = 1.2
# Numbers of each logit at the peak: the logits, those of tokens that are learned, what the loss makes of them, and the
# gradients of these; as measured.
_LOGITS = 6
# Bytes of the package peft, of what it imports, and of what freed memory leaves in pieces: as measured.
_PEFT = 100_000_000


class PlannedModel:
    """See `effcli.run.plan.Planned`. calibration: of the recipe, whose windows go through the blocks."""

    counted: ClassVar[tuple[str, float]] = ("TFLOP", 1e12)

    def __init__(self, weights: Weights, calibration: Calibration) -> None:
        self._weights = weights
        self._skeleton = weights.skeleton
        self._calibration = calibration
        self._formats: dict[str, Packing] = {
            site.name: weights.stored[site.name].format if site.name in weights.stored else self._dense(site)
            for site in self._skeleton.sites()
        }
        # Whether a step trains, with all blocks in memory.
        self._trains = False
        # The layers that a step wrote anew.
        self._taken: set[str] = set()
        # Whether a step gives a head that is tied a weight of its own.
        self._apart = False
        # Those whose columns the last step that cuts may remove.
        self._readers: list[LayerSite] = []
        # Numbers of the adapter that stands beside the weights, by layer.
        self._adapter: dict[str, int] = {}
        # The last step over parameters, and what it edits.
        self._last: tuple[PassStep, Edited] | None = None

    @property
    def at_a_time(self) -> str:
        return ", for the whole network in training" if self._trains else ", for one block and its statistics at a time"

    @property
    def weights(self) -> int:
        return self._skeleton.weights()

    def layered(self, step: PassStep) -> Layered:
        if isinstance(step.config, ParameterPass):
            return self._edited(step)
        return self._skeleton

    def _edited(self, step: PassStep) -> Edited:
        """What a pass over parameters edits, read once for all that is asked of a step."""
        if self._last is None or self._last[0] is not step:
            known = with_own_adapter(step, self._weights.checkpoint.path) if not self._adapter else step
            if takes_adapter(known):
                known = step.model_copy(update={"config": _Expected(ignore=step.config.ignore).of(self._adapter)})
            self._last = step, edited(self._weights, known)
        return self._last[1]

    def take(self, step: PassStep, choices: Mapping[str, Choice]) -> None:
        if isinstance(step.config, CutPass):
            for name, format in self._formats.items():
                if isinstance(format, Packing) and not isinstance(format, Dense):
                    raise UserError(
                        f"{name} is stored as {format} before {step.name}", "cut channels before compressing"
                    )
            groups = [depth(self._weights, choices)] if step.config.depth else coupled(self._weights)
            offered = offer(step.name, step.config, groups, choices)
            self._readers = [site for group in offered.groups for _, site in offered.readers(group)]
        if isinstance(step.config, AdapterPass):
            self._trains = True
            layers = taken(step.name, choices)
            self._adapter = {name: own.numbers(name, choices[name].site.shape) for name, own in layers.items()}
            return
        if isinstance(step.config, TrainPass):
            self._trains = True
            check_trainable(step.name, self._weights, [name for name, own in choices.items() if own.config is not None])
        if isinstance(step.config, ParameterPass):
            self._apart |= unties(self._weights, self._edited(step).edits)
            self._adapter = {}
        for name, choice in choices.items():
            self._formats[name] = choice.leaves(self._formats[name], self._dense(choice.site))
            if choice.config is not None:
                self._taken.add(name)

    def _dense(self, site: LayerSite) -> Dense:
        return Dense(self._weights.dtype_of(site.parameter))

    @property
    def nbytes(self) -> int:
        skeleton, weights = self._skeleton, self._weights
        apart = self._apart or skeleton.head in self._taken
        left_out = weights.left_out(apart)
        names = [name for name in skeleton.parameters() if name not in left_out]
        if skeleton.tied and apart:
            names.append(f"{skeleton.head}.weight")
        state = skeleton.model.state_dict()
        total = 0
        for name in names:
            sites = weights.sites(name)
            if sites:
                total += sum(map(self._nbytes, sites))
            else:
                total += state[name].numel() * weights.dtype_of(name).itemsize
        total += FLOAT * sum(self._adapter.values())
        return total + sum(entry.nbytes for entry in weights.carried().values())

    def _nbytes(self, site: LayerSite) -> int:
        if site.name not in self._taken:
            if site.name in self._weights.stored:
                return self._weights.packed_bytes(site.name)
            if self._skeleton.tied and not self._apart and site.name == self._skeleton.head:
                return 0
        return self._formats[site.name].nbytes(site.shape, self._dense(site).dtype.itemsize)

    def rows(self, choices: Iterable[Choice]) -> list[Row]:
        return [self._row(choice) for choice in choices] + list(map(Row.other, other_rows(self._weights)))

    def _row(self, choice: Choice) -> Row:
        site = choice.site
        format = str(self._formats[site.name])
        return Row.of(site, format, self._nbytes(site), status=choice.planned, reason=choice.reason)

    def remarks(self, step: PassStep, name: str) -> list[str]:
        found = []
        if step.needs and self._calibration.data is None:
            found.append("calibration text: the sample model's own; give text of your own domain with --calib FILE")
        obstacles = self._obstacles()
        if obstacles:
            layer, why = next(iter(obstacles.items()))
            found.append(
                f"{name}: effcli's own layout, which stock loaders refuse; no place in the standard format for "
                f"{count(len(obstacles), 'layer')}, such as {layer} ({why})"
            )
        return found

    @property
    def layout(self) -> str:
        obstacles = self._obstacles()
        if not obstacles:
            return ""
        layer, why = next(iter(obstacles.items()))
        others = f" and {len(obstacles) - 1} more" if len(obstacles) > 1 else ""
        lines = [
            "the output will load with effcli.load, not with transformers",
            f"  why: the standard layout has no place for {layer}{others}: {why}",
        ]
        kept = keeping_standard(set(obstacles.values()))
        if kept:
            lines.append(f"  what would keep it: {kept}")
        lines.append("  beside it: --export safetensors:dequantize=true writes dense weights for transformers")
        return "\n".join(lines)

    def _obstacles(self) -> dict[str, str]:
        """The layers that the standard format has no place for as things stand, and why."""
        kinds = {site.name: site.kind for site in self._skeleton.sites()}
        packed = {name: format for name, format in self._formats.items() if not isinstance(format, Dense)}
        layers = {name: Stored(format, kinds[name]) for name, format in packed.items()}
        return self._weights.obstacles({**layers, **self._weights.foreign})

    def effort(self, step: PassStep, choices: Mapping[str, Choice]) -> Effort:
        blocks = [self._skeleton.block_layers(k) for k in range(len(self._skeleton.blocks))]
        if not any(blocks):
            raise SelectionError(f"{self._skeleton.block_path} holds no layer", "this version compresses linear layers")
        if isinstance(step.config, ParameterPass):
            return Effort(0.0, self._rewritten(step, blocks))
        if isinstance(step.config, AdapterPass):
            return self._adapting(step.config, blocks)
        if isinstance(step.config, TrainPass):
            return self._training(step.config, choices, blocks)
        operations, memory, disk = 0.0, self._working(step, choices, blocks), 0
        if forwards(step, choices):
            operations, disk = self._operations(step, choices), 2 * self.states(self._skeleton.dtype)
        if isinstance(step.config, CutPass):
            disk += sum(site.columns**2 for site in self._readers if Needs.GRAM in step.needs) * FLOAT
            # The network with zeros for what goes, before it is cut.
            disk += self.nbytes if step.config.restoring is not None else 0
        if needs_of([choices]).gradients:
            made = _Gradients(self, choices, blocks)
            memory, disk = max(memory + made.held, made.memory), disk + made.disk
            operations += made.operations
        return Effort(operations, memory, disk)

    def _training(
        self, options: TrainPass, choices: Mapping[str, Choice], blocks: Sequence[Sequence[LayerSite]]
    ) -> Effort:
        """Of a training of the weights: the whole network in float32, and what `_steps` takes."""
        chosen = [choice.site for choice in choices.values() if choice.config is not None]
        if isinstance(options, AttachPass) and not options.trains_weights:
            trained = sum(site.rows for site in chosen)
        else:
            trained = _numbers(site for site in chosen if site.index is None and self._floating(site))
        held = FLOAT * (sum(map(_numbers, blocks)) + self.outer(1))
        return self._steps(options, held, trained, Needs.ORIGINAL in options.needs, 3, blocks)

    def _adapting(self, options: AdapterPass, blocks: Sequence[Sequence[LayerSite]]) -> Effort:
        """Of the training of an adapter: packed layers as they are, the rest in float32, and what `_steps` takes."""
        trained, held = sum(self._adapter.values()), self.outer(FLOAT) + _PEFT
        for site in (site for layers in blocks for site in layers):
            held += FLOAT * _numbers([site]) if self._floating(site) else self._nbytes(site)
        taught = Needs.ORIGINAL in options.needs and Needs.LABELS not in options.needs
        # Weights that stay need no gradient.
        return self._steps(options, held + FLOAT * trained, trained, taught, 2, blocks, 1 + options.alive)

    def _steps(
        self,
        options: TrainPass,
        held: int,
        trained: int,
        teachers: bool,
        ways: int,
        blocks: Sequence[Sequence[LayerSite]],
        beside: float = 1.0,
    ) -> Effort:
        """Of the steps of a training, with what a batch leaves behind in every block for the way back.

        held: bytes of the network; trained: numbers, each with a gradient, two moments of the optimizer and its best
        value; teachers: whether the original runs beside it, in float32; ways: how often a step multiplies with every
        weight; beside: what a token leaves in layers and beside them, as a multiple of what it leaves in layers. These
        are their inputs and outputs, and at the head its logits with what the loss makes of them.
        """
        weights = sum(map(_numbers, blocks)) + self.outer(1)
        samples = self._calibration.samples
        size = min(options.batch_size or self._calibration.batch_size, samples)
        tokens = size * self.length
        head: int = self._skeleton.model.get_parameter(self._skeleton.embedding).shape[0]
        left = [_ALIVE * beside * _widths(sites) for sites in blocks]
        alive = sum(left)
        if options.recomputes:
            # The states before each block, and what is in one of them.
            alive = max(left) + len(blocks) * self.states(torch.float32) / FLOAT / max(self.tokens, 1)
        states = tokens * (alive + (_LOGITS + 3 * teachers) * head)
        # A gradient, the best value, and the moments.
        kept = FLOAT * (1 + options.keep_best) + options.moment_bytes
        per_epoch = options.per_epoch(samples, self._calibration.batch_size)
        seen = options.total(per_epoch) * size * options.accumulation * self.length
        measured = (-(-options.total(per_epoch) // per_epoch) + 1) * options.measured_on(samples) * self.length
        ways += options.recomputes
        operations = 2.0 * weights * (seen * (ways + teachers) + measured * (1 + teachers))
        memory = held + int(FLOAT * (teachers * weights + states) + kept * trained)
        # Two snapshots, each of the weights as they are in place of their gradient.
        return Effort(operations, memory, int(2 * kept * trained))

    def _floating(self, site: LayerSite) -> bool:
        format = self._formats[site.name]
        return isinstance(format, Dense) or (isinstance(format, Sparse) and isinstance(format.values, Dense))

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return text.window_length(self._calibration, longest_sequence(self._skeleton.config))

    @property
    def tokens(self) -> int:
        """Calibration tokens, where the text has so many."""
        return self._calibration.samples * self.length

    def states(self, dtype: torch.dtype) -> int:
        """Bytes of the hidden states of all tokens at one place between the blocks."""
        config = self._skeleton.config.get_text_config()
        embedded: int = self._skeleton.model.get_parameter(self._skeleton.embedding).shape[-1]
        width: int = getattr(config, "hidden_size", embedded)
        return self.tokens * width * dtype.itemsize

    def outer(self, itemsize: int | None = None) -> int:
        """Bytes of what stands outside the blocks; itemsize: of a number, in the network's own dtype without it."""
        state = self._skeleton.model.state_dict()
        numbers: int = sum(state[name].numel() for name in self._skeleton.outer_parameters())
        return numbers * (itemsize or self._skeleton.dtype.itemsize)

    def _rewritten(self, step: PassStep, blocks: Sequence[Sequence[LayerSite]]) -> int:
        """Bytes of the largest block, or of what stands outside where something there gets a new value.

        An embedding and its head may be there at a time, to be compared.
        """
        names, inside = self._edited(step).edits, f"{self._skeleton.block_path}."
        outside = any(not name.startswith(inside) for name in names)
        largest = max(map(_numbers, blocks)) * self._skeleton.dtype.itemsize
        return max(largest, 2 * self.outer() * outside)

    def _working(self, step: PassStep, choices: Mapping[str, Choice], blocks: Sequence[Sequence[LayerSite]]) -> int:
        """The parts outside the blocks, the largest block, its float32 working set, Gram matrices and one batch.

        Of a Gram matrix there are two, for the inputs before and after their scales, and what the pass makes of it.
        """
        largest = max(blocks, key=_numbers)
        itemsize = self._skeleton.dtype.itemsize
        widest = max(site.rows * site.columns for site in largest)
        total = self.outer() + _numbers(largest) * itemsize + 5 * widest * FLOAT
        if forwards(step, choices):
            squares = {site.columns: site.columns**2 for site in largest}
            total += _numbers(largest) * FLOAT
            total += (2 * sum(squares.values()) + step.config.workspace * max(squares.values())) * FLOAT
            batch = self._calibration.batch_size * self.length
            total += 6 * batch * max(max(site.rows, site.columns) for site in largest) * itemsize
        return total

    def _operations(self, step: PassStep, choices: Mapping[str, Choice]) -> float:
        """Floating-point operations of the forwards over all tokens and of the Gram matrices."""
        sites = [choice.site for choice in choices.values()]
        forward, times = 2.0 * self.tokens * _numbers(sites), forwards(step, choices)
        # Layers of one parent module with inputs of one width share their input, which is close enough for an estimate.
        widths = {(site.name.rpartition(".")[0], site.columns) for site in sites}
        if isinstance(step.config, CutPass):
            restores = step.config.restoring is not None
            again = restores and self._calibration.inputs == "compressed"
            grams = restores + (Needs.GRAM in step.needs)
            gram = 2.0 * self.tokens * sum(site.columns**2 for site in self._readers)
            return forward * (times + again) + gram * grams
        gram = 2.0 * self.tokens * sum(columns**2 for _, columns in widths)
        again = self._calibration.inputs == "compressed" and bool(needs_of([choices]))
        return forward * (times + again) + gram * (1 + (Needs.GRAM in Survey(choices).needs))


class _Expected(ParameterPass):
    """An adapter that is not there yet: it changes the layers that it will be trained beside."""

    untouched: ClassVar[str] = "no adapter is trained beside it"

    _names: tuple[str, ...] = PrivateAttr(default=())

    def of(self, names: Iterable[str]) -> _Expected:
        self._names = tuple(names)
        return self

    def edits(self, places: Mapping[str, Place]) -> Mapping[str, Edit]:
        return {name: Edit(lambda value: lambda rows, where: rows) for name in self._names}


class _Gradients:
    """What gradients of the layers that a step takes add, as `effcli.language.backward.StoredGradients` makes them.

    blocks: the layers of each block.
    """

    def __init__(
        self, model: PlannedModel, choices: Mapping[str, Choice], blocks: Sequence[Sequence[LayerSite]]
    ) -> None:
        self._model = model
        self._blocks = blocks
        # Bytes of the sums of one weight.
        self._sums = len(needs_of([choices]).gradients) * FLOAT
        taken = {name for name, choice in choices.items() if choice.config is not None}
        inside = {site.name for sites in blocks for site in sites}
        # Weights that gradients are of, in each block and in the output head.
        self._taken = [_numbers(site for site in sites if site.name in taken) for sites in blocks]
        self._head = _numbers(choices[name].site for name in taken - inside)

    @property
    def operations(self) -> float:
        """A forward; once more through each block, and back; and for each weight that is taken its gradient."""
        numbers = 3 * sum(map(_numbers, self._blocks)) + sum(self._taken) + self._head
        return 2.0 * self._model.tokens * numbers

    @property
    def held(self) -> int:
        """Bytes of the sums of one block, while its layers are compressed."""
        return self._sums * max(*self._taken, self._head)

    @property
    def memory(self) -> int:
        """Bytes while they are made: of what stands outside the blocks, and of one block with all that a window leaves.

        Everything is float32, beside what the forwards of the pass hold already outside the blocks, and a weight has a
        sum for the sample at hand besides.
        """
        blocks = [
            FLOAT * (_numbers(sites) + 2 * self._model.length * _widths(sites)) + (self._sums + FLOAT) * taken
            for sites, taken in zip(self._blocks, self._taken, strict=True)
        ]
        return self._model.outer(FLOAT) + self._model.outer() + max(*blocks, (self._sums + FLOAT) * self._head)

    @property
    def disk(self) -> int:
        """Bytes at the peak: hidden states before each block, gradients before and behind one, and the sums.

        On the way back the states before a block are removed once its sums are written.
        """
        states, written, most = self._model.states(torch.float32), self._sums * self._head, 0
        for k in reversed(range(len(self._blocks))):
            written += self._sums * self._taken[k]
            most = max(most, (k + 3) * states + written)
        return most


def inspect(model: str, source: Path, trust_remote_code: bool = False) -> Inspection:
    """What the checkpoint in `source` consists of, which is called `model`."""
    weights = open_weights(source, trust_remote_code, base=True)
    skeleton, nbytes = weights.skeleton, weights.checkpoint.nbytes
    total = skeleton.weights()
    blocks = f"{count(len(skeleton.blocks), 'block')} ({skeleton.block_path})"
    remarks = [
        f"{skeleton.config.model_type}: {count(total, 'weight')} in {blocks}",
        f"{size(nbytes)} on disk, {8 * nbytes / total:.2f} bits per weight",
    ]
    if adapter_in(source) is not None:
        remarks.append("an adapter stands beside the weights: `--pass merge` adds it to them")
    if skeleton.tied:
        remarks.append(f"{skeleton.head} shares its weight with the input embedding")
    rows = PlannedModel(weights, Calibration()).rows(Choice(site, None) for site in skeleton.sites())
    return Inspection.of(model, rows, remarks, nbytes, total)


def _numbers(sites: Iterable[LayerSite]) -> int:
    """How many weights the layers have."""
    return sum(site.rows * site.columns for site in sites)


def _widths(sites: Iterable[LayerSite]) -> int:
    """Inputs and outputs of a token in all layers; of a stack of experts it takes few, which are counted as one."""
    stacks = {site.parameter: site.rows + site.columns for site in sites}
    return sum(stacks.values())


__all__ = ["PlannedModel", "inspect"]
