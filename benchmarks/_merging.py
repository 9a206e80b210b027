"""One way to merge an adapter, in a process of its own: `_merging.py WAY MODEL ADAPTER OUT`; see merge_memory.py.

A way is `adapter`, which writes a random one, `effcli` or `peft`, each merging, or `effcli-idle` or `peft-idle`, which
import what merging takes and open the model without its weights.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


def main() -> None:
    way, model, adapter, out = sys.argv[1], *map(Path, sys.argv[2:])
    warnings.simplefilter("ignore")
    if way.startswith("effcli"):
        merge_with_effcli(model, adapter, out, idle=way.endswith("idle"))
    elif way == "adapter":
        write_adapter(model, adapter)
    else:
        merge_with_peft(model, adapter, out, idle=way.endswith("idle"))


def merge_with_effcli(model: Path, adapter: Path, out: Path, idle: bool) -> None:
    from effcli.language.editing import edit_model, edited
    from effcli.language.weights import open_weights
    from effcli.run.recipe import PassStep

    step = PassStep.model_validate({"merge": {"adapter": str(adapter)}})
    if idle:
        edited(open_weights(model), step)
        return
    out.mkdir()
    edit_model(model, out, step, out.with_name(f"{out.name}-work"))


def merge_with_peft(model: Path, adapter: Path, out: Path, idle: bool) -> None:
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if idle:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
            peft.get_peft_model(base, peft.LoraConfig.from_pretrained(adapter))
        return
    base = AutoModelForCausalLM.from_pretrained(model)
    peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)


def write_adapter(model: Path, adapter: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=16, target_modules="all-linear")
    network = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    network.save_pretrained(adapter)


if __name__ == "__main__":
    main()
