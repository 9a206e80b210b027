"""A look at all layers before the first is changed, by a pass that divides among them what it does to each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from effcli.layers.contract import Layer, LayerPass, Needs, Surveyed
from effcli.layers.engine import Seen
from effcli.layers.returned import Asked
from effcli.layers.selection import Choice


class Survey:
    """The layers whose options ask to be looked at, each of which is shown once; false where there are none."""

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        """choices: of every layer of the network."""
        self._choices = dict(choices)
        self._options = {
            name: choice.config
            for name, choice in choices.items()
            if isinstance(choice.config, LayerPass) and choice.config.surveys is not None
        }
        self._found: list[Surveyed] = []

    def __bool__(self) -> bool:
        return bool(self._options)

    def __contains__(self, name: str) -> bool:
        return name in self._options

    @property
    def needs(self) -> Needs:
        """What must be gathered for the look, of all layers together."""
        needs = Needs.NOTHING
        for options in self._options.values():
            needs |= options.surveys or Needs.NOTHING
        return needs

    def look(self, layer: Layer, seen: Seen) -> None:
        """Show a layer as it is before the step; seen: of its groups' inputs, empty where nothing is gathered."""
        options = self._options[layer.name]
        self._found.append(Surveyed(layer.name, options, options.summarize(layer, seen)))

    def end(self) -> dict[str, dict[str, Any]]:
        """The options of the layers that were shown, by name, as JSON has them."""
        if not self._found:
            return {}
        first = self._found[0].options
        asked = Asked(first, "survey")
        made = asked.expect(first.survey(tuple(self._found)), Mapping, "options by layer")
        for name, options in made.items():
            if name not in self._options:
                asked.refuse(f"options of {name!r}", "those of the layers that it was shown")
            asked.expect(options, type(self._options[name]), "options of its own class")
        return {name: options.model_dump(mode="json") for name, options in made.items()}

    def chosen(self, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Choice]:
        """The choices of every layer with the options `found`, as `end` returned them."""
        return self._choices | {
            name: dataclasses.replace(self._choices[name], config=type(self._options[name]).model_validate(options))
            for name, options in found.items()
        }


__all__ = ["Survey"]
