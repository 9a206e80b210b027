"""The names that a task's C code refers to, and the functions that tasks of one shape share.

All C text is written with the prefix `net_` (`NET_` for macros); `emit` puts the network's own name in its place.
"""

from __future__ import annotations

from collections.abc import Sequence


class Functions:
    """Specialised functions by their text: tasks of one shape get one function."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._names: dict[tuple[str, str], str] = {}

    def add(self, stem: str, parameters: Sequence[str], body: str, returns: str = "void") -> str:
        """The name of a function with these parameters and this body, made anew unless there is one."""
        text = f"({', '.join(parameters)})\n{{\n{body}\n}}\n"
        name = self._names.get((stem, text))
        if name is None:
            count = sum(known == stem for known, _ in self._names)
            name = f"net_{stem}_{count}"
            self._names[stem, text] = name
            self.texts[name] = f"NET_NOINLINE {returns} {name}{text}"
        return name


class Scope:
    """What one task's statements may use.

    `rows0`, `rows1` point to the rows that a task with windows reads of its inputs (`in0`, `in1` where it is one row,
    or the whole input of a task without windows), `out` to what it writes, `scratch` to its scratch memory.
    """

    def __init__(self, functions: Functions, layer: int, scratch: str) -> None:
        self.functions = functions
        self.layer = layer
        self.scratch = scratch

    def constant(self, suffix: str) -> str:
        return f"net_{self.layer}_{suffix}"
