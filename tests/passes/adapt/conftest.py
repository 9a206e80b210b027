"""What tests of adapters share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Small networks by architecture, each made once."""
    made: dict[str, Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
        key = f"{name} {dtype} {more}"
        if key not in made:
            made[key] = architectures.make(name, tmp_path_factory.mktemp(name) / "model", dtype, **more)
        return made[key]

    return make
