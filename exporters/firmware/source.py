"""The C text of a program: the network itself, its constants, its header, and its test vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from effcli.exporters.firmware.arena import WHOLE, Plan
from effcli.exporters.firmware.bands import Band
from effcli.exporters.firmware.program import Array, Constant, Program, Task, Tensor, Window
from effcli.exporters.firmware.scope import Functions, Scope
from effcli.graphs.integer import IntegerNetwork, Value
from effcli.reports.escaping import c_comment, c_string

# Kernels in the order in which their files build on each other.
_KERNELS = (
    "rows",
    "patch",
    "table",
    "dot8",
    "dot4",
    "dot_table",
    "convolution",
    "depthwise",
    "linear_inputs",
    "linear_table",
    "linear",
    "pool",
    "elementwise",
    "attention",
)
_FEATURES: tuple[str, ...] = ("DOT8", "DOT4", "DOT_TABLE", "DOT_PAIRS", "LINEAR8", "LINEAR4")
_FEATURES += ("LINEAR_TABLE", "LINEAR_TABLE4", "LINEAR_TABLE2", "LINEAR_PAIRS4", "LINEAR_PAIRS2", "LINEAR_PAIRS")
_FEATURES += ("MAX_POOL", "AVERAGE_POOL", "ADD", "MULTIPLY")
_FEATURES += ("MATRIX_PRODUCT", "SOFTMAX", "LAYER_NORM", "EMBEDDING")
_LINE = 110


class Sizes(NamedTuple):
    """Bytes. arena: of RAM; constants: in flash; flash: with an estimate of the code."""

    arena: int
    constants: int
    flash: int


def fill(text: str, name: str, layers: Sequence[str]) -> str:
    """The network's name in place of the prefix `net`, and of @name@; the layers' names in place of @0@, @1@, ..."""
    text = re.sub(r"\bnet_", f"{name}_", text)
    text = re.sub(r"\bNET_", f"{name.upper()}_", text).replace("@name@", name)
    return re.sub(r'("?)@(\d+)@', lambda found: _layer(layers[int(found[2])], found[1]), text)


def _layer(name: str, quote: str) -> str:
    """A layer's name as it stands in a string, after its opening quote, or in a comment."""
    return f"{quote}{c_string(name)}" if quote else c_comment(name)


def kernel(name: str) -> str:
    return (resources.files("effcli.exporters.firmware") / "kernels" / name).read_text(encoding="utf-8")


class Body(NamedTuple):
    """The functions of a program. specialised: those that tasks of one shape share; layers: one for each task."""

    specialised: Functions
    layers: tuple[str, ...]


def body(program: Program, plan: Plan) -> Body:
    """Write the functions of a planned program."""
    specialised = Functions()
    layers = tuple(_step(index, task, program, plan, specialised) for index, task in enumerate(program.tasks))
    return Body(specialised, layers)


def implementation(program: Program, plan: Plan, written: Body) -> str:
    """Kernels, one function for each layer, and the schedule."""
    wanted = {stem for task in program.tasks for stem in task.kernels}
    features = {feature for task in program.tasks for feature in task.features}
    taps = max((getattr(task, "taps", 1) for task in program.tasks), default=1)
    lines = [f"#define NET_HAS_{name} {int(name in features)}" for name in _FEATURES]
    lines += [f"#define NET_MOST_TAPS {taps}"]
    parts = [
        "\n".join(lines),
        _assertions(program),
        kernel("common.c"),
        *(kernel(f"{stem}.c") for stem in _KERNELS if stem in wanted),
    ]
    parts += [*written.specialised.texts.values(), *written.layers, _schedule(program, plan), kernel("entry.c")]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _assertions(program: Program) -> str:
    """What a compiler can check of the sizes that the header names."""
    names = [f"net_fixed_{index}" for index in range(len(program.fixed))]
    names += [f"net_{index}_{suffix}" for index, task in enumerate(program.tasks) for suffix in task.arrays]
    sizes = " + ".join(["0u", *(f"sizeof({name})" for name in names)])
    return (
        "typedef char net_assert_arena[(NET_ARENA_BYTES % NET_ARENA_ALIGN == 0u) ? 1 : -1];\n"
        f"typedef char net_assert_constants[({sizes} == NET_CONSTANT_BYTES) ? 1 : -1];\n"
    )


def _base(tensor: Tensor, program: Program, plan: Plan) -> str:
    """Where a tensor or its ring begins."""
    if tensor.data is not None:
        return f"net_fixed_{_fixed(tensor, program)}"
    if tensor.name == program.input.name:
        return "state->in"
    if tensor.name == program.output.name:
        return "state->out"
    ring = any(tensor.name in band.rings for band in plan.bands)
    offset = plan.offset("ring" if ring else "tensor", tensor.name)
    return f"(state->arena + {offset})" if offset else "state->arena"


def _fixed(tensor: Tensor, program: Program) -> int:
    """The number of a tensor in flash."""
    return [each.name for each in program.fixed].index(tensor.name)


def _ring(tensor: Tensor, plan: Plan) -> int:
    return next((band.rings[tensor.name] for band in plan.bands if tensor.name in band.rings), tensor.rows)


def _row(tensor: Tensor, row: str, program: Program, plan: Plan) -> str:
    """The address of one row."""
    ring = _ring(tensor, plan)
    place = f"({row} % {ring})" if ring < tensor.rows else row
    return f"{_base(tensor, program, plan)} + {place} * {tensor.row_bytes}"


def _step(index: int, task: Task, program: Program, plan: Plan, functions: Functions) -> str:
    """The function of one layer: one row of it, or all of it."""
    band = next(number for number, each in enumerate(plan.bands) if each.start <= index < each.end)
    scratch = f"state->arena + {plan.offset('scratch', str(band))}" if task.scratch else "0"
    scope = Scope(functions, index, scratch)
    by_rows = task.windows is not None
    count = task.output.row_bytes if by_rows else task.output.nbytes
    lines, setup = [], []
    statements = task.emit(scope)
    for number, tensor in enumerate(task.inputs):
        window = task.windows[number] if task.windows is not None else None
        if window is None:
            lines.append(f"const int8_t *const in{number} = {_base(tensor, program, plan)};")
        elif f"rows{number}" not in statements:
            row = _first(window)
            row = row if row == "y" else f"({row})"
            lines.append(f"const int8_t *const in{number} = {_row(tensor, row, program, plan)};")
        else:
            lines.append(f"const int8_t *rows{number}[{window.count}];")
            setup.append(_rows(number, tensor, window, program, plan))
    place = _row(task.output, "y", program, plan) if by_rows else _base(task.output, program, plan)
    lines.append(f"int8_t *const out = {place};")
    lines += [f"NET_BEGIN(state, {index});", *setup, *statements.splitlines()]
    lines.append(f"NET_END(state, {index}, out, {count}u);")
    parameters = "const net_state *state" + (", int32_t y" if by_rows else "")
    body = "\n".join(f"    {line}" for line in lines)
    return f"/* @{index}@: {task.kind} */\nstatic void net_layer_{index}({parameters})\n{{\n{body}\n}}\n"


def _rows(number: int, tensor: Tensor, window: Window, program: Program, plan: Plan) -> str:
    known = (window.dilation, window.count, tensor.rows, _ring(tensor, plan), tensor.row_bytes)
    return f"net_rows(rows{number}, {_base(tensor, program, plan)}, {_first(window)}, {', '.join(map(str, known))});"


def _first(window: Window) -> str:
    """The first row that row y of the output reads."""
    row = "y" if window.stride == 1 else f"y * {window.stride}"
    return row + (f" - {window.above}" if window.above > 0 else f" + {-window.above}" if window.above else "")


def _schedule(program: Program, plan: Plan) -> str:
    lines: list[str] = []
    counters = max((band.size - 1 for band in plan.bands), default=0)
    looped = any(program.tasks[band.end - 1].windows is not None for band in plan.bands)
    if looped:
        lines.append("    int32_t y;")
    if counters:
        lines.append(f"    int32_t done[{counters}];")
    for band in plan.bands:
        lines += _run(band, program)
    text = "\n".join(lines)
    limit = ""
    if counters:
        limit = (
            "/* How many rows of a layer must be there before row y of the last layer of its band is computed. */\n"
            "static int32_t net_rows_before(int32_t y, int32_t last, int32_t a, int32_t b, int32_t height)\n"
            "{\n    const int32_t rows = a * y + b;\n"
            "    return ((y == last) || (rows > height)) ? height : rows;\n}\n\n"
        )
    return f"{limit}static void net_schedule(const net_state *state)\n{{\n{text}\n}}\n"


def _run(band: Band, program: Program) -> list[str]:
    last = band.end - 1
    task = program.tasks[last]
    if task.windows is None:
        return [f"    net_layer_{last}(state);"]
    height = task.output.rows
    if band.size == 1:
        return [f"    for (y = 0; y < {height}; ++y)", f"        net_layer_{last}(state, y);"]
    lines = [f"    for (y = 0; y < {band.size - 1}; ++y)", "        done[y] = 0;"]
    lines.append(f"    for (y = 0; y < {height}; ++y) {{")
    for number, pace in enumerate(band.paces):
        known = f"{height - 1}, {pace.a}, {pace.b}, {pace.height}"
        lines.append(f"        for (; done[{number}] < net_rows_before(y, {known}); ++done[{number}])")
        lines.append(f"            net_layer_{band.start + number}(state, done[{number}]);")
    return [*lines, f"        net_layer_{last}(state, y);", "    }"]


def constants(program: Program) -> tuple[str, str]:
    """Declarations and definitions of what lies in flash."""
    declared, defined = [], []
    if any("LINEAR8" in task.features for task in program.tasks):
        declared.append("#if NET_HALF_PRODUCTS\nextern const uint32_t net_lanes;\n#endif")
        lanes = "/* Bytes 0 and 2 of a word. */\nNET_CONSTANT const uint32_t net_lanes = 0x00FF00FFu;\n"
        defined.append(f"#if NET_HALF_PRODUCTS\n{lanes}#endif\n")
    for index, tensor in enumerate(program.fixed):
        assert tensor.data is not None
        declared.append(f"extern const int8_t net_fixed_{index}[{tensor.nbytes}];")
        numbers = _numbers(tensor.data)
        defined.append(f"NET_CONSTANT const int8_t net_fixed_{index}[{tensor.nbytes}] = {{\n{numbers}}};\n")
    for index, task in enumerate(program.tasks):
        for suffix, constant in task.arrays.items():
            name = f"net_{index}_{suffix}"
            declared.append(f"extern const {constant.type} {name}[{constant.values.size}];")
            defined.append(_definition(index, name, constant))
    return "\n".join(declared) + "\n", "\n".join(defined)


def _definition(layer: int, name: str, constant: Constant) -> str:
    head = f"NET_CONSTANT const {constant.type} {name}[{constant.values.size}] = {{\n"
    text = f"/* @{layer}@ */\n"
    if constant.halved is None:
        return f"{text}{head}{_numbers(constant.values)}}};\n"
    numbers, halved = _numbers(constant.values), _numbers(constant.halved)
    return f"{text}{head}#if NET_HALF_PRODUCTS\n{halved}#else\n{numbers}#endif\n}};\n"


def _numbers(values: Array) -> str:
    """Numbers in lines of at most about 110 characters."""
    flat = values.reshape(-1)
    if flat.dtype == np.uint32:
        texts = [f"0x{number:08x}u" for number in flat.tolist()]
    else:
        # The smallest int32 is no literal of C.
        texts = [str(number) if number > -(2**31) else "(-2147483647 - 1)" for number in flat.tolist()]
    if not texts:
        return ""
    per = max(1, _LINE // (max(map(len, texts)) + 2))
    return "".join(f"    {', '.join(texts[start : start + per])},\n" for start in range(0, len(texts), per))


def extents(value: Value) -> tuple[int, ...]:
    """The shape in memory: an image has its channels last."""
    shape = value.shape
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape


def macros(prefix: str, value: Value, offset: int) -> str:
    shape = extents(value)
    bytes_ = int(np.prod(shape)) if shape else 1
    return (
        f"#define NET_{prefix}_BYTES {bytes_}u\n"
        f"#define NET_{prefix}_RANK {max(len(shape), 1)}\n"
        f"#define NET_{prefix}_SHAPE {{ {', '.join(map(str, shape or (1,)))} }}\n"
        f"#define NET_{prefix}_SCALE {_float(value.scale)}\n"
        f"#define NET_{prefix}_ZERO_POINT ({value.zero})\n"
        f"#define NET_{prefix}_OFFSET {offset}u\n"
    )


def _float(number: float) -> str:
    text = f"{number:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def header(network: IntegerNetwork, program: Program, plan: Plan, sizes: Sizes) -> str:
    """The API, with everything of it that is known as a macro."""
    offsets = [plan.offset("tensor", tensor.name) for tensor in (program.input, program.output)]
    names = ", ".join(f'\\\n    "@{index}@"' for index in range(len(program.tasks)))
    return f"""\
/* Written by effcli {version("effcli")}. An int8 network: the same codes on every processor.

   A code q stands for SCALE * (q - ZERO_POINT). Images lie with channels last, row by row. */
#ifndef NET_H
#define NET_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

/* RAM that net_run needs, with room for its input and its output, and the alignment of its address. */
#define NET_ARENA_BYTES {sizes.arena}u
#define NET_ARENA_ALIGN {WHOLE}u
/* Flash: constants, and with them an estimate of the code for a Cortex-M4 at -O2. */
#define NET_CONSTANT_BYTES {sizes.constants}u
#define NET_FLASH_BYTES {sizes.flash}u

{macros("INPUT", network.input, offsets[0])}
{macros("OUTPUT", network.output, offsets[1])}
#define NET_LAYERS {len(program.tasks)}
#define NET_LAYER_NAMES {{ {names} }}

/* Runs the network. in: NET_INPUT_BYTES codes, read only unless they lie at net_input(arena); out: NET_OUTPUT_BYTES
   codes. Returns 0, or -1 when a pointer is null or the arena is not aligned. With NET_DEFAULT_ARENA defined the
   network brings an arena of its own, which is taken when `arena` is null; it then serves one caller at a time. */
int net_run(const int8_t *in, int8_t *out, void *arena);

/* Places in the arena where the input may be written and the output be had without further memory. */
int8_t *net_input(void *arena);
int8_t *net_output(void *arena);

#if !defined(NET_NO_HOOKS)
/* Called with bytes = 0 before work on a layer begins or goes on, and after it with the `bytes` that are now final: in
   the order of the layer's memory. Layers take turns where only a few rows of them are kept. */
typedef void (*net_hook)(void *context, int layer, const int8_t *data, uint32_t bytes);
int net_run_hooked(const int8_t *in, int8_t *out, void *arena, net_hook hook, void *context);
#endif

/* In the test file: 0 when every layer gives what it should on the test inputs, else how many of them do not. */
int net_selftest(void);

#ifdef __cplusplus
}}
#endif

#endif
"""


def files(
    network: IntegerNetwork, program: Program, plan: Plan, written: Body, sizes: Sizes, name: str, tests: str
) -> dict[str, str]:
    """The C files of a network called `name`, by file name; tests: the text of the test file."""
    declared, defined = constants(program)
    guarded = f"#ifndef NET_PROCESSOR_H\n#define NET_PROCESSOR_H\n\n{kernel('processor.h')}\n{declared}\n#endif\n"
    texts = {
        "@name@.h": header(network, program, plan, sizes),
        "@name@_internal.h": f"#include <stdint.h>\n\n{guarded}",
        "@name@.c": f'#include "@name@.h"\n#include "@name@_internal.h"\n\n{implementation(program, plan, written)}',
        "@name@_weights.c": f'#include "@name@_internal.h"\n\n{defined}',
        "@name@_test.c": f'#include "@name@.h"\n\n{tests}',
    }
    layers = [task.layer for task in program.tasks]
    return {file.replace("@name@", name): fill(text, name, layers) for file, text in texts.items()}


def single_header(texts: dict[str, str], name: str) -> str:
    """All of it in one header: the implementation where NET_IMPLEMENTATION is defined, the tests with NET_TEST_..."""
    parts = [texts[f"{name}.h"]]
    inner = [texts[f"{name}_internal.h"], texts[f"{name}_weights.c"], texts[f"{name}.c"]]
    parts.append(f"#if defined({name.upper()}_IMPLEMENTATION)\n{_joined(inner, name)}\n#endif\n")
    tests = _joined([texts[f"{name}_test.c"]], name)
    parts.append(f"#if defined({name.upper()}_TEST_IMPLEMENTATION)\n{tests}\n#endif\n")
    return "\n".join(parts)


def _joined(texts: list[str], name: str) -> str:
    """The texts without the inclusion of each other."""
    return re.sub(rf'#include "{name}(_internal)?\.h"\n', "", "\n".join(texts))
