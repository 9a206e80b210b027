"""What must be cut together in the blocks of a language model, found by experiment, and cutting it.

Which parameters follow a width is seen by building the network, without memory, from a config that says one position
less: those whose shapes change do, and along which axis. Which position stands behind each of their entries is seen by
running one block of every kind with random weights. With x the inputs of the layers that read the width and
p(j) the position behind the input channel j, the gradients at an output channel of position q are

    g = ∂ Σ_j r_j x_j / ∂y   and   g' = ∂ Σ_j p(j) r_j x_j / ∂y = q · g,

for whatever stands between leads only from channels of q to channels of q. The quotient names q: of gate and up, of
queries, keys and values, apart or fused in any order. In the end one position is cut on trial, and the block must
compute what it does with that position set to zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from effcli.errors import EffcliError, UnsupportedError, UserError, first_line
from effcli.files.checkpoint import write_shard
from effcli.files.layout import own_config, write_checkpoint
from effcli.language.calls import Call, hidden_of, kind_of
from effcli.language.pairs import weights_with_inputs
from effcli.language.skeleton import Skeleton, with_widths
from effcli.language.stream import Stream, WatchLayers
from effcli.language.weights import Weights, open_weights, place, zeros_for_weights
from effcli.layers.coupling import Coupled, Cut, GroupKind, Member, entries_kept, shortened
from effcli.platform import memory
from effcli.reports.units import count

# What configs call the width of feed-forwards, and the number of experts.
_FEED_FORWARD = (
    *("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k")
# The number of equal groups of experts that a router chooses among first.
_GROUPS = ("n_group", "num_expert_group")

# A prime number of tokens, lest wrong shapes be divided among them evenly.
_ROWS, _LENGTH = 1, 47
# How many numbers of positions less a config is asked for.
_TRIED = 64
# Positions are read off quotients digit by digit.
_BASE = 64
_TOLERANCE = 0.02
# Largest difference of a block's output, relative to its largest number, that rounding explains.
_EQUAL = 1e-4


@dataclass(frozen=True, eq=False)
class Width(Coupled):
    """A width of one block: the positions of its attention heads, its feed-forward or its experts.

    A position of grouped heads is a key/value head with the query heads that read it; head_dim stays. block: its
    number; keys: what the config calls the width, and how much of it one position is; fixed: what the config must say
    so that all else stays as it is.
    """

    block: int = 0
    keys: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kind:
    """A width that configs can say."""

    what: str
    kind: GroupKind
    keys: Mapping[str, int]
    fixed: Mapping[str, int] = field(default_factory=dict)

    def width(
        self, name: str, block: int = 0, count: int = 0, members: tuple[Member, ...] = (), reason: str = ""
    ) -> Width:
        """One of this kind."""
        return Width(name, count, members, reason, block, self.keys, self.fixed, kind=self.kind)


class _Uncuttable(Exception):
    """Says why a width cannot be cut."""


def coupled(weights: Weights) -> list[Width]:
    """The widths of all blocks that can be cut: heads, feed-forwards and experts.

    A width that exists and cannot be cut says why and has no members, as do experts that are routed in groups. The
    hidden width is not among them: norms over it would see other means.
    """
    found: list[Width] = []
    with Stream(weights) as stream:
        hidden, calls = stream.enter(_tokens(weights.skeleton))
        for kind in _kinds(weights.skeleton):
            found += _found(weights, kind, hidden, calls)
    return sorted(found, key=lambda width: width.block)


def cut(source: Path, target: Path, cuts: Sequence[Cut], work: Path, trust_remote_code: bool = False) -> None:
    """Write the checkpoint `source` without some positions of its widths into `target`, a directory that exists.

    cuts: of groups of `coupled`. Blocks are read, shortened and written one after another; work: a folder for what is
    unfinished. Stock transformers loads the result where config.json can say the widths; where they differ between
    blocks it is in effcli's own layout. Raises `UserError` for a checkpoint that is compressed, `UnsupportedError` for
    widths with which the network cannot be built or does not run.
    """
    weights = open_weights(source, trust_remote_code)
    skeleton, carried = weights.skeleton, weights.carried()
    if weights.stored or weights.foreign:
        name, stored = next(iter({**weights.stored, **weights.foreign}.items()))
        raise UserError(f"{name} is stored as {stored.format}", "cut channels before compressing")
    kept = entries_kept(cuts)
    shapes = {name: value.shape for name, value in skeleton.model.state_dict().items()}
    for member in (member for one in cuts for member in one.coupled.members):
        if shapes.get(member.parameter, ())[member.axis : member.axis + 1] != member.position.shape:
            raise UserError(
                f"{member.parameter} is not coupled in {source} as it was", "find its groups again after a cut"
            )
    after = {
        name: tuple(len(kept.get(name, {}).get(axis, range(size))) for axis, size in enumerate(shape))
        for name, shape in shapes.items()
    }
    config = _described(weights, cuts, after, trust_remote_code)
    names = [name for name in skeleton.outer_parameters() if name not in weights.left_out()]
    groups = [*(skeleton.block_parameters(k) for k in range(len(skeleton.blocks))), names]
    parts = []
    for number, keys in enumerate(groups):
        part = work / f"cut-{number:05d}.safetensors"
        # A parameter keeps the dtype that it has in the file.
        write_shard(part, {key: shortened(weights.parameter(key), kept.get(key, {})).contiguous() for key in keys})
        parts.append(part)
        memory.trim()
    write_checkpoint(source, target, parts, config, carried, weights.file_names())
    for part in parts:
        part.unlink()


def _tokens(skeleton: Skeleton) -> Tensor:
    """Token ids (_ROWS, _LENGTH) at random."""
    vocabulary = skeleton.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))


def _described(
    weights: Weights, cuts: Sequence[Cut], after: Mapping[str, tuple[int, ...]], trust_remote_code: bool
) -> dict[str, Any]:
    """`config.json` of the network whose parameters have the shapes `after`, by one width for all blocks if it can."""
    skeleton, path = weights.skeleton, weights.checkpoint.path
    own, text = weights.network_config(), skeleton.config.get_text_config()
    blocks: dict[int, dict[str, int]] = {k: dict(values) for k, values in skeleton.widths.items()}
    for one in cuts:
        width = one.coupled
        if not isinstance(width, Width) or not one.changes:
            continue
        values, gone = blocks.setdefault(width.block, {}), int((~one.kept).sum())
        values.update(width.fixed)
        for key, each in width.keys.items():
            values[key] = values.get(key, _value(text, key)) - each * gone
            if key in map(lambda name: _native(text, name), _EXPERTS):
                _check_chosen(text, values[key], width.name)
    if not blocks:
        return own
    every = [{**_says(text, value), **value} for value in blocks.values()]
    uniform = {key: value for key, value in every[0].items() if all(other.get(key, value) == value for other in every)}

    def obstacle(config: dict[str, Any], widths: Mapping[int, Mapping[str, int]]) -> str:
        try:
            built = Skeleton(path, config, trust_remote_code, widths)
            shapes = {key: tuple(value.shape) for key, value in built.model.state_dict().items()}
            wrong = (f"{key} would be {shapes.get(key)}" for key, wanted in after.items() if shapes.get(key) != wanted)
            reason = next(wrong, "")
            if not reason:
                _run_once(Weights(weights.checkpoint, built))
        except EffcliError as error:
            return error.cause
        return reason

    one_for_all = with_widths(own, uniform)
    if not obstacle(one_for_all, {}):
        return one_for_all
    reason = obstacle(own, blocks)
    if not reason:
        return own_config(own, {}, blocks)
    raise UnsupportedError(
        f"{type(skeleton.model).__name__} cannot be built with these widths: {reason}", "cut other numbers of positions"
    )


def _run_once(weights: Weights) -> None:
    """Run one block of every kind on zeros for weights; raises `EffcliError` where the network's code does not run."""
    blocks = weights.skeleton.blocks
    with Stream(weights) as stream, torch.inference_mode():
        hidden, calls = stream.enter(_tokens(weights.skeleton))
        for k in {kind_of(block): k for k, block in enumerate(blocks)}.values():
            with zeros_for_weights(blocks[k], weights.skeleton.dtype):
                stream.through(k, hidden, calls[k])


def _says(text: Any, values: Mapping[str, int]) -> dict[str, int]:
    return {key: _value(text, key) for key in values}


def _check_chosen(text: Any, left: int, name: str) -> None:
    for key in _CHOSEN:
        chosen = getattr(text, key, None)
        if isinstance(chosen, int) and chosen > left:
            raise UserError(
                f"{name} would have {count(left, 'expert')}, of which each token takes {chosen}", "keep more of them"
            )


def _native(text: Any, name: str) -> str:
    """What this config itself calls one of its values."""
    found: str = (getattr(text, "attribute_map", None) or {}).get(name, name)
    return found


def _value(text: Any, key: str) -> int:
    value = getattr(text, key, None)
    # GPT-2 leaves the width of its feed-forward to the hidden width.
    return int(4 * text.hidden_size if value is None and key == "n_inner" else value or 0)


def _kinds(skeleton: Skeleton) -> Iterator[_Kind]:
    """The widths that the config has names for."""
    text = skeleton.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int):
        names = [name for name in ("num_key_value_heads", "num_kv_heads") if isinstance(getattr(text, name, None), int)]
        key, keys = _native(text, "num_attention_heads"), {}
        groups = _value(text, names[0]) if names else heads
        # One key and value for all stays when query heads go.
        keys = {key: heads // groups, _native(text, names[0]): 1} if names and groups > 1 else {key: 1}
        fixed = {"head_dim": int(getattr(text, "head_dim", None) or text.hidden_size // heads)}
        if isinstance(getattr(type(text), "head_dim", None), property):
            fixed = {}
        yield _Kind("attention heads", "heads", keys, fixed)
    others: tuple[tuple[str, GroupKind, tuple[str, ...]], ...] = (
        ("feed-forward", "feed_forward", _FEED_FORWARD),
        ("experts", "experts", _EXPERTS),
    )
    for what, kind, known in others:
        said = dict.fromkeys(_native(text, name) for name in known if hasattr(text, name))
        widths = [key for key in said if isinstance(getattr(text, key, None), int | None) and _value(text, key) > 1]
        for key in widths:
            # A block may have several of one kind, such as those of its experts and of the one that all tokens share.
            yield _Kind(what if len(widths) == 1 else f"{what} ({key})", kind, {key: 1})


def _found(weights: Weights, kind: _Kind, hidden: Tensor, calls: Sequence[Call | None]) -> list[Width]:
    """The groups of one kind of width, by block; one without members where it cannot be cut."""
    skeleton = weights.skeleton
    names = {k: f"{name} {kind.what}" for k, name in enumerate(skeleton.block_names)}
    try:
        if kind.kind == "experts":
            _check_ungrouped(skeleton.config.get_text_config())
        smaller, less, reason = _smaller(weights, kind)
    except (_Uncuttable, EffcliError) as error:
        return [kind.width(f"{skeleton.block_path} {kind.what}", reason=first_line(error))]
    known: dict[str, dict[str, tuple[int, Tensor]] | str] = {}
    found = []
    for k, block in enumerate(skeleton.blocks):
        axes = _axes(block, smaller.blocks[k])
        if not axes:
            continue
        one = kind_of(block)
        if one not in known:
            try:
                known[one] = _members(block, smaller.blocks[k], axes, less, kind, hidden, calls[k])
            except _Uncuttable as error:
                known[one] = str(error)
        made = known[one]
        if isinstance(made, str):
            found.append(kind.width(names[k], k, reason=made))
            continue
        prefix = skeleton.block_names[k] + "."
        members = tuple(Member(prefix + key, axis, position) for key, (axis, position) in made.items())
        found.append(kind.width(names[k], k, int(next(iter(made.values()))[1].max()) + 1, members))
    if not found and reason:
        found.append(kind.width(f"{skeleton.block_path} {kind.what}", reason=reason))
    return found


def _smaller(weights: Weights, kind: _Kind) -> tuple[Skeleton, int, str]:
    """The network without memory whose config says some positions less, and how many: the fewest that it can say.

    Some configs take only numbers of heads that divide the hidden width: why one less is not taken, or empty, comes
    last.
    """
    skeleton = weights.skeleton
    text = skeleton.config.get_text_config()
    values = {key: _value(text, key) for key in kind.keys}
    positions = min(value // kind.keys[key] for key, value in values.items())
    reason = ""
    for less in range(1, min(positions, _TRIED + 1)):
        config = with_widths(weights.network_config(), {**kind.fixed, **_less(values, kind, less)})
        widths = {k: {**own, **_less(own, kind, less)} for k, own in skeleton.widths.items()}
        try:
            smaller = Skeleton(weights.checkpoint.path, config, skeleton.trust_remote_code, widths)
        except EffcliError as error:
            reason = reason or f"transformers takes no config with fewer: {first_line(error.__cause__ or error)}"
            continue
        _check_outside(skeleton, smaller, kind)
        return smaller, less, reason
    raise _Uncuttable(reason or "there is only one")


def _check_ungrouped(text: Any) -> None:
    """Raise `_Uncuttable` where experts are routed in groups: without one of them, others would change their group."""
    for key in _GROUPS:
        groups = getattr(text, key, None)
        if isinstance(groups, int) and groups > 1:
            raise _Uncuttable(f"its experts are routed in {groups} groups of equal size ({key})")


def _check_outside(skeleton: Skeleton, smaller: Skeleton, kind: _Kind) -> None:
    """Raise `_Uncuttable` where parameters outside the blocks follow the width."""
    before, after = skeleton.model.state_dict(), smaller.model.state_dict()
    inside = skeleton.block_path + "."
    for name, value in before.items():
        if not name.startswith(inside) and (name not in after or after[name].shape != value.shape):
            raise _Uncuttable(f"{name}, outside the blocks, changes with {' and '.join(kind.keys)}")


def _less(values: Mapping[str, int], kind: _Kind, less: int) -> dict[str, int]:
    """What is said of the width, some positions less; nothing where none would be left."""
    found = {key: values[key] - each * less for key, each in kind.keys.items() if key in values}
    return found if min(found.values(), default=0) > 0 else {}


def _axes(block: nn.Module, smaller: nn.Module) -> dict[str, list[tuple[int, int, int]]]:
    """The axes of a block's parameters that another width shortens, with their sizes before and after."""
    after = smaller.state_dict()
    found: dict[str, list[tuple[int, int, int]]] = {}
    for name, value in block.state_dict().items():
        if name not in after or after[name].ndim != value.ndim:
            found[name] = [(0, 0, 0)]
            continue
        sizes = enumerate(zip(value.shape, after[name].shape, strict=True))
        changed = [(axis, old, new) for axis, (old, new) in sizes if old != new]
        if changed:
            found[name] = changed
    return found


def _members(
    block: nn.Module,
    smaller: nn.Module,
    axes: Mapping[str, list[tuple[int, int, int]]],
    less: int,
    kind: _Kind,
    hidden: Tensor,
    call: Call | None,
) -> dict[str, tuple[int, Tensor]]:
    """The axis of each parameter that follows, and the position behind each entry along it.

    less: how many positions less the block `smaller` has.
    """
    if call is None:
        raise _Uncuttable("the network passes over this block where there is only text")
    sizes: dict[str, tuple[int, int]] = {}
    for name, changed in axes.items():
        axis, old, new = changed[0]
        each = (old - new) // less
        if len(changed) > 1 or each < 1 or old - new != each * less or old % each:
            raise _Uncuttable(f"{name} does not lose an equal share of one axis with each position")
        sizes[name] = axis, each
    count = {block.state_dict()[name].shape[axis] // each for name, (axis, each) in sizes.items()}
    if len(count) > 1:
        raise _Uncuttable(f"{' and '.join(sizes)} have no number of positions in common")
    trial = _Trial(block, hidden, call)
    (positions,) = count
    if kind.kind == "experts":
        several = next((name for name, (_, each) in sizes.items() if each > 1), None)
        if several is not None:
            raise _Uncuttable(f"{several} has several entries for each expert along one axis")
        found = {name: (axis, torch.arange(positions)) for name, (axis, _) in sizes.items()}
    else:
        found = trial.positions(sizes, positions)
    gone = torch.randperm(positions, generator=torch.Generator().manual_seed(3))[:less]
    trial.check(smaller, found, gone, silent=kind.kind != "experts")
    return found


class _Trial:
    """One block with random weights in float32, and tokens to run it on."""

    def __init__(self, block: nn.Module, hidden: Tensor, call: Call) -> None:
        generator = torch.Generator().manual_seed(1)
        self.block = copy.deepcopy(block)
        for name, parameter in block.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.rpartition(".")[2] == "bias":
                # A large one would keep a ReLU closed on all tokens.
                value = noise / 10
            else:
                value = 1 + noise / 4 if parameter.ndim < 2 else noise / math.sqrt(parameter.shape[-1])
            place(self.block, name, value)
        self.block = self.block.float().cpu()
        self.hidden = torch.randn(hidden.shape, generator=generator)
        self.call = _wide(call)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        try:
            return hidden_of(block(hidden, *self.call.args, **self.call.kwargs), hidden)
        except Exception as error:  # whatever the class's own code says of such a width
            raise _Uncuttable(f"a block of this width does not run: {first_line(error)}") from error

    def positions(self, sizes: Mapping[str, tuple[int, int]], count: int) -> dict[str, tuple[int, Tensor]]:
        """sizes: by parameter the axis that follows, and how many entries stand for each position."""
        sites = weights_with_inputs(self.block)
        readers = {site.name: site for site in sites if sizes.get(site.parameter, (-1, 0))[0] == site.column_axis}
        makers = {site.name: site for site in sites if sizes.get(site.parameter, (-1, 0))[0] == site.row_axis}
        if not readers:
            raise _Uncuttable("no layer reads it")
        seen: list[tuple[str, Tensor, Tensor]] = []
        with (
            torch.enable_grad(),
            WatchLayers(self.block, "", sites, lambda name, inputs, output: seen.append((name, inputs, output))),
        ):
            self.run(self.block, self.hidden.clone().requires_grad_())
        found: dict[str, tuple[int, Tensor]] = {}
        digits = max(1, math.ceil(math.log(count, _BASE)))
        generator = torch.Generator().manual_seed(2)
        sums = [torch.zeros(()) for _ in range(1 + digits)]
        for name, inputs, _ in seen:
            if name in readers and inputs.numel():
                axis, each = sizes[readers[name].parameter]
                position = torch.arange(count).repeat_interleave(each)
                found[readers[name].parameter] = axis, position
                weighted = inputs * (torch.rand(inputs.shape, generator=generator) + 0.5)
                sums[0] = sums[0] + weighted.sum()
                for digit in range(digits):
                    value = position // _BASE**digit % _BASE
                    sums[1 + digit] = sums[1 + digit] + (weighted * value).sum()
        made = [(name, output) for name, _, output in seen if name in makers and output.numel()]
        outputs = [output for _, output in made]
        gradients = [torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True) for total in sums]
        rows: dict[str, Tensor] = {}
        for at, (name, output) in enumerate(made):
            parts = [each[at] for each in gradients]
            if parts[0] is None:
                continue
            flat = [torch.zeros_like(output) if part is None else part for part in parts]
            position = _quotients([part.reshape(-1, output.shape[-1]) for part in flat])
            parameter = makers[name].parameter
            known = rows.get(parameter, torch.full_like(position, -1))
            # Experts of one stack are alike; a token may reach one that others do not.
            if bool(((known >= 0) & (position >= 0) & (known != position)).any()):
                raise _Uncuttable(f"the matrices of {parameter} do not agree on their order")
            rows[parameter] = torch.where(known >= 0, known, position)
        for site in makers.values():
            position = rows.get(site.parameter, torch.full((site.rows,), -1))
            each = sizes[site.parameter][1]
            if bool((position < 0).any()) or position.bincount(minlength=count).tolist() != [each] * count:
                raise _Uncuttable(f"what {site.name} makes does not reach its readers position by position")
            found[site.parameter] = sizes[site.parameter][0], position
            bias = f"{site.name}.bias"
            if bias in sizes:
                found[bias] = sizes[bias][0], position
        missing = [name for name in sizes if name not in found]
        if missing:
            raise _Uncuttable(f"{missing[0]} follows it, and is no weight or bias of a layer")
        return found

    def check(self, smaller: nn.Module, members: Mapping[str, tuple[int, Tensor]], gone: Tensor, silent: bool) -> None:
        """Cut the positions `gone` on trial: the smaller block must compute what this one does with zeros there.

        silent: whether zeros are as good as nothing; an expert whose weights are zero would still be chosen.
        """
        smaller = copy.deepcopy(smaller)
        tensors = self.block.state_dict()
        kept = {name: {axis: (~torch.isin(at, gone)).nonzero().flatten()} for name, (axis, at) in members.items()}
        for name, _ in list(smaller.named_parameters()):
            place(smaller, name, shortened(tensors[name], kept.get(name, {})).contiguous())
        with torch.no_grad():
            found = self.run(smaller.float().cpu(), self.hidden)
            for name, (axis, position) in members.items():
                tensors[name].index_fill_(axis, torch.isin(position, gone).nonzero().flatten(), 0)
            expected = self.run(self.block, self.hidden)
        if silent and float((found - expected).abs().max()) > _EQUAL * float(expected.abs().max()):
            raise _Uncuttable("a block without some positions computes something else than with zeros there")


def _quotients(gradients: Sequence[Tensor]) -> Tensor:
    """The position behind each output channel, int64 (rows,), -1 where none is found.

    gradients: (tokens, rows) of the plain sum, then of the sums weighted with each digit of the positions.
    """
    plain = gradients[0]
    best = plain.abs().argmax(0, keepdim=True)
    pivot = plain.gather(0, best).squeeze(0)
    position = torch.zeros(plain.shape[1], dtype=torch.int64)
    known = pivot != 0
    for digit, weighted in enumerate(gradients[1:]):
        quotient = weighted.gather(0, best).squeeze(0) / pivot
        known &= (quotient - quotient.round()).abs() < _TOLERANCE
        position += quotient.nan_to_num().round().to(torch.int64) * _BASE**digit
    return torch.where(known & (position >= 0), position, -1)


def _wide(call: Call) -> Call:
    """Arguments of a block in float32 on the CPU, fit for a backward pass."""

    def wide(value: Tensor) -> Tensor:
        return value.cpu().float().clone() if value.is_floating_point() else value.cpu().clone()

    return Call(*tree_map_only(Tensor, wide, (call.args, call.kwargs)))


__all__ = ["Width", "coupled", "cut"]
