"""Small random-weight image classifiers of every architecture that effcli is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    EfficientNetConfig,
    MobileNetV1Config,
    MobileNetV2Config,
    PreTrainedConfig,
    RegNetConfig,
    ResNetConfig,
    ViTConfig,
)

SIZE = 32
CLASSES = "cat", "dog", "bird", "ship", "frog"
_COMMON: dict[str, Any] = {"image_size": SIZE, "id2label": dict(enumerate(CLASSES))}
_STAGES: dict[str, Any] = {**_COMMON, "embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 2, 1, 1]}

_CONFIGS: dict[str, Any] = {
    "resnet": lambda: ResNetConfig(**_STAGES),
    "mobilenet_v1": lambda: MobileNetV1Config(**_COMMON, depth_multiplier=0.25),
    "mobilenet_v2": lambda: MobileNetV2Config(**_COMMON, depth_multiplier=0.25),
    "regnet": lambda: RegNetConfig(**_STAGES, groups_width=4),
    "efficientnet": lambda: EfficientNetConfig(
        **_COMMON, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320
    ),
    "vit": lambda: ViTConfig(
        **_COMMON, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    ),
    "convnext": lambda: ConvNextConfig(**_COMMON, hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1]),
}
NAMES = tuple(_CONFIGS)


def build(name: str) -> Any:
    """The classifier of architecture `name`, one of `NAMES`, in evaluation; the same each time."""
    config: PreTrainedConfig = _CONFIGS[name]()
    torch.manual_seed(0)
    network = AutoModelForImageClassification.from_config(config)
    # With the small weights that the architectures start from, nothing of the input would reach the logits.
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over all batches
    with torch.no_grad():
        network.train()(torch.randn(32, 3, SIZE, SIZE))
    return network.eval()


def make(name: str, folder: Path) -> Path:
    """Write the classifier of architecture `name` as a checkpoint into `folder`."""
    build(name).save_pretrained(folder)
    return folder
