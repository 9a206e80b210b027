"""What is observed and what is measured: the keys `calibration` and `evaluate` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from effcli.options import Options


class Calibration(Options):
    """What passes observe: text cut into windows of tokens, or images and other inputs."""

    data: str | None = Field(
        None,
        description="A text file, a jsonl of texts or of messages, an npz, an image folder, a parquet file or a "
        "`datasets` directory; without one, the sample model's own.",
    )
    samples: int = Field(32, ge=1, description="Windows of text, or inputs (512 unless set).")
    length: int = Field(512, ge=2, description="Tokens per window; fewer unless set when the model takes fewer.")
    batch_size: int = Field(4, ge=1, description="Windows or inputs (64 unless set) per forward.")
    inputs: Literal["original", "compressed"] = Field(
        "original", description="Whose outputs feed the next block: the original block's or the compressed one's."
    )


class Evaluate(Options):
    """What to measure on the input and after every pass. `evaluate: false` in a recipe measures nothing."""

    perplexity: str | bool = Field(
        True,
        description="A text file or a jsonl of texts; true: the sample model's own held-out text, or the end of the "
        "calibration text, which calibration does not touch.",
    )
    images: str | bool = Field(
        True,
        description="Labelled images or other inputs: npz, image folder, parquet or `datasets` directory; true: those "
        "beside the model, or else the calibration inputs, on which only the agreement with the original counts.",
    )
    samples: int = Field(20, ge=1, description="Windows of text, or inputs (2,000 unless set).")
    length: int = Field(512, ge=2, description="Tokens per window; fewer unless set when the model takes fewer.")
    choices: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="A jsonl or parquet file of multiple-choice questions, or several."
    )
    limit: int | None = Field(None, ge=1, description="Take only the first questions of each file of `choices`.")
    latency: bool = Field(
        True,
        description="Time prefill and decode with the kernels that will run; where perplexity is measured, a language "
        "model also writes a few texts for the report.",
    )
    prefill: int = Field(
        128,
        ge=1,
        description="Tokens of the prompt whose prefill is timed; fewer unless set when the model takes fewer.",
    )
    decode: int = Field(
        32, ge=1, description="Tokens whose decoding is timed; fewer unless set when the model takes fewer."
    )

    @staticmethod
    def nothing() -> Evaluate:
        """Measure nothing but bytes."""
        return Evaluate(perplexity=False, images=False, latency=False)

    @property
    def enabled(self) -> bool:
        """Whether anything at all is measured by running the network."""
        return self.quality or self.latency

    @property
    def questions(self) -> tuple[str, ...]:
        """The files of `choices`."""
        return () if self.choices is None else (self.choices,) if isinstance(self.choices, str) else self.choices

    @property
    def quality(self) -> bool:
        """Whether anything is measured on text."""
        return self.perplexity is not False or self.choices is not None

    @field_validator("choices")
    @classmethod
    def _once(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        files = [Path(file).expanduser().resolve() for file in value] if isinstance(value, tuple) else []
        twice = [file for number, file in enumerate(files) if file in files[:number]]
        if twice:
            raise ValueError(f"names {twice[0]} twice, and its questions would count twice")
        return value

    @field_validator("perplexity", "images", mode="before", json_schema_input_type=str | bool | None)
    @classmethod
    def _null_is_off(cls, value: Any) -> Any:
        return False if value is None else value
