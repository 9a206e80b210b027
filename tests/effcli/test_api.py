"""effcli from Python: few names, all of them described, and the runs of the command line."""

from __future__ import annotations

import inspect

import effcli


def test_the_public_names_are_few_and_described() -> None:
    assert len(effcli.__all__) <= 10
    for name in effcli.__all__:
        found = getattr(effcli, name)
        assert inspect.getdoc(found), name
        if inspect.isfunction(found):
            described = inspect.getdoc(found) or ""
            assert [each for each in inspect.signature(found).parameters if f"{each}:" not in described] == []
            assert "Raises" in described
