"""The `bias_correction` pass: afterwards every channel has the mean that it had before compression."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import small_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import chain
from torch import Tensor, fx, nn

from effcli.errors import DataError, NumericsError, UserError
from effcli.graphs.channels import divide_outputs, multiply_inputs
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.graphs.walk import stream
from effcli.layers.contract import Needs, NetworkPass, Observed, Pass, Transformed
from effcli.passes.quantize import bias_correction
from effcli.passes.quantize._affine import nearest
from effcli.passes.quantize.linear import Linear


def rounded(graph: Graph, bits: Any = 2) -> Graph:
    """A copy whose weights are rounded to few bits."""
    other = Graph(copy.deepcopy(graph.module), graph.facts)
    format = Linear(bits=bits, granularity="channel").format
    for site in other.sites():
        weight: Any = other.layer(site.name).weight
        other.set_weight(site.name, nearest(weight.flatten(1), format, torch.float32))
    return other


def corrected(graph: Graph, reference: Graph | None, *ignored: str, count: int = 12) -> Transformed:
    chosen: dict[str, Pass] = {
        site.name: bias_correction.BiasCorrection() for site in graph.sites() if site.name not in ignored
    }
    seen = Observed(small_graphs.batches(graph, count), reference, chosen)
    return bias_correction.BiasCorrection().transform(graph, seen)


def means(graph: Graph) -> dict[str, Tensor]:
    """The mean of every channel behind every module, by the way of one batch in float64."""
    found: dict[str, Tensor] = {}

    def look(node: fx.Node, inputs: Any, value: Any) -> None:
        if node.op == "call_module":
            axis = value.ndim - 1 if isinstance(graph.module_of(node), nn.Linear) else 1
            found[str(node.target)] = value.double().mean([other for other in range(value.ndim) if other != axis])

    stream(graph, [small_graphs.inputs(graph)], look)
    return found


def test_by_hand() -> None:
    """Inputs 1 and 3; a weight 2 that became 1.5 lowers the mean from 4 to 3: the bias rises by 1."""
    reference = chain((1,), nn.Linear(1, 1))
    reference.set_weight("layer0", torch.tensor([[2.0]]))
    reference.set_bias("layer0", torch.tensor([0.5]))
    graph = Graph(copy.deepcopy(reference.module), reference.facts)
    graph.set_weight("layer0", torch.tensor([[1.5]]))
    seen = Observed(
        lambda: iter([torch.tensor([[1.0], [3.0]])]), reference, {"layer0": bias_correction.BiasCorrection()}
    )
    made = bias_correction.BiasCorrection().transform(graph, seen)
    bias: Any = graph.layer("layer0").bias
    assert bias.tolist() == [1.5]
    assert made.notes == {"layer0": {"largest_shift": 1.0}}


@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4]))
def test_the_means_are_those_of_the_reference(seed: int, bits: int) -> None:
    """Every layer, with the inputs that the corrections before it lead to; three sizes of batches."""
    reference = small_graphs.separable()
    small_graphs.seeded(reference.layer("layer0"), seed)
    graph = rounded(reference, bits)
    corrected(graph, reference)
    wanted = means(reference)
    for name, mean in means(graph).items():
        torch.testing.assert_close(mean, wanted[name], rtol=1e-4, atol=1e-4 * float(wanted[name].abs().max()))


def test_a_batch_norm_behind_a_layer_takes_the_correction() -> None:
    reference = small_graphs.residual()
    graph = rounded(reference)
    made = corrected(graph, reference)
    assert graph.layer("stem").bias is None
    assert made.notes["stem"]["corrected_in"] == "stem_norm"
    wanted, found = means(reference), means(graph)
    for name in ("stem_norm", "block.a_norm", "block.b_norm", "head"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)


def test_layers_without_a_bias_get_one() -> None:
    reference = chain((2, 5, 5), nn.Conv2d(2, 3, 3, bias=False), "relu.default", nn.Conv2d(3, 2, 1, bias=False))
    graph = rounded(reference)
    corrected(graph, reference)
    assert isinstance(graph.layer("layer0").bias, Tensor)
    torch.testing.assert_close(means(graph)["layer2"], means(reference)["layer2"], rtol=1e-4, atol=1e-4)


def test_ignored_layers_keep_their_bias() -> None:
    reference = small_graphs.separable()
    graph = rounded(reference)
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    made = corrected(graph, reference, "layer2")
    changed = {name for name, value in graph.module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"layer0.bias", "layer4.bias", "layer7.bias"}
    assert set(made.notes) == {"layer0", "layer4", "layer7"}


def test_layers_whose_channels_were_rescaled_stay() -> None:
    """Their means are multiples of the reference's; the layers behind them are not affected."""
    reference = small_graphs.separable()
    graph = rounded(reference, 8)
    scale = torch.full((6,), 3.0)
    divide_outputs(graph, "layer0", scale)
    multiply_inputs(graph, "layer2", scale)
    made = corrected(graph, reference)
    assert set(made.notes) == {"layer2", "layer4", "layer7"}
    assert made.remarks == (
        "layer0 stays as it is: an earlier step rescaled its channels, so their means are not those of the original "
        "network",
    )
    torch.testing.assert_close(means(graph)["layer7"], means(reference)["layer7"], rtol=1e-3, atol=1e-3)


def test_layers_that_cannot_be_compared_stay() -> None:
    builder = Builder()
    shared = small_graphs.seeded(nn.Linear(4, 4), 0)
    node = builder.module("a", shared, builder.module("a", shared, builder.input()))
    reference = builder.finish(
        builder.module("b", small_graphs.seeded(nn.Linear(4, 2), 1), node), Facts(origin="test", shape=(4,))
    )
    assert corrected(rounded(reference), reference).remarks == ("a stays as it is: it is called 2 times",)
    other = chain((4,), nn.Linear(4, 2))
    made = corrected(chain((4,), nn.Linear(4, 2)), reference)
    assert made.remarks == ("layer0 stays as it is: the network before compression has no such layer",)
    assert corrected(rounded(other), other).remarks == ()


def test_without_a_reference() -> None:
    with pytest.raises(UserError, match="and none were") as caught:
        corrected(small_graphs.separable(), None)
    assert caught.value.remedy == "put it after the step that compresses the weights"


def test_without_calibration_inputs() -> None:
    with pytest.raises(DataError, match="no calibration input reached layer"):
        corrected(small_graphs.separable(), small_graphs.separable(), count=0)


def test_outputs_that_are_no_numbers_name_the_layer() -> None:
    reference = chain((2,), nn.Linear(2, 2), "relu.default")
    graph = rounded(reference)
    graph.set_bias("layer0", torch.tensor([0.0, torch.nan]))
    with pytest.raises(NumericsError, match="the outputs of layer0 are NaN or infinite"):
        corrected(graph, reference)


def test_what_the_pass_asks_for() -> None:
    assert isinstance(bias_correction.BiasCorrection(), NetworkPass)
    assert bias_correction.BiasCorrection().needs == Needs.INPUTS | Needs.DENSE
