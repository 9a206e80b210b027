"""PEFT adapters with random weights, of small networks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from effcli.language.editing import edit_model
from effcli.layers.result import PassResult
from effcli.run.recipe import PassStep


def make(source: Path, folder: Path, config: Any, seed: int = 0) -> Any:
    """Write an adapter for the model in `source` to `folder`; returns the model with it, in evaluation mode.

    A trained number of a factor is normal; others, such as norms and magnitudes, are what they were times about 1.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
        model = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                factor = any(kind in name for kind in ("lora_A", "lora_B", "lora_embedding", "hada_", "lokr_"))
                value = 0.2 * noise if factor else parameter.data * (1 + noise / 4) + noise / 50
                # In place: two parameters may share their numbers.
                parameter.data.copy_(value)
        model.save_pretrained(folder)
    return model.eval()


def merged(source: Path, target: Path, **options: Any) -> PassResult:
    """Carry out a `merge` step with `options` on the model in `source`, and write `target`."""
    target.mkdir()
    work = target.with_name(f"{target.name}-work")
    return edit_model(source, target, PassStep.model_validate({"merge": options}), work)


def reference(model: Any) -> dict[str, Tensor]:
    """What PEFT makes of the parameters of a model with an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return found


def logits(model: Any, vocabulary: int = 1024) -> Tensor:
    """float32 (2, 16, vocabulary) on random tokens."""
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def loaded(folder: Path) -> Any:
    """The checkpoint in `folder` as stock transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
