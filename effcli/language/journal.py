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
from typing import Any

from effcli.checkpoint import write_text
from effcli.errors import writing


@dataclass
class Journal:
    """The working folder of one pass. `done` counts finished blocks."""

    folder: Path
    fingerprint: str
    done: int = 0

    @staticmethod
    def open(folder: Path, fingerprint: str) -> Journal:
        """Continue the work in `folder` if it is of the same request, else start it anew."""
        file = folder / "journal.json"
        if file.is_file():
            try:
                state = json.loads(file.read_text(encoding="utf-8"))
                if state["fingerprint"] == fingerprint:
                    return Journal(folder, fingerprint, int(state["done"]))
            except (ValueError, KeyError, TypeError):
                pass
        journal = Journal(folder, fingerprint)
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

    def recall(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def advance(self, done: int) -> None:
        """Say that `done` blocks are on the disk. Everything they need must be synced before."""
        write_text(self.folder / "journal.json", json.dumps({"fingerprint": self.fingerprint, "done": done}))
        self.done = done

    def remove(self) -> None:
        (self.folder / "journal.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
