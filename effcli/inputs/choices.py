"""Multiple-choice questions: which continuation of a text does the network find likeliest?

A file has one JSON object per line: `{"query": ..., "choices": [...], "gold": index}`, answered by the choice with the
highest log-likelihood per character (lm-evaluation-harness' `acc_norm`); or `{"context": ..., "continuation": ...}`,
answered when the continuation is what greedy decoding gives (LAMBADA's accuracy); or
`{"contexts": [...], "continuation": ..., "gold": index}`, answered by the context behind which the one continuation is
likeliest (WinoGrande, by partial evaluation). The columns of some published benchmarks are read as one of these: see
`effcli.inputs.published`. A parquet file has the same keys as columns.

Conventions are those of lm-evaluation-harness: a space joins query and choice; both are tokenized together and split
where the query's own tokens end; a text that is too long loses its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcli.errors import DataError
from effcli.inputs import jsonl, published, tables
from effcli.inputs.published import FORM
from effcli.inputs.tokens import Reader
from effcli.reports.units import count

_DELIMITER = " "
# Lengths are rounded up to multiples of this, so that few shapes of batches occur.
_LENGTH_STEP = 32


@dataclass(frozen=True)
class Question:
    """One line of a file. gold: index of the right choice, None when the one choice must be the greedy continuation.

    contexts: what may stand before the one choice, in place of the query; gold is then the right one's index.
    """

    query: str
    choices: tuple[str, ...]
    gold: int | None
    contexts: tuple[str, ...] = ()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each query with the choice behind it, in the order that `gold` counts."""
        if self.contexts:
            return [(context, self.choices[0]) for context in self.contexts]
        return [(self.query, choice) for choice in self.choices]


@dataclass(frozen=True)
class Score:
    """Fraction answered rightly, 0 to 1, its standard error, and the number of questions."""

    accuracy: float
    stderr: float
    examples: int


def read(file: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a jsonl or parquet file; `DataError` names the line of one that cannot serve."""
    questions: list[Question] = []
    rows = tables.rows(file) if file.suffix.lower() == tables.SUFFIX else jsonl.objects(file, FORM)
    for where, data in rows:
        questions.append(_question(data, where))
        if len(questions) == limit:
            break
    if not questions:
        raise DataError(f"{file} holds no question", "give one JSON object per line")
    return questions


def _question(data: dict[str, Any], where: str) -> Question:
    data = published.as_question(data, where) or data
    if {"context", "continuation"} <= data.keys():
        query, choices, gold = data["context"], [data["continuation"]], None
    elif {"contexts", "continuation"} <= data.keys():
        return _partial(data, where)
    else:
        missing = [key for key in ("query", "choices", "gold") if key not in data]
        if missing:
            told = f"no {' and no '.join(missing)}; it holds {jsonl.named(data)}"
            raise DataError(f"{where}: {told}", f"{FORM}; a text of a jsonl stands under the key text")
        query, choices, gold = data["query"], data["choices"], data["gold"]
        if not isinstance(choices, list) or len(choices) < 2:
            raise DataError(f"{where}: choices must be a list of at least two texts", FORM)
        _check_gold(gold, len(choices), where)
    if not isinstance(query, str) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: query and choices must be texts", FORM)
    if not all(choices):
        raise DataError(f"{where}: a choice is empty", FORM)
    return Question(query, tuple(choices), gold)


def _partial(data: dict[str, Any], where: str) -> Question:
    """A question whose contexts differ while the continuation is the same."""
    contexts, continuation = data["contexts"], data["continuation"]
    if not isinstance(contexts, list) or len(contexts) < 2:
        raise DataError(f"{where}: contexts must be a list of at least two texts", FORM)
    if "gold" not in data:
        raise DataError(f"{where}: no gold", FORM)
    _check_gold(data["gold"], len(contexts), where)
    if not isinstance(continuation, str) or not all(isinstance(context, str) for context in contexts):
        raise DataError(f"{where}: contexts and continuation must be texts", FORM)
    if not continuation:
        raise DataError(f"{where}: the continuation is empty", FORM)
    return Question("", (continuation,), data["gold"], tuple(contexts))


def _check_gold(gold: Any, count: int, where: str) -> None:
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < count:
        raise DataError(f"{where}: gold must be 0 to {count - 1}, not {repr(gold)[:60]}", FORM)


@dataclass(frozen=True)
class _Target:
    """A continuation to score: the last `len(ids)` predictions of an input are compared with `ids`."""

    question: int
    choice: int
    ids: list[int]


@dataclass
class Task:
    """Questions as token ids, and what the network thinks of them.

    batches: int64 (rows, length), padded on the right. `score` reads the log-likelihoods that `add` collected.
    """

    questions: Sequence[Question]
    batches: list[Tensor]
    remarks: tuple[str, ...]
    _rows: list[list[tuple[int, list[_Target]]]]
    _likelihood: dict[tuple[int, int], float] = field(default_factory=dict)
    _greedy: dict[tuple[int, int], bool] = field(default_factory=dict)

    @staticmethod
    def build(questions: Sequence[Question], reader: Reader, tokens_per_batch: int) -> Task:
        """Tokenize, and gather inputs of about one length into batches."""
        inputs: dict[tuple[int, ...], list[_Target]] = {}
        cut = 0
        for number, question in enumerate(questions):
            for choice, (query, text) in enumerate(question.pairs):
                context, continuation = encode_pair(reader, query, text)
                whole = context + continuation
                if reader.longest is not None and len(whole) - 1 > reader.longest:
                    cut += 1
                    whole = whole[-reader.longest - 1 :]
                if len(whole) < 2:
                    raise DataError(
                        f"question {number + 1} gives no token behind its query", "leave out choices of blanks alone"
                    )
                reader.check_ids(whole)
                # At least one token is scored, even where the query's tokens swallow the whole choice.
                kept = whole[max(1, min(len(whole) - len(continuation), len(whole) - 1)) :]
                # Choices of one token share their input.
                inputs.setdefault(tuple(whole[:-1]), []).append(_Target(number, choice, kept))
        order = sorted(inputs, key=lambda ids: (-len(ids), ids))
        batches, rows = [], []
        while order:
            length = min(-(-len(order[0]) // _LENGTH_STEP) * _LENGTH_STEP, reader.longest or 1 << 62)
            fitting = max(1, tokens_per_batch // length)
            taken = [ids for ids in order[:fitting] if len(ids) > length - _LENGTH_STEP]
            order = order[len(taken) :]
            batch = torch.zeros(len(taken), length, dtype=torch.int64)
            for row, ids in enumerate(taken):
                batch[row, : len(ids)] = torch.tensor(ids)
            batches.append(batch)
            rows.append([(len(ids), inputs[ids]) for ids in taken])
        remarks: tuple[str, ...] = ()
        if cut:
            longer = f"longer than the {reader.longest} tokens that the model takes"
            remarks = (f"questions {longer} lost their start: {count(cut, 'text')}",)
        return Task(questions, batches, remarks, rows)

    def positions(self, batch: int) -> Iterator[tuple[int, slice, list[_Target]]]:
        """For each row of a batch: its number, the positions whose predictions count, and what they should be."""
        for row, (length, targets) in enumerate(self._rows[batch]):
            longest = max(len(target.ids) for target in targets)
            yield row, slice(length - longest, length), targets

    def add(self, targets: Sequence[_Target], log_probabilities: Tensor) -> None:
        """Take in log-probabilities float32 (positions, vocabulary) of the positions that belong to `targets`."""
        for target in targets:
            own = log_probabilities[-len(target.ids) :]
            ids = torch.tensor(target.ids)
            key = target.question, target.choice
            self._likelihood[key] = float(own.gather(1, ids.unsqueeze(1)).double().sum())
            self._greedy[key] = bool((own.argmax(dim=1) == ids).all())

    def score(self, begin: int = 0, end: int | None = None) -> Score:
        """How well the questions from `begin` up to `end` are answered; all of them unless those are given."""
        right = [self._right(number, self.questions[number]) for number in range(len(self.questions))[begin:end]]
        count, accuracy = len(right), sum(right) / len(right)
        # The standard error of a mean of zeros and ones, with n - 1 as in lm-evaluation-harness.
        stderr = math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else 0.0
        return Score(accuracy, stderr, count)

    def _right(self, number: int, question: Question) -> bool:
        if question.gold is None:
            return self._greedy.get((number, 0), False)
        # What was not added is the least likely.
        found = (self._likelihood.get((number, k), -math.inf) for k in range(len(question.pairs)))
        values = [value / len(text) for value, (_, text) in zip(found, question.pairs, strict=True)]
        return values.index(max(values)) == question.gold


def encode_pair(reader: Reader, query: str, choice: str) -> tuple[list[int], list[int]]:
    """Token ids of the query and of the choice behind it; spaces at the query's end go to the choice."""
    kept = query.rstrip()
    choice = query[len(kept) :] + _DELIMITER + choice
    whole = reader.encode(kept + choice)
    context = reader.encode(kept) if kept else []
    if not context:
        start = reader.tokenizer.bos_token_id
        start = reader.tokenizer.eos_token_id if start is None else start
        if start is None:
            raise DataError("a question has no query, and the tokenizer has no token to start with", "add a query")
        return [start], reader.encode(choice, special=False)
    return context, whole[len(context) :]
