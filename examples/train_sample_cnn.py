"""Train the image classifier that ships with effcli as `sample:cnn`: a small residual network, on a CPU.

    python examples/train_sample_cnn.py DATA_DIR OUT_DIR

DATA_DIR holds Fashion-MNIST as `train.npz` and `test.npz`, each with `images` uint8 (n, 28, 28) and `labels` (n,).
OUT_DIR gets the network as an exported graph, `model.pt2`, which runs without this file; what turns pixels into its
input; and two sets of images: `calibration.npz` (cut out of train.npz) and `evaluation.npz` (cut out of test.npz, which
is looked at once, after the last step). About half an hour on one core that multiplies bfloat16.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, as pixel / 255
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor",  # the plainest one: transformers wants a name, whatever the network
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [MEAN],
    "image_std": [STD],
}
CALIBRATION, EVALUATION = 256, 1000  # images that ship with the network
README = """\
`sample:cnn` is a small residual network for Fashion-MNIST that ships with effcli, to be compressed and compared.
It has {parameters:,} parameters and takes {macs:,} multiply-accumulates for an image of 28 x 28 pixels.
Top-1 is {test:.2%} on the 10,000 test images and {evaluation:.1%} on the 1,000 that ship, the first 100 of each class.
`OMP_NUM_THREADS=1 python examples/train_sample_cnn.py DATA_DIR effcli/data/cnn` made it, on images of train.npz alone.
The images in `calibration.npz` and `evaluation.npz` are Fashion-MNIST: © 2017 Zalando SE, MIT licence (`LICENSE`).
"""
SHIFT = 2  # pixels by which training images move in each direction


class ConvNorm(nn.Module):
    """A convolution that keeps the image's size, or divides it by `stride`, and the batch norm after it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Basic(nn.Module):
    """The basic block of residual networks (arXiv:1512.03385, fig. 5): two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, stride)
        self.second = ConvNorm(outputs, outputs, 3)
        self.shortcut = ConvNorm(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class Separable(nn.Module):
    """The inverted residual of MobileNetV2 (arXiv:1801.04381): widen, filter each channel alone, narrow, add."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = ConvNorm(channels, wide, 1)
        self.depthwise = ConvNorm(wide, wide, 3, groups=wide)
        self.project = ConvNorm(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))


class SmallResNet(nn.Module):
    """float32 (n, 1, 28, 28), normalised, -> logits (n, 10), by stages of 28 x 28, 14 x 14 and 7 x 7 pixels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = ConvNorm(1, width, 3)
        self.stage1 = Basic(width, width)
        self.stage2 = nn.Sequential(Basic(width, 2 * width, stride=2), Separable(2 * width, expansion=3))
        self.stage3 = nn.Sequential(Basic(2 * width, 4 * width, stride=2), Separable(4 * width, expansion=2))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(x.mean((2, 3)))


def normalise(images: Tensor) -> Tensor:
    """images uint8 (n, 28, 28) -> what the network takes, float32 (n, 1, 28, 28)."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def augment(images: Tensor) -> Tensor:
    """Shift each image of uint8 (n, 28, 28) by up to SHIFT pixels in both directions, and mirror half of them."""
    each = torch.arange(len(images))
    # A view with one more pair of axes: every position of the image inside its black frame.
    positions = F.pad(images, (SHIFT,) * 4).unfold(1, 28, 1).unfold(2, 28, 1)
    down, right = torch.randint(2 * SHIFT + 1, (2, len(images)))
    shifted = positions[each, down, right]
    return torch.where(torch.rand(len(images), 1, 1) < 0.5, shifted.flip(2), shifted)


def train(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train in place on images uint8 (n, 28, 28) and labels int64 (n,); the last weights are the ones that stay."""
    # Norms and the bias are excluded from decay: a smaller gain would only be made up for by the next convolution.
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=args.lr,
        momentum=0.9,
        nesterov=True,
    )
    steps = len(images) // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    started = time.perf_counter()
    # On a CPU convolutions run at three times the speed with channels last and in bfloat16; weights stay in float32.
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(args.epochs):
        total = 0.0
        for chosen in torch.randperm(len(images))[: steps * args.batch].split(args.batch):
            inputs = normalise(augment(images[chosen])).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(inputs)
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3d}  loss {total / steps:.3f}  {time.perf_counter() - started:5.0f} s", flush=True)
    model.eval().to(memory_format=torch.contiguous_format)


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images uint8 (n, 28, 28) the network classifies as in labels (n,), bool (n,)."""
    return torch.cat([model(normalise(part)).argmax(1) for part in images.split(500)]) == labels


def export(model: nn.Module) -> ExportedProgram:
    """The network as a graph for batches of any size, batch norms as they are."""
    example = torch.zeros(2, 1, 28, 28)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},))
    # The graph remembers the lines of source behind each node. Where the folders of this machine lie should not ship;
    # site-packages stays, by which readers tell torch's own lines from ours.
    for node in program.graph.nodes:
        if "stack_trace" in node.meta:
            for folder in (Path(torch.__file__).parents[2], Path(__file__).parent):
                node.meta["stack_trace"] = node.meta["stack_trace"].replace(f"{folder}/", "")
    return program


def evenly(labels: Tensor, count: int) -> Tensor:
    """Indices of the first count / 10 images of each class, in the order of the data."""
    return torch.cat([(labels == label).nonzero()[: count // 10, 0] for label in range(10)]).sort().values


def write_images(path: Path, images: Tensor, labels: Tensor) -> None:
    """images uint8 (n, 28, 28) and labels (n,), as Fashion-MNIST's own `.npz`."""
    np.savez_compressed(path, images=images.numpy(), labels=labels.numpy().astype(np.uint8))


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train effcli's sample image classifier.")
    parser.add_argument("data_dir", type=Path, help="folder with train.npz and test.npz")
    parser.add_argument("out_dir", type=Path, help="folder to write")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    (images, labels), (test_images, test_labels) = (
        (torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long())
        for file in (np.load(args.data_dir / "train.npz"), np.load(args.data_dir / "test.npz"))
    )
    model = SmallResNet()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(images):,} images to learn from")
    train(model, images, labels, args)

    hits = correct(model, test_images, test_labels)
    shipped = evenly(test_labels, EVALUATION)
    top1 = {"test.npz": float(hits.double().mean()), "evaluation.npz": float(hits[shipped].double().mean())}
    with FlopCounterMode(display=False) as counter:
        model(normalise(images[:1]))
    macs = counter.get_total_flops() // 2

    args.out_dir.mkdir(parents=True, exist_ok=True)
    torch.export.save(export(model), args.out_dir / "model.pt2")
    calibration = torch.randperm(len(images))[:CALIBRATION]
    write_images(args.out_dir / "calibration.npz", images[calibration], labels[calibration])
    write_images(args.out_dir / "evaluation.npz", test_images[shipped], test_labels[shipped])
    write_json(args.out_dir / "config.json", {"classes": CLASSES, "parameters": parameters, "top1": top1})
    write_json(args.out_dir / "preprocessor_config.json", PREPROCESSING)
    readme = README.format(parameters=parameters, macs=macs, test=top1["test.npz"], evaluation=top1["evaluation.npz"])
    (args.out_dir / "README.md").write_text(readme, encoding="utf-8")
    print(readme)


if __name__ == "__main__":
    main()
