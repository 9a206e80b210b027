"""Quality of a network by streaming: perplexity, KL divergence from the original, multiple-choice accuracy.

Perplexity is exp of the mean negative log-likelihood of every token of a window given those before it in the window; a
window of n tokens predicts n - 1. The divergence is KL(original ‖ this), the mean over the same predictions, in nats.
Logits are computed in the network's own dtype and converted to float32.
"""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effcli.errors import DataError, NumericsError
from effcli.files import locate as samples
from effcli.inputs import choices as multiple_choice
from effcli.inputs import text
from effcli.inputs.tokens import Reader
from effcli.language.beside import as_it_runs
from effcli.language.continuations import continuations
from effcli.language.forward import TOKENS_PER_BATCH, chunks, last_hidden, logits
from effcli.language.spool import Spool
from effcli.language.stream import Stream
from effcli.language.weights import CPU, Weights, open_weights
from effcli.layers.result import Phases, Progress, unseen
from effcli.platform.rehearsal import few
from effcli.reports.report import Continuation, Quality, TaskRow

if TYPE_CHECKING:
    from effcli.inputs.options import Calibration, Evaluate

_log = logging.getLogger(__name__)


def evaluate(
    model: str,
    options: Evaluate,
    *,
    reference: str | None = None,
    trust_remote_code: bool = False,
    phases: Phases = unseen,
) -> Quality:
    """Measure `model` on what `options` name, and its divergence from `reference` if there is one.

    model, reference: a directory, a Hub id, or `sample:lm`. What the user should know is logged as a warning.
    """
    path = samples.resolve(model)
    original = path if reference is None else samples.resolve(reference)
    with tempfile.TemporaryDirectory(prefix="effcli-") as folder:
        with phases("reading the texts"):
            evaluation = Evaluation(
                original, options, Path(folder), trust_remote_code=trust_remote_code, compare=reference is not None
            )
        for remark in evaluation.remarks:
            _log.warning(remark)
        with phases(evaluation.measured) as progress:
            return evaluation.measure(path, progress)


class Evaluation:
    """What the checkpoints of one run are held against: the same tokens for all, and the original's view of them.

    The original runs once, when it is first needed; its hidden states behind the last block stay in `workdir`, and its
    logits are computed from them again, a few positions at a time. remarks: what the user should know of the data.
    """

    def __init__(
        self,
        original: Path,
        options: Evaluate,
        workdir: Path,
        *,
        calibration: Calibration | None = None,
        trust_remote_code: bool = False,
        compare: bool = True,
        device: torch.device = CPU,
    ) -> None:
        """Read the texts; nothing runs yet. calibration: where the end of its text serves; compare: measure KL too.

        device: where the networks run.
        """
        self.original = original
        self.workdir = workdir
        self.trust_remote_code = trust_remote_code
        self.device = device
        self.compare = compare and options.perplexity is not False
        self._reader: Reader | None = None
        self._windows: list[Tensor] = []
        self._task: multiple_choice.Task | None = None
        # Each file of questions with the first of its questions and the one behind its last.
        self._files: list[tuple[str, int, int]] = []
        self._reference: tuple[Weights, Spool] | None = None
        self._tick: Callable[[], None] = lambda: None
        remarks: list[str] = []
        if options.quality:
            reader = self._reader = Reader.open(original, trust_remote_code)
            if options.perplexity is not False:
                cut = text.evaluation_windows(options, reader, original, calibration)
                self._windows = cut.batches(max(1, TOKENS_PER_BATCH // cut.windows.shape[1]))
                remarks += cut.remarks
            questions: list[multiple_choice.Question] = []
            for name in options.questions:
                found = multiple_choice.read(Path(name).expanduser(), options.limit)
                self._files.append((name, len(questions), len(questions) + len(found)))
                questions += found
            if questions:
                self._task = multiple_choice.Task.build(questions, reader, TOKENS_PER_BATCH)
                remarks += self._task.remarks
        self.remarks = tuple(remarks)

    @property
    def measured(self) -> str:
        """What is measured, in words."""
        found = ["perplexity"] * bool(self._windows) + ["questions"] * (self._task is not None)
        return " and ".join(found) or "quality"

    @property
    def reads_text(self) -> bool:
        """Whether perplexity is measured."""
        return bool(self._windows)

    def measure(self, path: Path, progress: Progress = lambda done, total: None) -> Quality:
        """The quality of the checkpoint `path`, of the original itself too.

        progress: is told of each batch that has gone through a block, or through the output head.
        """
        if not self._windows and self._task is None:
            return Quality()
        weights = as_it_runs(path, self.trust_remote_code, self.device)
        first = path.resolve() == self.original.resolve()
        batches, blocks = len(self._batches()), len(weights.skeleton.blocks)
        total = batches * (blocks + 1)
        if not first and self.compare and self._reference is None:
            total += len(self._windows) * blocks
        self._tick = _ticking(progress, total)
        if first:
            return self._measure_original(weights)
        file = self.workdir / "measured.spool"
        try:
            with ExitStack() as stack:
                stream = stack.enter_context(Stream(weights, with_head=True))
                spool = last_hidden(stream, self._batches(), file, self._tick)
                if not self.compare:
                    return self._judge(stream, spool)
                reference, spooled = self._original_hidden()
                _check_comparable(reference, weights)
                against = stack.enter_context(Stream(reference, with_head=True))
                return self._judge(stream, spool, against, spooled)
        finally:
            file.unlink(missing_ok=True)

    def beside(self, weights: Weights, path: Path) -> tuple[Quality, Quality]:
        """The perplexity of a network, and that of the checkpoint `path` with its divergence from it."""
        other = open_weights(path, self.trust_remote_code, device=self.device)
        files = [self.workdir / f"{name}.spool" for name in ("beside", "written")]
        self._tick = lambda: None
        try:
            with Stream(weights, with_head=True) as first, Stream(other, with_head=True) as second:
                spools = [
                    last_hidden(stream, self._windows, file, self._tick)
                    for stream, file in zip((first, second), files, strict=True)
                ]
                with torch.inference_mode():
                    alone = self._perplexity(first, spools[0], None, None)
                    compared = self._perplexity(second, spools[1], first, spools[0])
        finally:
            for file in files:
                file.unlink(missing_ok=True)
        return Quality.model_validate(alone), Quality.model_validate(compared)

    def continuations(self, network: Any) -> tuple[Continuation, ...]:
        """What `network` writes behind the first words of the windows for perplexity; empty where there are none."""
        if self._reader is None or not self._windows:
            return ()
        return continuations(network, self._windows, self._reader)

    def close(self) -> None:
        """Remove the original's hidden states."""
        if self._reference is not None:
            self._reference[1].remove()
            self._reference = None

    def _batches(self) -> list[Tensor]:
        return self._windows + (self._task.batches if self._task is not None else [])

    def _measure_original(self, weights: Weights) -> Quality:
        with Stream(weights, with_head=True) as stream:
            spool = last_hidden(stream, self._batches(), self.workdir / "original.spool", self._tick)
            quality = self._judge(stream, spool)
        if not self.compare:
            spool.remove()
            return quality
        # Only the windows serve again.
        self._reference = weights, Spool(spool.file, spool.shapes[: len(self._windows)], spool.dtype, spool.device)
        return quality.model_copy(update={"kl": 0.0})

    def _original_hidden(self) -> tuple[Weights, Spool]:
        if self._reference is None:
            weights = as_it_runs(self.original, self.trust_remote_code, self.device)
            with Stream(weights) as stream:
                spool = last_hidden(stream, self._windows, self.workdir / "original.spool", self._tick)
                self._reference = weights, spool
        return self._reference

    def _judge(
        self, stream: Stream, spool: Spool, against: Stream | None = None, spooled: Spool | None = None
    ) -> Quality:
        """Read off logits what the hidden states in `spool` are worth, next to the original's in `spooled`."""
        found: dict[str, Any] = {}
        with torch.inference_mode():
            if self._windows:
                found |= self._perplexity(stream, spool, against, spooled)
            if self._task is not None:
                score = self._answer(self._task, stream, spool)
                found |= {"accuracy": score.accuracy, "accuracy_stderr": score.stderr, "examples": score.examples}
                if len(self._files) > 1:
                    found["tasks"] = [self._of_file(self._task, *file) for file in self._files]
        return Quality.model_validate(found)

    def _perplexity(
        self, stream: Stream, spool: Spool, against: Stream | None, spooled: Spool | None
    ) -> dict[str, Any]:
        nll, divergence, tokens = 0.0, 0.0, 0
        losses: list[float] = []
        for number in few(range(len(self._windows))):
            batch = self._windows[number]
            hidden = spool.read(number)[:, :-1].flatten(0, 1)
            targets = batch[:, 1:].flatten().to(hidden.device)
            original = None
            likelihoods = torch.zeros(len(targets), dtype=torch.float64, device=hidden.device)
            if against is not None and spooled is not None:
                original = spooled.read(number)[:, :-1].flatten(0, 1)
            for part in few([*_parts(stream, len(targets), batch.shape[1])]):
                mine = _log_probabilities(stream, hidden[part])
                likelihoods[part] = mine.gather(1, targets[part].unsqueeze(1)).squeeze(1).double()
                nll -= float(likelihoods[part].sum())
                if against is not None and original is not None:
                    divergence += kl(_log_probabilities(against, original[part]), mine)
            tokens += len(targets)
            self._tick()
            losses += (-likelihoods.view(len(batch), -1).mean(dim=1)).tolist()
        perplexity = _exp(nll / tokens)
        return {
            "perplexity": perplexity,
            "perplexity_stderr": stderr_of_exp(perplexity, losses),
            "losses": losses,
            "kl": None if against is None else max(0.0, divergence / tokens),
            "tokens": tokens,
        }

    def _of_file(self, task: multiple_choice.Task, name: str, begin: int, end: int) -> TaskRow:
        score = task.score(begin, end)
        return TaskRow(name=name, accuracy=score.accuracy, accuracy_stderr=score.stderr, examples=score.examples)

    def _answer(self, task: multiple_choice.Task, stream: Stream, spool: Spool) -> multiple_choice.Score:
        for number in few(range(len(task.batches))):
            batch = task.batches[number]
            hidden = spool.read(len(self._windows) + number)
            for row, places, targets in task.positions(number):
                wanted = hidden[row, places]
                parts = [
                    _log_probabilities(stream, wanted[part]) for part in _parts(stream, len(wanted), batch.shape[1])
                ]
                task.add(targets, torch.cat(parts).cpu())
            self._tick()
        return task.score()


def kl(original: Tensor, other: Tensor) -> float:
    """Sum of KL(original ‖ other) over positions, nats; both log-probabilities float32 (positions, vocabulary)."""
    probability = original.exp()
    # A token that the original rules out counts nothing, whatever the other thinks of it.
    terms = torch.where(probability > 0, probability * (original - other), 0.0)
    return float(terms.sum(dim=1).double().sum())


def stderr_of_exp(perplexity: float, losses: Sequence[float]) -> float | None:
    """The standard error of exp of the mean of `losses`, which is `perplexity`, to first order.

    None of fewer than two windows, or of an infinite loss. d exp(m) = exp(m) dm, and the standard error of a mean of n
    windows is their deviation, with n - 1, over √n.
    """
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return None
    return perplexity * statistics.stdev(losses) / math.sqrt(len(losses))


def _log_probabilities(stream: Stream, hidden: Tensor) -> Tensor:
    """Log-probabilities float32 (positions, vocabulary) of hidden states (positions, hidden)."""
    result = torch.log_softmax(logits(stream, hidden).float(), dim=-1)
    if bool(result.isnan().any()):
        raise NumericsError(
            f"the logits of {stream.weights.checkpoint.path} are NaN or infinite",
            "its weights are damaged, or its activations overflow its dtype",
        )
    return result


def _ticking(progress: Progress, total: int) -> Callable[[], None]:
    """What tells of one more of `total` steps each time that it is called; it tells at once that there are none yet."""
    done = 0
    progress(done, total)

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return tick


def _parts(stream: Stream, count: int, longest: int) -> Iterator[slice]:
    return chunks(count, stream.skeleton.config.get_text_config().vocab_size, longest)


def _check_comparable(original: Weights, other: Weights) -> None:
    sizes = [weights.skeleton.config.get_text_config().vocab_size for weights in (original, other)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{other.checkpoint.path} knows {sizes[1]} tokens, the reference {sizes[0]}: they cannot be compared",
            "give the model that it was made from",
        )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


__all__ = ["Evaluation", "evaluate", "kl", "stderr_of_exp"]
