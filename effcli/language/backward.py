"""A backward pass through a language model with one block in memory at a time, from the last block to the first.

The hidden states before every block lie on the disk. Of each window one loss or several are taken back: the gradients
at the hidden states behind a block are read, the block is run once more on what it was given, and the gradients before
it are written. On the way every product of an input with a weight shows what the loss says of that weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from effcli.errors import DataError
from effcli.files.checkpoint import write_shard
from effcli.language.calls import Call
from effcli.language.forward import chunks
from effcli.language.spool import Spool
from effcli.language.stream import Stream, WatchLayers
from effcli.language.weights import CPU, open_weights
from effcli.layers.input_rounding import straight_through
from effcli.layers.layer import LayerSite
from effcli.layers.result import check_finite
from effcli.layers.statistics import Gradients, Needs
from effcli.platform import memory
from effcli.platform.rehearsal import counted, few


class Sums(Protocol):
    """What is summed up of the gradients of one weight."""

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Take in inputs (..., in) and gradients at the outputs (..., out) of the sample at hand."""

    def end_sample(self) -> None:
        """The next inputs are those of another sample."""


class GradientStream(Stream):
    """A stream whose way out can be differentiated."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) of hidden states (n, hidden) behind the last block, with a gradient."""
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64)
        with torch.enable_grad():
            return self._leave(ids, hidden.unsqueeze(0))[0]


# The gradients of a window's losses at logits (n, vocabulary) of the positions `part`, float32, one after the other.
# Given the number of the window, the logits and the part.
Pulls = Callable[[int, Tensor, slice], Iterator[Tensor]]


class Backward:
    """Losses of single windows on their way back.

    stream: entered, with its head; windows: token ids int64 (1, length) by number; hidden: the hidden states before
    each block, or behind the last, of all windows by number; folder: for gradients; losses: how many of each window.
    """

    def __init__(
        self,
        stream: GradientStream,
        windows: Mapping[int, Tensor],
        hidden: Callable[[int], Spool],
        folder: Path,
        losses: int = 1,
    ) -> None:
        self.stream = stream
        self.windows = windows
        self.hidden = hidden
        self.losses = losses
        self._folder = folder

    def behind(self, k: int) -> Spool:
        """The gradients at the hidden states behind block k, -1 for those before the first: of each window, by loss.

        Two files take turns, so that those of a block that was interrupted are whole.
        """
        spool = self.hidden(0)
        shapes = [spool.shapes[number] for number in self.windows for _ in range(self.losses)]
        return Spool(self._folder / f"gradients-{k % 2}.bin", shapes, spool.dtype, spool.device)

    def begin(self, pulls: Pulls, head: LayerSite | None = None, sums: Sums | None = None) -> None:
        """The gradients behind the last block. head: the output head, where `sums` are to be made of its weight."""
        skeleton = self.stream.skeleton
        vocabulary = skeleton.config.get_text_config().vocab_size
        count = len(skeleton.blocks)
        incoming, outgoing = self.hidden(count), self.behind(count - 1)
        sites = [] if head is None else [head]
        outgoing.reserve()
        for at, (number, ids) in few([*enumerate(self.windows.items())]):
            hidden = incoming.read(number)
            flat = hidden.flatten(0, 1)
            gradients = [torch.zeros_like(flat) for _ in range(self.losses)]
            for part in few([*chunks(ids.numel(), vocabulary, ids.shape[1])]):
                leaf = flat[part].clone().requires_grad_()
                with WatchLayers(skeleton.model, "", sites, _hook(lambda name: sums)):
                    out = self.stream.logits(leaf)
                for gradient, pull in zip(gradients, pulls(number, out.detach(), part), strict=True):
                    (gradient[part],) = torch.autograd.grad(out, leaf, pull.to(out.dtype), retain_graph=True)
            if sums is not None:
                sums.end_sample()
            for loss, gradient in enumerate(gradients):
                outgoing.write(at * self.losses + loss, gradient.view(hidden.shape))

    def through(
        self,
        k: int,
        sites: Sequence[LayerSite],
        sums: Mapping[str, Sums],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Take all losses back through block k, which is open.

        sums: of the layers `sites`, by name; tick: called for each window.
        """
        block, prefix = self.stream.skeleton.blocks[k], self.stream.skeleton.block_names[k] + "."
        incoming, gradients, before = self.hidden(k), self.behind(k), self.behind(k - 1)
        before.reserve()
        for at, (number, ids) in few([*enumerate(self.windows.items())]):
            hidden = incoming.read(number)
            with torch.enable_grad(), WatchLayers(block, prefix, sites, _hook(sums.get)):
                out = self.stream.through(k, hidden.requires_grad_(), differentiable(self.stream.call(k, ids)))
            for loss in range(at * self.losses, (at + 1) * self.losses):
                (gradient,) = torch.autograd.grad(out, hidden, gradients.read(loss), retain_graph=True)
                before.write(loss, gradient)
                for each in sums.values():
                    each.end_sample()
            tick()

    def end(self) -> None:
        """Remove the gradients."""
        for k in (0, 1):
            self.behind(k).remove()


def _hook(sums: Callable[[str], Sums | None]) -> Callable[[str, Tensor, Tensor], None]:
    """Shows each product's inputs, with the gradients at its outputs once these are known, to the sums of its layer."""

    def look(name: str, inputs: Tensor, output: Tensor) -> None:
        own = sums(name)
        if own is not None and output.requires_grad:
            seen = inputs.detach()
            output.register_hook(lambda gradient: own.add(seen, gradient))  # type: ignore[no-untyped-call]

    return look


def differentiable(call: Call | None) -> Call | None:
    """A block's arguments for a backward pass: tensors made in inference mode take no part in one, clones do."""
    return call and Call(*tree_map_only(Tensor, Tensor.clone, (call.args, call.kwargs)))


def next_tokens(windows: Mapping[int, Tensor]) -> Pulls:
    """The loss of a window: the mean cross-entropy of each of its tokens after those before it."""

    def pulls(number: int, logits: Tensor, part: slice) -> Iterator[Tensor]:
        following = windows[number].flatten()[1:][part.start : part.stop].to(logits.device)
        pull = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        if len(following):
            # The last position has none behind it.
            predicted = torch.softmax(logits[: len(following)].float(), dim=-1)
            predicted[torch.arange(len(following), device=logits.device), following] -= 1
            pull[: len(following)] = predicted / (windows[number].numel() - 1)
        yield pull

    return pulls


class StoredGradients:
    """The gradients of all layers that a pass takes, made once in one forward and one backward and kept on the disk.

    sites: by block, and of the output head last (None where it is left alone). A sample is one window, and its loss
    `next_tokens`; the weights are those of the checkpoint `source`, in float32. device: where blocks run.
    """

    def __init__(
        self,
        source: Path,
        sites: Sequence[Sequence[LayerSite]],
        head: LayerSite | None,
        batches: Sequence[Tensor],
        needs: Needs,
        folder: Path,
        trust_remote_code: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self._device = device
        self._source = source
        self._sites = sites
        self._head = head
        self._windows = dict(enumerate(window for batch in batches for window in torch.split(batch, 1)))
        self._needs = needs.gradients
        self._folder = folder
        self._trust = trust_remote_code

    def of(self, k: int) -> dict[str, Gradients]:
        """Those of the layers of block k, by name; behind the last block that of the head."""
        files = [self._file(number) for number in range(len(self._sites) + 1)]
        if not all(file.is_file() for file in files):
            self._make()
        tensors = {key: tensor.to(self._device) for key, tensor in load_file(files[k]).items()}
        sites = [*self._sites, [self._head] if self._head is not None else []][k]
        return {
            site.name: Gradients.of(
                {need: tensors[f"{site.name}.{need.name}"] for need in self._needs}, len(self._windows)
            )
            for site in sites
        }

    def _file(self, k: int) -> Path:
        return self._folder / f"gradients-{k:05d}.safetensors"

    def _make(self) -> None:
        if not any(window.numel() > 1 for window in self._windows.values()):
            raise DataError("no calibration window has a token to predict", "give windows of two tokens or more")
        weights = open_weights(self._source, self._trust, "float32", self._device)
        skeleton = weights.skeleton
        count = len(skeleton.blocks)

        def hidden(k: int) -> Spool:
            return Spool(self._folder / f"states-{k}.bin", shapes, skeleton.dtype, self._device)

        with GradientStream(weights, with_head=True) as stream, torch.inference_mode(False), torch.no_grad():
            shapes: list[tuple[int, ...]] = []
            for number, ids in few([*self._windows.items()]):
                states, _ = stream.enter(ids)
                if not shapes:
                    shapes += [(*each.shape, *states.shape[2:]) for each in self._windows.values()]
                    hidden(0).reserve()
                hidden(0).write(number, states)
            for k in range(count):
                hidden(k + 1).reserve()
                with counted(skeleton.block_names[k]), self._opened(stream, k), torch.inference_mode():
                    check_finite(skeleton.blocks[k], skeleton.block_names[k])
                    for number, ids in few([*self._windows.items()]):
                        states = stream.through(k, hidden(k).read(number), stream.call(k, ids))
                        hidden(k + 1).write(number, states)
                memory.trim()
            backward = Backward(stream, self._windows, hidden, self._folder)
            head = None if self._head is None else Gradients(self._head.shape, self._needs, self._device)
            backward.begin(next_tokens(self._windows), self._head, head)
            self._keep(count, {self._head.name: head} if self._head is not None and head is not None else {})
            hidden(count).remove()
            for k in reversed(range(count)):
                sums = {site.name: Gradients(site.shape, self._needs, self._device) for site in self._sites[k]}
                with counted(skeleton.block_names[k]):
                    with self._opened(stream, k), straight_through(skeleton.blocks[k]):
                        backward.through(k, self._sites[k], sums)
                    self._keep(k, sums)
                hidden(k).remove()
                memory.trim()
            backward.end()

    @staticmethod
    def _opened(stream: Stream, k: int) -> AbstractContextManager[nn.Module]:
        skeleton = stream.skeleton
        return stream.weights.opened(skeleton.blocks[k], skeleton.block_names[k] + ".", skeleton.block_parameters(k))

    def _keep(self, k: int, sums: Mapping[str, Gradients]) -> None:
        for name, own in sums.items():
            own.check_finite(name)
        tensors = {f"{name}.{need.name}": total.cpu() for name, own in sums.items() for need, total in own.sums.items()}
        write_shard(self._file(k), tensors)


__all__ = ["Backward", "GradientStream", "StoredGradients", "Sums", "differentiable", "next_tokens"]
