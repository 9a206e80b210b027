"""Rows of published benchmarks as questions: their own columns, in the words of lm-evaluation-harness."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from effcli.errors import DataError

FORM = (
    'write {"query": text, "choices": [text, ...], "gold": index}, {"context": text, "continuation": text}, '
    '{"contexts": [text, ...], "continuation": text, "gold": index}, or give the columns of ARC, HellaSwag, MMLU, '
    "OpenBookQA, PIQA or WinoGrande"
)
# The columns of effcli's own three forms.
OWN = ({"query", "choices", "gold"}, {"context", "continuation"}, {"contexts", "continuation", "gold"})
_LETTERS = "ABCDEFGHIJ"


def as_question(data: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """A row of a published benchmark in one of effcli's own forms; None where the columns are no benchmark's.

    Raises `DataError`, which names `where`, for columns of the wrong type and for a row without an answer.
    """
    form = next((form for columns, form in _FORMS if columns <= data.keys()), None)
    return None if form is None else form(data, where)


def holds_questions(columns: set[str]) -> bool:
    """Whether rows with these columns are questions."""
    return any(wanted <= columns for wanted in (*OWN, *(own for own, _ in _FORMS)))


def _winogrande(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Each option takes the place of the blank `_`; what stands behind it is the continuation."""
    sentence, *options = _texts(data, where, "sentence", "option1", "option2")
    before, blank, behind = sentence.partition("_")
    if not blank:
        raise DataError(f"{where}: the sentence has no blank (_)", FORM)
    gold = _index(data["answer"], "answer", ("1", "2"), where)
    return {"contexts": [before + option for option in options], "continuation": behind.strip(), "gold": gold}


def _arc(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    (question,) = _texts(data, where, "question")
    choices, gold = _labelled(data, where)
    return {"query": f"Question: {question}\nAnswer:", "choices": choices, "gold": gold}


def _openbookqa(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    (question,) = _texts(data, where, "question_stem")
    choices, gold = _labelled(data, where)
    return {"query": question, "choices": choices, "gold": gold}


def _mmlu(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The answers stand in the query under letters, and a letter is the choice."""
    question, subject = _texts(data, where, "question", "subject")
    answers = _list(data["choices"], "choices", where)
    letters = list(_LETTERS[: len(answers)])
    lines = [f"{letter}. {answer}" for letter, answer in zip(letters, answers, strict=True)]
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    query = about + "\n".join([question.strip(), *lines, "Answer:"])
    allowed = letters if isinstance(data["answer"], str) and not data["answer"].isdigit() else range(len(letters))
    return {
        "query": query,
        "choices": letters,
        "gold": _index(data["answer"], "answer", tuple(map(str, allowed)), where),
    }


def _hellaswag(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    label, first, second = _texts(data, where, "activity_label", "ctx_a", "ctx_b")
    endings = _list(data["endings"], "endings", where)
    gold = _index(data["label"], "label", tuple(map(str, range(len(endings)))), where)
    query = _cleaned(f"{label}: {first} {second.capitalize()}")
    return {"query": query, "choices": [_cleaned(ending) for ending in endings], "gold": gold}


def _piqa(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    goal, *solutions = _texts(data, where, "goal", "sol1", "sol2")
    gold = _index(data["label"], "label", ("0", "1"), where)
    return {"query": f"Question: {goal}\nAnswer:", "choices": solutions, "gold": gold}


def _cleaned(text: str) -> str:
    """Without the marks of WikiHow, from which a part of HellaSwag is taken."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^\]]*\]", "", text).replace("  ", " ")


def _labelled(data: Mapping[str, Any], where: str) -> tuple[list[str], int]:
    """The choices, and the number of the right one, of `{"text": [...], "label": [...]}` and `answerKey`."""
    choices = data["choices"]
    if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
        raise DataError(f"{where}: choices must hold the lists text and label", FORM)
    texts, labels = _list(choices["text"], "text", where), _list(choices["label"], "label", where)
    if len(texts) != len(labels):
        raise DataError(f"{where}: {len(texts)} choices have {len(labels)} labels", FORM)
    return texts, _index(data["answerKey"], "answerKey", tuple(labels), where)


def _texts(data: Mapping[str, Any], where: str, *keys: str) -> list[str]:
    found = [data[key] for key in keys]
    if not all(isinstance(text, str) for text in found):
        last = f" and {keys[-1]}" if len(keys) > 1 else ""
        raise DataError(f"{where}: {', '.join(keys[:-1] or keys)}{last} must be texts", FORM)
    return found


def _list(value: Any, key: str, where: str) -> list[str]:
    if (
        not isinstance(value, list)
        or not 2 <= len(value) <= len(_LETTERS)
        or not all(isinstance(v, str) for v in value)
    ):
        raise DataError(f"{where}: {key} must be a list of 2 to {len(_LETTERS)} texts", FORM)
    return value


def _index(value: Any, key: str, allowed: tuple[str, ...], where: str) -> int:
    """Which of `allowed` a value names, from 0."""
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value) not in allowed:
        named = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise DataError(f"{where}: {key} must be {named}, not {repr(value)[:60]}", FORM)
    return allowed.index(str(value))


_FORMS: tuple[tuple[set[str], Callable[[Mapping[str, Any], str], dict[str, Any]]], ...] = (
    ({"sentence", "option1", "option2", "answer"}, _winogrande),
    ({"question", "choices", "answerKey"}, _arc),
    ({"question_stem", "choices", "answerKey"}, _openbookqa),
    ({"question", "subject", "choices", "answer"}, _mmlu),
    ({"activity_label", "ctx_a", "ctx_b", "endings", "label"}, _hellaswag),
    ({"goal", "sol1", "sol2", "label"}, _piqa),
)
