"""Text cut into windows of tokens, for calibration and for perplexity.

Windows are neighbours without overlap, from the start of the text; what is left at the end is dropped. They equal the
slices of `tokenizer(text).input_ids`, special tokens at the start included, although of a long text only as much is
tokenized as the windows need. A file of JSON lines holds documents: each is tokenized for itself, and their tokens
follow one another.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effcli.errors import DataError, at_fault
from effcli.files import locate as samples
from effcli.inputs import jsonl
from effcli.inputs.options import Calibration, Evaluate
from effcli.inputs.tokens import Reader

# Characters to read for each token wanted, at first: English text has about four per token of a large vocabulary.
_CHARACTERS_PER_TOKEN = 8
_CHARACTERS_AT_LEAST = 1 << 16
# Tokens behind the last one used that a cut in the text may change.
_CUT_MARGIN = 64
# Bytes from which on a file is not tokenized whole to find its end; calibration takes far less from its start.
_LARGE_FILE = 32 << 20


@dataclass(frozen=True)
class Windows:
    """Calibration text as token ids. batches: int64 (windows, length) each; inputs: whose outputs go on.

    answers: of each token whether it answers, as `effcli.inputs.jsonl.marked_ids` says, bool in the shapes of
    `batches`; None where that was not asked for, or where the text is no JSON lines.
    """

    batches: list[Tensor]
    inputs: str = "original"
    answers: list[Tensor] | None = None


def window_length(options: Calibration | Evaluate, longest: int | None) -> int:
    """Tokens per window: what the user set, else the default or as many as the model takes."""
    if longest is None or "length" in options.model_fields_set:
        return options.length
    return min(options.length, longest)


@dataclass(frozen=True)
class Cut:
    """Windows of one text. windows: int64 (windows, length); remarks: what the user should know of them.

    answers: see `Windows`, bool (windows, length).
    """

    windows: Tensor
    remarks: tuple[str, ...] = ()
    answers: Tensor | None = None

    def batches(self, size: int) -> list[Tensor]:
        """The windows as batches int64 (at most `size`, length)."""
        return list(torch.split(self.windows, size))


def windows(
    source: Path | str, reader: Reader, count: int, length: int, key: str = "length", answers: bool = False
) -> Cut:
    """The first `count` windows of `length` tokens of a text file (a `Path`) or of a text (a `str`).

    Fewer when the text is shorter, with a remark; `DataError` when there is not even one. `key` names the length in
    the recipe, for messages. answers: whether to find the tokens that answer, in JSON lines.
    """
    reader.check_length(length, key)
    name = str(source) if isinstance(source, Path) else "the text"
    if answers and isinstance(source, Path) and jsonl.is_jsonl(source):
        ids, marks = _marked_ids(source, reader, count * length)
        cut = _cut(ids, count, length, name, key, reader)
        found = torch.tensor(marks[: cut.windows.numel()]).view(cut.windows.shape)
        return Cut(cut.windows, cut.remarks, found)
    ids = _first_ids(source, reader, count * length, name)
    return _cut(ids, count, length, name, key, reader)


def last_windows(source: Path, reader: Reader, count: int, length: int, begin: int, key: str) -> Cut | None:
    """The last `count` windows of a text file that do not touch its first `begin` tokens; None without any."""
    reader.check_length(length, key)
    end = _read_end(source, count * length * _CHARACTERS_PER_TOKEN)
    if end is None:
        ids = _document_ids(source, reader) if jsonl.is_jsonl(source) else reader.encode(_read(source, None)[0])
        fitting = min(count, (len(ids) - begin) // length)
    else:
        ids = _last_document_ids(source, end, reader) if jsonl.is_jsonl(source) else reader.encode(end)
        fitting = min(count, len(ids) // length)
    if fitting < 1:
        return None
    return _cut(ids[len(ids) - fitting * length :], count, length, f"the end of {source}", key, reader)


def calibration_windows(
    options: Calibration, path: Path, trust_remote_code: bool = False, answers: bool = False
) -> tuple[Windows, list[str]]:
    """The calibration windows for the checkpoint `path` that `options` ask for, and remarks.

    answers: whether to find the tokens that answer, in JSON lines.
    """
    reader = Reader.open(path, trust_remote_code)
    length = window_length(options, reader.longest)
    source = Path(options.data).expanduser() if options.data is not None else samples.CALIBRATION_TEXT
    cut = windows(source, reader, options.samples, length, "calibration.length", answers)
    remarks = list(cut.remarks)
    if options.data is None and not is_sample(path):
        remarks.append(
            "calibrated on the sample text that ships with effcli (Shakespeare); text like the model's own work "
            "gives better results: --calib FILE, or calibration.data in a recipe"
        )
    marks = None if cut.answers is None else list(torch.split(cut.answers, options.batch_size))
    return Windows(cut.batches(options.batch_size), options.inputs, marks), remarks


def evaluation_windows(options: Evaluate, reader: Reader, path: Path, calibration: Calibration | None = None) -> Cut:
    """The windows for perplexity of the network in `path`, whose options say which text to take."""
    count, length, key = options.samples, window_length(options, reader.longest), "evaluate.length"
    if isinstance(options.perplexity, str):
        return windows(Path(options.perplexity).expanduser(), reader, count, length, key)
    if is_sample(path):
        return windows(samples.EVALUATION_TEXT, reader, count, length, key)
    why = "no text was given"
    if calibration is not None and calibration.data is not None:
        source = Path(calibration.data).expanduser()
        begin = calibration.samples * window_length(calibration, reader.longest)
        cut = last_windows(source, reader, count, length, begin, key)
        if cut is not None:
            return cut
        why = f"calibration takes all of {source}"
    cut = windows(samples.EVALUATION_TEXT, reader, count, length, key)
    remark = (
        f"perplexity is of the sample text that ships with effcli (Shakespeare), for {why}; "
        "give held-out text: --eval FILE, or evaluate.perplexity in a recipe"
    )
    return Cut(cut.windows, (*cut.remarks, remark))


def is_sample(path: Path) -> bool:
    """Whether `path` is the sample language model or was made from it, by its tokenizer: it has texts of its own."""
    own, file = samples.SAMPLES["sample:lm"] / "tokenizer.json", path / "tokenizer.json"
    return file.is_file() and file.read_bytes() == own.read_bytes()


def _first_ids(source: Path | str, reader: Reader, wanted: int, name: str) -> list[int]:
    """The first token ids of a text, at least `wanted` of them or all there are."""
    if isinstance(source, Path) and jsonl.is_jsonl(source):
        return _document_ids(source, reader, wanted)
    limit = max(_CHARACTERS_AT_LEAST, wanted * _CHARACTERS_PER_TOKEN)
    while True:
        text, whole = _read(source, limit) if isinstance(source, Path) else (source, True)
        if not text.strip():
            raise DataError(f"{name} is empty", "give a file with some pages of text")
        ids = reader.encode(text)
        # The last tokens of a text that was cut may differ from those of the whole text.
        if whole or len(ids) >= wanted + _CUT_MARGIN:
            return ids
        limit *= 2


def _document_ids(file: Path, reader: Reader, wanted: int | None = None) -> list[int]:
    """The token ids of the documents in a file of JSON lines, at least `wanted` of them or all there are."""
    ids: list[int] = []
    for where, data in jsonl.objects(file, jsonl.FORM):
        ids += jsonl.document_ids(data, where, reader)
        if wanted is not None and len(ids) >= wanted:
            break
    if not ids:
        raise _empty(file)
    return ids


def _marked_ids(file: Path, reader: Reader, wanted: int) -> tuple[list[int], list[bool]]:
    """What `_document_ids` returns, and of each token whether it answers."""
    ids: list[int] = []
    marks: list[bool] = []
    for where, data in jsonl.objects(file, jsonl.FORM):
        more, own = jsonl.marked_ids(data, where, reader)
        ids += more
        marks += own
        if len(ids) >= wanted:
            break
    if not ids:
        raise _empty(file)
    return ids, marks


def _empty(file: Path) -> DataError:
    return DataError(f"{file} is empty", "give a file with some pages of text")


def _last_document_ids(file: Path, lines: str, reader: Reader) -> list[int]:
    """The token ids of the documents in the last `lines` of a file of JSON lines."""
    where = f"a line near the end of {file}"
    found = (jsonl.parse(line, where, jsonl.FORM) for line in lines.split("\n") if line.strip())
    return [token for data in found for token in jsonl.document_ids(data, where, reader)]


def _read(file: Path, limit: int | None) -> tuple[str, bool]:
    """The first `limit` characters of a text file, and whether that is all of it."""
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise DataError(f"{file} is not a file", "give a text file")
        with file.open(encoding="utf-8") as stream:
            if limit is not None:
                # Python takes memory for as much as is asked for.
                limit = min(limit, os.fstat(stream.fileno()).st_size)
            text = stream.read(limit)
            return text, limit is None or not stream.read(1)
    except FileNotFoundError:
        raise DataError(f"there is no text file {file}", "check the path") from None
    except IsADirectoryError:
        raise DataError(f"{file} is a directory", "give a text file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason})", "convert it to UTF-8") from None
    except OSError as error:
        if not at_fault(error):
            raise
        raise DataError(f"cannot read {file}: {error.strerror}", "check the file's permissions") from None


def _read_end(file: Path, size: int) -> str | None:
    """The lines in about the last `size` bytes of a large file; None for one that is small enough to read whole."""
    try:
        total = file.stat().st_size
        if total <= max(_LARGE_FILE, 4 * size):
            return None
        with file.open("rb") as stream:
            stream.seek(total - size)
            # What stands before the first line break may begin in the middle of a character.
            return stream.read().partition(b"\n")[2].decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason})", "convert it to UTF-8") from None


def _cut(ids: list[int], count: int, length: int, name: str, key: str, reader: Reader) -> Cut:
    found = len(ids) // length
    if found < 1:
        raise DataError(
            f"{name} has {len(ids)} tokens, too few for one window of {length}",
            f"give more text, or set {key} to at most {len(ids)}",
        )
    remarks: tuple[str, ...] = ()
    if found < count:
        asked = key.replace("length", "samples")
        remarks = (
            f"{name} holds only {found} of the {count} windows of {length} tokens that {asked} asks for; "
            f"less text makes the result less certain: give a longer one, or set {asked}={found}",
        )
    ids = ids[: min(found, count) * length]
    reader.check_ids(ids)
    return Cut(torch.tensor(ids, dtype=torch.int64).view(-1, length), remarks)
