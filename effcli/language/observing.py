"""What is gathered of the inputs of single layers of a language model, kept on the disk: one block is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from effcli.files.checkpoint import write_shard
from effcli.language.spool import Spool
from effcli.language.stream import Stream, WatchLayers
from effcli.language.weights import CPU, open_weights
from effcli.layers.layer import LayerSite
from effcli.layers.result import check_finite
from effcli.layers.statistics import Needs, Statistics
from effcli.platform import memory


class StoredStatistics(Mapping[str, tuple[Statistics]]):
    """The statistics of the inputs of `sites`, made at once in one forward of the checkpoint `source`.

    sites: layers of blocks; batches: token ids int64 (windows, length); folder: for what is kept; device: where blocks
    run. Those of one layer are in memory at a time. influence: 1 - cos of the hidden states before and behind each
    block (arXiv:2403.03853, equation 1), a mean over tokens, float64 (blocks,).
    """

    def __init__(
        self,
        source: Path,
        sites: Sequence[LayerSite],
        batches: Sequence[Tensor],
        needs: Needs,
        folder: Path,
        trust_remote_code: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self._sites = {site.name: site for site in sites}
        self._needs = needs
        self._folder = folder
        self._device = device
        self.influence = torch.zeros(0, dtype=torch.float64)
        self._make(source, batches, trust_remote_code)

    def __getitem__(self, name: str) -> tuple[Statistics]:
        tensors = load_file(self._file(name))
        return (Statistics.read({key: tensor.to(self._device) for key, tensor in tensors.items()}, self._needs),)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def _file(self, name: str) -> Path:
        return self._folder / f"statistics-{list(self._sites).index(name):05d}.safetensors"

    def _make(self, source: Path, batches: Sequence[Tensor], trust_remote_code: bool) -> None:
        weights = open_weights(source, trust_remote_code, device=self._device)
        skeleton = weights.skeleton
        with Stream(weights) as stream, torch.inference_mode():
            check_finite(skeleton.model, "")
            shapes: list[tuple[int, ...]] = []
            turns: list[float] = []

            def hidden(k: int) -> Spool:
                return Spool(self._folder / f"hidden-{k % 2}.bin", shapes, skeleton.dtype, self._device)

            for number, batch in enumerate(batches):
                states, _ = stream.enter(batch)
                shapes = shapes or [(*each.shape, *states.shape[2:]) for each in batches]
                hidden(0).write(number, states)
            for k, block in enumerate(skeleton.blocks):
                prefix = skeleton.block_names[k] + "."
                own = [site for site in skeleton.block_layers(k) if site.name in self._sites]
                found = {site.name: Statistics(site.columns, self._needs, self._device) for site in own}

                def add(name: str, inputs: Tensor, output: Tensor, found: dict[str, Statistics] = found) -> None:
                    found[name].add(inputs)

                with weights.opened(block, prefix, skeleton.block_parameters(k)), WatchLayers(block, prefix, own, add):
                    check_finite(block, prefix.removesuffix("."))
                    turned = 0.0
                    for number, states in enumerate(hidden(k)):
                        out = stream.through(k, states, stream.call(k, batches[number]))
                        turned += float((1 - cosine_similarity(states.float(), out.float(), dim=-1)).sum())
                        hidden(k + 1).write(number, out)
                turns.append(turned / sum(batch.numel() for batch in batches))
                for name, statistics in found.items():
                    statistics.check_finite(name)
                    write_shard(self._file(name), {key: t.cpu() for key, t in statistics.tensors().items()})
                memory.trim()
        self.influence = torch.tensor(turns, dtype=torch.float64)
        for k in (0, 1):
            hidden(k).remove()


__all__ = ["StoredStatistics"]
