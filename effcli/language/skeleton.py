"""The network without its weights: blocks and layers found in the modules, not listed per architecture.

The network is built from its config on the meta device. Its blocks are the children of the largest ModuleList; its
layers are the weights with inputs inside them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn

from effcli.errors import CheckpointError, UnsupportedError, first_line
from effcli.language.experts import stacks_of
from effcli.layers.layer import LayerSite
from effcli.platform import rehearsal
from effcli.platform.huggingface import (
    check_causal,
    check_decoder,
    language_loader,
    load_network_config,
    quiet_transformers,
)

if TYPE_CHECKING:
    from effcli.language.calls import Manner


class Skeleton:
    """A causal language model on the meta device, its blocks and its layers.

    head: the module name of the output head, None without one; tied: whether it shares the input embedding's weight;
    was_tied: whether the config says that it does; widths: what single blocks say otherwise than the config.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        trust_remote_code: bool = False,
        widths: Mapping[int, Mapping[str, int]] | None = None,
    ) -> None:
        quiet_transformers()
        self.trust_remote_code = trust_remote_code
        self.widths = {k: dict(values) for k, values in sorted((widths or {}).items())}
        check_causal(path, config)
        self.config = load_network_config(path, config, trust_remote_code)
        check_decoder(path, self.config)
        loader = language_loader(self.config)
        self.dtype: torch.dtype = self.config.dtype or torch.float32
        with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
            # Initialisers that warn about zero-sized or meta tensors say nothing about this network.
            warnings.simplefilter("ignore")
            try:
                self.model: nn.Module = loader.from_config(
                    self.config,
                    dtype=self.dtype,
                    experts_implementation="eager",
                    trust_remote_code=trust_remote_code,
                )
            except Exception as error:  # whatever transformers says about the config
                raise UnsupportedError(
                    f"{path} is not a causal language model that transformers can build: {first_line(error)}",
                    "this version compresses causal language models; config.json must be the one they were saved with",
                ) from error
        self.model.eval()
        self.model.tie_weights()
        head, inputs = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        self.head: str | None = next((name for name, m in self.model.named_modules() if m is head), None)
        self.tied = head is not None and inputs is not None and head.weight is inputs.weight
        self.was_tied = self.tied
        self.embedding = next(f"{name}.weight" for name, m in self.model.named_modules() if m is inputs)
        self.block_path, self.blocks = find_blocks(self.model)
        self._set_widths(path, config)
        # Where the class for the text alone has the same blocks, None without one.
        self.text_path = self._find_text_path(loader)
        self.block_names = [f"{self.block_path}.{k}" for k in range(len(self.blocks))]
        # How the blocks are called, once it was found.
        self.manner: Manner | None = None

    def _set_widths(self, path: Path, config: dict[str, Any]) -> None:
        """Put blocks of other widths, from networks whose configs say these, in their places."""
        made: dict[tuple[tuple[str, int], ...], nn.ModuleList] = {}
        for k, values in self.widths.items():
            key = tuple(sorted(values.items()))
            if key not in made:
                made[key] = Skeleton(path, with_widths(config, values), self.trust_remote_code).blocks
            if k >= len(self.blocks):
                raise CheckpointError(f"{path} gives widths for block {k} of {len(self.blocks)}", "restore config.json")
            self.blocks[k] = made[key][k]

    def _find_text_path(self, loader: Any) -> str | None:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

        if loader is AutoModelForCausalLM or type(self.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return None
        with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
            warnings.simplefilter("ignore")
            text = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        path = find_blocks(text)[0]
        return path if path != self.block_path else None

    def untie(self) -> None:
        """Give the output head a weight of its own."""
        assert self.head is not None
        head = self.model.get_submodule(self.head)
        head.weight = nn.Parameter(torch.empty_like(head.get_parameter("weight")), requires_grad=False)
        # Whoever ties this network's weights once more is to leave the head alone.
        for config in (self.config, self.config.get_text_config()):
            config.tie_word_embeddings = False
        self.tied = False

    def weights(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def sites(self) -> list[LayerSite]:
        """Every layer, those outside the blocks last."""
        inner = [site for k in range(len(self.blocks)) for site in self.block_layers(k)]
        return inner + self.outer_layers()

    def left_alone(self, step: str, lm_head: bool) -> dict[str, str]:
        """See `effcli.layers.selection.Layered`: what stands outside the blocks, but for the output head on request."""
        tied = ", and it shares its weight with the input embedding" if self.tied else ""
        reasons = {site.name: "outside the repeated blocks" for site in self.outer_layers()}
        if self.head in reasons:
            reasons[self.head] = "" if lm_head else f"the output head is kept unless lm_head is set{tied}"
        return reasons

    def block_layers(self, k: int) -> list[LayerSite]:
        """The layers of block k, in the order of its modules."""
        return list(find_layers(self.blocks[k], self.block_names[k]))

    def outer_layers(self) -> list[LayerSite]:
        """The layers outside the blocks: the output head, and projections around the stack."""
        inside = self.block_path + "."
        return [site for site in find_layers(self.model, "") if not site.name.startswith(inside)]

    def block_parameters(self, k: int) -> list[str]:
        """State-dict keys of block k, persistent buffers included."""
        prefix = self.block_names[k] + "."
        return [prefix + name for name in self.blocks[k].state_dict()]

    def outer_parameters(self) -> list[str]:
        """State-dict keys outside the blocks; a tied head is not named twice."""
        inside = self.block_path + "."
        names = [name for name in self.model.state_dict() if not name.startswith(inside)]
        if self.tied and self.head is not None:
            names = [name for name in names if name != f"{self.head}.weight"]
        return names

    def parameters(self) -> list[str]:
        """All state-dict keys: those outside the blocks, then block by block."""
        return self.outer_parameters() + [name for k in range(len(self.blocks)) for name in self.block_parameters(k)]


def with_widths(config: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A network's config that says other widths, those of its language model where it has other parts."""
    text = config.get("text_config")
    if isinstance(text, dict):
        return {**config, "text_config": {**text, **values}}
    return {**config, **values}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList that holds the most parameters, and its path; the decoder's where there are several parts."""
    from transformers import PreTrainedModel

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    inner = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    lists = [(name, module) for name, module in lists if module in inner] or lists
    if not lists:
        raise UnsupportedError(
            "the network has no repeated blocks (no ModuleList)", "this version compresses causal language models"
        )

    def size(item: tuple[str, nn.ModuleList]) -> int:
        return sum(parameter.numel() for parameter in item[1].parameters())

    # Of nested lists the outermost has at least as many parameters, and comes first.
    return max(lists, key=size)


@contextmanager
def counting_blocks(network: nn.Module) -> Iterator[None]:
    """Have each block of `network` that runs counted in a rehearsal."""
    if rehearsal.ongoing() is None:
        yield
        return
    path, blocks = find_blocks(network)

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with rehearsal.counted(name):
                return forward(*args, **kwargs)

        return run

    try:
        for k, block in enumerate(blocks):
            block.forward = counted(f"{path}.{k}", block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def find_layers(root: nn.Module, prefix: str) -> Iterator[LayerSite]:
    """Every weight with inputs below `root`: linears, transformers' Conv1D, matrices of stacked expert parameters."""
    from transformers.pytorch_utils import Conv1D

    for path, module in root.named_modules():
        name = ".".join(part for part in (prefix, path) if part)
        if isinstance(module, nn.Linear):
            yield LayerSite(
                name, "linear", f"{name}.weight", module.out_features, module.in_features, obstacle=_own_forward(module)
            )
        elif isinstance(module, Conv1D):
            columns, rows = module.weight.shape
            yield LayerSite(name, "conv1d", f"{name}.weight", rows, columns, transposed=True)
        elif "Experts" in type(module).__name__:
            # The order in which the experts run: all matrices of expert 0, then of expert 1.
            stacks = stacks_of(module)
            parameters = {own: module.get_parameter(own) for own in stacks}
            count = max((parameter.shape[0] for parameter in parameters.values()), default=0)
            for index in range(count):
                for own, stack in stacks.items():
                    shape = parameters[own].shape
                    if index >= shape[0]:
                        continue
                    rows, columns = shape[:0:-1] if stack.transposed else shape[1:]
                    key = f"{name}.{own}"
                    yield LayerSite(
                        f"{key}.{index}", "expert", key, rows, columns, index, stack.transposed, obstacle=stack.obstacle
                    )


def _own_forward(module: nn.Linear) -> str:
    """Why a linear layer cannot be replaced, empty when it computes as `nn.Linear` does.

    A subclass with a forward of its own is tried on small weights and compared with the plain product.
    """
    kind = type(module)
    if kind.forward is nn.Linear.forward:
        return ""
    random = torch.Generator("cpu").manual_seed(0)
    weight, bias = (torch.randn(shape, generator=random, device="cpu") for shape in ((5, 3), (5,)))
    small = copy.copy(module).eval()
    small._parameters = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
    small.in_features, small.out_features = 3, 5
    # Magnitudes far apart show an activation or a limit inside the layer.
    sizes = torch.tensor([1e-3, 1.0, 1e3], device="cpu")[:, None, None]
    x = torch.randn(3, 6, 3, generator=random, device="cpu") * sizes
    try:
        with torch.no_grad():
            expected = nn.functional.linear(x, weight, small.bias)
            same = torch.allclose(small(x) / sizes, expected / sizes, rtol=1e-4, atol=1e-4)
    except Exception:  # whatever a foreign forward raises over three inputs, or returns besides a tensor
        same = False
    return "" if same else f"{kind.__name__} computes more than a linear layer"
