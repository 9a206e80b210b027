"""Export to C for a microcontroller: an integer network as firmware without an interpreter.

The C is compiled with this machine's compiler, where there is one, and every layer is compared with the reference
executor on the inputs that the network carries. `effcli verify OUT --target NAME` does the same in QEMU.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from effcli.errors import UnsupportedError, writing
from effcli.exporters._target import nbytes, replacing
from effcli.exporters.firmware import check, project, targets
from effcli.exporters.firmware.cost import LayerCost
from effcli.exporters.firmware.generate import Generated, generate, inputs, planned
from effcli.files.documents import read_model
from effcli.files.exporter import Exporter, Footprint
from effcli.graphs.integer import IntegerNetwork, is_integer
from effcli.options import Options
from effcli.reports.report import Exported
from effcli.reports.units import count

_CONTENT = "source text"
# Inputs on which an export is compared.
_COMPARED = 16
_UNIT = {"": 1, "b": 1, "k": 1024, "kb": 1024, "m": 1024**2, "mb": 1024**2}


def _bytes(value: Any) -> Any:
    """'64k' as 65536: the units of linker scripts, powers of 1024."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", value.lower().replace("ib", "b"))
    if found is None or found[2] not in _UNIT:
        raise ValueError(f"must be bytes, as 65536 or 64k, not {value!r}")
    return int(found[1]) * _UNIT[found[2]]


Bytes = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(ge=1)]


class LayerRow(Options):
    """A layer as the command line shows it: bytes, and estimated instructions on a Cortex-M4."""

    layer: str
    kind: str
    ram: int
    flash: int
    macs: int
    instructions: int


class _Plan(BaseModel):
    """What the command line shows of `plan.json`."""

    layers: tuple[LayerCost, ...]


class C(Exporter):
    """An export to C."""

    name: str = Field("network", description="Prefix of files, functions and macros: a lower-case C identifier.")
    target: str = Field("cortex-m4", description=f"What `make qemu` runs on: {', '.join(targets.TARGETS)}.")
    max_ram: Bytes | None = Field(None, description="Fail when arena and stack need more, e.g. 64k (of 1024 bytes).")
    max_flash: Bytes | None = Field(None, description="Fail when constants and code need more, e.g. 256k.")
    single_header: bool = Field(False, description="One header that holds everything.")
    tests: int = Field(4, ge=1, le=16, description="Inputs in the self test.")

    @field_validator("name")
    @classmethod
    def _identifier(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", value):
            raise ValueError(f"must be a C identifier in lower case, e.g. kws, not {value!r}")
        return value

    @field_validator("target")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            targets.find(value)
        except UnsupportedError as error:
            raise ValueError(f"{error.cause}; {error.remedy}") from None
        return value

    def export(self, source: Path, target: Path, overwrite: bool = False) -> Exported:
        """Write the integer network `source` to the folder `target` as C, whole or not at all.

        Raises `UnsupportedError` for a checkpoint or an operation that has no C code and for a limit that is not kept,
        `OutputError` when `target` exists (without `overwrite`) or cannot be written, `MachineError` when the C
        computes something else than the reference executor.
        """
        network = _read(source)
        with replacing(source, target, overwrite) as folder:
            generated = generate(
                network,
                self.name,
                max_ram=self.max_ram,
                max_flash=self.max_flash,
                tests=self.tests,
                single_header=self.single_header,
            )
            texts = project.files(generated, self.name, targets.find(self.target))
            with writing(target):
                check.write_texts(folder, texts)
            checked = _checked(network, generated, self.name)
        cost = generated.cost
        remarks = (
            f"RAM {cost.ram:,} bytes: {cost.arena:,} of arena, about {cost.stack:,} of stack",
            f"flash about {cost.flash:,} bytes: {cost.constants:,} of constants, about {cost.code:,} of code",
        )
        return Exported(target="c", nbytes=nbytes(target), content=_CONTENT, checked=checked, remarks=remarks)

    def footprint(self, source: Path) -> Footprint:
        found = planned(_read(source)).cost
        return Footprint(found.ram, found.flash)

    def table(self, folder: Path) -> list[LayerRow]:
        """What each layer of the export in `folder` costs."""
        costs = read_model(_Plan, folder / "plan.json", remedy="export it again").layers
        return [
            LayerRow(
                layer=cost.name,
                kind=cost.kind,
                ram=cost.ram,
                flash=cost.weights + cost.requantization,
                macs=cost.macs,
                instructions=cost.instructions,
            )
            for cost in costs
        ]


def _read(source: Path) -> IntegerNetwork:
    if not is_integer(source):
        raise UnsupportedError(
            f"{source} holds no integer network, which C is made from", "make it one: let `int8` be the last pass"
        )
    return IntegerNetwork.read(source)


def _checked(network: IntegerNetwork, generated: Generated, name: str) -> str:
    """Compile the C for this machine and compare every layer; one line on what that showed."""
    host = targets.find("host")
    if targets.missing(host):
        return "not compiled: there is no C compiler here"
    codes = inputs(network, _COMPARED)
    with tempfile.TemporaryDirectory(prefix="effcli-") as temporary:
        check.write_sources(Path(temporary), generated, name)
        check.compare(network, generated.program, Path(temporary), name, host, codes)
    kind = "random" if network.probe is None else "calibration"
    layers = count(len(generated.program.tasks), "layer")
    return f"compiled here, {count(len(codes), f'{kind} input')}: every byte of {layers} as in the reference executor"
