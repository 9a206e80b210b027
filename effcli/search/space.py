"""What a search may choose for every layer: one option of a pass, and the values that it may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from effcli.layers.contract import CutPass, LayerPass, Pass
from effcli.platform.registry import Registry
from effcli.reports.sensitivity import Value, Varied

VARIED: tuple[Varied, ...] = get_args(Varied)


@dataclass(frozen=True)
class Space:
    """What is known of an option that a search varies.

    defaults: what it chooses from unless told; kind: of the passes whose option it is; passes: some of them. least,
    most: of the values that leave the fewest bytes and the most, as adjectives. many: whether the option is a plural.
    """

    defaults: tuple[Value, ...]
    kind: type[Pass]
    passes: str
    least: str = "highest"
    most: str = "lowest"
    many: bool = False


SPACES: Mapping[Varied, Space] = {
    "bits": Space((2, 3, 4, 8), LayerPass, "awq or linear", least="fewest", most="most", many=True),
    "sparsity": Space((0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), LayerPass, "sparsegpt or magnitude"),
    "ratio": Space((0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75), CutPass, "channels"),
}


def varies(kind: type[Pass], option: Varied) -> bool:
    """Whether a search can choose this option of a pass for every layer, or every group of channels."""
    return option in kind.model_fields and issubclass(kind, SPACES[option].kind)


def option_of(name: str, passes: Registry[Any]) -> Varied:
    """The option of the pass `name` that a search chooses; bits where it has none, or is none of `passes`."""
    if passes.find(name) is None:
        return "bits"
    kind = passes.load(name)
    return next((option for option in VARIED if varies(kind, option)), "bits")


def unchanging(option: Varied) -> str:
    """The beginning of a sentence: `bits do not change`."""
    return f"{option} {'do' if SPACES[option].many else 'does'} not change"


__all__ = ["SPACES", "VARIED", "Space", "option_of", "unchanging", "varies"]
