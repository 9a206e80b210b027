"""What a program costs: bytes of flash and RAM, and instructions, layer by layer.

Constants and the arena are exact. Code, stack and instructions are estimates for a Cortex-M4 at -O2 with gcc 12, from
sizes of compiled functions and instructions counted in QEMU; `effcli verify --target` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field

from effcli.exporters.firmware.arena import Plan
from effcli.exporters.firmware.program import Program
from effcli.exporters.firmware.requantize import Requantized
from effcli.options import Options

# Bytes of a function, by its stem, and of what they call.
_FUNCTIONS = {
    "convolution": 720,
    "depthwise": 380,
    "linear": 170,
    "max_pool": 200,
    "average_pool": 130,
    "mean": 110,
    "sum": 50,
    "move": 70,
    "fill": 30,
    "add": 70,
    "multiply": 90,
    "table": 40,
    "matrix_product": 180,
    "softmax": 140,
    "layer_norm": 500,
    "embedding": 60,
}
_OTHER_FUNCTION = 200
_KERNELS = {"linear": 300, "rows": 50, "table": 70}
_ENTRY, _LAYER = 160, 75
_STACK, _POINTER = 250, 4


class LayerCost(Options):
    """What one layer costs, in bytes of RAM and flash and in instructions."""

    name: str
    kind: str
    output: int = Field(description="bytes of its whole output")
    rows: int = Field(description="rows of the output that are kept at once")
    scratch: int
    ram: int = Field(description="bytes of the arena up to the highest that is in use while it runs")
    weights: int
    requantization: int = Field(description="biases, multipliers, shifts and tables")
    bits: int = Field(8, description="of a stored weight; depthwise filters are bytes whatever the network has")
    codebook: int = Field(0, description="of requantization: tables that hold the entries of which weights are numbers")
    macs: int = Field(description="multiplications")
    instructions: int = Field(description="estimate with DSP instructions")
    plain: int = Field(description="estimate of instructions in plain C")

    @property
    def flash(self) -> int:
        return self.weights + self.requantization


@dataclass(frozen=True)
class Cost:
    """All bytes. ram: the arena and the stack."""

    layers: tuple[LayerCost, ...]
    arena: int
    stack: int
    constants: int
    code: int

    @property
    def ram(self) -> int:
        return self.arena + self.stack

    @property
    def flash(self) -> int:
        return self.constants + self.code


def cost(program: Program, plan: Plan, functions: Iterable[str]) -> Cost:
    """The cost of a planned program; functions: the names of its specialised functions."""
    layers = []
    for number, band in enumerate(plan.bands):
        for task in program.tasks[band.start : band.end]:
            weights = task.arrays["weights"].values.nbytes if "weights" in task.arrays else 0
            looked_up = isinstance(task, Requantized) and task.looked_up
            dsp, plain = task.instructions()
            layers.append(
                LayerCost(
                    name=task.layer,
                    kind=task.kind,
                    macs=task.macs,
                    output=task.output.nbytes,
                    scratch=task.scratch,
                    rows=band.rings.get(task.output.name, task.output.rows),
                    ram=plan.live(number),
                    weights=weights,
                    requantization=task.flash - weights,
                    bits=getattr(task, "bits", 8),
                    codebook=task.arrays["table"].values.nbytes if looked_up else 0,
                    instructions=round(dsp),
                    plain=round(plain),
                )
            )
    code = _ENTRY + _LAYER * len(layers)
    code += sum(_FUNCTIONS.get(name.removeprefix("net_").rpartition("_")[0], _OTHER_FUNCTION) for name in functions)
    code += sum(_KERNELS.get(stem, 0) for stem in {stem for task in program.tasks for stem in task.kernels})
    pointers = max((w.count for task in program.tasks for w in task.windows or ()), default=0)
    taps = max((getattr(task, "taps", 0) for task in program.tasks), default=0)
    return Cost(
        tuple(layers),
        plan.nbytes,
        _STACK + _POINTER * (pointers + taps),
        sum(task.flash for task in program.tasks) + sum(tensor.nbytes for tensor in program.fixed),
        code,
    )
