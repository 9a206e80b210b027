"""What tests of emitted C need: tools that may be missing, and a network written by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from effcli.exporters.firmware import targets
from effcli.exporters.firmware.targets import Target

NAME = "fake"
# A warning in emitted C or in the code around it is an error.
STRICT = ("-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror")
BOARDS = [target for target in targets.TARGETS.values() if target.board is not None]

_HEADER = """#ifndef FAKE_H
#define FAKE_H
#include <stdint.h>
#define FAKE_ARENA_BYTES 64u
#define FAKE_ARENA_ALIGN 8u
#define FAKE_INPUT_BYTES 3u
#define FAKE_OUTPUT_BYTES 2u
#define FAKE_LAYERS 2
typedef void (*fake_hook)(void *context, int layer, const int8_t *data, uint32_t bytes);
int fake_run(const int8_t *in, int8_t *out, void *arena);
int fake_run_hooked(const int8_t *in, int8_t *out, void *arena, fake_hook hook, void *context);
#endif
"""

# The first layer adds 1 to each number, in two pieces; the second one sums up its first and its last two numbers.
_SOURCE = """#include "fake.h"
%(helpers)s
int fake_run(const int8_t *in, int8_t *out, void *arena)
{
    return fake_run_hooked(in, out, arena, 0, 0);
}

int fake_run_hooked(const int8_t *in, int8_t *out, void *arena, fake_hook hook, void *context)
{
    int8_t *middle = arena;
    int i;
    for (i = 0; i < 3; ++i)
        middle[i] = (int8_t)(in[i] + 1);
    if (hook != 0) {
        hook(context, 0, 0, 0u);
        hook(context, 0, middle, 2u);
        hook(context, 1, 0, 0u);
    }
    out[0] = (int8_t)(middle[0] + middle[1]);
    if (hook != 0) {
        hook(context, 1, out, 1u);
        hook(context, 0, 0, 0u);
    }
    %(first)s
    if (hook != 0) {
        hook(context, 0, middle + 2, 1u);
        hook(context, 1, 0, 0u);
    }
    out[1] = (int8_t)(middle[1] + middle[2]);
    %(second)s
    if (hook != 0)
        hook(context, 1, out + 1, 1u);
    return 0;
}
"""


def need(*programs: str) -> None:
    """Skip the test where one of `programs` is not installed, with the package that brings it."""
    absent = tuple(program for program in programs if shutil.which(program) is None)
    if absent:
        pytest.skip(f"needs {' and '.join(absent)}: {targets.remedy(absent)}")


def need_target(target: Target) -> None:
    """Skip the test where `target` cannot be built for and run."""
    need(*targets.missing(target))


def write_fake(folder: Path, first: str = "", second: str = "", helpers: str = "") -> Path:
    """The network `fake` of 3 input and 2 output bytes in `folder`; first and second: C within its layers."""
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "fake.h").write_text(_HEADER)
    text = _SOURCE % {"first": first, "second": second, "helpers": helpers}
    (folder / "src" / "fake.c").write_text(text)
    return folder
