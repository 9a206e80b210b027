"""JSON lines: the objects of a file one by one, and the documents of text that they hold.

A document is `{"text": ...}`, `{"prompt": ..., "completion": ...}`, or `{"messages": [...]}`, which the tokenizer's
chat template writes out; prompt and completion may be lists of messages too. Other keys beside these are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import DataError, at_fault, first_line
from effcli.files.documents import parse_json

if TYPE_CHECKING:
    from effcli.inputs.tokens import Reader

SUFFIXES = (".jsonl", ".ndjson", ".json")
FORM = 'write {"text": text}, {"prompt": text, "completion": text} or {"messages": [{"role": ..., "content": ...}]}'
_QUESTION = {"choices", "continuation", "gold"}


def is_jsonl(file: Path) -> bool:
    """Whether a file is read as JSON lines, by its name."""
    return file.suffix.lower() in SUFFIXES


def holds_documents(file: Path) -> bool:
    """Whether the first line of a file is a document of text; False when it cannot be read, too."""
    try:
        first = next(objects(file, FORM), None)
    except DataError:
        return False
    return first is not None and _has_document(first[1])


def objects(file: Path, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a file with the name of its line; `DataError`, which asks for `form`, for a line without one."""
    try:
        if file.exists() and not file.is_file():
            raise DataError(f"cannot read {file}: it is not a file", "give a .jsonl file")
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, parse(line, where, form)
    except FileNotFoundError:
        raise DataError(f"there is no file {file}", "check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason})", "give a .jsonl file in UTF-8") from None
    except OSError as error:
        if not at_fault(error):
            raise
        raise DataError(f"cannot read {file}: {error.strerror}", "give a .jsonl file") from None


def parse(line: str, where: str, form: str) -> dict[str, Any]:
    """The object in one line; `DataError`, which asks for `form`, when there is none."""
    try:
        data = parse_json(line, where, error=DataError)
    except DataError as error:
        raise DataError(f"{where}: {error.cause.removeprefix(f'{where} is ')}", form) from error
    if not isinstance(data, dict):
        raise DataError(f"{where}: not a JSON object", form)
    return data


def document_ids(data: dict[str, Any], where: str, reader: Reader) -> list[int]:
    """The token ids of the document in an object, its end token included; empty for an empty document."""
    return _ids(*_text(data, where, reader), reader)


def marked_ids(data: dict[str, Any], where: str, reader: Reader) -> tuple[list[int], list[bool]]:
    """What `document_ids` returns, and of each token whether it answers.

    Answers are completions and messages of the assistant, with the tokens that end them, and the whole of a plain text.
    Raises `DataError` where the tokenizer or its chat template does not let them be found.
    """
    text, special = _text(data, where, reader)
    ids = _ids(text, special, reader)
    if not ids:
        return [], []
    answers = _answers(data, text, where, reader)
    marks = [
        begin < end and any(begin < behind and end > first for first, behind in answers)
        for begin, end in reader.spans(text, special)
    ]
    # The end token stands behind the text.
    return ids, marks + [bool(answers) and answers[-1][1] == len(text)] * (len(ids) - len(marks))


def _ids(text: str, special: bool, reader: Reader) -> list[int]:
    if not text.strip():
        return []
    ids = reader.encode(text, special)
    end = reader.tokenizer.eos_token_id
    # Without it the documents would run into one another. A template writes the special tokens itself.
    return ids if not special or end is None or ids[-1:] == [end] else [*ids, end]


def _text(data: dict[str, Any], where: str, reader: Reader) -> tuple[str, bool]:
    """The document in an object as one text, and whether the tokenizer adds its special tokens to it."""
    found = _document(data, where)
    if isinstance(found, list):
        return _templated(found, data.get("tools"), where, reader), False
    return found, True


def _answers(data: dict[str, Any], text: str, where: str, reader: Reader) -> list[tuple[int, int]]:
    """Where the answers lie in the text of a document, as characters [begin, end), ascending."""
    found = _document(data, where)
    if isinstance(found, str):
        return [(0 if "text" in data else len(data["prompt"]), len(text))]
    asked = 0 if "messages" in data else len(data["prompt"])
    spans = []
    for number, message in enumerate(found):
        if number < asked or ("messages" in data and message["role"] != "assistant"):
            continue
        before = _templated(found[:number], data.get("tools"), where, reader, opened=True) if number else ""
        until = _templated(found[: number + 1], data.get("tools"), where, reader)
        if not text.startswith(until) or not until.startswith(before):
            raise DataError(
                f"{where}: the chat template does not write message {number + 1} behind those before it, so that its "
                "tokens are not found",
                "learn all tokens",
            )
        spans.append((len(before), len(until)))
    return spans


def named(data: dict[str, Any]) -> str:
    """The first keys of an object, for a message."""
    return ", ".join(repr(key)[:40] for key in list(data)[:6]) or "nothing"


def _has_document(data: dict[str, Any]) -> bool:
    named = bool(data.keys() & {"text", "messages"}) or {"prompt", "completion"} <= data.keys()
    return named and not data.keys() & _QUESTION


def _document(data: dict[str, Any], where: str) -> str | list[Any]:
    """The text or the messages of an object; `DataError` names what it holds instead."""
    if not _has_document(data):
        if data.keys() & _QUESTION:
            raise DataError(f"{where}: a question, not a text", "give questions with --eval or evaluate.choices")
        told = f"no text, no prompt and completion, and no messages; it holds {named(data)}"
        raise DataError(f"{where}: {told}", FORM)
    if "messages" in data:
        return _messages(data["messages"], where)
    if "text" in data:
        text = data["text"]
        if not isinstance(text, str):
            raise DataError(f"{where}: text is not a text", FORM)
        return text
    prompt, completion = data["prompt"], data["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages(prompt + completion, where)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(f"{where}: prompt and completion must both be texts, or both lists of messages", FORM)
    return prompt + completion


def _messages(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages must be a list of at least one message", FORM)
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: a message has no role", FORM)
        if not isinstance(message.get("content"), str | list) and "tool_calls" not in message:
            raise DataError(f"{where}: a message has no content", FORM)
    return value


def _templated(messages: list[Any], tools: Any, where: str, reader: Reader, opened: bool = False) -> str:
    """Messages as the chat template writes them; opened: up to where the assistant's next one begins."""
    if not getattr(reader.tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: messages need a chat template, and the tokenizer has none",
            'give {"text": ...}, or put the model\'s chat_template.jinja beside its tokenizer',
        )
    try:
        options = {"tools": tools} if tools else {}
        options |= {"add_generation_prompt": True} if opened else {}
        return str(reader.tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:
        # A template is a program of the model's: it may refuse, and fail, in any way.
        raise DataError(f"{where}: the chat template refuses the messages: {first_line(error)}", FORM) from error
