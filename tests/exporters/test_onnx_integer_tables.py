"""Integer networks whose weights are entries of tables in onnxruntime: the same numbers, in integer kernels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from integer_networks import Network

from effcli.exporters import _onnx_integer
from effcli.graphs.integer import CODEBOOK, IntegerNetwork, Weighted
from effcli.graphs.rows import look_up


def network_of(bits: int, channels: bool) -> IntegerNetwork:
    net = Network((3, 8, 8))
    net.convolution(6, relu=True)
    net.convolution(6, groups=6, padding=(1, 1, 1, 1))
    net.flatten()
    net.linear(5)
    network = net.finish(probe=8)
    random = np.random.default_rng(0)
    arrays, steps = dict(network.arrays), []
    for step in network.program.steps:
        if isinstance(step, Weighted):
            weight = network.array(step, "weight")
            table = random.integers(-127, 128, (len(weight) if channels else 1, 1 << bits)).astype(np.int8)
            numbers = random.integers(0, 1 << bits, (len(weight), weight[0].size)).astype(np.uint8)
            arrays[f"{step.name}.weight"] = look_up(table, numbers).reshape(weight.shape)
            arrays[f"{step.name}.{CODEBOOK}"] = table
            step = step.model_copy(update={"weight_bits": bits})
        steps.append(step)
    program = network.program.model_copy(update={"steps": tuple(steps)})
    return IntegerNetwork(program, arrays, network.facts, network.probe)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_tables_keep_the_integer_kernels(bits: int, channels: bool, tmp_path: Path) -> None:
    network = network_of(bits, channels)
    (tmp_path / "source").mkdir()
    network.save(tmp_path / "source")
    line = _onnx_integer.export_integer(tmp_path / "source", tmp_path)
    assert "3 layers of fewer than 8 bits" in line
    model = onnx.load(tmp_path / "model.onnx")
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer)
    assert kinds[onnx.TensorProto.UINT4] == 3 and not kinds[onnx.TensorProto.INT4]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert found["QLinearConv"] == 2 and found["QGemm"] == 1
    assert not found.keys() & {"Gather", "GatherElements", "Cast", "Conv", "Gemm"}
