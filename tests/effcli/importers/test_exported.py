"""Exported graphs: real networks to the bit, and files that are damaged, foreign or hostile."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from effcli.errors import CheckpointError, EffcliError, UnsupportedError
from effcli.graphs.graph import Graph, operation
from effcli.importers import read, recognises
from effcli.importers._archive import SCHEMA_MAJOR
from effcli.importers.exported import read_exported

NETWORKS = (
    "tiny_resnet8_cifar10",
    "tiny_dscnn_kws",
    "tiny_fc_autoencoder_toycar",
    "cifar10_resnet20_jpegft",
    "cifar10_resnet56",
)


class Net(nn.Module):
    """float32 (n, 3, 8, 8) -> (n, 4), with most of what an archive can hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(48, 4)
        self.register_buffer("offset", torch.randn(6, 1, 1), persistent=False)
        self.mixing = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.conv(x)) + self.offset)
        low, high = x.chunk(2, 1)
        x = F.max_pool2d(torch.cat([high, low], 1), 2)
        x = x.masked_fill(x > 1.5, float("-inf")).clamp(-2.0, 2.0)
        x = x + (self.mixing @ torch.tensor([[1.0], [2], [3], [4]])).unsqueeze(-1)
        return self.head(x[:, :, ::2, ::2].reshape(x.shape[0], -1)[:, :24].repeat(1, 2))


SHAPE = 3, 8, 8


def export(file: Path, module: nn.Module | None = None, dynamic: bool = True, batch: int = 2) -> Path:
    shapes = ({0: Dim.DYNAMIC},) if dynamic else None
    program = torch.export.export((module or Net()).eval(), (torch.zeros(batch, *SHAPE),), dynamic_shapes=shapes)
    torch.export.save(program, file)
    return file


def rewritten(file: Path, name: str, change: Callable[[bytes], bytes | None]) -> Path:
    """The archive with the member whose path ends with `name` changed, or left out for None."""
    with zipfile.ZipFile(file) as archive:
        members = {entry: archive.read(entry) for entry in archive.namelist()}
    assert any(entry.endswith(name) for entry in members)
    with zipfile.ZipFile(file, "w") as archive:
        for entry, data in members.items():
            kept = change(data) if entry.endswith(name) else data
            if kept is not None:
                archive.writestr(entry, kept)
    return file


def edited(file: Path, name: str, change: Callable[[Any], object]) -> Path:
    def apply(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return rewritten(file, name, apply)


@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks_to_the_bit(name: str, asset: Callable[[str], Path], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("networks", asset("networks.py"))
    assert spec is not None and spec.loader is not None
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    module, example = networks.load(name)
    graph = read(asset(name))
    graph.save(tmp_path)
    again = read(tmp_path)
    assert graph.facts.shape == tuple(example.shape[1:])
    layers = (nn.Conv2d, nn.Linear)
    assert {site.name for site in graph.sites()} == {n for n, m in module.named_modules() if isinstance(m, layers)}
    for batch in (1, 5):
        inputs = torch.randn(batch, *graph.facts.shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = module(inputs)
        for found in (graph, again):
            torch.testing.assert_close(found.run(inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_archive_can_hold(tmp_path: Path, dtype: torch.dtype) -> None:
    network = Net().eval()
    graph = read_exported(export(tmp_path / "net.pt2", network))
    for batch in (1, 5):
        inputs = torch.randn(batch, *SHAPE)
        with torch.no_grad():
            torch.testing.assert_close(graph.run(inputs), network(inputs))
    assert [site.name for site in graph.sites()] == ["conv", "head"]
    assert graph.facts.origin == "exported graph" and graph.facts.shape == SHAPE
    half = nn.Sequential(nn.Conv2d(3, 4, 3)).to(dtype)
    program = torch.export.export(half, (torch.zeros(2, *SHAPE, dtype=dtype),), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "half.pt2")
    remarks = () if dtype == torch.float32 else ("weights in bfloat16 were widened to float32",)
    assert read_exported(tmp_path / "half.pt2").facts.remarks == remarks


def test_lines_of_the_source_are_kept(tmp_path: Path) -> None:
    graph = read_exported(export(tmp_path / "net.pt2"))
    line = Net.forward.__code__.co_firstlineno + 1
    (relu,) = [node for node in graph.nodes if operation(node) == "aten.relu.default"]
    assert relu.meta["source"] == f"test_exported.py:{line} in forward"


@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_a_weight_that_is_a_view(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten(), nn.Linear(2, 3))
    network[2].weight = nn.Parameter(torch.randn(2, 5).t()[1:4])
    graph = read_exported(export(tmp_path / "net.pt2", network))
    inputs = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(inputs), network(inputs))


def test_a_weight_under_two_names(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    network[1].weight = network[0].weight
    graph = read_exported(export(tmp_path / "net.pt2", network))
    inputs = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(inputs), network(inputs))
    graph.save(tmp_path)
    torch.testing.assert_close(Graph.read(tmp_path).run(inputs), graph.run(inputs), rtol=0, atol=0)


def test_a_graph_for_one_input_takes_more_where_it_can(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    graph = read_exported(export(tmp_path / "net.pt2", network, dynamic=False, batch=1))
    inputs = torch.randn(7, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(inputs), network(inputs))

    assert graph.facts.remarks == ("it was exported for batches of 1 and is taken for batches of any size",)
    graph = read_exported(export(tmp_path / "net.pt2", Flat(), dynamic=False, batch=4))
    torch.testing.assert_close(graph.run(inputs), inputs.flatten(1))
    message = r"^add \(aten.add.Tensor, test_exported.py:\d+ in forward\) does not take a batch of 3: "
    with pytest.raises(UnsupportedError, match=message):
        read_exported(export(tmp_path / "fixed.pt2", Fixed(), dynamic=False, batch=2))


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, *SHAPE)


def test_facts_from_beside_the_file(tmp_path: Path) -> None:
    export(tmp_path / "model.pt2")
    (tmp_path / "config.json").write_text(json.dumps({"classes": ["a", "b", "c", "d"]}))
    described = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8},
        "do_rescale": True, "rescale_factor": 0.5, "do_normalize": True,
        "image_mean": [1, 2, 3], "image_std": [4, 5, 6],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    assert recognises(tmp_path) and recognises(tmp_path / "model.pt2")
    for model in (tmp_path, tmp_path / "model.pt2"):
        facts = read(model, shape=SHAPE).facts
        assert facts.classes == ("a", "b", "c", "d")
        assert (facts.preprocess.resize, facts.preprocess.scale) == ((8, 8), 0.5)
        assert (facts.preprocess.mean, facts.preprocess.std) == ((1, 2, 3), (4, 5, 6))
    with pytest.raises(UnsupportedError, match=r"takes inputs of shape \(3, 8, 8\), not \(1, 8, 8\)"):
        read(tmp_path, shape=(1, 8, 8))
    with pytest.raises(UnsupportedError, match="brings its own weights"):
        read(tmp_path, weights=tmp_path / "w.safetensors")


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Training(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1  # type: ignore[operator]
        return x * 2


def test_networks_of_another_form(tmp_path: Path) -> None:
    program = torch.export.export(Pair(), (torch.zeros(2, 3), torch.zeros(2, 3)))
    torch.export.save(program, tmp_path / "pair.pt2")
    program = torch.export.export(Training().train(), (torch.zeros(2, *SHAPE),))
    torch.export.save(program, tmp_path / "training.pt2")
    program = torch.export.export(Counting(), (torch.zeros(2, *SHAPE),))
    torch.export.save(program, tmp_path / "counting.pt2")
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    program = torch.export.export(nn.Conv2d(3, 3, 1), (torch.zeros(2, *SHAPE),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "sizes.pt2")
    program = torch.export.export(nn.Embedding(5, 3), (torch.zeros(2, 4, dtype=torch.long),))
    torch.export.save(program, tmp_path / "words.pt2")
    for name, message in {
        "pair": "the network takes 2 tensors",
        "training": r"add_ \(aten.add_.Tensor, test_exported.py:\d+ in forward\) changes the network's own norm",
        "counting": r"add_ \(aten.add_.Tensor, test_exported.py:\d+ in forward\) changes the network's own count",
        "sizes": "axis 2 of its input has no fixed size",
        "words": "the network takes inputs of int64",
    }.items():
        with pytest.raises(UnsupportedError, match=message) as caught:
            read_exported(tmp_path / f"{name}.pt2")
        assert "\n" not in caught.value.cause and caught.value.remedy


def _halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flipped(file: Path) -> None:
    """One byte of a weight, which the archive's own checksum finds."""
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        info = next(item for item in archive.infolist() if item.filename.endswith("weights/weight_0"))
    data[info.header_offset + len(info.FileHeader()) + 80] ^= 0xFF
    file.write_bytes(data)


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda file: edited(file, "model_weights_config.json", lambda data: change(data["config"]["conv.weight"]))


def _model(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda file: edited(file, "models/model.json", change)


def _renamed(name: str) -> Callable[[Path], object]:
    """A weight under another name, wherever the file has it."""

    def damage(file: Path) -> None:
        for member in ("models/model.json", "model_weights_config.json"):
            rewritten(file, member, lambda data: data.replace(b'"conv.weight"', json.dumps(name).encode()))

    return damage


def _placeholder(name: str) -> Callable[[Path], object]:
    def change(data: dict[str, Any]) -> None:
        data["graph_module"]["signature"]["input_specs"][0]["parameter"]["arg"]["name"] = name

    return _model(change)


def _undescribed(graph: dict[str, Any]) -> None:
    """Without the description of the first input."""
    del graph["tensor_values"][graph["inputs"][0]["as_tensor"]["name"]]


def _twice(inputs: list[Any]) -> None:
    inputs[1] = inputs[0]


def _out_of_range(ranges: dict[str, Any]) -> None:
    (only,) = ranges.values()
    only["min_val"] = 10**29


def _renamed_in_place(file: Path) -> None:
    """A member that is not read has another name before its content than in the directory."""
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        info = next(item for item in archive.infolist() if item.filename.endswith("serialization_id"))
    data[info.header_offset + len(info.FileHeader()) - len(info.extra) - 1] ^= 0x01
    file.write_bytes(data)


def _first_argument(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = data["graph_module"]["graph"]["nodes"][0]["inputs"][0]
    return found


def _first_value(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(data["graph_module"]["graph"]["tensor_values"].values()))
    return found


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b""), "is truncated, or no exported graph"),
        (lambda file: file.write_text("no archive"), "is truncated, or no exported graph"),
        (_halved, "is truncated, or no exported graph"),
        (_flipped, "is truncated, or no exported graph: Bad CRC-32"),
        (lambda file: torch.save({"a": torch.zeros(2)}, file), "effcli does not execute pickles"),
        (lambda file: rewritten(file, "weights/weight_0", lambda data: data[:8]), "is damaged"),
        (lambda file: rewritten(file, "weights/weight_0", lambda data: None), "is damaged"),
        (lambda file: rewritten(file, "model_weights_config.json", lambda data: b"{"), "is damaged"),
        (lambda file: rewritten(file, "models/model.json", lambda data: b"[]"), "is damaged"),
        (_config(lambda item: item["tensor_meta"].update(sizes=[{"as_int": 10**6}])), "is damaged"),
        (_model(lambda data: data["graph_module"]["graph"]["nodes"].pop(0)), "is damaged"),
        (
            _config(lambda item: item["tensor_meta"].update(sizes=[{"as_int": 2**40}], strides=[{"as_int": 0}])),
            "stores",
        ),
        (_config(lambda item: item["tensor_meta"].update(storage_offset={"as_int": -1})), "is damaged"),
        (lambda file: rewritten(file, "models/model.json", lambda data: b"[" * 5000 + b"]" * 5000), "nested too deep"),
        (_renamed("../x"), "'../x' is no name of a weight"),
        (lambda file: rewritten(file, "weights/weight_0", lambda data: data + b"x"), "are no whole numbers"),
        (lambda file: rewritten(file, "archive_version", lambda data: b"1"), "version b'1' of its archive"),
        (lambda file: rewritten(file, ".data/version", lambda data: b"99"), "is damaged"),
        (_config(lambda item: item["tensor_meta"]["device"].update(type="gpu")), "is damaged"),
        (_config(lambda item: item["tensor_meta"]["device"].update(index="x")), "is damaged"),
        (_model(lambda data: data["graph_module"]["graph"].update(tensor_values={"a": 3})), "is damaged"),
        (_model(lambda data: data["graph_module"]["graph"]["tensor_values"].popitem()), "is damaged"),
        (_model(lambda data: _first_value(data).update(storage_offset={"as_int": 1.5})), "has the size 1.5"),
        (_model(lambda data: _first_value(data).update(sizes=[])), "other strides than sizes"),
        (_model(lambda data: _first_value(data).update(requires_grad="x")), "nothing of its gradient"),
        (_model(lambda data: _first_argument(data).update(name="x")), "takes no 'x'"),
        (_model(lambda data: data["graph_module"]["graph"]["nodes"][0]["inputs"].pop(0)), "lacks its"),
        (_placeholder("x, y=print()"), "'x, y=print.*is no name of a value"),
        (_model(lambda data: data["graph_module"]["graph"]["inputs"].pop()), "in the graph and 12 in its signature"),
        (_model(lambda data: _undescribed(data["graph_module"]["graph"])), "is described nowhere"),
        (_model(lambda data: _twice(data["graph_module"]["graph"]["inputs"])), "is made twice"),
        (_model(lambda data: _out_of_range(data["range_constraints"])), "lies outside its range"),
        (_renamed_in_place, "is truncated, or no exported graph: File name in directory"),
        (_model(lambda data: data["schema_version"].update(major=9)), f"with schema 9, effcli reads {SCHEMA_MAJOR}"),
    ],
)
def test_damage_has_one_line(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    file = export(tmp_path / "model.pt2")
    damage(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(file)
    assert "\n" not in caught.value.cause and caught.value.remedy


def test_arguments_are_taken_by_their_names(tmp_path: Path) -> None:
    file = export(tmp_path / "net.pt2")
    expected = read_exported(file).digest()
    rewritten(
        file,
        "models/model.json",
        lambda data: json.dumps(_reversed(json.loads(data))).encode(),
    )
    assert read_exported(file).digest() == expected


def _reversed(data: dict[str, Any]) -> dict[str, Any]:
    for node in data["graph_module"]["graph"]["nodes"]:
        if node["target"].startswith("torch.ops.aten."):
            node["inputs"].reverse()
    return data


@pytest.mark.parametrize("larger", [1 << 12, 1 << 27])
def test_only_what_a_weight_needs_is_unpacked(tmp_path: Path, larger: int) -> None:
    """A member may hold more, as for a view; what shrinks to a hundredth in the archive is no weight."""
    file = export(tmp_path / "model.pt2")
    expected = read(file).run(torch.ones(1, *SHAPE))
    with zipfile.ZipFile(file) as archive:
        members = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in members.items():
            archive.writestr(entry, data + bytes(larger if entry.endswith("weights/weight_0") else 0))
    if larger < 1 << 26:
        assert torch.equal(read(file).run(torch.ones(1, *SHAPE)), expected)
        return
    with pytest.raises(CheckpointError, match="unpacks to 134,217,"):
        read(file)


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.file, "unpickled")


def _pickled_example(file: Path, trap: Path) -> None:
    rewritten(file, "sample_inputs/model.pt", lambda data: _saved(Trap(trap)))


def _pickled_weight(file: Path, trap: Path) -> None:
    stored: list[str] = []

    def mark(data: dict[str, Any]) -> None:
        data["config"]["conv.weight"].update(use_pickle=True)
        stored.append(data["config"]["conv.weight"]["path_name"])

    edited(file, "model_weights_config.json", mark)
    rewritten(file, f"weights/{stored[0]}", lambda data: _saved(Trap(trap)))


def _custom_object(file: Path, trap: Path) -> None:
    item = {"custom_obj": {"arg": {"name": "o", "class_fqn": "x"}, "custom_obj_name": "o"}}
    edited(file, "models/model.json", lambda data: data["graph_module"]["signature"]["input_specs"].insert(0, item))
    rewritten(file, "model_constants_config.json", lambda data: data)


def _size_as_code(file: Path, trap: Path) -> None:
    code = f"__import__('pathlib').Path({str(trap)!r}).write_text('evaluated')"

    def change(data: dict[str, Any]) -> None:
        for meta in data["graph_module"]["graph"]["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code
        data["guards_code"] = [code]

    edited(file, "models/model.json", change)


def _operator_as_code(file: Path, trap: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["graph_module"]["graph"]["nodes"][1]["target"] = "torch.hub.load"

    edited(file, "models/model.json", change)


def _name_as_code(file: Path, trap: Path) -> None:
    code = f'x"), open("{trap}", "w'

    def rename(data: dict[str, Any]) -> None:
        for spec in data["graph_module"]["signature"]["input_specs"]:
            if spec.get("parameter", {}).get("parameter_name") == "head.weight":
                spec["parameter"]["parameter_name"] = code + ".weight"

    edited(file, "models/model.json", rename)
    edited(
        file,
        "model_weights_config.json",
        lambda data: data["config"].update({code + ".weight": data["config"]["head.weight"]}),
    )


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (_pickled_example, None),
        (_size_as_code, None),
        (_pickled_weight, "holds conv.weight as a pickle"),
        (_custom_object, "holds a custom_obj"),
        (_operator_as_code, "torch.hub.load .*is not an operator of aten"),
        (_name_as_code, "cannot be the name of a layer"),
    ],
)
def test_nothing_in_a_file_is_executed(
    tmp_path: Path, attack: Callable[[Path, Path], None], message: str | None
) -> None:
    """What cannot be read without executing it is refused; what is not needed is not read."""
    file, trap = export(tmp_path / "model.pt2"), tmp_path / "sprung"
    attack(file, trap)
    inputs = torch.zeros(2, *SHAPE)
    if message is None:
        torch.testing.assert_close(read(file).run(inputs), Net().eval()(inputs).detach())
    else:
        with pytest.raises(EffcliError, match=message):
            read(file).run(inputs)
    assert not trap.exists()


def test_the_traps_are_real(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.read_text() == "unpickled"


def test_other_files(tmp_path: Path) -> None:
    pickled = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2).state_dict(), pickled)
    for model, message in {
        pickled: "is neither a .pt2 nor an .onnx file",
        tmp_path / "none.pt2": "does not exist",
        tmp_path: "holds no model.pt2, no graph of effcli, and no image classifier",
    }.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            read(model)
        assert "\n" not in caught.value.cause and caught.value.remedy
    assert not recognises(tmp_path) and not recognises(pickled)
