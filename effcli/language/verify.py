"""Load a checkpoint as its users will, and hold its logits against effcli's own arithmetic.

The reference is the network with dequantized weights, whose inputs are rounded where they are int8. Against it stand
the stock transformers loader, where the layout is the standard one, and the packed kernels that `effcli.load` uses. In
effcli's own layout the stock loader must refuse: a file that loads with random weights is worse than one that does not
load.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from effcli import runtime, samples
from effcli.activations import keep_inputs
from effcli.checkpoint import Checkpoint, read_config
from effcli.contract import Options
from effcli.errors import EffcliError, UserError, first_line
from effcli.inputs import text
from effcli.language.stream import running
from effcli.language.weights import open_weights
from effcli.stock import language_loader, load_network_config, logits_of, quiet_transformers
from effcli.storage import is_own, network_config, rounds_inputs

# Largest ‖a - b‖ / ‖b‖ over all logits. The stock loader computes the same numbers as the reference; the packed kernels
# sum in another order and round elsewhere, and every block passes that on.
_STOCK = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_PACKED = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# Where inputs are rounded to int8, the last digit of a number decides which level it falls to, and each such decision
# moves others behind it: in a deep network with loud channels until the logits differ as much as rounding itself moves
# them. All are compared in float32 then, where fewer numbers are close to a border, and allowed this much or somewhat
# more than rounding moves the reference. What compressed-tensors does otherwise, one scale for all tokens where a layer
# is given two axes, fits in as well.
_ROUNDED, _MOVED = 6e-2, 1.5
_ROWS = 2
_LENGTH = 32
# Rows of activations at which the kernels for decoding still run.
_FEW = 4


class Agreement(Options):
    """How two networks' logits on the same tokens compare."""

    largest: float = Field(description="largest difference of two logits")
    relative: float = Field(description="‖a - b‖ / ‖b‖ over all logits")
    top1: float = Field(description="fraction of positions with the same likeliest token, 0 to 1")
    tolerance: float = Field(description="the largest `relative` that passes")

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.relative <= self.tolerance

    @staticmethod
    def of(logits: Tensor, reference: Tensor, tolerance: float) -> Agreement:
        """logits, reference: float32 (rows, length, vocabulary)."""
        if logits.shape != reference.shape:
            return Agreement(largest=float("inf"), relative=float("inf"), top1=0.0, tolerance=tolerance)
        difference = logits - reference
        return Agreement(
            largest=float(difference.abs().max()),
            relative=float(difference.norm() / reference.norm().clamp(min=1e-30)),
            top1=float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
            tolerance=tolerance,
        )

    def __str__(self) -> str:
        verdict = "" if self.passed else f", more than {self.tolerance:g} allowed"
        size = f"largest logit difference {self.largest:.2g} ({self.relative:.1e} relative{verdict})"
        return f"{size}, top-1 {self.top1:.1%}"


class Verification(Options):
    """What was found. layout: 'dense', 'compressed-tensors' or 'effcli'."""

    path: str
    layout: str
    loader: str = Field(description="the stock loader and its version")
    stock: Agreement | None = Field(default=None, description="the stock loader against the reference")
    refused: bool | None = Field(default=None, description="whether the stock loader refuses, in effcli's own layout")
    packed: Agreement | None = Field(default=None, description="the packed kernels against the reference")
    problem: str = Field(default="", description="what failed besides the comparison")

    @property
    def passed(self) -> bool:
        agreements = [agreement for agreement in (self.stock, self.packed) if agreement is not None]
        return not self.problem and bool(agreements) and all(agreement.passed for agreement in agreements)

    @property
    def line(self) -> str:
        """The findings in one line."""
        found = []
        if self.problem:
            found.append(self.problem)
        if self.stock is not None:
            found.append(f"reloaded with {self.loader}: {self.stock}")
        if self.refused:
            found.append(f"{self.loader} refuses it, as it must; effcli.load reads it")
        if self.packed is not None:
            found.append(f"packed kernels: {self.packed}")
        return f"{'verified' if self.passed else 'NOT VERIFIED'}: {'; '.join(found)}"

    def to_json(self) -> str:
        data = {"passed": self.passed, "line": self.line, **self.model_dump(mode="json")}
        return json.dumps(data, indent=1)


def verify(path: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """Compare the ways to load the checkpoint `path` on a few fixed tokens; one network is in memory at a time."""
    import transformers

    quiet_transformers()
    path = samples.resolve(str(path))
    checkpoint = Checkpoint.open(path)
    own = is_own(checkpoint.config)
    compressed = own or "quantization_config" in checkpoint.config
    layout = "effcli" if own else "compressed-tensors" if compressed else "dense"
    if layout == "compressed-tensors":
        _require_compressed_tensors()
    config = load_network_config(path, network_config(checkpoint.config), trust_remote_code)
    ids = tokens(config)
    rounded = rounds_inputs(checkpoint.config)
    with running(path):
        reference, dtype = _logits(lambda: _reference(path, rounded, trust_remote_code), ids)
    if rounded:
        floating, _ = _logits(lambda: keep_inputs(_reference(path, rounded, trust_remote_code)), ids)
        allowed = max(_ROUNDED, _MOVED * Agreement.of(floating, reference, 0).relative)
    findings: dict[str, Any] = {
        "path": str(path),
        "layout": layout,
        "loader": f"transformers {transformers.__version__}",
    }
    if compressed:
        tolerance = allowed if rounded else _PACKED.get(dtype, _PACKED[torch.float32])
        findings["packed"] = _packed(path, ids, reference, dtype, tolerance, trust_remote_code)
    try:
        wanted = {"dtype": dtype} if rounded else {}
        stock, _ = _logits(lambda: load_stock(path, trust_remote_code, **wanted), ids)
    except EffcliError:
        raise
    except Exception as error:
        # Whatever the stock loader raises is its way of refusing.
        if own:
            return Verification(**findings, refused=True)
        return Verification(**findings, problem=f"{findings['loader']} cannot load it: {first_line(error)}")
    if own:
        problem = f"{findings['loader']} loads effcli's own layout, which it cannot understand"
        return Verification(**findings, refused=False, problem=problem)
    tolerance = allowed if rounded else _STOCK.get(dtype, _STOCK[torch.float32])
    return Verification(**findings, stock=Agreement.of(stock, reference, tolerance))


def _reference(path: Path, rounded: bool, trust_remote_code: bool) -> Any:
    if rounded:
        return restored(path, "float32", trust_remote_code)
    return runtime.load(path, packed=False, trust_remote_code=trust_remote_code)


def restored(path: Path, dtype: str, trust_remote_code: bool = False) -> Any:
    """The network of the checkpoint `path` in `dtype`, whatever its files hold, its layers dequantized to it."""
    weights = open_weights(path, trust_remote_code, dtype)
    skeleton = weights.skeleton
    weights.fill(skeleton.model, "", skeleton.parameters())
    if skeleton.tied:
        skeleton.model.tie_weights()  # type: ignore[operator]
    return skeleton.model.eval()


def _packed(
    path: Path, ids: Tensor, reference: Tensor, dtype: torch.dtype, tolerance: float, trust_remote_code: bool
) -> Agreement:
    """The packed kernels for many rows of activations, as in a prompt, or for few, as in decoding: the worse."""
    few = slice(0, 1), slice(0, _FEW)
    network = runtime.load(path, trust_remote_code=trust_remote_code)
    network = network if network.dtype == dtype else network.to(dtype)
    with torch.inference_mode():
        agreements = [
            Agreement.of(logits_of(network, ids[part]).float(), reference[part], tolerance)
            for part in ((slice(None), slice(None)), few)
        ]
    return max(agreements, key=lambda agreement: (not agreement.passed, agreement.relative))


def tokens(config: Any) -> Tensor:
    """A fixed batch of random token ids int64 (rows, length) for a network with this config."""
    length = min(_LENGTH, text.longest_sequence(config) or _LENGTH)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(text.vocabulary(config), (_ROWS, length), generator=generator)


def load_stock(path: Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The checkpoint `path` through transformers alone, offline and without a word; in its own dtype unless given."""
    config = load_network_config(path, network_config(read_config(path)), trust_remote_code)
    with warnings.catch_warnings():
        # What the stock loader warns about is between it and its authors; only its logits count here.
        warnings.simplefilter("ignore")
        return language_loader(config).from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code, dtype=dtype or "auto"
        )


def _logits(load: Callable[[], Any], ids: Tensor) -> tuple[Tensor, torch.dtype]:
    """Logits float32 (rows, length, vocabulary) of a network that is freed on return, and its dtype."""
    network = load().eval()
    with torch.inference_mode():
        return logits_of(network, ids).float(), network.dtype


def _require_compressed_tensors() -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise UserError(
            "stock transformers reads this checkpoint only with compressed-tensors installed",
            "pip install compressed-tensors",
        ) from error
