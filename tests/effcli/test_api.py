"""effcli from Python: few names, all of them described, and the runs of the command line."""

from __future__ import annotations

import inspect

import pytest

import effcli
from effcli import api
from effcli.reports.screen import Screen
from effcli.run import recipe as recipes
from effcli.run.listener import Silent


def test_the_public_names_are_few_and_described() -> None:
    assert len(effcli.__all__) <= 10
    for name in effcli.__all__:
        found = getattr(effcli, name)
        assert inspect.getdoc(found), name
        if inspect.isfunction(found):
            described = inspect.getdoc(found) or ""
            assert [each for each in inspect.signature(found).parameters if f"{each}:" not in described] == []
            assert "Raises" in described


def test_a_notebook_shows_how_a_run_goes_and_a_script_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.from_arguments("sample:lm", passes="linear")
    with api._watched(recipe, None) as listener:
        assert listener is None
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with api._watched(recipe, None) as listener:
        assert isinstance(listener, Screen)
    own = Silent()
    with api._watched(recipe, own) as listener:
        assert listener is own
