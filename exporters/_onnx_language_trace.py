"""The ONNX graph of a causal language model with its cache, traced without its weights.

The network stands on fake tensors, which have a shape and no memory. torch.export follows one call; whatever makes up
the mask, the positions and the attention is transformers' own code. The graph's initializers have names and shapes and
no values yet.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from effcli.errors import UnsupportedError
from effcli.language.caching import cache_name
from effcli.language.skeleton import Skeleton
from effcli.language.weights import place

if TYPE_CHECKING:
    import onnx_ir

# What torch's translations are written for, and every onnxruntime that the extra `onnx` allows reads.
OPSET = 18

_PREFIX = "network."
# Sizes that differ from each other, from 0 and from 1, so that none is taken for another or for a constant.
_BATCH, _LENGTH, _PAST = 2, 3, 5


class Decoder(nn.Module):
    """The network as a function of tensors alone.

    input_ids, position_ids int64 (batch, length), attention_mask int64 (batch, past + length), past: keys and values
    in turn, each (batch, heads, past, head size) -> logits (batch, length, vocabulary), then keys and values with the
    new ones appended, each (batch, heads, past + length, head size).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.takes_positions = "position_ids" in inspect.signature(network.forward).parameters
        self.cache_name = cache_name(network.forward)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        more = {"position_ids": position_ids} if self.takes_positions else {}
        more[self.cache_name] = _cache(past)
        out = self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **more)
        layers = out[self.cache_name].layers
        return out.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def trace(skeleton: Skeleton) -> onnx_ir.Model:
    """The graph of `skeleton.model`, whose parameters are on the meta device; they are fake ones afterwards.

    Inputs: input_ids, attention_mask, position_ids where the network takes them, past_key_values.N.key and .value.
    Outputs: logits, present.N.key and .value. Batch, lengths and past are dynamic. Initializers are named as in the
    network's state dict. Raises `UnsupportedError` for a network that cannot be followed, with the cause.
    """
    _check_positions(skeleton)
    decoder = Decoder(skeleton.model)
    if any(site.kind == "expert" for k in range(len(skeleton.blocks)) for site in skeleton.block_layers(k)):
        # The usual way asks which experts were chosen, and that cannot stand in a graph.
        skeleton.model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with quiet():
        with fake:
            _place_fakes(skeleton)
            past = _past(skeleton)
            ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64)
            mask = torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.int64)
            positions = torch.zeros_like(ids) if decoder.takes_positions else None
        # Outside: constants that the network's code makes must have values.
        model = _trace(skeleton, decoder, (ids, mask, positions, past))
    _name(model, decoder.takes_positions, len(past) // 2)
    return model


def _trace(skeleton: Skeleton, decoder: Decoder, inputs: tuple[Any, ...]) -> onnx_ir.Model:
    batch, length, past = Dim("batch_size"), Dim("sequence_length"), Dim("past_sequence_length")
    text = {0: batch, 1: length}
    dynamic = (
        text,
        # Its length is the sum of the other two, which torch.export cannot be told.
        {0: batch, 1: Dim.DYNAMIC},
        text if decoder.takes_positions else None,
        [{0: batch, 2: past}] * len(inputs[3]),
    )
    try:
        exported = torch.export.export(decoder, inputs, dynamic_shapes=dynamic, strict=False)
        program = torch.onnx.export(exported, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    except Exception as error:  # whatever the network's code and torch say
        raise _untraceable(skeleton, _first_line(error)) from error
    assert program is not None
    # Constants are folded where values are known, and those of fake weights must not look as if they were.
    names = {_PREFIX + name for name in skeleton.model.state_dict()}
    for name, value in program.model.graph.initializers.items():
        if name in names:
            value.const_value = None
    return _simplified(program.model)


def _check_positions(skeleton: Skeleton) -> None:
    """Raise `UnsupportedError` for positions whose frequencies change with the length of the text."""
    for module in skeleton.model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                raise UnsupportedError(
                    f"{skeleton.config.model_type} changes its rotary position embedding with the length of the text "
                    f"({kind}), and a graph holds one",
                    "this version exports networks whose positions are embedded in one way; safetensors takes any",
                )


def _simplified(model: onnx_ir.Model) -> onnx_ir.Model:
    """Without what can be worked out now; not `ONNXProgram.optimize`, whose time grows with the square of the depth."""
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer

    common.InlinePass()(model)
    optimizer.fold_constants(model)
    passes = Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    )
    return passes(model).model


def _place_fakes(skeleton: Skeleton) -> None:
    """Replace what is on the meta device by fake tensors, which mix with the constants of the network's code."""
    network: Any = skeleton.model
    for name, value in network.state_dict().items():
        if value.device.type == "meta":
            place(network, name, torch.empty(value.shape, dtype=value.dtype, device="cpu"))
    if skeleton.tied:
        network.tie_weights()


def _past(skeleton: Skeleton) -> list[Tensor]:
    """Fake keys and values in turn; their heads and sizes are those that the network itself puts into its cache."""
    from transformers import DynamicCache

    try:
        name = cache_name(skeleton.model.forward)
        ids = torch.zeros(1, _LENGTH, dtype=torch.int64)
        out = skeleton.model(input_ids=ids, use_cache=True, **{name: DynamicCache()})
        kept = [tensor for layer in out[name].layers for tensor in (layer.keys, layer.values)]
        shapes = [(_BATCH, tensor.shape[1], _PAST, tensor.shape[3]) for tensor in kept]
    except Exception as error:  # whatever the network's code says
        raise _untraceable(skeleton, _first_line(error)) from error
    return [torch.empty(shape, dtype=tensor.dtype) for shape, tensor in zip(shapes, kept, strict=True)]


def _cache(past: list[Tensor]) -> Any:
    """A cache that holds keys and values of tokens before: every layer all of them, also under a sliding window."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache: Any = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer: Any = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _name(model: onnx_ir.Model, takes_positions: bool, layers: int) -> None:
    """Give inputs, outputs, their dimensions and the initializers the names that their users look for."""
    graph = model.graph
    for node in graph:
        # Places in the source on the machine that traced it.
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            # Dimensions that only torch has names for; a runtime works them out again.
            if value.shape is not None and not value.shape.is_static() and not value.is_graph_output():
                value.shape = None
    pairs = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(["position_ids"] if takes_positions else [])]
    inputs += [f"past_key_values.{pair}" for pair in pairs]
    outputs = ["logits", *(f"present.{pair}" for pair in pairs)]
    for value, name in zip(graph.inputs, inputs, strict=True):
        length = "total" if name == "attention_mask" else "past" if name.startswith("past") else ""
        _describe(value, name, length)
    for value, name in zip(graph.outputs, outputs, strict=True):
        _describe(value, name, "total" if name.startswith("present") else "")
    for name, value in list(graph.initializers.items()):
        value.name = name.removeprefix(_PREFIX)


def _describe(value: onnx_ir.Value, name: str, length: str) -> None:
    """Name a value and its dimensions: (batch, length, ...), or for keys and values (batch, heads, length, size)."""
    import onnx_ir

    dimensions: list[Any] = [None, None] if value.shape is None else list(value.shape)
    dimensions[0] = "batch_size"
    dimensions[2 if len(dimensions) == 4 else 1] = f"{length}_sequence_length" if length else "sequence_length"
    value.name, value.shape = name, onnx_ir.Shape(dimensions)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and log lines of torch and onnxscript: none says anything about the file."""
    former = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)


def _untraceable(skeleton: Skeleton, cause: str) -> UnsupportedError:
    return UnsupportedError(
        f"the architecture {skeleton.config.model_type} cannot be traced to ONNX: {cause}",
        "this version exports decoders whose whole memory is a cache of keys and values; safetensors takes any",
    )


def _first_line(error: Exception) -> str:
    """What went wrong first: torch wraps its errors in others."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return f"{type(root).__name__}: {lines[0]}" if lines else type(root).__name__
