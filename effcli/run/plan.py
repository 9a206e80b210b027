"""What a recipe would do, from headers, names and shapes alone: no weight is read, nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field

from effcli.errors import SelectionError
from effcli.files import locate as samples
from effcli.files.checkpoint import DTYPES
from effcli.files.layout import Stored
from effcli.formats import Packing
from effcli.inputs import text
from effcli.inputs.tokens import longest_sequence
from effcli.language.weights import Weights, open_weights
from effcli.layers.layer import LayerSite
from effcli.layers.result import CARRIED, MATRIX
from effcli.layers.selection import Choice, choose
from effcli.options import Options
from effcli.reports.units import size
from effcli.run.recipe import Recipe


class Row(Options):
    """One layer of a network, and what a pass would make of it."""

    step: str = ""
    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    nbytes: int
    macs: int | None = Field(default=None, description="multiplications for one input; None for language models")
    status: str = ""
    reason: str = ""

    @staticmethod
    def of(site: LayerSite, format: str, nbytes: int, **more: Any) -> Row:
        """A layer that takes `nbytes` in `format`; more: any other field."""
        bits = 8 * nbytes / max(site.rows * site.columns, 1)
        known = {"name": site.name, "kind": site.kind, "shape": site.shape}
        return Row(**known, format=format, bits_per_weight=bits, nbytes=nbytes, **more)


class Layers(Options):
    """Layers of all blocks that are alike, as one line for a person."""

    step: str = ""
    layers: str
    count: int
    shape: tuple[int, ...]
    format: str
    nbytes: int
    macs: int | None = None
    status: str = ""


def summary(rows: Iterable[Row]) -> list[Layers]:
    """Rows whose names differ in numbers alone, taken together: `model.layers.*.mlp.up_proj`, 30 times."""
    alike: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
        alike.setdefault((row.step, pattern, row.shape, row.format, row.status), []).append(row)
    return [
        Layers(
            step=step,
            layers=pattern if len(found) > 1 else found[0].name,
            count=len(found),
            shape=shape,
            format=format,
            nbytes=sum(row.nbytes for row in found),
            macs=sum(row.macs or 0 for row in found) or None,
            status=status,
        )
        for (step, pattern, shape, format, status), found in alike.items()
    ]


class Plan(Options):
    """What each step of a recipe would do. `input_bytes` and `output_bytes` are those of the weight files."""

    model: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    weights: int = Field(description="number of parameters, tied ones counted once")
    input_bytes: int
    output_bytes: int = Field(description="as planned, file headers left out")
    memory_bytes: int = Field(description="estimated peak of the process")
    operations: float = Field(description="floating-point operations of the calibration forwards and Gram matrices")

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)


class Inspection(Options):
    """What a checkpoint consists of."""

    model: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    nbytes: int
    weights: int
    bits_per_weight: float

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)


# What the interpreter with torch and transformers takes before any weight is read.
BASE_MEMORY = 450_000_000


def kept_remarks(step: str, choices: Iterable[Choice]) -> list[str]:
    """Which layers `step` leaves alone, one line for each reason."""
    kept: dict[str, list[str]] = {}
    for choice in choices:
        if choice.reason:
            kept.setdefault(choice.reason, []).append(choice.site.name)
    more = {reason: f" and {len(names) - 1} more" if len(names) > 1 else "" for reason, names in kept.items()}
    return [f"{step} keeps {names[0]}{more[reason]}: {reason}" for reason, names in kept.items()]


def size_remark(before: int, after: int) -> str:
    """The bytes of the weight files before and after all steps."""
    return f"weights: {size(before)} before, {size(after)} after ({before / max(after, 1):.2f} times smaller)"


def make(recipe: Recipe) -> Plan:
    """The plan of a recipe; raises what a run would raise over its patterns, sizes and checkpoint."""
    path = samples.resolve(recipe.model, recipe.revision)
    weights = open_weights(path, recipe.trust_remote_code)
    sizes = _Sizes(weights)
    before = sizes.total()
    rows: list[Row] = []
    remarks: list[str] = []
    operations = 0.0
    for number, step in enumerate(recipe.passes):
        choices = choose(weights.skeleton, step)
        name = f"{number + 1}. {step.name}" if len(recipe.passes) > 1 else ""
        for choice in choices.values():
            sizes.take(choice)
            rows.append(sizes.row(choice, name, choice.planned))
        rows += [row.model_copy(update={"step": name, "status": "keep"}) for row in sizes.others()]
        remarks += kept_remarks(name or step.name, choices.values())
        if step.needs:
            longest = longest_sequence(weights.skeleton.config)
            tokens = recipe.calibration.samples * text.window_length(recipe.calibration, longest)
            operations += _operations(choices, tokens, recipe.calibration.inputs == "compressed")
            if recipe.calibration.data is None:
                remarks.append("calibration text: the sample model's own; give your domain's with --calib FILE")
        obstacles = sizes.obstacles()
        if obstacles:
            layer, why = next(iter(obstacles.items()))
            remarks.append(
                f"{name or step.name}: effcli's own layout, which stock loaders refuse; {len(obstacles)} layers have "
                f"no place in the standard format, such as {layer} ({why})"
            )
    after = sizes.total()
    memory = _memory(weights, recipe)
    remarks.insert(0, size_remark(before, after))
    remarks.insert(1, f"memory: about {size(memory)} at the peak, for one block and its statistics at a time")
    if operations:
        remarks.insert(2, f"arithmetic: {operations / 1e12:.1f} TFLOP of forwards and Gram matrices, then the searches")
    return Plan(
        model=recipe.model,
        rows=tuple(rows),
        remarks=tuple(remarks),
        weights=weights.skeleton.weights(),
        input_bytes=before,
        output_bytes=after,
        memory_bytes=memory,
        operations=operations,
    )


def inspect(model: str, trust_remote_code: bool = False) -> Inspection:
    """What a checkpoint consists of, from its headers."""
    path = samples.resolve(model)
    weights = open_weights(path, trust_remote_code)
    skeleton, sizes = weights.skeleton, _Sizes(weights)
    rows = [sizes.row(Choice(site, None)) for site in skeleton.sites()]
    rows += [row.model_copy(update={"reason": ""}) for row in sizes.others()]
    nbytes, count = weights.checkpoint.nbytes, skeleton.weights()
    remarks = [
        f"{skeleton.config.model_type}: {count:,} weights in {len(skeleton.blocks)} blocks ({skeleton.block_path})",
        f"{size(nbytes)} on disk, {8 * nbytes / count:.2f} bits per weight",
    ]
    if skeleton.tied:
        remarks.append(f"{skeleton.head} shares its weight with the input embedding")
    return Inspection(
        model=model,
        rows=tuple(rows),
        remarks=tuple(remarks),
        nbytes=nbytes,
        weights=count,
        bits_per_weight=8 * nbytes / count,
    )


class _Sizes:
    """The format of every layer as the steps go on, and the bytes that follow from it."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.formats: dict[str, Packing] = {name: item.format for name, item in weights.stored.items()}
        self.taken: set[str] = set()

    def take(self, choice: Choice) -> None:
        format = None if choice.config is None else choice.config.result
        if format is not None:
            self.formats[choice.site.name] = format
            self.taken.add(choice.site.name)

    def obstacles(self) -> dict[str, str]:
        """The layers that the standard format has no place for as things stand, and why."""
        kinds = {site.name: site.kind for site in self.weights.skeleton.sites()}
        layers = {name: Stored(format, kinds[name]) for name, format in self.formats.items()}
        return self.weights.obstacles({**layers, **self.weights.foreign})

    def nbytes(self, site: LayerSite) -> int:
        if site.name in self.taken:
            return self.formats[site.name].nbytes(site.shape, self.weights.dtype_of(site.parameter).itemsize)
        if site.name in self.formats:
            return self.weights.packed_bytes(site.name)
        if self.weights.skeleton.tied and site.name == self.weights.skeleton.head:
            return 0
        return site.rows * site.columns * self.weights.dtype_of(site.parameter).itemsize

    def total(self) -> int:
        skeleton = self.weights.skeleton
        apart = skeleton.head in self.taken
        left_out = self.weights.left_out(apart)
        names = [name for name in skeleton.parameters() if name not in left_out]
        if skeleton.tied and apart:
            names.append(f"{skeleton.head}.weight")
        state = skeleton.model.state_dict()
        total = 0
        for name in names:
            sites = self.weights.sites(name)
            if sites:
                total += sum(self.nbytes(site) for site in sites)
            else:
                total += state[name].numel() * self.weights.dtype_of(name).itemsize
        return total + sum(entry.nbytes for entry in self.weights.carried().values())

    def row(self, choice: Choice, step: str = "", status: str = "") -> Row:
        site = choice.site
        nbytes = self.nbytes(site)
        format = self.formats.get(site.name)
        named = str(format) if format else _dtype_name(self.weights, site.parameter)
        return Row.of(site, named, nbytes, step=step, status=status, reason=choice.reason)

    def others(self) -> list[Row]:
        """What is no layer and stays as it is: embeddings, other matrices, and what the network does not use."""
        state = self.weights.skeleton.model.state_dict()
        rows = [
            _dense(name, "embedding", tuple(state[name].shape), self.weights.dtype_of(name), MATRIX)
            for name in self.weights.skeleton.parameters()
            if not self.weights.sites(name) and state[name].ndim > 1
        ]
        carried = self.weights.carried().items()
        return rows + [_dense(name, "other", entry.shape, DTYPES[entry.dtype], CARRIED) for name, entry in carried]


def _dense(name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype, reason: str) -> Row:
    return Row(
        name=name,
        kind=kind,
        shape=shape,
        format=str(dtype).removeprefix("torch."),
        bits_per_weight=8 * dtype.itemsize,
        nbytes=math.prod(shape) * dtype.itemsize,
        reason=reason,
    )


def _dtype_name(weights: Weights, parameter: str) -> str:
    return str(weights.dtype_of(parameter)).removeprefix("torch.")


def _operations(choices: dict[str, Choice], tokens: int, twice: bool) -> float:
    """Floating-point operations of the forwards over `tokens` tokens and of the Gram matrices."""
    inner = [choice.site for choice in choices.values()]
    forward = 2.0 * tokens * sum(site.rows * site.columns for site in inner)
    # Layers of one parent module with inputs of one width share their input, which is close enough for an estimate.
    widths = {(site.name.rpartition(".")[0], site.columns) for site in inner}
    return forward * (2 if twice else 1) + 2.0 * tokens * sum(columns**2 for _, columns in widths)


def _memory(weights: Weights, recipe: Recipe) -> int:
    """The parts outside the blocks, the largest block, its float32 working set, Gram matrices and one batch.

    Of a Gram matrix there are two, for the inputs before and after their scales, and what the pass makes of it.
    """
    skeleton = weights.skeleton
    state = skeleton.model.state_dict()
    itemsize: int = skeleton.dtype.itemsize
    inputs = any(step.needs for step in recipe.passes)
    most = max((step.config.workspace for step in recipe.passes), default=0)
    outer = sum(state[name].numel() for name in skeleton.outer_parameters()) * itemsize
    total: int = BASE_MEMORY + outer
    sites = [skeleton.block_layers(k) for k in range(len(skeleton.blocks))]
    if not any(sites):
        raise SelectionError(f"{skeleton.block_path} holds no layer", "this version compresses linear layers")
    largest = max(range(len(sites)), key=lambda k: sum(site.rows * site.columns for site in sites[k]))
    numbers = sum(site.rows * site.columns for site in sites[largest])
    widest = max(site.rows * site.columns for site in sites[largest])
    total += numbers * itemsize + 5 * widest * 4
    if inputs:
        longest = longest_sequence(skeleton.config)
        batch = recipe.calibration.batch_size * text.window_length(recipe.calibration, longest)
        total += numbers * 4
        squares = {site.columns: site.columns**2 for site in sites[largest]}
        total += (2 * sum(squares.values()) + most * max(squares.values())) * 4
        total += 6 * batch * max(max(site.rows, site.columns) for site in sites[largest]) * itemsize
    return total


__all__ = ["Inspection", "Layers", "Plan", "Row", "inspect", "make", "summary"]
