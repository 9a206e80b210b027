"""Which layers a pass takes, with which options, and why it leaves the others: decided from names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from effcli.errors import SelectionError, UnsupportedError, did_you_mean
from effcli.formats import Bitmask, Dense, Packing, Sparse
from effcli.formats.base import Values
from effcli.layers.contract import Change, CutPass, LayerPass, Needs, NetworkPass, ParameterPass, Pass, TrainPass
from effcli.layers.layer import LayerSite

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep


@dataclass(frozen=True)
class Choice:
    """One layer: the options it is compressed with, or None and the reason."""

    site: LayerSite
    config: Pass | None
    reason: str = ""

    @property
    def planned(self) -> str:
        """What becomes of it, as a plan says it: a scale alone, say, changes a layer and leaves it floating."""
        if self.config is None:
            return "keep"
        if Change.SHAPE in self.config.changes:
            return "cut"
        if not self.config.changes:
            return "adapt"
        result = self.config.result
        floating = result is None or result.floating
        if floating and Change.MASK in self.config.changes:
            return "prune"
        return "change" if floating else "compress"

    def leaves(self, before: Packing, dense: Dense) -> Packing:
        """The format of the layer's weights, `before` until then, as far as it is known; dense: of floating ones.

        A pass over single layers stores what it returns; others without a format of their own keep that of the layer.
        What was removed of a weight stays removed.
        """
        if self.config is None or not self.config.changes:
            return before
        if isinstance(self.config, ParameterPass):
            return before if self.config.keeps_format else dense
        result = self.config.result
        if result is None:
            result = dense if isinstance(self.config, LayerPass) else before
        removes = Bitmask() if Change.MASK in self.config.changes else None
        pattern = next((format.pattern for format in (result, before) if isinstance(format, Sparse)), removes)
        values = result.values if isinstance(result, Sparse) else result
        values = dense if values.floating else values
        return Sparse(pattern, values) if pattern is not None and isinstance(values, Values) else values


def needs_of(variants: Iterable[Mapping[str, Choice]]) -> Needs:
    """What the layers, in all of the variants together, must be given besides their weights."""
    needs = Needs.NOTHING
    for choice in (choice for choices in variants for choice in choices.values()):
        needs |= Needs.NOTHING if choice.config is None else choice.config.needs
    return needs


class Layered(Protocol):
    """A network, as far as its layers can be chosen from."""

    def sites(self) -> list[LayerSite]:
        """Every layer, in the network's order."""

    def left_alone(self, step: str, lm_head: bool) -> Mapping[str, str]:
        """Why layers stay as they are that no pattern ignores, by name.

        step: what the pass is called; lm_head: whether it takes the output head, for which a network that can have none
        raises `SelectionError`.
        """


def choose(network: Layered, step: PassStep) -> dict[str, Choice]:
    """Every layer of the network by name, in the network's order.

    Raises `SelectionError` for a pattern that matches nothing, for options of layers that are left alone, for a group
    size that does not divide a layer, and for `lm_head` where the network has no output head.
    """
    sites, left_alone = network.sites(), network.left_alone(step.name, step.config.lm_head)
    names = [site.name for site in sites]
    config = step.config
    for key, patterns in (("ignore", config.ignore), ("layers", tuple(config.layers))):
        for pattern in patterns:
            _must_match(pattern, names, f"{step.name}.{key}")
    choices = {}
    for site in sites:
        # A new value is stored as the old one, which nothing keeps from it.
        obstacle = "" if isinstance(config, ParameterPass) else site.obstacle
        reason = ignored(site, config) or obstacle or left_alone.get(site.name, "")
        choices[site.name] = Choice(site, None if reason else options_of(site.name, step), reason)
    taken = [name for name, choice in choices.items() if choice.config is not None]
    if not taken and not isinstance(config, ParameterPass):
        remedy = "make `ignore` narrower" if choices else "the network has no convolution and no linear layer"
        raise SelectionError(f"{step.name} would take no layer at all", remedy)
    for pattern in config.layers:
        if not any(matches(name, pattern) for name in taken):
            kept = next(choice for name, choice in choices.items() if matches(name, pattern))
            raise SelectionError(
                f"{step.name}.layers: {pattern!r} matches only layers that are left alone, such as {kept.site.name}",
                f"{kept.reason}; take the entry out, or take the layer in",
            )
    _check_needs(step.name, choices.values())
    _check_group_sizes(choices.values())
    return choices


def _check_needs(name: str, choices: Iterable[Choice]) -> None:
    """Raise `UnsupportedError` when a pass asks for what passes of its kind are not given."""
    training = Needs.ORIGINAL | Needs.LABELS
    for config in (choice.config for choice in choices if choice.config is not None):
        if isinstance(config, LayerPass) and config.gathers & (Needs.INPUTS | Needs.INFLUENCE | Needs.DENSE | training):
            raise UnsupportedError(
                f"{name} takes one layer at a time and asks for the whole network",
                "ask in `needs` for statistics of a layer's inputs, or make it a NetworkPass",
            )
        if isinstance(config, NetworkPass) and config.needs & training:
            raise UnsupportedError(
                f"{name} asks for labels or the network as the run found it, which only a pass that trains is given",
                "make it an AttachPass",
            )
        if isinstance(config, NetworkPass) and config.needs.observes:
            raise UnsupportedError(
                f"{name} takes the network as a whole and asks for statistics of single layers",
                "ask for the calibration inputs (INPUTS), or make it a LayerPass",
            )
        if isinstance(config, CutPass) and config.needs & (Needs.DENSE | Needs.VALUES | training):
            raise UnsupportedError(
                f"{name} removes channels and asks for labels, histograms or another network",
                "ask in `needs` for gradients, or for other statistics of the inputs of layers",
            )
        if isinstance(config, CutPass) and config.restoring is not None and Needs.INPUTS not in config.needs:
            raise UnsupportedError(
                f"{name} restores the layers behind what it removes, and does not ask for the calibration inputs",
                "ask for INPUTS in `needs`",
            )
        if isinstance(config, TrainPass) and config.needs.observes:
            raise UnsupportedError(
                f"{name} trains the network and asks for statistics of single layers", "make it a LayerPass"
            )


def matches(name: str, pattern: str) -> bool:
    """Whether a glob pattern names this layer; a bare last part (`down_proj`) does not, `*.down_proj` does."""
    return fnmatchcase(name, pattern)


def ignored(site: LayerSite, config: Pass) -> str:
    """Which pattern leaves the layer out; empty where none does."""
    pattern = next((pattern for pattern in config.ignore if matches(site.name, pattern)), None)
    return "" if pattern is None else f"ignored by {pattern!r}"


def options_of(name: str, step: PassStep) -> Pass:
    """The options of one layer: of several patterns that match, the last one's."""
    config: Pass = step.config
    for pattern, overrides in step.config.layers.items():
        if matches(name, pattern):
            config = step.for_layer(overrides)
    return config


def _must_match(pattern: str, names: Sequence[str], key: str) -> None:
    """Raise `SelectionError` with near names unless `pattern` names a layer."""
    if any(matches(name, pattern) for name in names):
        return
    tails = {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}
    wanted = pattern.rpartition(".")[2]
    near = did_you_mean(wanted, tails)
    if wanted in tails:
        near = f"write '*.{wanted}'" if f"*.{wanted}" != pattern else did_you_mean(pattern, names)
    raise SelectionError(f"{key}: the pattern {pattern!r} matches no layer", near)


def _check_group_sizes(choices: Iterable[Choice]) -> None:
    """Raise `SelectionError` with the sizes that would do when a group size does not divide its layers."""
    misfits: dict[tuple[int, str], list[LayerSite]] = {}
    widths: set[int] = set()
    for choice in choices:
        format = None if choice.config is None else choice.config.format
        if format is not None and format.row_group:
            widths.add(choice.site.columns)
            if choice.site.columns % format.row_group:
                misfits.setdefault((format.row_group, _pattern(format)), []).append(choice.site)
    for (size, pattern), sites in misfits.items():
        common = math.gcd(*widths)
        fitting = sorted((n for n in range(8, 513) if common % n == 0), key=lambda n: abs(n - size))
        remedy = "give those layers another group_size under `layers`, or `ignore` them"
        if fitting:
            remedy = f"group sizes that divide every layer: {', '.join(map(str, sorted(fitting[:6])))}"
        shown = ", ".join(f"{site.name} ({site.columns})" for site in sites[:3])
        more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
        if pattern:
            remedy = "give those layers another pattern or a sparsity under `layers`, or `ignore` them"
            raise SelectionError(f"the pattern {pattern} does not divide the input channels of {shown}{more}", remedy)
        raise SelectionError(f"group size {size} does not divide the input channels of {shown}{more}", remedy)


def _pattern(format: Packing) -> str:
    """The pattern whose neighbours must divide a row; empty where it is the scales that are shared."""
    return str(format.pattern) if isinstance(format, Sparse) and format.pattern.row_group else ""
