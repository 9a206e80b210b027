from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcli.errors import CheckpointError, DataError, RecipeError
from effcli.files import locate as samples
from effcli.inputs import jsonl, text
from effcli.inputs.tokens import Reader, vocabulary_size
from effcli.run.recipe import Calibration, Evaluate, Recipe, from_arguments

SAMPLE = samples.SAMPLES["sample:lm"]


class Characters:
    """A tokenizer that gives 1 for the start and then the code of each character."""

    bos_token_id = 1
    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        return SimpleNamespace(input_ids=([1] if add_special_tokens else []) + [ord(letter) for letter in text])


def reader(vocabulary: int = 256, longest: int | None = 16) -> Reader:
    return Reader(Characters(), vocabulary, longest)


def recipe(**keys: Any) -> Recipe:
    return from_arguments(str(keys.pop("model", "sample:lm")), output="out", passes="linear:bits=4", **keys)


def test_a_tokenizer_that_fails_is_said() -> None:
    class Failing(Characters):
        name_or_path = "some/folder"

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
            raise TypeError("no length")

    with pytest.raises(DataError, match=r"the tokenizer in some/folder reads no text: TypeError: no length"):
        Reader(Failing(), 256, 16).encode("a")


@pytest.mark.parametrize("size", [None, True, 0, -5, 2.5, "x"])
def test_a_vocabulary_that_is_no_number(size: Any) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=size))
    with pytest.raises(CheckpointError, match="vocab_size"):
        vocabulary_size(config)


def test_windows_are_neighbours_from_the_start_and_the_rest_is_dropped() -> None:
    cut = text.windows("abcdefgh", reader(), 3, 3)
    assert cut.windows.tolist() == [[1, *b"ab"], [*b"cde"], [*b"fgh"]]
    assert text.windows("abcdefg", reader(), 2, 3).windows.tolist() == [[1, *b"ab"], [*b"cde"]]
    assert cut.remarks == ()
    assert [batch.shape for batch in cut.batches(2)] == [(2, 3), (1, 3)]


def test_too_few_windows_are_said(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("abcdefgh")
    cut = text.windows(file, reader(), 9, 3)
    assert cut.windows.shape == (3, 3)
    asked = f"{file} holds only 3 of the 9 windows of 3 tokens that samples asks for"
    assert cut.remarks == (f"{asked}; less text makes the result less certain: give a longer one, or set samples=3",)
    (remark,) = text.windows(file, reader(), 9, 3, "calibration.length").remarks
    assert remark.endswith("give a longer one, or set calibration.samples=3")


def test_windows_of_a_long_file_are_those_of_the_whole_text() -> None:
    found = Reader.open(SAMPLE)
    whole = found.tokenizer(samples.CALIBRATION_TEXT.read_text(encoding="utf-8")).input_ids
    # Few windows: only the start of the file is tokenized. Many: all of it.
    for count in (4, 150):
        cut = text.windows(samples.CALIBRATION_TEXT, found, count, 512)
        assert cut.windows.flatten().tolist() == whole[: count * 512]


@given(st.text(st.characters(max_codepoint=255, exclude_characters="\r"), min_size=1), st.integers(2, 9))
def test_windows_and_their_rest_make_up_the_text(content: str, length: int) -> None:
    ids = reader().encode(content)
    if not content.strip() or len(ids) < length:
        with pytest.raises(DataError):
            text.windows(content, reader(), 1000, length)
        return
    cut = text.windows(content, reader(), 1000, length).windows
    assert cut.flatten().tolist() + ids[cut.numel() :] == ids
    assert len(ids) - cut.numel() < length


@pytest.mark.parametrize(
    ("content", "length", "message"),
    [
        (None, 4, "there is no text file"),
        (b"", 4, "is empty"),
        (b" \n\n ", 4, "is empty"),
        (b"abc", 5, "has 4 tokens, too few for one window of 5"),
        (b"abc", 17, "windows of 17 tokens are longer than the 16"),
        (b"caf\xe9 au lait", 4, "is not UTF-8"),
        ("ab\u0416".encode(), 2, "the tokenizer gives token 1046, the network knows only 256"),
    ],
)
def test_bad_text(tmp_path: Path, content: bytes | None, length: int, message: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        text.windows(file, reader(), 2, length)
    assert message in caught.value.cause
    assert "\n" not in caught.value.cause
    assert caught.value.remedy


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory"):
        text.windows(tmp_path, reader(), 2, 4)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((SAMPLE / "config.json").read_bytes())
    with pytest.raises(DataError, match="holds no tokenizer"):
        Reader.open(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((SAMPLE / "config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((SAMPLE / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        Reader.open(tmp_path)


def test_the_sample_reads_its_own_texts_without_a_remark() -> None:
    found, remarks = text.calibration_windows(Calibration(), SAMPLE)
    assert [batch.shape for batch in found.batches] == [(4, 512)] * 8
    assert found.inputs == "original"
    assert remarks == []
    cut = text.evaluation_windows(Evaluate(), Reader.open(SAMPLE), SAMPLE)
    assert cut.windows.shape == (20, 512)
    assert cut.remarks == ()
    assert not torch.equal(cut.windows[0], found.batches[0][0])


def test_what_was_made_from_the_sample_reads_its_texts_too(tmp_path: Path) -> None:
    for file in SAMPLE.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    cut = text.evaluation_windows(Evaluate(), Reader.open(tmp_path), tmp_path)
    assert cut.windows.shape == (20, 512) and cut.remarks == ()


def test_another_model_is_told_that_it_reads_the_sample_text(tmp_path: Path) -> None:
    for file in SAMPLE.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes() + b"\n")
    _, remarks = text.calibration_windows(Calibration(length=64, samples=2), tmp_path)
    assert len(remarks) == 1 and "--calib FILE" in remarks[0]
    cut = text.evaluation_windows(Evaluate(length=64), Reader.open(tmp_path), tmp_path)
    assert len(cut.remarks) == 1 and "--eval FILE" in cut.remarks[0]


def test_evaluation_takes_the_end_that_calibration_leaves(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefghijk")
    calibration = Calibration(data=str(file), samples=2, length=3)
    options = Evaluate(samples=4, length=2)
    cut = text.evaluation_windows(options, reader(), tmp_path, calibration)
    # Six tokens, the start among them, are calibration's: of "fghijk" three windows are left.
    assert cut.windows.tolist() == [[*b"fg"], [*b"hi"], [*b"jk"]]
    assert "3 of the 4 windows" in cut.remarks[0]


def test_evaluation_falls_back_when_calibration_takes_all(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefghijk")
    cut = text.evaluation_windows(
        Evaluate(samples=2, length=8), reader(1 << 20), tmp_path, Calibration(data=str(file), samples=4, length=3)
    )
    assert cut.windows.shape == (2, 8)
    assert f"calibration takes all of {file}" in cut.remarks[0]


def test_the_end_of_a_large_file_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.txt"
    file.write_text("é" * 999 + "\n" + "0123456789\n" * 50, encoding="utf-8")
    monkeypatch.setattr(text, "_LARGE_FILE", 0)
    cut = text.last_windows(file, reader(), 3, 11, begin=10, key="length")
    assert cut is not None
    assert cut.windows.tolist() == [list(b"0123456789\n")] * 3


def lines(file: Path, *objects: object) -> Path:
    file.write_text("\n".join(json.dumps(item) for item in objects) + "\n")
    return file


class Chatting(Characters):
    """Writes each message as `<role>content`, without the token for the start."""

    chat_template = "a template"
    eos_token_id = 2

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, **_: Any) -> str:
        if messages[0]["role"] == "nobody":
            raise ValueError("roles must alternate")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


CHATTING = Reader(Chatting(), 256, 16)


def test_documents_of_json_lines_are_read_one_by_one(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "d.jsonl",
        {"text": "ab", "id": 3},
        {"prompt": "c", "completion": " d"},
        {"text": " "},
        {"messages": [{"role": "u", "content": "e"}, {"role": "a", "content": "f"}]},
        {"prompt": [{"role": "u", "content": "g"}], "completion": [{"role": "a", "content": "h"}]},
    )
    expected = [1, *b"ab", 2, 1, *b"c d", 2, *b"<u>e<a>f", *b"<u>g<a>h"]
    assert text.windows(file, CHATTING, 1, len(expected) // 2).windows.flatten().tolist() == expected[:12]
    cut = text.last_windows(file, CHATTING, 3, 5, begin=4, key="length")
    assert cut is not None
    assert cut.windows.flatten().tolist() == expected[-15:]


def test_only_as_many_documents_are_read_as_the_windows_need(tmp_path: Path) -> None:
    file = lines(tmp_path / "d.jsonl", {"text": "abc"}, {"text": "def"}, {"odd": 1})
    assert text.windows(file, CHATTING, 2, 5).windows.tolist() == [[1, *b"abc", 2], [1, *b"def", 2]]
    with pytest.raises(DataError, match="line 3: no text, no prompt and completion, and no messages; it holds 'odd'"):
        text.windows(file, CHATTING, 3, 5)


def test_the_end_of_a_large_file_of_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lines(tmp_path / "d.jsonl", *({"text": "abc"} for _ in range(40)))
    monkeypatch.setattr(text, "_LARGE_FILE", 64)
    cut = text.last_windows(file, CHATTING, 1, 5, begin=0, key="length")
    assert cut is not None
    assert cut.windows.tolist() == [[1, *b"abc", 2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"text": ""}', "is empty"),
        (b"[1]", "line 1: not a JSON object"),
        (b"{", "line 1: not JSON"),
        (b'{"text": "\\ud800"}', "line 1: .*not UTF-8 text"),
        (b'{"text": ' + b"[" * 90_000, "nested too deep"),
        (b'{"text": 3}', "text is not a text"),
        (b'{"prompt": "a"}', "it holds 'prompt'"),
        (b'{"prompt": "a", "completion": []}', "both be texts"),
        (b'{"query": "a", "choices": ["b", "c"], "gold": 0}', "a question, not a text"),
        (b'{"messages": []}', "at least one message"),
        (b'{"messages": ["a"]}', "no role"),
        (b'{"messages": [{"role": "u"}]}', "no content"),
        (b'{"messages": [{"role": "nobody", "content": "a"}]}', "refuses the messages: roles must alternate"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_json_lines_that_are_no_documents(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        text.windows(file, CHATTING, 2, 4)
    assert caught.value.remedy


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    file = lines(tmp_path / "d.jsonl", {"messages": [{"role": "u", "content": "e"}]})
    with pytest.raises(DataError, match="the tokenizer has none"):
        text.windows(file, reader(), 1, 4)


def test_evaluation_tells_texts_from_questions(tmp_path: Path) -> None:
    texts = str(lines(tmp_path / "t.jsonl", {"text": "abc"}))
    questions = str(lines(tmp_path / "q.jsonl", {"context": "a", "continuation": "b"}))
    found = recipe(evals=[texts, questions]).evaluate
    assert found.perplexity == texts
    assert found.choices == questions
    more = str(lines(tmp_path / "r.jsonl", {"contexts": ["a", "b"], "continuation": "c", "gold": 0}))
    found = recipe(evals=[questions, texts, more]).evaluate
    assert found.choices == (questions, more)
    assert found.questions == (questions, more)
    with pytest.raises(RecipeError, match="there is already"):
        recipe(evals=[texts, texts])


def test_the_default_length_follows_the_model(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefghijk" * 9)
    cut = text.evaluation_windows(Evaluate(perplexity=str(file), samples=2), reader(longest=16), tmp_path)
    assert cut.windows.shape == (2, 16)
    assert text.window_length(Calibration(), 16) == 16
    assert text.window_length(Calibration(), 4096) == text.window_length(Calibration(), None) == 512
    with pytest.raises(DataError, match="longer than the 16"):
        text.evaluation_windows(Evaluate(perplexity=str(file), length=17), reader(longest=16), tmp_path)


def test_calibration_takes_windows_that_the_model_takes(tmp_path: Path) -> None:
    for file in SAMPLE.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((SAMPLE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    found, _ = text.calibration_windows(Calibration(samples=4), tmp_path)
    assert [batch.shape for batch in found.batches] == [(4, 256)]


def test_more_windows_than_can_be_counted_are_all_there_are(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("abcdefgh" * 5000)
    for count in (2**31, 2**63 - 1):
        assert text.windows(file, reader(), count, 3).windows.shape == (13333, 3)


LLAMA = (
    "{{- bos_token }}{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- for m in messages %}{{- '<h>' + m['role'] + '</h>' + m['content'] | trim + '<end>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<h>assistant</h>' }}{%- endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<im>' + m['role'] + ' ' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<im>assistant ' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<turn>' + m['role'] + ' ' + m['content'] | trim + '<end>' }}{% endfor %}"
)
MISTRAL = (
    "{%- set ns = namespace(index=0) -%}{{ bos_token }}{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{ '[I] ' + m['content'] + ' [/I]' }}{%- set ns.index = ns.index + 1 -%}"
    "{%- elif m['role'] == 'assistant' -%}{{ ' ' + m['content'] + eos_token }}"
    "{%- else -%}{{ raise_exception('Only user and assistant roles are supported!') }}{%- endif -%}{%- endfor -%}"
)


def templated(template: str) -> Reader:
    """The sample's tokenizer with a chat template of the kind that public models have."""
    whole = Reader.open(samples.SAMPLES["sample:lm"])
    whole.tokenizer.chat_template = template
    return whole


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, "{bos}<h>user</h>the king<end><h>assistant</h>is here<end>"),
        (CHATML, "<im>user the king<end><im>assistant is here<end>"),
        (GEMMA, "{bos}<turn>user the king<end><turn>assistant is here<end>"),
        (MISTRAL, "{bos}[I] the king [/I] is here{eos}"),
    ],
)
def test_messages_go_through_templates_as_models_have_them(template: str, expected: str) -> None:
    """Nothing is added behind the last answer: the conversation is whole, and no answer is asked for."""
    reader = templated(template)
    messages = [{"role": "user", "content": "the king"}, {"role": "assistant", "content": "is here"}]
    expected = expected.format(bos=reader.tokenizer.bos_token, eos=reader.tokenizer.eos_token)
    assert jsonl.document_ids({"messages": messages}, "line 1", reader) == reader.encode(expected, special=False)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (GEMMA, [{"role": "system", "content": "be kind"}], "System role not supported"),
        (GEMMA, [{"role": "assistant", "content": "a"}], "Conversation roles must alternate"),
        (MISTRAL, [{"role": "system", "content": "be kind"}], "Only user and assistant roles are supported!"),
        (CHATML, [{"role": "user", "tool_calls": []}], ""),
        ("{{ nothing.here }}", [{"role": "user", "content": "a"}], "'nothing' is undefined"),
        ("{% for %}", [{"role": "user", "content": "a"}], ""),
    ],
)
def test_what_a_template_refuses_is_said(template: str, messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=f"line 1: the chat template refuses the messages: .*{message}"):
        jsonl.document_ids({"messages": messages}, "line 1", templated(template))


def test_which_tokens_of_prompts_and_completions_answer() -> None:
    """Those of a completion with its end, and all of a plain text."""
    sample = Reader.open(samples.SAMPLES["sample:lm"])
    data = {"prompt": "Who goes there? ", "completion": "It is the king."}
    ids, marks = jsonl.marked_ids(data, "line 1", sample)
    assert ids == jsonl.document_ids(data, "line 1", sample)
    begin = marks.index(True)
    assert all(marks[begin:]) and not any(marks[:begin])
    assert sample.decode(ids[begin:]).strip() == "It is the king."
    ids, marks = jsonl.marked_ids({"text": "the king"}, "line 1", sample)
    special = len(ids) - len(sample.encode("the king", special=False)) - 1
    assert marks == [False] * special + [True] * (len(ids) - special)


def test_what_the_assistant_says_answers() -> None:
    """Each of its messages up to the token that ends it, and nothing that others say or that announces it."""
    messages = [
        {"role": "user", "content": "the king"},
        {"role": "assistant", "content": "is here"},
        {"role": "user", "content": "the queen"},
        {"role": "assistant", "content": "is gone"},
    ]
    reader = templated(CHATML)
    ids, marks = jsonl.marked_ids({"messages": messages}, "line 1", reader)
    assert ids == jsonl.document_ids({"messages": messages}, "line 1", reader)
    groups = groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1])
    runs = [[token for token, _ in group] for answers, group in groups if answers]
    assert [reader.decode(run).strip() for run in runs] == [
        reader.decode(reader.encode(text, special=False)) for text in ("is here<end>", "is gone<end>")
    ]
    asked = {"prompt": messages[:3], "completion": messages[3:]}
    _, marks = jsonl.marked_ids(asked, "line 1", reader)
    assert sum(marks) == len(runs[1])
    whole = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="does not write message 2 behind those before it"):
        jsonl.marked_ids({"messages": messages}, "line 1", templated(whole))


def test_marks_follow_the_tokens_into_windows(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} is ", "completion": "a number."}) + "\n" for n in range(20)))
    options = Calibration(data=str(file), samples=4, length=16, batch_size=3)
    path = samples.SAMPLES["sample:lm"]
    plain, _ = text.calibration_windows(options, path)
    marked, _ = text.calibration_windows(options, path, answers=True)
    assert plain.answers is None and marked.answers is not None
    assert [answer.shape for answer in marked.answers] == [batch.shape for batch in marked.batches]
    assert all(torch.equal(one, other) for one, other in zip(plain.batches, marked.batches, strict=True))
    share = float(torch.cat(marked.answers).float().mean())
    assert 0.2 < share < 0.9
