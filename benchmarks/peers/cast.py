"""Copy a checkpoint in another dtype: python cast.py CHECKPOINT OUTPUT DTYPE. Its other files stay as they are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    source, output, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    dtype = getattr(torch, name)
    output.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = {
                key: value.to(dtype) if value.is_floating_point() else value for key, value in load_file(file).items()
            }
            save_file(tensors, output / file.name, metadata={"format": "pt"})
        elif file.is_file():
            shutil.copyfile(file, output / file.name)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    # Older checkpoints say torch_dtype, newer ones dtype; whoever reads one of them must find the same.
    config.pop("torch_dtype", None)
    (output / "config.json").write_text(json.dumps({**config, "dtype": name}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
