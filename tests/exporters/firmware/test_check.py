"""Emitted C against the executor: what agrees passes, and what differs is named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from firmware_tools import BOARDS, need_target
from integer_networks import Network

from effcli.errors import MachineError
from effcli.exporters.firmware import check, targets
from effcli.exporters.firmware.generate import Generated, generate
from effcli.exporters.firmware.targets import Target
from effcli.graphs.integer import IntegerNetwork

WRONG_OUTPUT = """
int tiny_run(const int8_t *in, int8_t *out, void *arena)
{
    const int status = true_tiny_run(in, out, arena);
    out[4] = (int8_t)(out[4] ^ 1);
    return status;
}

#if !defined(TINY_NO_HOOKS)
int tiny_run_hooked(const int8_t *in, int8_t *out, void *arena, tiny_hook hook, void *context)
{
    const int status = true_tiny_run_hooked(in, out, arena, hook, context);
    out[4] = (int8_t)(out[4] ^ 1);
    return status;
}
#endif
"""


def network() -> IntegerNetwork:
    net = Network((3, 8, 6))
    start = net.convolution(8, padding=(1, 1, 1, 1))
    net.add(net.convolution(8, padding=(1, 1, 1, 1), groups=8), start)
    net.max_pool(kernel=(2, 2), stride=(2, 2))
    net.flatten()
    net.linear(5, bits=4)
    return net.finish(probe=6)


def written(folder: Path, single_header: bool = False) -> tuple[IntegerNetwork, Generated]:
    made = network()
    generated = generate(made, "tiny", single_header=single_header)
    check.write_sources(folder, generated, "tiny")
    return made, generated


def compare(made: IntegerNetwork, generated: Generated, folder: Path, target: Target) -> check.Measured | None:
    assert made.probe is not None
    return check.compare(made, generated.program, folder, "tiny", target, made.probe)


@pytest.mark.parametrize("target", BOARDS, ids=lambda target: target.name)
def test_every_processor_gives_the_same(target: Target, tmp_path: Path) -> None:
    need_target(target)
    made, generated = written(tmp_path)
    measured = compare(made, generated, tmp_path, target)
    assert measured is not None
    assert len(measured.layer_instructions) == len(generated.program.tasks)
    assert min(measured.layer_instructions) > 100
    # The layers are nearly all of it.
    assert 0.9 < sum(measured.layer_instructions) / measured.instructions < 1.01
    assert measured.sizes.text > sum(task.flash for task in generated.program.tasks)
    assert 0 < measured.stack < 2048


def test_one_header_gives_the_same(tmp_path: Path) -> None:
    need_target(targets.find("host"))
    made, generated = written(tmp_path, single_header=True)
    assert compare(made, generated, tmp_path, targets.find("host")) is None


@pytest.mark.parametrize("name", ["host", "cortex-m4"])
def test_the_first_layer_that_differs_is_named(name: str, tmp_path: Path) -> None:
    target = targets.find(name)
    need_target(target)
    made, generated = written(tmp_path)
    layer = made.program.steps[1]
    # The bias of one channel of the depthwise convolution.
    arrays = dict(made.arrays)
    arrays[f"{layer.name}.bias"] = arrays[f"{layer.name}.bias"] + np.int32(100_000) * (np.arange(8) == 3)
    arrays[f"{layer.name}.bias"] = arrays[f"{layer.name}.bias"].astype(np.int32)
    other = IntegerNetwork(made.program, arrays, made.facts, made.probe)
    with pytest.raises(MachineError) as caught:
        compare(other, generated, tmp_path, target)
    found = re.fullmatch(
        rf"the C computes something else on {target.core}: (.+) differs for (\d) of 6 inputs, the first of them "
        r"input (\d)",
        caught.value.cause,
    )
    assert found is not None and found[1] == layer.name and int(found[2]) >= 1


@pytest.mark.parametrize("name", ["host", "cortex-m4"])
def test_an_output_that_differs_is_named(name: str, tmp_path: Path) -> None:
    target = targets.find(name)
    need_target(target)
    made, generated = written(tmp_path)
    # Every layer is right, and what is handed to the caller is not.
    source = tmp_path / "src" / "tiny.c"
    text = source.read_text()
    for name in ("tiny_run", "tiny_run_hooked"):
        text = text.replace(f"int {name}(", f"static int true_{name}(")
    source.write_text(text + WRONG_OUTPUT)
    with pytest.raises(MachineError, match="the output differs for 6 of 6 inputs"):
        compare(made, generated, tmp_path, target)
