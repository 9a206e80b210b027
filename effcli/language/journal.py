"""What a pass has already written, so that after a crash it goes on from the last written block.

A pass works in a folder beside its target. Each finished block leaves a part with its tensors and a record with its
ledger; the journal, written last and atomically, says how far it came and for which request. Hidden states alternate
between two files, so a block that was interrupted still finds its input whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from effcli.errors import UnfinishedError, writing
from effcli.files.checkpoint import write_text
from effcli.files.documents import read_model
from effcli.options import Options

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)


class _State(Options):
    """`journal.json`."""

    fingerprint: str
    done: int = Field(ge=0, strict=True)


@dataclass
class Journal:
    """The working folder of one pass. `done` counts finished blocks; damage: why earlier work was thrown away."""

    folder: Path
    fingerprint: str
    done: int = 0
    damage: str = ""

    @staticmethod
    def open(folder: Path, fingerprint: str) -> Journal:
        """Continue the work in `folder` if it is of the same request, else start it anew."""
        file = folder / "journal.json"
        journal = Journal(folder, fingerprint)
        if file.exists():
            try:
                state = read_model(_State, file, error=UnfinishedError)
            except UnfinishedError as error:
                journal.damage = error.cause
            else:
                if state.fingerprint == fingerprint:
                    journal.done = state.done
                    return journal
        journal.begin()
        return journal

    def begin(self) -> None:
        """Throw away what is there; the journal goes first, so that it never speaks of what is gone."""
        self.done = 0
        with writing(self.folder):
            (self.folder / "journal.json").unlink(missing_ok=True)
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)

    def part(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def spool(self, k: int) -> Path:
        """The file of the hidden states before block k."""
        return self.folder / f"hidden-{k % 2}.bin"

    def holds(self, name: str) -> bool:
        """Whether a part and its record are there."""
        return self.part(name).is_file() and self.has(name)

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.json").is_file()

    def record(self, name: str, data: Any) -> None:
        write_text(self.folder / f"{name}.json", json.dumps(data))

    def recall(self, kind: type[Model], name: str) -> Model:
        """A record as a `kind`; `UnfinishedError` when it is damaged."""
        return read_model(kind, self.folder / f"{name}.json", error=UnfinishedError)

    def advance(self, done: int) -> None:
        """Say that `done` blocks are on the disk. Everything they need must be synced before."""
        write_text(self.folder / "journal.json", json.dumps({"fingerprint": self.fingerprint, "done": done}))
        self.done = done

    def remove(self) -> None:
        (self.folder / "journal.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
