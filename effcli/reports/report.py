"""The record of a run: one stage for the input and one per pass, each with its measurements and its ledger.

`report.json` is this model as JSON. `schema_version` rises when a field changes its meaning or goes away.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from effcli.errors import CheckpointError, writing
from effcli.files.documents import check_model, read_object
from effcli.options import Record
from effcli.reports.sensitivity import Search

SCHEMA_VERSION = 2
FILE_NAME = "report.json"
# How a finished checkpoint is loaded: by transformers, by `effcli.load` alone, or as a graph by `effcli.load`.
Layout = Literal["standard", "effcli", "graph"]
# What is drawn and reckoned with these takes roots and logarithms.
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class LedgerRow(Record):
    """What became of one layer in one pass."""

    name: str
    kind: str = Field(description="linear, conv1d, expert, conv or embedding")
    shape: tuple[int, ...]
    format: str = Field(description="how the weight is stored now, e.g. 'int4 g64 asym' or 'bfloat16'")
    bits_per_weight: float = Field(description="stored bits over number of weights, scales and zero points included")
    nbytes: int
    status: Literal["compressed", "changed", "kept", "removed"]
    reason: str = Field(default="", description="why it was kept, or what is to be known of its compression")
    weight_error: float | None = Field(default=None, description="‖W - Ŵ‖² / ‖W‖²")
    output_error: float | None = Field(
        default=None, description="mean ‖(W - Ŵ) x‖² / mean ‖W x‖² on the calibration inputs; None without calibration"
    )
    macs: int | None = Field(default=None, description="multiplications per input; None for language models")
    parameters: int | None = Field(default=None, description="weights and biases of the layer")
    notes: dict[str, Any] = Field(default_factory=dict)


class Histogram(Record):
    """Weights of one layer before and after a pass, counted over the same bins."""

    layer: str
    edges: tuple[float, ...]
    before: tuple[Count, ...]
    after: tuple[Count, ...]

    @model_validator(mode="after")
    def _same_bins(self) -> Histogram:
        if len(self.before) != len(self.after):
            raise ValueError("before and after have different bins")
        return self


class ActivationRange(Record):
    """The values of one activation on the calibration data, and the range that its 8 bits cover.

    Values below `low` and above `high` are clipped. edges: one more than counts.
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[Count, ...]
    low: float
    high: float
    observer: str = Field(description="how the range was chosen, e.g. 'percentile'")


class Training(Record):
    """How a pass trained the network. Steps are counted from 1; an error at step 0 is that before training."""

    steps: Count = Field(description="steps of the optimizer")
    curve: tuple[tuple[Count, float], ...] = Field(
        default=(), description="a step, and the mean loss of the steps after the point before"
    )
    errors: tuple[tuple[Count, float], ...] = Field(
        default=(), description="a step, and the error then on all calibration inputs"
    )
    kept: Count = Field(description="the step whose weights were kept; 0: those before training")
    measured: str = Field(default="", description="what the error is, e.g. 'loss on the calibration inputs'")
    searched: tuple[tuple[Count, Count], ...] = Field(
        default=(), description="the step behind which a line search was made, and how often it took that step again"
    )
    stopped: str = Field(default="", description="why it ended before its last step; empty where it did not")


class ClassRow(Record):
    """How well one class is recognised."""

    name: str
    images: Count = Field(description="test images of this class")
    recall: Fraction | None = Field(description="fraction of them recognised, 0 to 1; None without images")
    precision: Fraction | None = Field(description="fraction right of those taken for this class; None when none was")


class Classification(Record):
    """What a classifier makes of labelled inputs, or of inputs without labels next to the original network."""

    images: Count
    top1: Fraction | None = Field(default=None, description="fraction whose likeliest class is right, 0 to 1")
    top5: Fraction | None = Field(default=None, description="fraction whose class is among the five likeliest")
    top1_stderr: float | None = None
    agreement: Fraction | None = Field(default=None, description="fraction with the original's likeliest class, 0 to 1")
    sqnr: float | None = Field(
        default=None, description="10 log10 Σ y² / Σ (y - ŷ)² of the outputs y of the original, decibels"
    )
    classes: tuple[ClassRow, ...] = ()
    confusion: tuple[tuple[Count, ...], ...] = Field(
        default=(), description="images by their class (row) and the class they were taken for (column)"
    )

    @model_validator(mode="after")
    def _square(self) -> Classification:
        if any(len(row) != len(self.confusion) for row in self.confusion):
            raise ValueError("the confusion matrix is not square")
        return self


class TaskRow(Record):
    """How well the questions of one file are answered, where several were given."""

    name: str = Field(description="the file")
    accuracy: Fraction
    accuracy_stderr: float
    examples: Count


class Quality(Record):
    """What the network still knows. Every figure is None where it was not measured."""

    perplexity: float | None = None
    perplexity_stderr: float | None = Field(
        default=None, description="standard error over windows; None of fewer than two windows or of an infinite loss"
    )
    losses: tuple[float, ...] = Field(
        default=(), description="mean negative log-likelihood per token of each window of the perplexity's text, nats"
    )
    kl: float | None = Field(default=None, description="mean KL(original ‖ this) per token, nats")
    tokens: int = 0
    accuracy: Fraction | None = Field(
        default=None, description="multiple choice by length-normalised log-likelihood, 0 to 1"
    )
    accuracy_stderr: float | None = None
    examples: Count = 0
    tasks: tuple[TaskRow, ...] = Field(default=(), description="the accuracy by file, where there are several")
    classification: Classification | None = None


class Continuation(Record):
    """What greedy decoding writes behind a prompt."""

    prompt: str
    text: str


class Latency(Record):
    """Time for one input of a network that reads no text."""

    runtime: str = Field(description="what ran, e.g. 'torch float32' or 'onnxruntime int8'")
    milliseconds: float = Field(description="median for one input at a time")
    fastest: float = Field(description="the fastest repetition, milliseconds")
    repetitions: int
    threads: int
    device: str


class Speed(Record):
    """Latency of a language model, with the kernels that will run."""

    kernel: str = Field(description="the kernels that ran at decode, by name")
    prefill_kernel: str = ""
    prefill_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    threads: int
    device: str


class Stage(Record):
    """The input, or the checkpoint after one pass."""

    name: str = Field(description="'input' or the name of the pass")
    options: dict[str, Any] = Field(default_factory=dict)
    nbytes: int = Field(description="size of the weight files on disk")
    weights: int = Field(description="number of weights and other parameters, tied ones counted once")
    nonzeros: int | None = Field(default=None, description="how many of them are not 0")
    macs: int | None = Field(
        default=None,
        description="multiplications of the layers for one input, of a language model for one token; None where the "
        "token decides which layers run",
    )
    bits_per_weight: float
    quality: Quality | None = None
    continuations: tuple[Continuation, ...] = Field(
        default=(), description="of a language model whose quality and speed were measured: the same prompts each time"
    )
    speed: Speed | None = None
    latencies: tuple[Latency, ...] = Field(default=(), description="of a network that reads no text, one per runtime")
    peak_memory: int | None = Field(default=None, description="highest resident set during the pass, bytes")
    seconds: float | None = Field(default=None, description="wall time of the pass itself, measuring excluded")
    remarks: tuple[str, ...] = Field(default=(), description="what the user should know of how it was carried out")
    ledger: tuple[LedgerRow, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    activations: tuple[ActivationRange, ...] = ()
    training: Training | None = Field(default=None, description="of a pass that trains")
    search: Search | None = Field(default=None, description="how the options of the pass were chosen, if a search did")


class Check(Record):
    """One thing that was looked at when the finished checkpoint was loaded as its users will."""

    text: str = Field(description="what was found, in plain words")
    passed: bool | None = Field(default=None, description="None: it could not be looked at")
    numbers: str = Field(default="", description="the figures behind it")


class Exported(Record):
    """One export of the finished checkpoint."""

    target: str
    nbytes: int = Field(description="size of its files")
    content: str = Field(default="", description="what fills its files where they are no weights, e.g. 'C source'")
    checked: str = Field(default="", description="what running it next to the checkpoint showed, in one line")
    remarks: tuple[str, ...] = Field(default=(), description="what the user should know of it")
    latencies: tuple[Latency, ...] = ()
    speed: Speed | None = None


class PhaseTime(Record):
    """How long a phase of a run took; of several with one name, all together."""

    name: str
    seconds: Annotated[float, Field(ge=0)]
    predicted: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="seconds that a rehearsal before the run predicted; None: no prediction"
    )
    reason: str = Field(default="", description="why it was not predicted, where predictions were asked for")


class Report(Record):
    """One run of effcli."""

    schema_version: int = SCHEMA_VERSION
    effcli_version: str
    model: str
    output: str | None
    machine: str
    software: dict[str, str] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict, description="the recipe, resolved")
    given: dict[str, Any] = Field(default_factory=dict, description="the recipe as it was given, without defaults")
    data: dict[str, str] = Field(
        default_factory=dict, description="what tells the data apart that the recipe names: a digest of each, by name"
    )
    stages: tuple[Stage, ...] = Field(min_length=1, description="the input first, then one per pass")
    layout: Layout | None = Field(default=None, description="what loads the finished checkpoint")
    loader: str = Field(default="", description="the Python function that loads it, e.g. 'effcli.load'")
    verified: str | None = Field(default=None, description="what `verify` found, in one line")
    checks: tuple[Check, ...] = Field(default=(), description="what `verify` looked at, one by one")
    exports: tuple[Exported, ...] = ()
    phases: tuple[PhaseTime, ...] = Field(
        default=(), description="how long each phase took in the process that finished the run, this report left out"
    )
    files: tuple[str, ...] = Field(
        default=(), description="what the run wrote beside this report and the exports; --overwrite replaces only that"
    )

    def write(self, folder: Path) -> None:
        """Write `report.json` into `folder`, whole or not at all."""
        path = folder / FILE_NAME
        draft = path.with_suffix(".json.tmp")
        with writing(path):
            draft.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
            os.replace(draft, path)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `report.json` from `folder`; `CheckpointError` when there is none or it is of another schema."""
        path = folder / FILE_NAME
        if not path.is_file():
            cause = f"{folder} holds no {FILE_NAME}" if folder.exists() else f"{folder} does not exist"
            raise CheckpointError(cause, "give a directory that `effcli compress` wrote")
        remedy = "run the recipe again"
        try:
            data = read_object(path, remedy=remedy)
        except CheckpointError as error:
            what = error.cause.removeprefix(f"{path} ")
            if what == error.cause:
                raise
            raise CheckpointError(f"{path} is not a report of effcli: it {what}", remedy) from error
        version = data.get("schema_version")
        if isinstance(version, int) and version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {version}, this effcli reads {SCHEMA_VERSION}",
                "use the effcli that wrote it, or run the recipe again",
            )
        if version is None:
            raise CheckpointError(f"{path} is not a report of effcli: it has no schema version", remedy)
        return check_model(cls, data, f"{path} is not a report of effcli: it", remedy=remedy)
