"""What a layer multiplies its weight with, against torch's own convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from effcli.graphs.patches import geometry, padding, patches


def product(module: Any, inputs: Tensor, limit: int) -> Tensor:
    """Every token times the weight: (tokens, out), tokens in the order of the patches."""
    rows = torch.cat(list(patches(module, inputs, limit)), dim=1)
    groups, _, columns = rows.shape
    weight = module.weight.detach().reshape(groups, -1, columns)
    return (rows @ weight.mT).permute(1, 0, 2).flatten(1)


def test_by_hand() -> None:
    module = nn.Conv2d(1, 1, 2, bias=False)
    inputs = torch.arange(6.0).view(1, 1, 2, 3)
    (rows,) = patches(module, inputs)
    assert rows.tolist() == [[[0, 1, 3, 4], [1, 2, 4, 5]]]


# Torch copies the inputs of an even kernel, and says so.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(
    groups=st.sampled_from([1, 2, 6]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])),
    limit=st.sampled_from([1, 2000, 1 << 20]),
    images=st.integers(0, 3),
)
def test_convolutions_in_two_dimensions(
    groups: int, kernel: Any, stride: Any, dilation: Any, pads: Any, limit: int, images: int
) -> None:
    """Whatever the limit: the tokens of one image after the other, or line by line."""
    stride = (1, 1) if pads == "same" else stride
    module = nn.Conv2d(6, 12, kernel, stride, pads, dilation, groups, bias=False)
    inputs = torch.randn(images, 6, 11, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(inputs).permute(0, 2, 3, 1).reshape(-1, 12)
        if images:
            torch.testing.assert_close(product(module, inputs, limit), expected, rtol=1e-4, atol=1e-5)
        else:
            assert not list(patches(module, inputs, limit))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("pads", [0, 2, "same", "valid"])
def test_convolutions_in_one_dimension(pads: Any) -> None:
    module = nn.Conv1d(4, 6, 4, padding=pads, groups=2, bias=False)
    inputs = torch.randn(3, 4, 17, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(inputs).permute(0, 2, 1).reshape(-1, 6)
    torch.testing.assert_close(product(module, inputs, 500), expected, rtol=1e-4, atol=1e-5)


def test_linears() -> None:
    inputs = torch.randn(2, 3, 5)
    (rows,) = patches(nn.Linear(5, 2), inputs)
    torch.testing.assert_close(rows, inputs.view(1, 6, 5))


def test_what_is_held_at_a_time_is_bounded() -> None:
    module = nn.Conv2d(8, 8, 3, padding=1)
    inputs = torch.zeros(9, 8, 40, 40)
    limit = 8 * 9 * 40 * 4 * 7
    sizes = [part.nbytes for part in patches(module, inputs, limit)]
    assert max(sizes) <= limit
    assert sum(sizes) == 9 * 8 * 9 * 1600 * 4


def test_layers_that_see_the_same() -> None:
    one = geometry(nn.Conv2d(4, 8, 3, padding=1))
    assert one == geometry(nn.Conv2d(4, 5, 3, padding="same"))
    assert one != geometry(nn.Conv2d(4, 8, 3, stride=2, padding=1))
    assert geometry(nn.Linear(4, 8)) == geometry(nn.Linear(4, 2))
    # One zero more on the right and below, as in torch.
    assert padding(nn.Conv2d(1, 1, (2, 4), padding="same")) == (1, 2, 0, 1)
