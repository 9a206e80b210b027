"""Load a checkpoint as its users will, and hold it against effcli's own arithmetic and against its input.

The reference is the network with dequantized weights, whose inputs are rounded where they are int8. Against it stand
the stock transformers loader, where the layout is the standard one, and the packed kernels that `effcli.load` uses. In
effcli's own layout the stock loader must refuse: a file that loads with random weights is worse than one that does not
load. Against the input every tensor is compared, and its logits are the measure of what compression cost: both as the
class that the input's config names.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from effcli.errors import EffcliError, UserError, first_line
from effcli.files import locate as samples
from effcli.files.checkpoint import Checkpoint, read_config
from effcli.files.foreign import foreign_layout
from effcli.files.layout import adapter_in, is_own, network_config, rounds_inputs
from effcli.inputs.tokens import longest_sequence, vocabulary_size
from effcli.language import loading
from effcli.language.against import compare
from effcli.language.beside import as_it_runs
from effcli.language.skeleton import counting_blocks
from effcli.language.stream import running
from effcli.language.weights import Weights, open_weights
from effcli.layers.input_rounding import keep_inputs
from effcli.layers.result import Phases, unseen
from effcli.options import Options
from effcli.platform.huggingface import language_loader, load_network_config, logits_of, quiet_transformers
from effcli.platform.rehearsal import cannot_tell
from effcli.reports.against import Against, Moved
from effcli.reports.report import FILE_NAME, Check, Report, Stage
from effcli.reports.units import count, percent

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

    def told(self, whose: str) -> str:
        """In plain words: that the logits are those of `whose`, or by how much they differ."""
        if self.largest == 0:
            return f"equal those of {whose}"
        return f"differ by {percent(self.relative)} from those of {whose}{'' if self.passed else ', too much'}"

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
    adapter: Agreement | None = Field(default=None, description="PEFT's modules against the adapter in the weights")
    against: Against | None = Field(default=None, description="its tensors next to those of its input")
    absent: str = Field(default="", description="the input that it was made from, which is not at hand")
    problem: str = Field(default="", description="what failed besides the comparison")

    @property
    def passed(self) -> bool:
        every = (self.stock, self.packed, self.adapter)
        agreements = [agreement for agreement in every if agreement is not None]
        altered = self.against is not None and bool(self.against.problem)
        return (
            not self.problem and not altered and bool(agreements) and all(agreement.passed for agreement in agreements)
        )

    @property
    def layers(self) -> tuple[()]:
        """None: no processor is emulated for language models."""
        return ()

    @property
    def line(self) -> str:
        """The findings in one line."""
        found = []
        if self.problem:
            found.append(self.problem)
        if self.stock is not None:
            found.append(f"reloaded with {self.loader}: {self.stock}")
        if self.refused:
            found.append(f"effcli.load reads it; {self.loader} does not know this layout and refuses it, as it must")
        if self.packed is not None:
            found.append(f"packed kernels: {self.packed}")
        if self.adapter is not None:
            found.append(f"the adapter beside it: {self.adapter}")
        if self.against is not None:
            found.append(str(self.against))
        if self.absent:
            found.append(f"not compared with its input {self.absent}, which is not here: name it with --against")
        return f"{'verified' if self.passed else 'NOT VERIFIED'}: {'; '.join(found)}"

    @property
    def checks(self) -> tuple[Check, ...]:
        """The findings one by one, in plain words."""
        found = [Check(text=self.problem, passed=False)] if self.problem else []
        if self.stock is not None:
            text = f"{self.loader} loads it; its logits {self.stock.told('effcli')}"
            found.append(Check(text=text, passed=self.stock.passed, numbers=str(self.stock)))
        if self.refused:
            found.append(Check(text=f"effcli.load reads it; {self.loader} refuses it, as it should", passed=True))
        if self.packed is not None:
            text = f"effcli.load's logits {self.packed.told('unpacked weights')}"
            found.append(Check(text=text, passed=self.packed.passed, numbers=str(self.packed)))
        if self.adapter is not None:
            text = f"PEFT loads the adapter; its logits {self.adapter.told('the adapter added to the weights')}"
            found.append(Check(text=text, passed=self.adapter.passed, numbers=str(self.adapter)))
        if self.against is not None:
            found.append(self.against.check)
        if self.absent:
            found.append(Check(text=f"not compared with its input {self.absent}, which is not here; see --against"))
        return tuple(found)

    def to_json(self) -> str:
        data = {"passed": self.passed, "line": self.line, **self.model_dump(mode="json")}
        return json.dumps(data, indent=1)


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    stages: Sequence[Stage] | None = None,
    trust_remote_code: bool = False,
    phases: Phases = unseen,
) -> Verification:
    """Compare the ways to load the checkpoint `path` on a few fixed tokens; one network is in memory at a time.

    against: its input; what `report.json` names unless given, where that is at hand. stages: of the run between the
    two; those of `report.json` unless given.
    """
    quiet_transformers()
    path = samples.resolve(str(path))
    source, absent, found = _input(path, against)
    if source is None:
        return _with_input(path, None, (), trust_remote_code, phases).model_copy(update={"absent": absent})
    return _with_input(path, source, found if stages is None else stages, trust_remote_code, phases)


def _input(path: Path, against: str | Path | None) -> tuple[Path | None, str, Sequence[Stage]]:
    """The input that `path` was made from, its name where it is not at hand, and the stages of the run."""
    report = Report.read(path) if (path / FILE_NAME).is_file() else None
    stages = report.stages if report is not None else ()
    if against is not None:
        return samples.resolve(str(against)), "", stages
    if report is None:
        return None, "", ()
    revision = report.recipe.get("revision")
    source = samples.at_hand(report.model, revision if isinstance(revision, str) else None)
    return source, "" if source is not None else report.model, stages


def _with_input(
    path: Path, source: Path | None, stages: Sequence[Stage], trust_remote_code: bool, phases: Phases
) -> Verification:
    found, logits = _ways(path, trust_remote_code, phases)
    if source is None:
        return found
    with phases("comparing with the input", "tensor") as progress:
        against = compare(path, source, stages, trust_remote_code, progress)
    if not against.problem:
        said = read_config(source)
        config = load_network_config(source, network_config(said), trust_remote_code)
        # What another tool quantized needs that tool in transformers.
        load = _own if is_own(said) or foreign_layout(said) is not None else load_stock
        with running(source), phases("running the input"):
            original = _logits(lambda: load(source, trust_remote_code), tokens(config)).logits
        against = against.model_copy(update={"moved": Moved.of(logits, original, "random tokens")})
    return found.model_copy(update={"against": against})


def _own(path: Path, trust_remote_code: bool) -> Any:
    return _reference(path, False, trust_remote_code)


class _Logits(NamedTuple):
    """Of a fixed batch and of its first few tokens, float32 (rows, length, vocabulary), and the network's dtype."""

    logits: Tensor
    few: Tensor
    dtype: torch.dtype


def _ways(path: Path, trust_remote_code: bool, phases: Phases) -> tuple[Verification, Tensor]:
    """What the ways to load `path` give, and its logits."""
    import transformers

    checkpoint = Checkpoint.open(path)
    own = is_own(checkpoint.config)
    compressed = own or "quantization_config" in checkpoint.config
    layout = "effcli" if own else "compressed-tensors" if compressed else "dense"
    if layout == "compressed-tensors":
        _require_compressed_tensors()
    config = load_network_config(path, network_config(checkpoint.config), trust_remote_code)
    ids = tokens(config)
    rounded = rounds_inputs(checkpoint.config)
    with running(path), phases("running with dequantized weights"):
        reference = _logits(lambda: _reference(path, rounded, trust_remote_code), ids)
    dtype = reference.dtype
    if rounded:
        with phases("running with inputs that are not rounded"):
            floating = _logits(lambda: keep_inputs(_reference(path, rounded, trust_remote_code)), ids)
        allowed = max(_ROUNDED, _MOVED * Agreement.of(floating.logits, reference.logits, 0).relative)
    findings: dict[str, Any] = {
        "path": str(path),
        "layout": layout,
        "loader": f"transformers {transformers.__version__}",
    }
    if compressed:
        tolerance = allowed if rounded else _PACKED.get(dtype, _PACKED[torch.float32])
        with phases("running with packed kernels"):
            findings["packed"] = _packed(path, ids, reference, tolerance, trust_remote_code)
    if adapter_in(path) is not None:
        with phases("running with the adapter"):
            findings["adapter"] = _adapter(path, ids, trust_remote_code)
    try:
        wanted = {"dtype": dtype} if rounded else {}
        with phases("loading with transformers"):
            stock = _logits(lambda: load_stock(path, trust_remote_code, **wanted), ids).logits
    except EffcliError:
        raise
    except Exception as error:
        # Whatever the stock loader raises is its way of refusing.
        if own:
            return Verification(**findings, refused=True), reference.logits
        problem = f"{findings['loader']} cannot load it: {first_line(error)}"
        return Verification(**findings, problem=problem), reference.logits
    if own:
        problem = f"{findings['loader']} loads effcli's own layout, which it cannot understand"
        return Verification(**findings, refused=False, problem=problem), reference.logits
    tolerance = allowed if rounded else _STOCK.get(dtype, _STOCK[torch.float32])
    return Verification(**findings, stock=Agreement.of(stock, reference.logits, tolerance)), stock


def _reference(path: Path, rounded: bool, trust_remote_code: bool) -> Any:
    if rounded:
        return restored(path, "float32", trust_remote_code)
    return loading.load(path, packed=False, trust_remote_code=trust_remote_code, base=True)


def restored(path: Path, dtype: str, trust_remote_code: bool = False) -> Any:
    """The network of the checkpoint `path` in `dtype`, whatever its files hold, its layers dequantized to it.

    Without the adapter that may stand beside them.
    """
    return _filled(open_weights(path, trust_remote_code, dtype, base=True))


def _filled(weights: Weights) -> Any:
    """The network of `weights` in memory."""
    skeleton = weights.skeleton
    weights.fill(skeleton.model, "", skeleton.parameters())
    if skeleton.tied:
        skeleton.model.tie_weights()  # type: ignore[operator]
    return skeleton.model.eval()


def _packed(path: Path, ids: Tensor, reference: _Logits, tolerance: float, trust_remote_code: bool) -> Agreement:
    """The packed kernels for many rows of activations, as in a prompt, or for few, as in decoding: the worse."""

    def load() -> Any:
        network = loading.load(path, trust_remote_code=trust_remote_code, base=True)
        return network if network.dtype == reference.dtype else network.to(reference.dtype)

    packed = _logits(load, ids)
    agreements = [
        Agreement.of(packed.logits, reference.logits, tolerance),
        Agreement.of(packed.few, reference.few, tolerance),
    ]
    return max(agreements, key=lambda agreement: (not agreement.passed, agreement.relative))


def _adapter(path: Path, ids: Tensor, trust_remote_code: bool) -> Agreement:
    """The adapter as PEFT runs it beside the weights, and as it is added to them, both in float32."""
    loaded = _logits(
        lambda: loading.load(path, packed=False, trust_remote_code=trust_remote_code, dtype="float32"), ids
    )
    added = _logits(lambda: _filled(as_it_runs(path, trust_remote_code)), ids)
    return Agreement.of(loaded.logits, added.logits, _STOCK[torch.float32])


def tokens(config: Any) -> Tensor:
    """A fixed batch of random token ids int64 (rows, length) for a network with this config."""
    length = min(_LENGTH, longest_sequence(config) or _LENGTH)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size(config), (_ROWS, length), generator=generator)


def load_stock(path: Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The checkpoint `path` through transformers alone, offline and without a word; in its own dtype unless given.

    Raises `ValueError` when transformers would fill a parameter with random numbers.
    """
    config = load_network_config(path, network_config(read_config(path)), trust_remote_code)
    cannot_tell("transformers loads the network in one piece")
    with warnings.catch_warnings():
        # What the stock loader warns about is between it and its authors; only what it loads counts here.
        warnings.simplefilter("ignore")
        network, info = language_loader(config).from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            dtype=dtype or "auto",
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"it finds no weights for {count(len(missing), 'parameter')}, such as {missing[0]}")
    return network


def _logits(load: Callable[[], Any], ids: Tensor) -> _Logits:
    """The logits of a network that is freed on return."""
    network = load().eval()
    with counting_blocks(network), torch.inference_mode():
        # A network that attends in both directions gives other logits for the first few tokens alone.
        whole, few = (logits_of(network, part).float() for part in (ids, ids[:1, :_FEW]))
        return _Logits(whole, few, network.dtype)


def _require_compressed_tensors() -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise UserError(
            "stock transformers reads this checkpoint only with compressed-tensors installed",
            "pip install compressed-tensors",
        ) from error
