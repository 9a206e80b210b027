"""The passes that remove single weights, at several sparsities: time, memory, bytes, perplexity.

    python benchmarks/pruning.py CHECKPOINT --results DIR [--only NAME ...] [--columns s50 s60 s70 p24]
    python benchmarks/pruning.py --results DIR --table

Protocol, figures and options are those of `peers.py`: every run is two child processes, all layers in the blocks are
pruned, embedding and head stay as they are. Rows of llmcompressor run where they are named by --only, which makes its
environment below --environments; its inputs are compressed ones.

Columns:
  dense          the original
  s50, s60, s70  50, 60 and 70 % of the weights of each layer, or of all layers, are removed
  p24            two of four neighbours are kept
"""

from __future__ import annotations

from peers import Tool, effcli, main

SHARES = {"s50": 0.5, "s60": 0.6, "s70": 0.7}
COLUMNS = {"dense": "dense", "s50": "50 %", "s60": "60 %", "s70": "70 %", "p24": "2:4"}


def pruning(name: str, inputs: str = "original") -> Tool:
    """A pass in all columns; inputs: of calibration."""
    steps = {column: [f"{name}:sparsity={share}"] for column, share in SHARES.items()}
    return effcli(f"calibration inputs: {inputs}", inputs, **steps, p24=[f"{name}:pattern=2:4"])


def allocated(name: str, way: str) -> Tool:
    """A pass with other shares for each layer, on compressed inputs."""
    steps = {column: [f"{name}:sparsity={share},allocation={way}"] for column, share in SHARES.items()}
    return effcli(f"calibration inputs: compressed; allocation: {way}", "compressed", **steps)


def peer(method: str) -> Tool:
    """A method of llmcompressor."""
    columns = {column: {"method": method, "sparsity": share, "structure": "0:0"} for column, share in SHARES.items()}
    columns["p24"] = {"method": method, "sparsity": 0.5, "structure": "2:4"}
    return Tool("llmcompressor", "peer_llmcompressor.py", columns, unasked=False)


TOOLS = {
    "original": Tool("", "peer_original.py", {"dense": {}}),
    "magnitude": effcli(
        **{column: [f"magnitude:sparsity={share}"] for column, share in SHARES.items()}, p24=["magnitude:pattern=2:4"]
    ),
    **{name: pruning(name) for name in ("wanda", "taylor", "sparsegpt", "alps")},
    **{f"{name} compressed": pruning(name, "compressed") for name in ("wanda", "sparsegpt", "alps")},
    "alps by error": allocated("alps", "error"),
    "alps by outliers": allocated("alps", "outliers"),
    "llmcompressor wanda": peer("wanda"),
    "llmcompressor sparsegpt": peer("sparsegpt"),
}


if __name__ == "__main__":
    main(TOOLS, COLUMNS, __doc__ or "")
