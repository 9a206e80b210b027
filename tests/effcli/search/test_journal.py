"""Searches that are killed and given again, behind other passes and before them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest

from effcli.cli import main
from effcli.errors import UnfinishedError
from effcli.graphs import sensitivity as graph_costs
from effcli.graphs.network import GraphNetwork
from effcli.language.model import LanguageModel
from effcli.language.trials import Trials
from effcli.reports.report import Report
from effcli.reports.sensitivity import Search
from effcli.reports.units import size
from effcli.run import pipeline
from effcli.run import recipe as recipes
from effcli.search.costs import Cost
from effcli.search.journal import SearchJournal


class Killed(BaseException):
    """Ends a run where it stands, as a signal would."""


class Heard(pipeline.Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=3)


def run(
    model: Path, output: Path, *passes: Any, listener: pipeline.Listener | None = None, evaluate: bool = True
) -> Report:
    small = ["calibration.samples=8", *(["evaluate.latency=false", "evaluate.samples=4"] if evaluate else [])]
    if model.is_dir():
        small += ["calibration.length=32", "calibration.batch_size=2", *(["evaluate.length=32"] if evaluate else [])]
    recipe = recipes.from_arguments(
        str(model), passes=passes, output=str(output), overrides=small, no_eval=not evaluate
    )
    return pipeline.run(recipe, listener=listener)


def auto(**options: Any) -> dict[str, Any]:
    return {"auto": {"using": "linear", "average_bits": 3.5, **options}}


def contents(output: Path) -> dict[str, Any]:
    """The files of an output that hold no times, and what the search found without its seconds."""
    found: dict[str, Any] = {
        path.name: path.read_bytes() for path in output.iterdir() if path.suffix in (".safetensors", ".yaml")
    }
    found["recipe.yaml"] = found["recipe.yaml"].replace(str(output).encode(), b"OUTPUT")
    for path in output.glob("search*.json"):
        search = json.loads(path.read_text())
        search["sensitivity"]["seconds"] = None
        found[path.name] = search
    return found


def killed(start: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, place: Any, name: str, count: int) -> None:
    """Start a run that is killed when it calls `name` for the `count`-th time."""
    original, calls = getattr(place, name), 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, counting)
        with pytest.raises(Killed):
            start()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often blocks and variants are priced, and passes carried out."""
    found: Counter[str] = Counter()

    def counting(place: Any, name: str, key: Callable[..., str]) -> None:
        original = getattr(place, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            found[key(*arguments)] += 1
            return result

        monkeypatch.setattr(place, name, counted)

    counting(Trials, "_take_block", lambda trials, k: f"block {k}")
    counting(graph_costs, "_trials", lambda *given: "variant")
    for kind in (GraphNetwork, LanguageModel):
        counting(kind, "sweep", lambda network, step, *given: step.name)
    return found


def test_what_comes_before_is_carried_out_once(net: Path, tmp_path: Path, counts: Counter[str]) -> None:
    report = run(net, tmp_path / "out", "fold", auto(using="linear", by="gram", measured=2))
    assert [stage.name for stage in report.stages] == ["input", "fold", "linear"]
    # The ends of the front, the choice, and the pass itself.
    assert counts == {"fold": 1, "variant": 4, "linear": 4}


def test_the_report_holds_what_the_search_found(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(net, tmp_path / "out", auto(by="gram", measured=2))
    report = Report.read(tmp_path / "out")
    found = report.stages[-1].search
    assert found is not None and report.stages[0].search is None
    assert found == Search.model_validate_json((tmp_path / "out" / "search.json").read_text())
    assert found.budget == "3.5 bits on average" and found.name == "auto"
    # What other tensors and headers take is no less than they do, and little more.
    assert found.fixed_bytes is not None
    assert 0 <= found.chosen.nbytes + found.fixed_bytes - report.stages[-1].nbytes < 2000
    assert found.chosen.measured is not None and len(found.front) > 2 and len(found.uniform) == 4
    assert report.recipe["passes"] == [{"linear": report.stages[-1].options}]
    assert {row.name: row.format.split()[0] for row in report.stages[-1].ledger} == {
        name: f"int{bits}" for name, bits in found.values.items()
    }
    page = (tmp_path / "out" / "report.html").read_text()
    label = 'aria-label="Cost of the cheapest choices over their size, logarithmic axis"'
    assert "<h3>3.5 bits on average</h3>" in page and label in page
    assert "<h3>Search by auto</h3>" in page
    assert main(["report", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "auto: bits per layer for linear: 3.5 bits on average" in printed
    assert size(found.chosen.nbytes + found.fixed_bytes) in printed
    assert f"at most {size(found.fixed_bytes)} for all else" in printed
    (row,) = re.findall(r"^linear .*\n(.*)", printed, re.MULTILINE)
    assert row.startswith("by auto ")
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out")]) == 0
    assert "linear (by auto)" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["gram", "loss", "fisher"])
def test_a_graph_is_not_measured_again(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Counter[str], way: str
) -> None:
    def start(output: str) -> Report:
        return run(net, tmp_path / output, "fold", auto(by=way, measured=3))

    start("whole")
    whole = dict(counts)
    counts.clear()
    if way != "fisher":
        killed(lambda: start("out"), monkeypatch, graph_costs, "_trials", 3)
    killed(lambda: start("out"), monkeypatch, GraphNetwork, "sweep", 4 if way == "fisher" else 3)
    assert counts["linear"] == 2
    start("out")
    assert counts == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("way", ["gram", "loss", "fisher"])
def test_a_language_model_is_not_measured_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Counter[str], way: str
) -> None:
    def start(output: str) -> Report:
        return run(llama, tmp_path / output, auto(using="gptq", group_size=32, by=way), evaluate=False)

    start("whole")
    whole = dict(counts)
    assert whole == {"block 0": 1, "block 1": 1, "block 2": 1, "gptq": 1}
    counts.clear()
    for count in (2, 2):
        killed(lambda: start("out"), monkeypatch, Trials, "_take_block", count)
    start("out")
    assert counts == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_gradients_that_a_pass_asks_for_are_there_after_a_crash(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Counter[str]
) -> None:
    def start(output: str) -> Report:
        sparsity = {"using": "taylor", "sparsity": [0, 0.25, 0.5], "average_sparsity": 0.25, "by": "fisher"}
        return run(llama, tmp_path / output, {"auto": sparsity}, evaluate=False)

    start("whole")
    whole = dict(counts)
    counts.clear()
    killed(lambda: start("out"), monkeypatch, Trials, "_take_block", 2)
    start("out")
    assert counts == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_while_the_chosen_pass_is_carried_out(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Counter[str]
) -> None:
    def start(output: str) -> Report:
        return run(llama, tmp_path / output, auto(group_size=32, by="gram"), evaluate=False)

    killed(lambda: start("out"), monkeypatch, LanguageModel, "sweep", 1)
    blocks = dict(counts)
    start("out")
    assert counts == {**blocks, "linear": 1}
    assert start("whole").stages[-1].ledger == Report.read(tmp_path / "out").stages[-1].ledger


@pytest.mark.parametrize("damage", ['{"variants": [', '{"variants": [{}]}', "[]"])
def test_a_damaged_journal(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    def start(output: str, listener: pipeline.Listener | None = None) -> Report:
        step = auto(group_size=32, by="fisher")
        return run(llama, tmp_path / output, step, listener=listener, evaluate=False)

    killed(lambda: start("out"), monkeypatch, Trials, "_take_block", 3)
    (tmp_path / ".out.effcli" / "search-1" / "block-1.json").write_text(damage)
    heard = Heard()
    start("out", heard)
    assert sum("beginning the search of auto anew, for its journal is damaged" in line for line in heard.said) == 1
    start("whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_gradients_that_are_gone(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(output: str, listener: pipeline.Listener | None = None) -> Report:
        step = auto(group_size=32, by="fisher")
        return run(llama, tmp_path / output, step, listener=listener, evaluate=False)

    killed(lambda: start("out"), monkeypatch, Trials, "_take_block", 2)
    for file in (tmp_path / ".out.effcli" / "search-1" / "states").glob("gradients-*"):
        file.write_bytes(b"")
    heard = Heard()
    start("out", heard)
    assert any("is not whole" in line for line in heard.said)
    start("whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_searches(net: Path, tmp_path: Path, counts: Counter[str]) -> None:
    report = run(net, tmp_path / "two", "fold", auto(by="gram", average_bits=4), auto(using="kmeans", by="gram"))
    assert [stage.name for stage in report.stages] == ["input", "fold", "linear", "kmeans"]
    searches = [stage.search for stage in report.stages if stage.search is not None]
    assert [search.sensitivity.step for search in searches] == ["linear", "kmeans"]
    for number, search in enumerate(searches, start=1):
        text = (tmp_path / "two" / f"search-{number}.json").read_text()
        assert Search.model_validate_json(text) == search
    assert counts["fold"] == counts["linear"] == counts["kmeans"] == 1
    repeated = recipes.load(tmp_path / "two" / "recipe.yaml", [f"output={tmp_path / 'again'}"])
    assert [step.name for step in repeated.passes] == ["fold", "linear", "kmeans"]
    pipeline.run(repeated)
    assert (tmp_path / "two" / "effcli.safetensors").read_bytes() == (
        tmp_path / "again" / "effcli.safetensors"
    ).read_bytes()


def test_costs_are_read_back_as_they_were(tmp_path: Path) -> None:
    journal = SearchJournal(tmp_path / "journal")
    costs = [{"a.b": Cost(0.1, 1 / 3)}, {"a.b": Cost(float("inf"), 0.0)}]
    assert journal.costs("block-0", 2) is None
    journal.record_costs("block-0", costs)
    assert journal.costs("block-0", 2) == tuple(costs)
    with pytest.raises(UnfinishedError, match="of 2 variants, not 3"):
        journal.costs("block-0", 3)
    journal.begin()
    assert journal.costs("block-0", 2) is None
