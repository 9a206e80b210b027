"""PEFT's modules beside the layers of a language model, dense or packed, and the adapter that is written of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from effcli.adapters.tensors import DAMAGED
from effcli.errors import CheckpointError, UnsupportedError, foreign, writing
from effcli.language.modules import QuantizedLinear
from effcli.platform.installed import require

# What PEFT puts around a model, in the names of tensors.
_PREFIX = "base_model.model."


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT without what it and the packages that it looks for tell their developers."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def attach(network: nn.Module, config: Any) -> Any:
    """PEFT's model around `network`, whose layers get the adapter that `config` describes. Packed layers stay packed.

    Raises `UnsupportedError` for what PEFT does not take.
    """
    with (
        quiet(),
        foreign(lambda cause: UnsupportedError(f"peft does not take this network: {cause}", "take another pass")),
    ):
        from peft import get_peft_model

        return get_peft_model(network, _taking_packed(config))


def read(network: nn.Module, folder: Path) -> Any:
    """`network` with PEFT's modules for the adapter in `folder`; `CheckpointError` where PEFT does not read it."""
    require("peft", "train")
    with quiet(), foreign(lambda cause: CheckpointError(f"peft does not read {folder}: {cause}", DAMAGED)):
        from peft import PeftConfig, PeftModel

        config = _taking_packed(PeftConfig.from_pretrained(str(folder)))
        return PeftModel.from_pretrained(network, str(folder), config=config).get_base_model()


def _taking_packed(config: Any) -> Any:
    """A config that also names PEFT's module for packed layers."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    if isinstance(config, LoraConfig):
        # It holds its weight in no parameter, but reads and multiplies as a linear layer does.
        config._register_custom_module({QuantizedLinear: Linear})
    return config


def module_of(model: Any, name: str) -> Any:
    """PEFT's module around the layer `name`."""
    return model.base_model.model.get_submodule(name)


def save(model: Any, config: Any, tensors: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Write the adapter of `model` as PEFT does.

    config: what describes it; tensors: by the layer's name and then by PEFT's, those that are not the modules' own.
    """
    with quiet():
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, own in tensors.items():
        state |= {f"{_PREFIX}{name}.{part}.weight": value for part, value in own.items()}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = {name: value.detach().contiguous() for name, value in sorted(state.items())}
        save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # Where the base is hangs on who loads it.
        config.base_model_name_or_path, config.inference_mode = None, True
        with quiet():
            config.save_pretrained(str(folder))


__all__ = ["attach", "module_of", "quiet", "read", "save"]
