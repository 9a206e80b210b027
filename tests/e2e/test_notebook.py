"""The cells of the example notebook run as they stand, and what they show is there."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "notebook.ipynb"


def run(code: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of the expression that it ends with, None without one."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


@pytest.mark.slow
def test_all_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    shown = [run(code, names) for code in codes]
    tables = [value._repr_html_() for value in shown if value is not None]
    assert len(tables) == 2 and "awq" in tables[0] and "int8" in tables[1]
    printed = capsys.readouterr().out
    assert "output error" in printed and "largest difference" in printed
    assert "did you mean 'bits'?" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"lm", "cnn", "net"}
    # What is stored has no outputs: they would be of some machine, and stale.
    assert all(not cell.get("outputs") for cell in cells)
