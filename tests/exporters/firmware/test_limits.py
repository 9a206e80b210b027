"""What an export costs, and what it says when that is too much."""

from __future__ import annotations

import json

import pytest
from integer_networks import Network

from effcli.errors import UnsupportedError
from effcli.exporters.firmware.generate import generate


def network(out: int = 8) -> Network:
    net = Network((8, 12, 12))
    net.convolution(out, (3, 3), padding=(1, 1, 1, 1))
    net.mean((1, 2))
    net.linear(400)
    return net


def test_what_is_exact_is_exact() -> None:
    cost = generate(network().finish(), "tiny").cost
    convolution, mean, linear = cost.layers
    # 8 x 9 x 8 weights and 8 biases with multipliers of 32 bits; a patch of two windows of 72 numbers of 16 bits.
    assert (convolution.weights, convolution.requantization) == (8 * 72, 8 * 8)
    assert convolution.scratch == 2 * 2 * 72
    assert convolution.macs == 12 * 12 * 8 * 72
    assert (mean.weights, mean.requantization, mean.macs) == (0, 0, 0)
    assert (linear.weights, linear.requantization) == (400 * 8, 400 * 8)
    assert cost.constants == 8 * 72 + 8 * 8 + 400 * 8 + 400 * 8
    assert cost.ram == cost.arena + cost.stack and cost.flash == cost.constants + cost.code
    assert all(layer.ram <= cost.arena for layer in cost.layers)


def test_weights_of_4_bits_take_half() -> None:
    net = Network((64,))
    net.linear(64, bits=4)
    wide = Network((64,))
    wide.linear(64)
    assert (
        2 * generate(net.finish(), "tiny").cost.layers[0].weights
        == generate(wide.finish(), "tiny").cost.layers[0].weights
    )


def test_a_limit_that_is_kept_says_nothing() -> None:
    cost = generate(network().finish(), "tiny").cost
    generate(network().finish(), "tiny", max_ram=cost.ram, max_flash=cost.flash)


def test_too_much_ram_names_the_layers_and_what_they_hold() -> None:
    cost = generate(network().finish(), "tiny").cost
    with pytest.raises(UnsupportedError) as caught:
        generate(network().finish(), "tiny", max_ram=cost.ram - 1)
    cause, remedy = caught.value.cause, caught.value.remedy
    assert f"needs {cost.ram:,} bytes of RAM, and {cost.ram - 1:,} are allowed" in cause
    assert "most in convolution0" in cause and "1.15 kB for v0" in cause
    assert "a smaller input, or fewer channels in convolution0" in remedy


def test_too_much_flash_names_the_layers_and_says_whether_4_bits_would_do() -> None:
    cost = generate(network().finish(), "tiny").cost
    with pytest.raises(UnsupportedError) as caught:
        generate(network().finish(), "tiny", max_flash=cost.flash - 1)
    assert "most in linear2 6.40 kB, convolution0 640 B" in caught.value.cause
    assert "adaround: {bits: 4}" in caught.value.remedy
    with pytest.raises(UnsupportedError) as caught:
        generate(network().finish(), "tiny", max_flash=1000)
    assert "fewer channels in linear2; weights of 4 bits alone would save" in caught.value.remedy


def test_both_limits_are_reported_at_once() -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)of RAM.*of flash"):
        generate(network().finish(), "tiny", max_ram=10, max_flash=10)


def test_plan_and_picture() -> None:
    generated = generate(network().finish(), "tiny")
    described = json.loads(generated.documents["plan.json"])
    assert described["ram"]["arena"] == generated.plan.nbytes
    assert [layer["name"] for layer in described["layers"]] == ["convolution0", "mean1", "linear2"]
    assert [layer for band in described["bands"] for layer in band] == ["convolution0", "mean1", "linear2"]
    assert max(piece["offset"] + piece["bytes"] for piece in described["arena"]) <= described["ram"]["arena"]
    picture = generated.documents["arena.svg"]
    assert picture.count("<rect") == len(described["arena"]) + 3
    assert "a whole tensor: v0, 1152 bytes" in picture


def test_the_same_network_gives_the_same_files() -> None:
    first, second = generate(network().finish(), "tiny"), generate(network().finish(), "tiny")
    assert first.sources == second.sources and first.documents == second.documents
