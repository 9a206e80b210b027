"""What an export target is: its options and how it writes. What asks for an export never asks which one it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effcli.exporters._target import nbytes, replacing
from effcli.options import Options

if TYPE_CHECKING:
    from effcli.reports.report import Exported, Latency, Speed


@dataclass(frozen=True)
class Footprint:
    """What an exported network takes of a microcontroller, in bytes."""

    ram: int
    flash: int


class Exporter(Options, ABC):
    """The options of an export target, and what it does with a finished checkpoint."""

    @abstractmethod
    def export(self, source: Path, target: Path, overwrite: bool = False) -> Exported:
        """Write the finished checkpoint `source` to the directory `target`, whole or not at all.

        Raises `UnsupportedError` for what the target has no place for, and `OutputError` when `target` exists (without
        `overwrite`) or cannot be written: `replacing` makes the directory and sees to that.
        """

    def footprint(self, source: Path) -> Footprint | None:
        """What the checkpoint `source` would take of a microcontroller; None where the target is for none.

        Raises `UnsupportedError` as `export` does; a limit that is not kept is none of its concern.
        """
        return None

    def table(self, folder: Path) -> Sequence[Options]:
        """Records of one kind that the command line shows of the export in `folder`, one row each; empty for none."""
        return ()

    def speed(self, folder: Path, prefill: int, decode: int, threads: int | None = None) -> Speed | None:
        """The speed of the language model exported to `folder`; None where it cannot be timed here.

        prefill, decode: tokens of the prompt, and tokens decoded after it; threads: None takes the runtime's own.
        """
        return None

    def latency(self, folder: Path, threads: int | None = None) -> Latency | None:
        """The time of one input to the graph exported to `folder`; None where it cannot be taken here."""
        return None


__all__ = ["Exporter", "Footprint", "nbytes", "replacing"]
