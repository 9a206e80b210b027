from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effcli.errors import CheckpointError, DataError, MachineError, UnsupportedError, UserError
from effcli.platform import onnx_session

onnx = pytest.importorskip("onnx", exc_type=ImportError)
pytest.importorskip("onnxruntime", exc_type=ImportError)


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Writes y = op(x), x float32 (n, 4), to `model.onnx`."""

    def make(op: str = "Relu", *, opset: int = 18, ir: int = 10, domain: str = "", dtype: int = 1) -> Path:
        from onnx import helper

        values = [helper.make_tensor_value_info(name, dtype, ["n", 4]) for name in "xy"]
        node = helper.make_node(op, ["x"], ["y"], domain=domain)
        graph = helper.make_graph([node], "g", values[:1], values[1:])
        opsets = [helper.make_opsetid("", opset)] + [helper.make_opsetid(domain, 1)] * bool(domain)
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir), tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return make


def test_run_by_name(model: Callable[..., Path]) -> None:
    session = onnx_session.open_session(model(), threads=1)
    x = np.array([[-1, 0, 2, -3]], np.float32)
    assert {name: value.tolist() for name, value in onnx_session.run(session, {"x": x}).items()} == {
        "y": [[0, 0, 2, 0]]
    }
    assert onnx_session.run(session, {"x": x[:0]})["y"].shape == (0, 4)


def test_a_folder_stands_for_its_model_and_takes_entries(model: Callable[..., Path]) -> None:
    entries = {"session.disable_prepacking": "1"}
    session = onnx_session.open_session(model().parent, entries=entries)
    assert session.get_session_options().get_session_config_entry("session.disable_prepacking") == "1"


def test_time_one_runs_as_often_as_the_time_allows(model: Callable[..., Path]) -> None:
    session = onnx_session.open_session(model(), threads=1)
    times = onnx_session.time_one(session, {"x": np.zeros((1, 4), np.float32)}, seconds=0.0)
    assert len(times) == 3 and all(seconds > 0 for seconds in times)
    assert len(onnx_session.time_one(session, {"x": np.zeros((1, 4), np.float32)}, seconds=0.1)) > 3


def test_version_names_the_runtime() -> None:
    import onnxruntime

    assert onnx_session.version() == f"onnxruntime {onnxruntime.__version__}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"op": "Nope"}, "No Op registered for Nope"),
        ({"op": "Nope", "domain": "my.domain"}, "my.domain:Nope"),
        ({"opset": 99}, "Opset 99"),
        ({"ir": 99}, "Unsupported model IR version: 99"),
        ({"op": "Erf", "dtype": 16}, "Could not find an implementation for Erf"),
    ],
)
def test_what_this_onnxruntime_lacks(options: dict[str, Any], said: str, model: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        onnx_session.open_session(model(**options))
    assert said in caught.value.cause and "\n" not in caught.value.cause
    assert "/onnxruntime" not in caught.value.cause
    assert "newer onnxruntime" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_damaged_file(content: bytes | None, model: Callable[..., Path]) -> None:
    path = model()
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(CheckpointError, match="is damaged or no ONNX file"):
        onnx_session.open_session(path)


def test_lost_weights(tmp_path: Path) -> None:
    from onnx import helper, numpy_helper

    values = [helper.make_tensor_value_info(name, 1, ["n", 4]) for name in "xy"]
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(made, tmp_path / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    (tmp_path / "w.data").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="w offset"):
        onnx_session.open_session(tmp_path)
    (tmp_path / "w.data").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        onnx_session.open_session(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "other.onnx"):
        with pytest.raises(CheckpointError, match="there is no "):
            onnx_session.open_session(path)


@pytest.mark.parametrize(
    "inputs",
    [{}, {"z": np.zeros((1, 4), np.float32)}, {"x": np.zeros((1, 3), np.float32)}, {"x": np.zeros((1, 4))}],
)
def test_inputs_that_do_not_fit(inputs: dict[str, Any], model: Callable[..., Path]) -> None:
    session = onnx_session.open_session(model())
    with pytest.raises(DataError) as caught:
        onnx_session.run(session, inputs)
    assert "\n" not in caught.value.cause
    assert caught.value.remedy == "it takes x tensor(float) ['n', 4]"


def test_a_failure_at_work_is_ours() -> None:
    class Broken:
        def get_outputs(self) -> list[Any]:
            return []

        def run(self, *_: Any) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : no memory\nleft")

    with pytest.raises(MachineError) as caught:
        onnx_session.run(Broken(), {})  # type: ignore[arg-type]
    assert caught.value.cause == "onnxruntime failed: no memory left"


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_session.require()
    monkeypatch.setattr(onnx_session, "find_spec", lambda name: None if name.startswith("onnxs") else object())
    onnx_session.require("onnx", "onnxruntime")
    with pytest.raises(UserError) as caught:
        onnx_session.require()
    assert caught.value.cause == "ONNX needs onnxscript, not installed here"
    assert caught.value.remedy == "pip install 'effcli[onnx]'"
