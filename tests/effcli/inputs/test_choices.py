from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from effcli.cli import main
from effcli.errors import DataError
from effcli.files import locate as samples
from effcli.inputs import choices, published, tables
from effcli.inputs.choices import Question, Task
from effcli.inputs.tokens import Reader
from effcli.language import evaluate
from effcli.run.recipe import Evaluate

SAMPLE = samples.SAMPLES["sample:lm"]


class Letters:
    """A tokenizer without special tokens: 0 is a space, 1 to 26 are letters."""

    bos_token_id = 26
    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        return SimpleNamespace(input_ids=[" abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text])


def reader(longest: int | None = None) -> Reader:
    return Reader(Letters(), 27, longest)


def answer(task: Task, table: torch.Tensor) -> choices.Score:
    """Score with a network that looks at one token only; table: probabilities of the next token, by token."""
    for number, batch in enumerate(task.batches):
        for row, places, targets in task.positions(number):
            task.add(targets, table[batch[row, places]].log())
    return task.score()


def test_reads_both_forms(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    lines = [{"query": "a", "choices": ["b", "c"], "gold": 1}, {"context": "a b", "continuation": "c"}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert choices.read(file) == [Question("a", ("b", "c"), 1), Question("a b", ("c",), None)]
    assert len(choices.read(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"query": "a", "gold": 0}', "line 2: no choices"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "line 2: choices must be a list of at least two"),
        ('{"query": "a", "choices": "bc", "gold": 0}', "line 2: choices must be a list of at least two"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2: gold must be 0 to 1, not 2"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "line 2: gold must be 0 to 1, not True"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "line 2: query and choices must be texts"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "line 2: a choice is empty"),
        ('{"contexts": ["a"], "continuation": "c", "gold": 0}', "line 2: contexts must be a list of at least two"),
        ('{"contexts": ["a", "b"], "continuation": "c"}', "line 2: no gold"),
        ('{"contexts": ["a", "b"], "continuation": "c", "gold": 2}', "line 2: gold must be 0 to 1, not 2"),
        ('{"contexts": ["a", 1], "continuation": "c", "gold": 0}', "line 2: contexts and continuation must be texts"),
        ('{"contexts": ["a", "b"], "continuation": "", "gold": 0}', "line 2: the continuation is empty"),
        ('{"context": "\\ud800", "continuation": "c"}', "line 2: not JSON"),
        ("[" * 90_000, "line 2: not JSON"),
        ('{"context": 1, "continuation": "c"}', "line 2: query and choices must be texts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"context": "a", "continuation": "b"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        choices.read(file)
    assert message in caught.value.cause
    assert caught.value.remedy


def test_bad_files(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    with pytest.raises(DataError, match="there is no file"):
        choices.read(file)
    file.write_bytes(b"\n")
    with pytest.raises(DataError, match="holds no question"):
        choices.read(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        choices.read(file)


@pytest.mark.parametrize(
    ("query", "choice", "context", "continuation"),
    [
        ("ab", "cd", [1, 2], [0, 3, 4]),
        # A space at the end of the query belongs to the choice, and the one between them comes on top.
        ("ab ", "cd", [1, 2], [0, 0, 3, 4]),
        # Without a query the start token stands before the choice.
        ("", "cd", [26], [0, 3, 4]),
    ],
)
def test_where_a_choice_begins(query: str, choice: str, context: list[int], continuation: list[int]) -> None:
    assert choices.encode_pair(reader(), query, choice) == (context, continuation)


def test_scored_by_hand() -> None:
    """After `a` comes a space; after a space `b` (0.6) or `c` (0.4); letters follow themselves with 0.9."""
    table = torch.full((27, 27), 1e-6)
    table[1, 0], table[0, 2], table[0, 3] = 1.0, 0.6, 0.4
    table[2, 2], table[3, 3] = 0.5, 0.9
    questions = [
        Question("a", ("b", "c"), 0),  # log 0.6 > log 0.4
        # Per character: log(0.6 · 0.5) / 2 = -0.602 < log(0.4 · 0.9²) / 3 = -0.376, though -1.204 < -1.127 is closer.
        Question("a", ("bb", "ccc"), 1),
        # Without the division by the length b would win: -0.511 against -0.916 - 3 · 0.105 = -1.232; with it, -0.308.
        Question("a", ("b", "cccc"), 1),
        Question("a", ("b", "c"), 1),  # answered wrongly
        Question("a", ("b",), None),  # the greedy continuation
        Question("a", ("c",), None),  # not the greedy continuation
    ]
    task = Task.build(questions, reader(), 64)
    score = answer(task, table)
    assert task._likelihood[1, 1] == pytest.approx(math.log(0.4 * 0.9 * 0.9), abs=1e-5)
    assert score.accuracy == pytest.approx(4 / 6)
    assert score.stderr == pytest.approx(math.sqrt((4 / 6) * (2 / 6) / 5))
    assert score.examples == 6


def test_choices_of_one_token_share_an_input() -> None:
    questions = [Question("a", ("b", "c"), 0), Question("a", ("bd", "cd"), 0)]
    task = Task.build(questions, reader(), 1024)
    assert sum(len(batch) for batch in task.batches) == 3


def test_a_text_that_is_too_long_loses_its_beginning() -> None:
    questions = [Question("abcdefgh", ("i", "j"), 0)]
    task = Task.build(questions, reader(longest=4), 1024)
    # `efgh i` is the end; its last token is predicted and not read.
    assert task.batches[0].tolist() == [[6, 7, 8, 0]]
    assert len(task.remarks) == 1 and "lost their start" in task.remarks[0]


def test_batches_hold_no_more_tokens_than_asked() -> None:
    questions = [Question("a" * length, ("b", "cc"), 0) for length in (1, 5, 40, 41, 70, 200)]
    task = Task.build(questions, reader(), 128)
    assert all(batch.numel() <= 128 or len(batch) == 1 for batch in task.batches)
    rows = sorted(len(ids) for row in task._rows for ids in [range(row[0][0])])
    assert max(rows) == 200 + 2


def test_streamed_scores_equal_a_plain_loop(tmp_path: Path) -> None:
    """The sample in float32, one unpadded sequence at a time, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    folder = tmp_path / "float32"
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = samples.EVALUATION_TEXT.read_text(encoding="utf-8").split("\n\n")[:24]
    questions: list[dict[str, Any]] = []
    for k in range(0, 12, 2):
        choice = [lines[k + 1][:30].strip(), lines[k + 2][-45:].strip(), "O no, my lord."]
        questions.append({"query": lines[k][:200].strip(), "choices": choice, "gold": k % 3})
    ids = tokenizer("KING RICHARD III:\nMy", return_tensors="pt").input_ids
    greedy = tokenizer.decode(network.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :])
    if greedy.startswith(" "):
        questions.append({"context": "KING RICHARD III:\nMy", "continuation": greedy[1:]})
    questions.append({"context": "KING RICHARD III:\nMy", "continuation": "zebra"})

    def likelihood(query: str, choice: str) -> tuple[float, bool]:
        whole = tokenizer(query + " " + choice, return_tensors="pt").input_ids
        begin = len(tokenizer(query).input_ids)
        with torch.inference_mode():
            predicted = network(whole).logits[0, begin - 1 : -1].log_softmax(-1)
        target = whole[0, begin:]
        return float(predicted[range(len(target)), target].sum()), bool((predicted.argmax(-1) == target).all())

    expected, right = {}, []
    for number, question in enumerate(questions):
        if "context" in question:
            right.append(likelihood(question["context"], question["continuation"])[1])
            continue
        for k, choice in enumerate(question["choices"]):
            expected[number, k] = likelihood(question["query"], choice)[0]
        values = [expected[number, k] / len(choice) for k, choice in enumerate(question["choices"])]
        right.append(max(range(3), key=values.__getitem__) == question["gold"])
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(question) for question in questions))
    options = Evaluate(perplexity=False, choices=str(file), latency=False)
    evaluation = evaluate.Evaluation(folder, options, tmp_path)
    quality = evaluation.measure(folder)
    assert quality.accuracy == pytest.approx(sum(right) / len(right))
    assert quality.examples == len(questions)
    assert evaluation._task is not None
    for key, value in expected.items():
        assert evaluation._task._likelihood[key] == pytest.approx(value, rel=1e-4)


def test_the_context_behind_which_the_continuation_is_likeliest_is_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    line = {"contexts": ["a", "ab"], "continuation": "c", "gold": 1}
    file.write_text("\n".join(json.dumps(line | {"gold": gold}) for gold in (1, 1, 0)))
    questions = choices.read(file)
    assert questions[0] == Question("", ("c",), 1, ("a", "ab"))
    task = Task.build(questions, reader(), 64)
    table = torch.full((27, 27), 0.01)
    # A space is likelier behind b than behind a; what follows the space is the same.
    table[1, 0], table[2, 0] = 0.1, 0.4
    assert answer(task, table).accuracy == pytest.approx(2 / 3)
    assert task.score(0, 2).accuracy == 1
    assert task.score(2, 3) == choices.Score(0, 0.0, 1)


WINOGRANDE = [
    {"sentence": "Ann gave _ the king to see.", "option1": "Bob", "option2": "Cy", "answer": "2"},
    {"sentence": "_ is late", "option1": "Bob", "option2": "Cy", "answer": "1"},
]
READ = [
    Question("", ("the king to see.",), 1, ("Ann gave Bob", "Ann gave Cy")),
    Question("", ("is late",), 0, ("Bob", "Cy")),
]


def test_the_columns_of_winogrande_are_partial_contexts(tmp_path: Path) -> None:
    file = tmp_path / "winogrande.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in WINOGRANDE))
    assert choices.read(file) == READ


LETTERS = {"text": ["red", "blue", "green"], "label": ["A", "B", "C"]}
PUBLISHED = {
    "arc": (
        {"id": "x", "question": "Which colour?", "choices": LETTERS, "answerKey": "C"},
        Question("Question: Which colour?\nAnswer:", ("red", "blue", "green"), 2),
    ),
    "arc with numbers": (
        {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        Question("Question: Q?\nAnswer:", ("a", "b"), 1),
    ),
    "openbookqa": (
        {"question_stem": "The sky is", "choices": LETTERS, "answerKey": "B"},
        Question("The sky is", ("red", "blue", "green"), 1),
    ),
    "mmlu": (
        {"question": " 1 + 1? ", "subject": "high_school_maths", "choices": ["0", "1", "2"], "answer": 2},
        Question(
            "The following are multiple choice questions (with answers) about high school maths.\n\n"
            "1 + 1?\nA. 0\nB. 1\nC. 2\nAnswer:",
            ("A", "B", "C"),
            2,
        ),
    ),
    "hellaswag": (
        {
            "activity_label": "Sawing",
            "ctx_a": "A man saws.",
            "ctx_b": "he",
            "endings": ["stops. [title] Rest [step] now.", "sings."],
            "label": "0",
            "ctx": "A man saws. he",
        },
        Question("Sawing: A man saws. He", ("stops.. Rest now.", "sings."), 0),
    ),
    "piqa": (
        {"goal": "Open it", "sol1": "Pull.", "sol2": "Push.", "label": 1},
        Question("Question: Open it\nAnswer:", ("Pull.", "Push."), 1),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_columns_of_published_benchmarks(name: str, tmp_path: Path) -> None:
    row, question = PUBLISHED[name]
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row))
    assert choices.read(file) == [question]
    assert published.holds_questions(set(row))
    answers = {"answerKey", "answer", "label"} & row.keys()
    for key in answers:
        for wrong in ("", "Z", -1, 77, None, True, [0]):
            file.write_text(json.dumps({**row, key: wrong}))
            with pytest.raises(DataError, match=f"line 1: {key} must be"):
                choices.read(file)
    for key in row.keys() - answers - {"id", "ctx"}:
        for wrong in (3, [], {"text": []}, ["one"], {"text": ["a"], "label": ["A", "B"]}):
            file.write_text(json.dumps({**row, key: wrong}))
            with pytest.raises(DataError, match=r"line 1: .* must"):
                choices.read(file)


def test_a_line_that_is_neither_text_nor_question(tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text(json.dumps({"content": "a text"}))
    with pytest.raises(DataError, match="it holds 'content'") as raised:
        choices.read(file)
    assert "under the key text" in raised.value.remedy


def test_a_file_counts_once(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(ValidationError, match="would count twice"):
        Evaluate(choices=(str(tmp_path / "a.jsonl"), str(tmp_path / "link.jsonl")))


def test_questions_in_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "winogrande.parquet"
    parquet.write_table(arrow.Table.from_pylist(WINOGRANDE), file)
    assert choices.read(file) == READ
    assert choices.read(file, limit=1) == READ[:1]
    assert tables.holds_questions(file)
    parquet.write_table(arrow.table({"image": ["a"]}), file)
    assert not tables.holds_questions(file)
    with pytest.raises(DataError, match="row 1: no query and no choices and no gold"):
        choices.read(file)
    file.write_bytes(b"PAR1 but no more")
    assert not tables.holds_questions(file)
    with pytest.raises(DataError, match="is no parquet file that can be read"):
        choices.read(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "answer must be 1 or 2, not ''"),
        ({"answer": "3"}, "answer must be 1 or 2"),
        ({"sentence": "no blank"}, "the sentence has no blank"),
        ({"sentence": "nothing behind _"}, "the continuation is empty"),
        ({"option1": 1}, "sentence, option1 and option2 must be texts"),
    ],
)
def test_rows_of_winogrande_that_cannot_serve(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "winogrande.jsonl"
    file.write_text(json.dumps(WINOGRANDE[0] | change))
    with pytest.raises(DataError, match=message):
        choices.read(file)


def test_several_files_are_told_apart(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for gold, file in enumerate(files):
        file.write_text(json.dumps({"query": "the king", "choices": ["is", "zq"], "gold": gold}) + "\n")
    options = Evaluate(perplexity=False, latency=False, choices=tuple(map(str, files)))
    found = evaluate.evaluate(str(SAMPLE), options)
    assert [task.name for task in found.tasks] == list(map(str, files))
    assert found.tasks[0].accuracy + found.tasks[1].accuracy == 1
    assert (found.accuracy, found.examples) == (0.5, 2)
    assert evaluate.evaluate(str(SAMPLE), options.model_copy(update={"choices": str(files[0])})).tasks == ()


def test_several_files_may_be_given_to_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text(json.dumps({"query": "the king", "choices": ["is", "zq"], "gold": 0}) + "\n")
    assert main(["eval", "sample:lm", *(word for file in files for word in ("--choices", str(file))), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 2 and [task["name"] for task in found["tasks"]] == list(map(str, files))


def test_a_choice_that_gives_no_token_is_refused() -> None:
    class Stripping(Letters):
        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
            return super().__call__(text.strip())

    with pytest.raises(DataError, match="no token behind its query"):
        Task.build([Question("a", (" ", "b"), 0)], Reader(Stripping(), 27, None), 64)
