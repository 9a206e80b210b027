"""Deep Compression's two networks for digits, LeNet-300-100 and LeNet-5, pruned and quantized (arXiv:1510.00149).

    python examples/lenet.py DATA [-o out/lenet]

DATA holds images uint8 (n, 28, 28) as `images` and their `labels` (n,): either a folder with `train.npz` and
`test.npz`, such as MNIST or Fashion-MNIST, or one npz, of which a fifth is kept for testing. With `--sparsity` weights
are removed while the others are trained, and their places are stored as gaps. Weights share tables of 32 entries in
linear layers and of 256 in convolutions, the tables are trained to restore the outputs of the network as it was, and
the codes are Huffman-coded. Printed are the accuracy before and after and the bytes of the file, next to what the
entropy of the codes promises.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import effcli
from effcli.formats import CodebookWeight, SparseWeight, huffman
from effcli.graphs.graph import WEIGHTS_NAME, Graph

Images = tuple[Tensor, Tensor]


def lenet_300_100() -> nn.Module:
    """float32 (n, 1, 28, 28) -> logits (n, 10): 266,610 parameters in three linear layers."""
    first, second, third = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), third)


def lenet_5() -> nn.Module:
    """float32 (n, 1, 28, 28) -> logits (n, 10): Caffe's version, 431,080 parameters, without ReLU in between."""
    first = nn.Conv2d(1, 20, 5), nn.MaxPool2d(2)
    second = nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*first, *second, nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


NETWORKS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5}


def read(data: Path, generator: torch.Generator) -> tuple[Images, Images]:
    """Images float32 (n, 1, 28, 28), in [-1, 1], and labels int64 (n,), to learn from and to be tested on."""

    def images(file: Path) -> Images:
        arrays = np.load(file)
        pixels, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
        return (pixels.float() / 127.5 - 1).unsqueeze(1), labels.long()

    if data.is_dir():
        return images(data / "train.npz"), images(data / "test.npz")
    pixels, labels = images(data)
    order = torch.randperm(len(labels), generator=generator)
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, 1, 28, 28), all of them moved by the same up to 2 pixels down and to the right."""
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return pixels.roll((down, right), (2, 3))


def train(model: nn.Module, images: Images, steps: int, generator: torch.Generator) -> None:
    """Adam (arXiv:1412.6980) in place, on 128 images a step, each time `shifted`.

    The steps shrink along a cosine.
    """
    pixels, labels = images
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (128,), generator=generator)
        loss = F.cross_entropy(model(shifted(pixels[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def compress(model: nn.Module, folder: Path, images: Images, test: Images, options: argparse.Namespace) -> Any:
    """Export the network, quantize it into `folder`, and return the report."""
    convolutions = {
        name: {"bits": options.conv_bits} for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }
    passes: list[Any] = [
        {"kmeans": {"bits": options.bits, "layers": convolutions}},
        {"centroids": {"epochs": options.tuning}},
    ]
    if options.sparsity:
        pruning = {"sparsity": options.sparsity, "compare": "network", "epochs": options.epochs, "batch_size": 64}
        passes.insert(0, {"gradual": pruning | {"learning_rate": 1e-3, "towards": options.towards}})
    # The images once as they are, and shifted as in training until there are enough.
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.arange(options.calibration) % len(images[1])
    seen = [images[0][chosen[: len(images[1])]]]
    seen += [shifted(images[0][some], generator) for some in chosen[len(images[1]) :].split(128)]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        program = torch.export.export(model.eval(), (images[0][:2],), dynamic_shapes=({0: Dim("batch")},))
        torch.export.save(program, place / "model.pt2")
        np.savez(place / "calibration.npz", inputs=torch.cat(seen).numpy(), labels=images[1][chosen].numpy())
        np.savez(place / "evaluation.npz", inputs=test[0].numpy(), labels=test[1].numpy())
        return effcli.compress(
            place / "model.pt2",
            passes=passes,
            output=folder,
            calibration={"data": str(place / "calibration.npz"), "samples": len(chosen)},
            evaluate={"images": str(place / "evaluation.npz"), "samples": len(test[1]), "latency": False},
            overwrite=True,
        )


def tell(folder: Path, report: Any) -> None:
    """Print what became of the network, next to what the entropy of its codes promises."""
    before, *_, after = (stage.quality.classification for stage in report.stages)
    graph = Graph.read(folder)
    codes = tables = places = 0.0
    for name, stored in graph.stored.items():
        weight = stored.values if isinstance(stored, SparseWeight) else stored
        assert isinstance(weight, CodebookWeight)
        kept = weight.codes
        if isinstance(stored, SparseWeight):
            kept = weight.codes[stored.mask]
            places += sum(tensor.nbytes for tensor in stored.format.pattern.pack(stored.mask).values())
        entropy = huffman.entropy(kept)
        codes += kept.numel() * entropy / 8
        tables += weight.table.nbytes
        share, coded = kept.numel() / weight.codes.numel(), huffman.bits_per_symbol(kept)
        print(f"  {name}: {stored.format}, {share:.1%} kept, entropy {entropy:.3f}, coded {coded:.3f} bits per weight")
    biases = sum(tensor.nbytes for name, tensor in graph.module.named_parameters() if name.endswith("bias"))
    promised, original = codes + places + tables + biases, 4 * graph.weights()
    size = (folder / WEIGHTS_NAME).stat().st_size
    print(f"  accuracy: {before.top1:.2%} before, {after.top1:.2%} after, agreement {after.agreement:.2%}")
    print(
        f"  entropy promises {promised:,.0f} bytes: codes {codes:,.0f}, places {places:,.0f}, tables {tables:,.0f}, "
        f"biases {biases:,}"
    )
    print(f"  file: {size:,} bytes, {size / promised - 1:+.2%}; {original / size:.2f} times smaller than {original:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train.npz and test.npz, or one npz")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/lenet"))
    parser.add_argument("--network", choices=[*NETWORKS, "both"], default="both")
    parser.add_argument("--steps", type=int, default=2000, help="of training, on 128 images each")
    parser.add_argument("--tuning", type=int, default=5, help="epochs of training the tables")
    parser.add_argument(
        "--calibration", type=int, default=10_000, help="training images that the tables are trained on"
    )
    parser.add_argument("--bits", type=int, default=5, help="per weight of a linear layer")
    parser.add_argument("--conv-bits", type=int, default=8, help="per weight of a convolution")
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of the weights that is removed")
    parser.add_argument("--epochs", type=int, default=30, help="of training while weights are removed")
    parser.add_argument(
        "--towards",
        choices=["labels", "original"],
        default="original",
        help="what is learned while weights are removed",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    for name in NETWORKS if options.network == "both" else (options.network,):
        torch.manual_seed(options.seed)
        generator = torch.Generator().manual_seed(options.seed)
        images, test = read(options.data, generator)
        model = NETWORKS[name]()
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(images[1]):,} images")
        train(model, images, options.steps, generator)
        report = compress(model, options.output / name, images, test, options)
        tell(options.output / name, report)


if __name__ == "__main__":
    main()
