"""Which layers share an input, and which module before them can take in a scale: found by experiment, not by name.

A scale s per input channel may be multiplied into the columns of every consumer when the producer of that input
divides its output channels by s. Two experiments on one block in float32 decide:

1. Single tokens. Attention over one token returns its value whatever query and key are, so every producer channel
   that reaches the input linearly shows itself there: y_c · ∂(Σ_j r_j x_j)/∂y_c is then parallel, over tokens, to x_j
   of the channel j it feeds. This finds slices of fused projections, interleaved heads and repeated heads alike.
2. Several tokens. The candidate is scaled by a random s and the consumers by its inverse; it is accepted when the
   block's output stays the same to float32 rounding, and refused otherwise. Equivalence is measured, never assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effcli.language.calls import Call, hidden_of
from effcli.language.skeleton import find_layers
from effcli.language.stream import Stream, WatchLayers
from effcli.layers.contract import tied
from effcli.layers.layer import LayerSite
from effcli.options import Options
from effcli.reports.units import count

TOLERANCE = 2e-5
_PARALLEL = 1e-3
_FEWEST_TOKENS = 4
# What both experiments are made with: single tokens, and rows of several.
_PROBE_TOKENS = 64
_PROBE_ROWS, _PROBE_LENGTH = 2, 12


@dataclass(frozen=True)
class Producer:
    """A module whose output channels can be divided by a scale.

    name: path inside the block; how: "norm" divides weight and bias, "norm plus one" a weight that stands for
    (1 + w), "rows" the rows of a layer and its bias. channel: int64 (in,), the producer's output channel behind each
    input channel of the consumers; two inputs behind one channel (a repeated head) must share their scale. outputs:
    how many output channels the producer has.
    """

    name: str
    how: str
    channel: Tensor
    outputs: int


@dataclass(frozen=True)
class SharedInput:
    """Weights that read one tensor. `consumers` are names inside the block; `error` is the measured difference."""

    consumers: tuple[str, ...]
    producer: Producer | None
    reason: str
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        producer = self.producer and {**vars(self.producer), "channel": self.producer.channel.tolist()}
        return {**vars(self), "producer": producer}

    @staticmethod
    def from_json(data: dict[str, Any]) -> SharedInput:
        return _DescribedInput.model_validate(data).read()


class _DescribedProducer(Options):
    name: str
    how: Literal["norm", "norm plus one", "rows"]
    channel: tuple[int, ...]
    outputs: int

    def read(self) -> Producer:
        return Producer(self.name, self.how, torch.tensor(self.channel, dtype=torch.int64), self.outputs)


class _DescribedInput(Options):
    consumers: tuple[str, ...]
    producer: _DescribedProducer | None
    reason: str
    error: float | None

    def read(self) -> SharedInput:
        producer = None if self.producer is None else self.producer.read()
        return SharedInput(self.consumers, producer, self.reason, self.error)


class SharedInputs(Options):
    """The shared inputs of a block, as the journal keeps them."""

    pairs: tuple[_DescribedInput, ...]

    def read(self) -> list[SharedInput]:
        return [pair.read() for pair in self.pairs]


@dataclass
class _Seen:
    """One product with a weight, or one norm: `position` counts them in the order in which they ran."""

    name: str
    inputs: Tensor
    output: Tensor
    position: int


def output_factors(producer: Producer, scale: Tensor) -> Tensor:
    """scale (in,) of the consumers -> the divisor of each of the producer's output channels, float32 (outputs,)."""
    factors = torch.ones(producer.outputs, dtype=torch.float32, device=scale.device)
    factors[producer.channel.to(scale.device)] = scale.float()
    return factors


def divide_norm(block: nn.Module, producer: Producer, scale: Tensor) -> Tensor:
    """Divide a norm's weight and bias by scale (in,); returns the scale that it really took, float32 (in,).

    The weight keeps its dtype. The factor that survives its rounding is returned, so that consumers scaled by it undo
    it exactly.
    """
    module = block.get_submodule(producer.name)
    weight: Tensor = module.weight  # type: ignore[assignment]
    factors = output_factors(producer, scale)
    shift = 1.0 if producer.how == "norm plus one" else 0.0
    before = weight.float() + shift
    divided = (before / factors - shift).to(weight.dtype)
    after = divided.float() + shift
    # A channel that its dtype could not hold any more, too small or too large, stays as it is.
    lost = (before != 0) & ((after == 0) | ~torch.isfinite(after))
    weight.copy_(torch.where(lost, weight, divided))
    taken = torch.where(before != 0, before / after, factors).masked_fill_(lost, 1.0)
    divide_bias(block, producer.name, taken)
    return taken[producer.channel.to(taken.device)]


def divide_bias(block: nn.Module, name: str, factors: Tensor) -> list[str]:
    """Divide the bias of module `name`, if it has one, by factors (outputs,); returns the parameters that changed."""
    # One expert of a stack is no module.
    bias = getattr(dict(block.named_modules()).get(name), "bias", None)
    if not isinstance(bias, Tensor):
        return []
    bias.copy_(bias.float() / factors)
    return [f"{name}.bias"]


def _fold(block: nn.Module, producer: Producer, scale: Tensor, sites: dict[str, LayerSite]) -> Tensor:
    """Divide the producer's output channels by scale (in,); returns the scale that it really took."""
    if producer.how != "rows":
        return divide_norm(block, producer, scale)
    factors = output_factors(producer, scale)
    weight = sites[producer.name].view(block.get_parameter(sites[producer.name].parameter))
    weight.copy_(weight.float() / factors.unsqueeze(1))
    divide_bias(block, producer.name, factors)
    return scale


def scale_columns(block: nn.Module, site: LayerSite, scale: Tensor) -> None:
    """Multiply the input channels of a weight by scale (in,)."""
    weight = site.view(block.get_parameter(site.parameter))
    weight.copy_(weight.float() * scale)


def weights_with_inputs(block: nn.Module) -> list[LayerSite]:
    """The layers of a block by their names inside it, and other matrices (a router's) that may read the same input."""
    sites = list(find_layers(block, ""))
    known = {site.parameter for site in sites}
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2 and name not in known:
            sites.append(LayerSite(name, "linear", name, parameter.shape[0], parameter.shape[1]))
    return sites


def probe_pairs(stream: Stream, k: int) -> list[SharedInput]:
    """The shared inputs of block k, which is open, found with random tokens that are the same each time."""
    size = stream.skeleton.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    single = torch.randint(size, (_PROBE_TOKENS, 1), generator=generator)
    several = torch.randint(size, (_PROBE_ROWS, _PROBE_LENGTH), generator=generator)
    with torch.inference_mode(False):
        probes = []
        for ids in (single, several):
            hidden, calls = stream.enter(ids)
            call = calls[k]
            if call is None:
                return []
            probes.append((hidden, call))
        return find_pairs(stream.skeleton.blocks[k], probes[0], probes[1])


def leaders(taken: Iterable[str], prefix: str, shared: Sequence[SharedInput]) -> dict[str, str]:
    """For every layer that is taken the one whose statistics it shares: the first that reads the same input.

    prefix: of the block that `shared` is of.
    """
    found = {name: name for name in taken}
    for item in shared:
        members = [prefix + name for name in item.consumers if prefix + name in found]
        for name in members:
            found[name] = members[0]
    return found


def find_pairs(block: nn.Module, single: tuple[Tensor, Call], several: tuple[Tensor, Call]) -> list[SharedInput]:
    """The shared inputs of one open block, in the order in which they are read.

    single: hidden states (tokens, 1, hidden) with their call; several: (batch, length, hidden) with theirs.
    """
    trial = copy.deepcopy(block).float().requires_grad_(False)
    sites = weights_with_inputs(trial)
    by_name = {site.name: site for site in sites}
    seen, norms = _observe(trial, sites, *_in_float32(single))
    groups = [_Candidates.of(group, seen, norms) for group in _by_input(seen)]
    del seen, norms
    several = _in_float32(several)
    with torch.no_grad():
        baseline = _run(trial, *several)
        return [_decide(trial, group, by_name, several, baseline) for group in groups]


@dataclass
class _Candidates:
    """Weights that read one tensor, and the producers whose channels match it, nearest first."""

    names: tuple[str, ...]
    matches: list[tuple[str, Tensor, int]]
    reason: str

    @staticmethod
    def of(group: list[_Seen], seen: Sequence[_Seen], norms: Sequence[_Seen]) -> _Candidates:
        names = tuple(item.name for item in group)
        inputs = group[0].inputs
        flat = inputs.reshape(-1, inputs.shape[-1])
        tokens = flat.shape[0]
        if tokens < _FEWEST_TOKENS:
            return _Candidates(names, [], f"only {count(tokens, 'token')} reached it in the experiment")
        before = [
            item
            for item in sorted((*norms, *seen), key=lambda item: -item.position)
            if item.position < group[0].position and item.output.numel() == tokens * item.output.shape[-1]
        ]
        # What a network computes without gradients (an index of tokens) cannot be followed.
        before = [item for item in before if item.output.requires_grad and inputs.requires_grad]
        if not before:
            return _Candidates(names, [], "no norm or linear before it sees the same tokens")
        weighting = (torch.rand(flat.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5).to(flat.device)
        target = (flat * weighting).sum()
        outputs = [item.output for item in before]
        gradients = torch.autograd.grad(target, outputs, retain_graph=True, allow_unused=True)
        matches = []
        for item, gradient in zip(before, gradients, strict=True):
            if gradient is not None:
                products = (item.output * gradient).reshape(tokens, -1)
                channel = match_channels(products, flat * weighting)
                if channel is not None:
                    matches.append((item.name, channel, products.shape[1]))
        reason = "" if matches else "no module before it reaches its channels one by one and linearly"
        return _Candidates(names, matches, reason)


def _decide(
    trial: nn.Module,
    group: _Candidates,
    sites: dict[str, LayerSite],
    several: tuple[Tensor, Call],
    baseline: Tensor,
) -> SharedInput:
    smallest: float | None = None
    for name, channel, outputs in group.matches:
        for how in ("rows",) if name in sites else ("norm", "norm plus one"):
            producer = Producer(name, how, channel, outputs)
            error = _equivalence(trial, producer, group.names, sites, several, baseline)
            if error <= TOLERANCE:
                return SharedInput(group.names, producer, "", error)
            smallest = error if smallest is None else min(smallest, error)
    if smallest is None:
        return SharedInput(group.names, None, group.reason)
    return SharedInput(
        group.names, None, f"scaling the module before it changes the block's output by {smallest:.1e}: others read it"
    )


def _equivalence(
    trial: nn.Module,
    producer: Producer,
    names: tuple[str, ...],
    sites: dict[str, LayerSite],
    several: tuple[Tensor, Call],
    baseline: Tensor,
) -> float:
    """Largest change of a token's output, relative to its own norm, when a random scale is folded.

    Each token for itself: one token with massive activations must not hide what changes at all others.
    """
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(producer.channel.shape[0], generator=generator) * 1.5 + 0.5
    scale = tied(scale, producer.channel).to(baseline.device)
    touched = {sites[name].parameter for name in names}
    touched |= {key for key, _ in trial.named_parameters() if key.startswith(f"{producer.name}.")}
    if producer.how == "rows":
        touched.add(sites[producer.name].parameter)
    parameters = {key: trial.get_parameter(key) for key in touched}
    saved = {key: parameter.clone() for key, parameter in parameters.items()}
    taken = _fold(trial, producer, scale, sites)
    for name in names:
        scale_columns(trial, sites[name], taken)
    changed = _run(trial, *several)
    for key, parameter in parameters.items():
        parameter.copy_(saved[key])
    return float(((changed - baseline).norm(dim=-1) / baseline.norm(dim=-1).clamp(min=1e-30)).max())


def match_channels(products: Tensor, inputs: Tensor) -> Tensor | None:
    """The column of products (tokens, outputs) parallel to each column of inputs (tokens, in); None if one has none.

    Columns that are zero on every token (a ReLU that never fired) say nothing; they are filled in when all others
    stand in their own place, and else the match fails.
    """
    left, right = (_unit_columns(columns.cpu()) for columns in (products, inputs))
    live = right.norm(dim=0) > 0.5
    if not live.any():
        return None
    # One random projection sorts the candidates, so that no (in, outputs) table of distances is needed.
    direction = torch.randn(left.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys, order = (direction @ left).sort()
    position = torch.searchsorted(keys, direction @ right)
    best = torch.full((right.shape[1],), -1, dtype=torch.long)
    distance = torch.full((right.shape[1],), torch.inf, dtype=torch.float64)
    for step in range(-2, 3):
        candidate = order[(position + step).clamp(0, len(order) - 1)]
        gap = (left[:, candidate] - right).norm(dim=0)
        best = torch.where(gap < distance, candidate, best)
        distance = torch.minimum(gap, distance)
    matched = distance < _PARALLEL
    if bool((matched | ~live).all()) and not bool(live.all()):
        own_place = torch.arange(right.shape[1])
        if left.shape[1] == right.shape[1] and bool((best == own_place)[live].all()):
            return own_place
        return None
    return best if bool(matched.all()) else None


def _unit_columns(columns: Tensor) -> Tensor:
    wide = columns.detach().double()
    norms = wide.norm(dim=0)
    return torch.where(norms > 1e-12, wide / norms.clamp(min=1e-300), 0.0)


def _observe(
    trial: nn.Module, sites: Sequence[LayerSite], hidden: Tensor, call: Call
) -> tuple[list[_Seen], list[_Seen]]:
    """Run the block once with gradients; returns the weight products and the norms' outputs in their order."""
    seen: list[_Seen] = []
    norms: list[_Seen] = []
    clock = iter(range(1 << 30))
    handles = []

    def watch_norm(name: str, channels: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad and output.shape[-1] == channels:
                norms.append(_Seen(name, args[0], output, next(clock)))

        return hook

    for name, module in trial.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            handles.append(module.register_forward_hook(watch_norm(name, weight.numel())))
    with (
        torch.enable_grad(),
        WatchLayers(
            trial, "", sites, lambda name, inputs, output: seen.append(_Seen(name, inputs, output, next(clock)))
        ),
    ):
        _run(trial, hidden.clone().requires_grad_(True), call)
    for handle in handles:
        handle.remove()
    return seen, norms


def _by_input(seen: Sequence[_Seen]) -> list[list[_Seen]]:
    groups: dict[tuple[int, int, int], list[_Seen]] = {}
    for item in seen:
        # Experts that no token reached share an address and read nothing in common.
        alone = item.position if item.inputs.numel() == 0 else -1
        groups.setdefault((item.inputs.data_ptr(), item.inputs.numel(), alone), []).append(item)
    return list(groups.values())


def _run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    return hidden_of(block(hidden, *call.args, **call.kwargs), hidden)


def _in_float32(item: tuple[Tensor, Call]) -> tuple[Tensor, Call]:
    hidden, call = item
    return _cast(hidden), Call(_cast(call.args), _cast(call.kwargs))


def _cast(value: Any) -> Any:
    # Tensors made in inference mode cannot take part in autograd; a clone can.
    if isinstance(value, Tensor):
        return value.float().clone() if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {key: _cast(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item) for item in value)
    return value
