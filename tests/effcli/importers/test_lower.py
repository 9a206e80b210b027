"""Lowering: each operation in its canonical form, the same values as the module for every size of the batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from effcli.errors import UnsupportedError
from effcli.graphs.graph import Graph, operation, where
from effcli.importers._rules import lower
from effcli.importers._trace import trace_module


class Function(nn.Module):
    """A function of a tensor as a network, with some weights to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3)
        self.linear = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("two", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def graph_of(module: nn.Module | Callable[..., Any], *shape: int) -> Graph:
    network = module if isinstance(module, nn.Module) else Function(module)
    return lower(trace_module(network, shape), "test")


def check(module: nn.Module | Callable[..., Any], *shape: int, tolerance: float = 1e-6) -> Graph:
    """Read `module` and hold the graph against it, before and after it was on disk."""
    network = (module if isinstance(module, nn.Module) else Function(module)).eval()
    graph = lower(trace_module(network, shape), "test")
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 5):
        inputs = torch.randn(batch, *shape, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(
                graph.run(inputs.clone()), network(inputs.clone()), rtol=tolerance, atol=tolerance
            )
    return graph


def operations(graph: Graph) -> list[str]:
    return [operation(node) for node in graph.nodes if node.op not in ("placeholder", "output")]


def forms(graph: Graph) -> list[tuple[Any, ...]]:
    """Operators with what they are given besides tensors."""
    return [
        (operation(node), *(arg for arg in node.args if not isinstance(arg, torch.fx.Node)))
        for node in graph.nodes
        if node.op == "call_function"
    ]


IMAGE = 4, 8, 6
ROW = (4,)


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda m, x: F.relu_(x * 1.5), IMAGE, [("aten.mul.Tensor", 1.5), ("aten.relu.default",)]),
        (lambda m, x: F.relu6(x), IMAGE, [("aten.hardtanh.default", 0.0, 6.0)]),
        (lambda m, x: x.clamp(-1, 2), IMAGE, [("aten.hardtanh.default", -1, 2)]),
        (lambda m, x: x.clamp(min=0), IMAGE, [("aten.relu.default",)]),
        (lambda m, x: F.hardtanh(x), IMAGE, [("aten.hardtanh.default", -1.0, 1.0)]),
        (lambda m, x: torch.add(x, 3, alpha=2), IMAGE, [("aten.add.Tensor", 6)]),
        (lambda m, x: 1 - x, IMAGE, [("aten.mul.Tensor", -1), ("aten.add.Tensor", 1)]),
        (lambda m, x: x * m.two, IMAGE, [("aten.mul.Tensor", 2.0)]),
        (
            lambda m, x: x.add_(1).sub_(2).div_(4),
            IMAGE,
            [("aten.add.Tensor", 1), ("aten.sub.Tensor", 2), ("aten.div.Tensor", 4)],
        ),
        (
            lambda m, x: F.dropout(x, 0.5, m.training).contiguous().clone().detach().float() + 1,
            IMAGE,
            [("aten.add.Tensor", 1)],
        ),
        (lambda m, x: x.view(x.shape[0], -1), IMAGE, [("aten.reshape.default", [-1, 192])]),
        (lambda m, x: x.flatten(2), IMAGE, [("aten.reshape.default", [-1, 4, 48])]),
        (
            lambda m, x: x.reshape(x.size(0) * 2, 2, 48).reshape(-1, 4, 48),
            IMAGE,
            [("aten.reshape.default", [-1, 2, 48]), ("aten.reshape.default", [-1, 4, 48])],
        ),
        (
            lambda m, x: x.unsqueeze(1).squeeze(1) + 0.5,
            IMAGE,
            [
                ("aten.reshape.default", [-1, 1, 4, 8, 6]),
                ("aten.reshape.default", [-1, 4, 8, 6]),
                ("aten.add.Tensor", 0.5),
            ],
        ),
        (lambda m, x: x.transpose(-1, 1), IMAGE, [("aten.permute.default", [0, 3, 2, 1])]),
        (lambda m, x: x.movedim(1, -1), IMAGE, [("aten.permute.default", [0, 2, 3, 1])]),
        (lambda m, x: x.mT, IMAGE, [("aten.permute.default", [0, 1, 3, 2])]),
        (
            lambda m, x: x[:, :, ::2, 1:-1],
            IMAGE,
            [("aten.slice.Tensor", 2, 0, 8, 2), ("aten.slice.Tensor", 3, 1, 5, 1)],
        ),
        (lambda m, x: x.narrow(-3, 1, 2), IMAGE, [("aten.slice.Tensor", 1, 1, 3, 1)]),
        (lambda m, x: x[:, -1], IMAGE, [("aten.select.int", 1, 3)]),
        (lambda m, x: torch.cat([x, x], -3), IMAGE, [("aten.cat.default", [None, None], 1)]),
        (lambda m, x: x.chunk(3, -1)[2], IMAGE, [("aten.slice.Tensor", 3, 4, 6, 1)]),
        (lambda m, x: x.split([1, 3], 1)[0], IMAGE, [("aten.slice.Tensor", 1, 0, 1, 1)]),
        (lambda m, x: x.unbind(1)[3], IMAGE, [("aten.select.int", 1, 3)]),
        (lambda m, x: F.pad(x, (1, 0, 2, 0)), IMAGE, [("aten.constant_pad_nd.default", [1, 0, 2, 0], 0.0)]),
        (lambda m, x: F.pad(x, (0, 0)) + 1, IMAGE, [("aten.add.Tensor", 1)]),
        (lambda m, x: F.pad(x, (1, 1), mode="replicate"), (4, 6), [("aten.pad.default", [1, 1], "replicate", None)]),
        (lambda m, x: F.max_pool2d(x, 2), IMAGE, [("aten.max_pool2d.default", [2, 2], [2, 2], [0, 0], [1, 1], False)]),
        (
            lambda m, x: F.avg_pool2d(x, 3, 2, 1),
            IMAGE,
            [("aten.avg_pool2d.default", [3, 3], [2, 2], [1, 1], False, True, None)],
        ),
        (lambda m, x: F.adaptive_avg_pool2d(x, 1), IMAGE, [("aten.adaptive_avg_pool2d.default", [1, 1])]),
        (lambda m, x: x.mean((-2, -1)), IMAGE, [("aten.mean.dim", [2, 3], False)]),
        (lambda m, x: x.softmax(-1), ROW, [("aten.softmax.int", 1)]),
        (
            lambda m, x: F.gelu(x) + F.silu(x),
            ROW,
            [("aten.gelu.default",), ("aten.silu.default",), ("aten.add.Tensor",)],
        ),
        (lambda m, x: x * x.shape[1], ROW, [("aten.mul.Tensor", 4)]),
    ],
)
def test_canonical_forms(function: Callable[..., Any], shape: tuple[int, ...], expected: list[tuple[Any, ...]]) -> None:
    found = forms(check(function, *shape))
    plain = [tuple([None] * len(arg) if _nodes(arg) else arg for arg in form) for form in found]
    assert plain == expected


def _nodes(arg: Any) -> bool:
    return isinstance(arg, list | tuple) and bool(arg) and all(isinstance(item, torch.fx.Node) for item in arg)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), IMAGE, ["Conv2d"]),
        (nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(1, 2), bias=False), IMAGE, ["Conv2d"]),
        (nn.Conv2d(4, 4, (2, 4), padding="same"), IMAGE, ["aten.constant_pad_nd.default", "Conv2d"]),
        (nn.Conv2d(4, 4, 2, padding="valid"), IMAGE, ["Conv2d"]),
        (nn.Conv1d(4, 6, 3, 2, 1, 2), (4, 11), ["Conv1d"]),
        (nn.Linear(4, 3, bias=False), (7, 4), ["Linear"]),
        (nn.BatchNorm2d(4), IMAGE, ["BatchNorm2d"]),
        (nn.BatchNorm2d(4, affine=False), IMAGE, ["BatchNorm2d"]),
        (nn.BatchNorm1d(4, eps=1e-3), ROW, ["BatchNorm1d"]),
        (nn.BatchNorm1d(4), (4, 9), ["BatchNorm1d"]),
        (nn.LayerNorm(6, eps=1e-3), IMAGE, ["LayerNorm"]),
        (nn.LayerNorm((8, 6), bias=False), IMAGE, ["LayerNorm"]),
        (nn.LayerNorm(6, elementwise_affine=False), IMAGE, ["aten.layer_norm.default"]),
        (nn.GroupNorm(2, 4), IMAGE, ["GroupNorm"]),
        (nn.ConvTranspose2d(4, 3, 2), IMAGE, ["get_attr", "get_attr", "aten.conv_transpose2d.input"]),
        (nn.MultiheadAttention(4, 2, batch_first=True), None, None),
    ],
)  # fmt: skip
def test_layers_are_modules(module: nn.Module, shape: tuple[int, ...] | None, expected: list[str] | None) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for name, buffer in module.named_buffers():
        if "var" in name:
            nn.init.uniform_(buffer, 0.5, 2)
    if shape is None:
        attention = module
        graph = check(lambda m, x: attention(x, x, x, need_weights=False)[0], 5, 4, tolerance=1e-5)
        assert "Linear" in operations(graph)
        return
    graph = check(nn.Sequential(module), *shape, tolerance=1e-5)
    assert operations(graph) == expected
    if expected is not None and expected[-1] in ("Conv1d", "Conv2d", "Linear"):
        (site,) = graph.sites()
        assert site.name == "0" and site.parameter == "0.weight"


def test_a_product_with_a_weight_is_a_linear() -> None:
    graph = check(lambda m, x: torch.addmm(m.linear.bias, x, m.linear.weight.t()), *ROW)
    assert operations(graph) == ["Linear"] and [site.name for site in graph.sites()] == ["linear"]
    graph = check(lambda m, x: x @ m.scale.t(), *ROW)
    assert [(site.name, site.shape) for site in graph.sites()] == [("scale", (5, 4))]


def test_what_depends_on_weights_alone_is_computed_once() -> None:
    """A convolution whose weight is normalised in the network itself is a plain convolution."""
    graph = check(lambda m, x: F.conv2d(x, m.conv.weight / m.conv.weight.std(), m.conv.bias), *IMAGE, tolerance=1e-5)
    assert operations(graph) == ["Conv2d"] and graph.sites()[0].name == "conv"
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 2))
    graph = check(nn.Sequential(parametrized), *IMAGE, tolerance=1e-5)
    assert [site.name for site in graph.sites()] == ["0"]


def test_one_module_called_twice_stays_one() -> None:
    graph = check(lambda m, x: m.conv(x) + m.conv(x * 2), *IMAGE)
    assert len(graph.sites()) == 1 and operations(graph).count("Conv2d") == 2
    assert graph.weights() == 6 * 4 * 9 + 6


def test_one_weight_with_two_meanings() -> None:
    graph = check(lambda m, x: F.conv2d(x, m.conv.weight, padding=1)[:, :, 1:-1, 1:-1] + m.conv(x), *IMAGE)
    assert sorted(site.name for site in graph.sites()) == ["conv", "conv_2"]
    graph = check(lambda m, x: m.linear(x) + (m.linear.weight * x.unsqueeze(1)).sum(-1), *ROW)
    assert [site.name for site in graph.sites()] == ["linear"] and "get_attr" in operations(graph)


def test_changes_in_place_reach_later_readers() -> None:
    def residual(m: Any, x: Tensor) -> Tensor:
        x = x * 2
        y = F.relu_(x)
        return x - y * 0.5

    assert operations(check(residual, *IMAGE)).count("aten.relu.default") == 1


def test_a_change_behind_a_view_is_refused() -> None:
    def hidden(m: Any, x: Tensor) -> Tensor:
        x = x * 2
        part = x[:, :2]
        F.relu_(x)
        return part + 1

    with pytest.raises(UnsupportedError, match=r"relu_ \(aten.relu_.default, test_lower.py:\d+ in forward\) changes"):
        graph_of(hidden, *IMAGE)


def test_a_token_for_every_input() -> None:
    """What is put to every input keeps the size of the batch in the graph."""
    graph = check(lambda m, x: torch.cat([m.scale.unsqueeze(0).expand(x.shape[0], -1, -1), x], 1), 3, 4)
    assert operations(graph) == ["aten.sym_size.int", "get_attr", "aten.expand.default", "aten.cat.default"]
    assert graph.run(torch.zeros(7, 3, 4)).shape == (7, 8, 4)


def test_a_mask_that_masks_nothing_goes() -> None:
    def attention(m: Any, x: Tensor) -> Tensor:
        mask = torch.ones(1, 1, 6, dtype=torch.bool).expand(x.shape[0], 8, 6)
        return F.scaled_dot_product_attention(x[:, 0], x[:, 1, :6], x[:, 2, :6], mask)

    assert "aten.expand.default" not in operations(check(attention, *IMAGE, tolerance=1e-5))


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    padding=st.sampled_from([0, 1, (2, 0), "valid"]),
    bias=st.booleans(),
)
def test_any_convolution(
    kernel: tuple[int, int], stride: int, dilation: int, groups: int, padding: Any, bias: bool
) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias)
    graph = check(nn.Sequential(module), 4, 11, 9, tolerance=1e-5)
    assert operations(graph) == ["Conv2d"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU()).to(dtype)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x.to(dtype)).float()
            return y

    graph = graph_of(Cast().eval(), *IMAGE)
    inputs = torch.randn(2, *IMAGE)
    torch.testing.assert_close(graph.run(inputs), network.float()(inputs))
    assert operations(graph) == ["Conv2d", "aten.relu.default"]
    verb = "rounded" if dtype == torch.float64 else "widened"
    assert graph.facts.remarks == (f"weights in {str(dtype)[6:]} were {verb} to float32",)


def _branch(m: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        x = x + 1
    return x


def _fixed(m: Any, x: Tensor) -> Tensor:
    return x.view(2, 192)


def _counting(m: Any, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] == 2 else x


def _failing(m: Any, x: Tensor) -> Tensor:
    raise ValueError("no such thing\nand more")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_branch, r"^torch.export cannot record .*data-dependent.* \(test_lower.py:\d+ in _branch\)$"),
        (_fixed, r"^view \(aten.view.default, test_lower.py:\d+ in forward\) does not take a batch of 3: .*$"),
        (_counting, r"^the network does not do the same to batches of every size$"),
        (_failing, r"^torch.export cannot record the network: no such thing \(test_lower.py:\d+ in _failing\)$"),
        (lambda m, x: (x, x + 1), r"^the network returns 2 values$"),
        (lambda m, x: x.sum(), r"^the first axis of the output, sum_1 \(aten.sum.default.*\), is not the batch$"),
        (lambda m, x: x.transpose(0, 1), r"^the first axis of the output, .* is not the batch$"),
        (lambda m, x: x[:1] + x, r"^slice_1 .* takes a part of the batch$"),
        (lambda m, x: F.dropout(x, 0.5, True), r"^dropout .* drops values at random$"),
        (lambda m, x: x + torch.rand(4, 8, 6), r"^rand .* gives other values each time$"),
        (
            lambda m, x: F.batch_norm(x, None, None, training=True),
            r"^batch_norm .* normalises by the batch that it sees$",
        ),
        (lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)), r"is not an operator of aten$"),
    ],
)
def test_what_a_graph_cannot_hold(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        graph_of(function, *IMAGE)
    assert "\n" not in caught.value.cause and caught.value.remedy
    assert re.search(message, caught.value.cause), caught.value.cause


def test_a_line_for_every_node() -> None:
    graph = check(lambda m, x: F.relu(m.conv(x)), *IMAGE)
    conv, relu = [node for node in graph.nodes if node.op.startswith("call")]
    line = Function.forward.__code__.co_firstlineno + 1
    assert where(conv) == f"conv (Conv2d, test_lower.py:{line} in forward)"
    assert where(relu) == f"relu (aten.relu.default, test_lower.py:{line} in forward)"


def test_the_module_keeps_its_weights() -> None:
    """Changing a layer of the graph leaves the module that it was read from alone."""
    network = nn.Sequential(nn.Linear(4, 3))
    before = network[0].weight.detach().clone()  # type: ignore[union-attr]
    graph = graph_of(network, *ROW)
    graph.set_weight("0", torch.zeros(3, 4))
    torch.testing.assert_close(network[0].weight.detach(), before)  # type: ignore[union-attr, arg-type]
