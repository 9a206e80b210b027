"""From an integer network to all that an export holds, as text."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from effcli.exporters.firmware import arena, limits, lowering, source, vectors
from effcli.exporters.firmware.arena import Plan
from effcli.exporters.firmware.cost import Cost, cost
from effcli.exporters.firmware.picture import arena_svg
from effcli.exporters.firmware.program import Program
from effcli.graphs.integer import HIGHEST, LOWEST, Array, IntegerNetwork


@dataclass(frozen=True)
class Generated:
    """sources: C files by name; documents: plan.json and arena.svg."""

    program: Program
    plan: Plan
    cost: Cost
    sources: dict[str, str]
    documents: dict[str, str]


def generate(
    network: IntegerNetwork,
    name: str,
    *,
    max_ram: int | None = None,
    max_flash: int | None = None,
    tests: int = 4,
    single_header: bool = False,
) -> Generated:
    """The C program of `network` under the prefix `name`, with at most `tests` test vectors.

    max_ram, max_flash: bytes. Raises `UnsupportedError` for what has no C code and for a limit that is not kept.
    """
    made = planned(network)
    program, plan, written, found = made.program, made.plan, made.written, made.cost
    limits.check(program, plan, found, max_ram, max_flash)
    sizes = source.Sizes(plan.nbytes, found.constants, found.flash)
    tested = vectors.test_file(network, program, inputs(network, tests))
    sources = source.files(network, program, plan, written, sizes, name, tested)
    if single_header:
        sources = {f"{name}.h": source.single_header(sources, name)}
    documents = {"plan.json": description(program, plan, found, name), "arena.svg": arena_svg(program, plan)}
    return Generated(program, plan, found, sources, documents)


@dataclass(frozen=True)
class Planned:
    """A program whose memory is planned, the C code of its layers, and what it costs."""

    program: Program
    plan: Plan
    written: source.Body
    cost: Cost


def planned(network: IntegerNetwork) -> Planned:
    """The program of `network` with its costs; `UnsupportedError` for what has no C code."""
    program, plan = arena.plan(lowering.lower(network))
    written = source.body(program, plan)
    return Planned(program, plan, written, cost(program, plan, written.specialised.texts))


def inputs(network: IntegerNetwork, count: int) -> Array:
    """Input codes (n, *shape) to compare on: those of calibration that the network carries, else random ones."""
    if network.probe is not None:
        return network.probe[:count]
    generator = np.random.default_rng(0)
    return generator.integers(LOWEST, HIGHEST + 1, (count, *network.input.shape), dtype=np.int8)


def description(program: Program, plan: Plan, found: Cost, name: str) -> str:
    """plan.json: where everything lies, and what every layer costs. All sizes in bytes."""
    pieces = [
        {
            "name": piece.name,
            "kind": piece.kind,
            "offset": offset,
            "bytes": piece.nbytes,
            "first_layer": program.tasks[plan.bands[piece.start].start].layer,
            "last_layer": program.tasks[plan.bands[piece.end].end - 1].layer,
        }
        for piece, offset in plan.pieces
    ]
    bands = [[task.layer for task in program.tasks[band.start : band.end]] for band in plan.bands]
    return (
        json.dumps(
            {
                "name": name,
                "ram": {"arena": found.arena, "stack_estimate": found.stack},
                "flash": {"constants": found.constants, "code_estimate": found.code},
                "macs": sum(layer.macs for layer in found.layers),
                "layers": [layer.model_dump() for layer in found.layers],
                "bands": bands,
                "arena": pieces,
            },
            indent=1,
        )
        + "\n"
    )
