"""A report to show: a residual network for ten classes of images, weights compressed, then activations as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

from effcli.reports.report import (
    ActivationRange,
    Classification,
    ClassRow,
    Histogram,
    Latency,
    LedgerRow,
    Quality,
    Report,
    Stage,
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PER_CLASS = 1000
WEIGHTS = 272_474
DEVICE = "AMD EPYC 9575F"

# Images of a class out of 1,000 that the network misses, and the classes they are taken for, most often first.
MISSED = {
    "airplane": (98, ("ship", "bird", "truck", "automobile")),
    "automobile": (61, ("truck", "ship", "airplane")),
    "bird": (171, ("deer", "frog", "cat", "airplane", "dog")),
    "cat": (247, ("dog", "frog", "bird", "deer", "horse")),
    "deer": (122, ("bird", "horse", "cat", "frog")),
    "dog": (178, ("cat", "horse", "bird", "deer")),
    "frog": (74, ("cat", "bird", "deer")),
    "horse": (93, ("deer", "dog", "cat")),
    "ship": (64, ("airplane", "automobile", "truck")),
    "truck": (79, ("automobile", "ship", "airplane")),
}
# How many more it misses when it is compressed once and twice.
WORSE = {"cat": (9, 41), "bird": (4, 18), "dog": (-3, 12), "frog": (1, 5), "deer": (2, -7), "ship": (0, -3)}

# Name, output channels, input channels, kernel, output height and width.
LAYERS = (
    ("conv1", 16, 3, 3, 32),
    *(
        (f"layer{stage}.{block}.conv{place}", 8 * 2**stage, _into, 3, 64 >> stage)
        for stage in (1, 2, 3)
        for block in (0, 1, 2)
        for place in (1, 2)
        for _into in [4 * 2**stage if (block, place) == (0, 1) and stage > 1 else 8 * 2**stage]
    ),
    ("fc", 10, 64, 1, 1),
)


def confusion(step: int) -> tuple[tuple[int, ...], ...]:
    """Images by class and by what they were taken for, after `step` passes: every row sums to `PER_CLASS`."""
    rows = []
    for name in CLASSES:
        missed, others = MISSED[name]
        missed += (0, *WORSE.get(name, (1, 2)))[step]
        row = [0] * len(CLASSES)
        left = missed
        for other in others:
            taken = math.ceil(left * 0.55)
            row[CLASSES.index(other)] += taken
            left -= taken
        row[CLASSES.index(others[0])] += left
        row[CLASSES.index(name)] = PER_CLASS - missed
        rows.append(tuple(row))
    return tuple(rows)


def classification(
    counts: Sequence[Sequence[int]],
    names: Sequence[str] = CLASSES,
    agreement: float | None = None,
    sqnr: float | None = None,
) -> Classification:
    """What follows from a confusion matrix; no top-5 figure does."""
    images = sum(map(sum, counts))
    right = sum(row[index] for index, row in enumerate(counts))
    top1 = right / images
    taken = [sum(column) for column in zip(*counts, strict=True)]
    return Classification(
        images=images,
        top1=top1,
        top1_stderr=math.sqrt(top1 * (1 - top1) / images),
        agreement=agreement,
        sqnr=sqnr,
        classes=tuple(
            ClassRow(
                name=name,
                images=sum(row),
                recall=row[index] / sum(row) if sum(row) else None,
                precision=row[index] / taken[index] if taken[index] else None,
            )
            for index, (name, row) in enumerate(zip(names, counts, strict=True))
        ),
        confusion=tuple(tuple(row) for row in counts),
    )


def quality(step: int) -> Quality:
    found = classification(confusion(step), agreement=(None, 0.9861, 0.9638)[step], sqnr=(None, 31.4, 24.8)[step])
    return Quality(classification=found.model_copy(update={"top5": (0.9948, 0.9946, 0.9931)[step]}))


def ledger(observed: bool) -> tuple[LedgerRow, ...]:
    rows = []
    for index, (name, out, into, kernel, side) in enumerate(LAYERS):
        columns = into * kernel * kernel
        kept = name == "fc" and not observed
        error = 2e-4 * math.exp(0.9 * math.sin(1.7 * index) + 0.04 * index)
        rows.append(
            LedgerRow(
                name=name,
                kind="linear" if kernel == 1 else "conv",
                shape=(out, columns),
                format="float32" if kept else "int8 per-channel sym" if observed else "int4 per-channel sym",
                bits_per_weight=32 if kept else 8.25 if observed else 4.25,
                nbytes=out * columns * (32 if kept else 8 if observed else 4) // 8 + 4 * out,
                status="kept" if kept else "compressed",
                reason="the last layer; classifier: true takes it" if kept else "",
                weight_error=None if kept else 1.4 * error,
                output_error=None if kept else error,
                macs=out * columns * side * side,
                parameters=out * (columns + 1),
            )
        )
    return tuple(rows)


def activation(name: str, spread: float, low: float, high: float, observer: str) -> ActivationRange:
    """A ReLU's output: half of all zeros in the first bin, then a tail that outlives the range."""
    bins = 96
    edges = tuple(6 * spread * k / bins for k in range(bins + 1))
    counts = tuple(
        round(4e6 * (0.5 * (k == 0) + 0.02 * math.exp(-k / 9) + 2e-7 * (k > 70) * (k % 5))) for k in range(bins)
    )
    return ActivationRange(name=name, edges=edges, counts=counts, low=low, high=high, observer=observer)


def logits() -> ActivationRange:
    """A network's outputs: a bell on both sides of zero, and a range that is wider than they are."""
    bins = 96
    edges = tuple(-12 + 30 * k / bins for k in range(bins + 1))
    counts = tuple(round(9000 * math.exp(-(((k - 36) / 15) ** 2))) for k in range(bins))
    return ActivationRange(name="fc", edges=edges, counts=counts, low=-13.0, high=19.5, observer="minmax")


def histogram(layer: str) -> Histogram:
    bins = 64
    edges = tuple(-0.6 + 1.2 * k / bins for k in range(bins + 1))
    before = tuple(round(900 * math.exp(-(((k - 31.5) / 9) ** 2))) for k in range(bins))
    after = tuple(sum(before[k : k + 4]) if k % 4 == 0 else 0 for k in range(bins))
    return Histogram(layer=layer, edges=edges, before=before, after=after)


def latency(runtime: str, milliseconds: float, repetitions: int = 200) -> Latency:
    return Latency(
        runtime=runtime,
        milliseconds=milliseconds,
        fastest=0.94 * milliseconds,
        repetitions=repetitions,
        threads=1,
        device=DEVICE,
    )


def vision_report(output: str = "out/resnet20-int8") -> Report:
    """Weights at four bits, then all at eight bits with activations; measured with labels and in two runtimes."""
    return Report(
        effcli_version="0.2.0",
        model="models/resnet20.pt2",
        output=output,
        machine=f"{DEVICE}, 2 cores, Linux",
        software={"python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.32.0"},
        recipe={
            "model": "models/resnet20.pt2",
            "calibration": {"data": "images/train", "samples": 512},
            "passes": [{"gptq": {"bits": 4}}, {"static": {"bits": 8, "observer": "percentile"}}],
        },
        stages=(
            Stage(
                name="input",
                nbytes=1_098_304,
                weights=WEIGHTS,
                bits_per_weight=32.0,
                quality=quality(0),
                latencies=(latency("torch float32", 2.31), latency("onnxruntime float32", 0.874)),
            ),
            Stage(
                name="gptq",
                options={"bits": 4, "group_size": None},
                nbytes=148_120,
                weights=WEIGHTS,
                bits_per_weight=4.35,
                quality=quality(1),
                latencies=(latency("torch float32", 2.52),),
                peak_memory=612_000_000,
                seconds=14.2,
                ledger=ledger(False),
                histograms=(histogram("layer1.0.conv1"), histogram("layer3.2.conv2")),
            ),
            Stage(
                name="static",
                options={"bits": 8, "observer": "percentile", "percentile": 99.99},
                nbytes=287_640,
                weights=WEIGHTS,
                bits_per_weight=8.45,
                quality=quality(2),
                latencies=(latency("onnxruntime int8", 0.312),),
                peak_memory=655_000_000,
                seconds=8.9,
                remarks=("images/train holds 50,000 images; 512 of them were drawn with seed 0",),
                ledger=ledger(True),
                activations=(
                    activation("relu", 0.55, 0.0, 2.41, "percentile"),
                    activation("layer1.0.relu", 0.4, 0.0, 1.62, "percentile"),
                    activation("layer2.1.relu_1", 0.7, 0.0, 2.2, "mse"),
                    activation("layer3.2.relu_1", 1.3, 0.0, 7.8, "minmax"),
                    logits(),
                ),
            ),
        ),
        verified="integer executor against onnxruntime: 0 of 10,000 outputs differ",
    )
