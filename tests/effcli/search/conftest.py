"""A network that is searched in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier, with labelled inputs beside it."""
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4)),
    ).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(network, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, folder / "net.pt2")
    images = np.random.default_rng(0).standard_normal((64, 1, 8, 8)).astype(np.float32)
    labels = network(torch.from_numpy(images)).argmax(1).numpy()
    for name in ("calibration.npz", "evaluation.npz"):
        np.savez(folder / name, images=images, labels=labels)
    return folder / "net.pt2"
