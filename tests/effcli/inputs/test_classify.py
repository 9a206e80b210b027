"""Scores of outputs, by hand and against loops in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcli.errors import DataError, NumericsError
from effcli.inputs.classify import Scores, decibels, ranks
from effcli.reports.report import Classification


def one_hot(classes: list[int], count: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def test_a_case_worked_by_hand() -> None:
    """Cats, cats and a dog, taken for a cat, a dog and a dog; no fish."""
    scores = Scores()
    scores.add(one_hot([0, 1, 1], 3), torch.tensor([0, 0, 1]), original=one_hot([0, 0, 1], 3))
    found = scores.result(["cat", "dog", "fish"])
    assert (found.images, found.top1, found.top5) == (3, pytest.approx(2 / 3), None)
    assert found.top1_stderr == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert found.agreement == pytest.approx(2 / 3)
    # Σ y² = 3; one output of three differs, by 1 in two places.
    assert found.sqnr == pytest.approx(10 * math.log10(3 / 2))
    assert found.confusion == ((1, 1, 0), (0, 1, 0), (0, 0, 0))
    assert [(row.name, row.images, row.recall, row.precision) for row in found.classes] == [
        ("cat", 2, 0.5, 1.0),
        ("dog", 1, 1.0, 0.5),
        ("fish", 0, None, None),
    ]


def test_of_equal_logits_the_lowest_class_counts() -> None:
    logits = torch.zeros(7, 7)
    scores = Scores()
    scores.add(logits, torch.arange(7), original=one_hot([0] * 7, 7))
    found = scores.result()
    assert ranks(logits, torch.arange(7)).tolist() == list(range(7))
    assert (found.top1, found.top5, found.agreement) == (pytest.approx(1 / 7), pytest.approx(5 / 7), 1.0)


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=30), st.data())
def test_batches_and_the_reference(rows: list[list[int]], data: st.DataObject) -> None:
    """Any cut into batches gives what sorting each row in plain Python gives."""
    labels = data.draw(st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows)))
    size = data.draw(st.integers(1, len(rows)))
    logits, truth = torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)
    original = logits.roll(1, 0)
    scores = Scores()
    for part, right, before in zip(logits.split(size), truth.split(size), original.split(size), strict=True):
        scores.add(part, right, before)
    found = scores.result()
    order = [sorted(range(6), key=lambda c, row=row: (-row[c], c)) for row in rows]  # type: ignore[misc]
    confusion = [[0] * 6 for _ in range(6)]
    for right, ranking in zip(labels, order, strict=True):
        confusion[right][ranking[0]] += 1
    assert found.top1 == pytest.approx(sum(a == b[0] for a, b in zip(labels, order, strict=True)) / len(rows))
    assert found.top5 == pytest.approx(sum(a in b[:5] for a, b in zip(labels, order, strict=True)) / len(rows))
    assert [list(row) for row in found.confusion] == confusion
    assert found.agreement == pytest.approx(sum(order[k][0] == order[k - 1][0] for k in range(len(rows))) / len(rows))
    assert sum(row.images for row in found.classes) == found.images == len(rows)
    signal, noise = original.double().square().sum(), (original - logits).double().square().sum()
    if signal > 0 and noise > 0:
        assert found.sqnr == pytest.approx(10 * math.log10(signal / noise))


def test_an_auto_encoder_has_only_signal_to_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(41, 640, generator=generator)
    scores = Scores(classifier=False)
    scores.add(original * 1.01, original=original)
    found = scores.result()
    assert found == Classification(images=41, sqnr=found.sqnr)
    assert found.sqnr == pytest.approx(40, abs=1e-3)
    images = Scores(classifier=False)
    images.add(torch.ones(2, 3, 4, 4), original=torch.full((2, 3, 4, 4), 2.0))
    assert images.result().sqnr == pytest.approx(10 * math.log10(4))


def test_equal_outputs_have_no_noise() -> None:
    scores = Scores()
    scores.add(torch.ones(2, 3), original=torch.ones(2, 3))
    found = scores.result()
    assert (found.sqnr, found.agreement, found.top1, found.confusion) == (math.inf, 1.0, None, ())
    assert Classification.model_validate_json(found.model_dump_json()) == found
    assert decibels(0.0, 1.0) == -math.inf


def test_half_precision_is_summed_exactly() -> None:
    """100 · 300² overflows float16."""
    scores = Scores()
    scores.add(
        torch.full((10, 10), 300.0, dtype=torch.float16), original=torch.full((10, 10), 297.0, dtype=torch.float16)
    )
    assert scores.result().sqnr == pytest.approx(20 * math.log10(99))


def test_nothing_measured() -> None:
    assert Scores().result() == Classification(images=0)
    scores = Scores()
    scores.add(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert scores.result() == Classification(images=0)


def test_one_image_has_no_spread() -> None:
    scores = Scores()
    scores.add(torch.ones(1, 2), torch.tensor([0]))
    assert scores.result().top1_stderr == 0.0


def test_many_classes_have_no_matrix_in_the_report() -> None:
    scores = Scores()
    scores.add(torch.eye(101), torch.arange(101))
    found = scores.result()
    assert found.confusion == () and len(found.classes) == 101
    assert found.top1 == found.top5 == 1.0


def test_very_many_classes_take_memory_for_each_class_only() -> None:
    """A matrix of a million classes would have 8 TB."""
    scores = Scores()
    outputs = torch.zeros(2, 1_000_000)
    outputs[:, 5] = 1
    scores.add(outputs, torch.tensor([5, 6]))
    rows = scores.result().classes
    assert [(row.images, row.recall, row.precision) for row in rows[4:8]] == [
        (0, None, None),
        (1, 1.0, 0.5),
        (1, 0.0, None),
        (0, None, None),
    ]


def test_each_input_has_an_output() -> None:
    with pytest.raises(DataError, match="gives 14 outputs for 2 inputs"):
        Scores().add(torch.zeros(14, 8), torch.tensor([0, 1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_must_be_numbers(bad: float) -> None:
    broken = torch.tensor([[0.0, bad]])
    with pytest.raises(NumericsError, match="the outputs of the network hold NaN or infinite values"):
        Scores().add(broken)
    with pytest.raises(NumericsError, match="the outputs of the original network"):
        Scores().add(torch.zeros(1, 2), original=broken)


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_must_be_classes(label: int) -> None:
    with pytest.raises(DataError, match=f"a label is {label}, the network's classes are 0 to 1"):
        Scores().add(torch.zeros(1, 2), torch.tensor([label]))


def test_the_original_must_have_the_same_outputs() -> None:
    with pytest.raises(DataError, match=r"shape \(1, 2\), the original's \(1, 3\)"):
        Scores().add(torch.zeros(1, 2), original=torch.zeros(1, 3))


def test_names_must_be_of_the_classes() -> None:
    scores = Scores()
    scores.add(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(DataError, match="1 names for 2 classes"):
        scores.result(["cat"])
