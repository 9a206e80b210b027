"""Sensitivities without a run: what changing each layer of a network alone would cost."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from effcli.inputs.options import Evaluate
from effcli.reports.sensitivity import Sensitivity, Varied, Way
from effcli.run import detect
from effcli.run.listener import Listener, Silent, told
from effcli.run.recipe import Recipe
from effcli.search.sensitivity import sensitivity


def inspect(
    recipes: Sequence[Recipe], option: Varied, way: Way | None = None, listener: Listener | None = None
) -> Sensitivity:
    """What each layer alone costs with the only step of each recipe; they differ in its `option` alone."""
    with tempfile.TemporaryDirectory(prefix="effcli-") as folder:
        steps = tuple(recipe.passes[0] for recipe in recipes)
        unmeasured = {"passes": steps[:1], "evaluate": Evaluate.nothing(), "export": ()}
        network = detect.of_run(recipes[0].model_copy(update=unmeasured))
        with told(listener or Silent(), "reading the network"):
            network.plan()
            network.open(Path(folder))
        own = tuple(map(network.with_defaults, steps))
        with told(listener or Silent(), "sensitivity", "step") as progress:
            return sensitivity(network, own, option, network.base, Path(folder), way, progress)


__all__ = ["inspect"]
