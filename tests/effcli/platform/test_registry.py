from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import packages
import pytest

from effcli import exporters, passes
from effcli.cli import main
from effcli.errors import RecipeError, UserError
from effcli.layers.contract import LayerPass, Outcome
from effcli.platform.registry import Entry, Registry
from effcli.run import recipe

KINDS = "LayerPass or NetworkPass or CutPass or TrainPass or SearchPass or ParameterPass"
PASS = '''
from typing import ClassVar

from effcli.layers.contract import LayerPass, Outcome, Pass


class Halve(LayerPass):
    """Halve each weight.

    And no more.
    """

    def apply(self, layer, seen):
        return Outcome(layer.weight / 2)


class Named(Halve):
    """Not this."""

    summary: ClassVar[str] = "Another line."


class Abstract(LayerPass):
    """Lacks its method."""


class Neither(Pass):
    """Of no kind."""


class NotOne:
    pass
'''

Offer = Callable[..., Path]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Installs a package that offers passes or export targets by name and place, `module.py` beside them."""

    def make(package: str, text: str = PASS, group: str = "effcli.passes", module: str = "", **points: str) -> Path:
        module = module or package.replace("-", "_")
        packages.install(tmp_path, package, {group: points}, {f"{module}.py": text})
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return tmp_path

    return make


def test_what_other_packages_offer(offer: Offer) -> None:
    offer("effcli-halving", halve="effcli_halving:Halve", named="effcli_halving:Named", nowhere="effcli_halving:Other")
    known = passes.REGISTRY.known()
    assert list(known)[: len(passes.PASSES)] == list(passes.PASSES)
    assert known["halve"] == Entry("effcli_halving:Halve", "Halve each weight.", package="effcli-halving")
    assert known["named"].summary == "Another line." and known["nowhere"].summary == ""
    assert "effcli_halving" not in sys.modules
    found = passes.load("halve")
    assert issubclass(found, LayerPass) and found.__name__ == "Halve"
    step = recipe.check({"model": "sample:lm", "passes": [{"halve": {"ignore": ["*.o_proj"]}}]}).passes[0]
    assert type(step.config) is found and step.package == "effcli-halving"
    assert recipe.from_arguments("sample:lm", passes=[found()]).passes[0].name == "halve"
    with pytest.raises(RecipeError, match=r"halve has no option 'ignor'\ndid you mean 'ignore'"):
        recipe.check({"model": "sample:lm", "passes": [{"halve": {"ignor": []}}]})
    with pytest.raises(RecipeError, match="did you mean 'halve'"):
        passes.load("halv")


def test_summaries_are_read_and_nothing_is_imported(offer: Offer) -> None:
    site = offer("effcli-loud", f"raise SystemExit('imported')\n{PASS}", loud="effcli_loud:Halve")
    inside = site / "outer" / "inner.py"
    inside.parent.mkdir()
    (inside.parent / "__init__.py").write_text("raise SystemExit('imported')")
    inside.write_text(PASS)
    (site / "effcli_loud-1.0.dist-info" / "entry_points.txt").write_text(
        "[effcli.passes]\nloud = effcli_loud:Halve\ninner = outer.inner:Named\n[effcli.exporters]\nhalves = outer:Out\n"
    )
    code = (
        "import sys, effcli.cli as c; c.main(['passes']); print(*[name in sys.modules for name in ('torch', 'outer')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "150"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    for words in (("loud", "Halve each weight.", "effcli-loud"), ("inner", "Another line."), ("halves", "effcli-loud")):
        assert any(all(word in line for word in words) for line in done.stdout.splitlines()), words


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        ("absent.package:Halve", "cannot be imported from absent.package:Halve: ModuleNotFoundError"),
        ("effcli_faulty:Halv", "cannot be imported from effcli_faulty:Halv: AttributeError"),
        ("effcli_faulty", "cannot be imported from effcli_faulty: "),
        (
            "effcli_faulty:NotOne",
            f"is not a {KINDS}: effcli_faulty:NotOne",
        ),
        (
            "effcli_faulty:Neither",
            f"is not a {KINDS}: effcli_faulty:Neither",
        ),
        ("effcli_faulty:Abstract", "is not complete: effcli_faulty:Abstract lacks apply"),
    ],
)
def test_what_cannot_serve(place: str, cause: str, offer: Offer, capsys: pytest.CaptureFixture[str]) -> None:
    offer("effcli-faulty", own=place)
    with pytest.raises(UserError) as raised:
        passes.load("own")
    assert raised.value.cause.startswith("the pass 'own' of the package effcli-faulty ") and cause in raised.value.cause
    assert raised.value.remedy == "pip install --upgrade effcli-faulty, or pip uninstall effcli-faulty"
    assert main(["plan", "sample:lm", "--pass", "own"]) == 1
    said = capsys.readouterr().err
    assert cause in said and "pip uninstall effcli-faulty" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "fault", ["raise RuntimeError('no licence')", "import sys; sys.exit(3)", "class Halve:", "1/0"]
)
def test_code_that_fails(fault: str, offer: Offer, capsys: pytest.CaptureFixture[str]) -> None:
    offer("effcli-failing", fault, own="effcli_failing:Halve")
    assert main(["passes", "show", "own"]) == 1
    assert "error: the pass 'own' of the package effcli-failing cannot be imported" in capsys.readouterr().err
    assert main(["passes"]) == 0


def test_a_pass_that_fails(offer: Offer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offer("effcli-fragile", PASS.replace("layer.weight / 2", "layer.wait / 2"), own="effcli_fragile:Halve")
    arguments = ["compress", "sample:cnn", "--pass", "own", "--no-eval", "--quiet", "-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "error: the package effcli-fragile failed: AttributeError: 'Layer' object has no attribute 'wait'" in said
    assert "with --debug for the traceback, and report it to those who make effcli-fragile" in said


def test_own_names_win(offer: Offer, capsys: pytest.CaptureFixture[str]) -> None:
    offer("effcli-halving", awq="effcli_halving:Halve")
    offer("effcli-writing", "", "effcli.exporters", onnx="effcli_writing:Out")
    said = "the pass 'awq' is effcli's own; that of effcli-halving is not used"
    assert passes.load("awq").__module__ == "effcli.passes.quantize.awq"
    assert recipe.check({"model": "sample:lm", "passes": ["awq"]}).passes[0].clash == said
    assert main(["passes"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown and "the export target 'onnx' is effcli's own; that of effcli-writing is not used" in shown
    assert exporters.load("onnx").__module__ == "effcli.exporters.onnx"
    assert main(["passes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["awq"] == passes.PASSES["awq"].summary


def test_two_packages_with_one_name(offer: Offer) -> None:
    offer("effcli-one", own="effcli_one:Halve")
    offer("effcli-two", own="effcli_two:Halve")
    assert passes.REGISTRY.clashes() == {"own": "effcli-one and effcli-two both have a pass 'own'; none can be used"}
    with pytest.raises(UserError, match="effcli-one and effcli-two both have a pass 'own'"):
        passes.load("own")


def test_a_pass_without_a_name() -> None:
    class Local(LayerPass):
        def apply(self, layer: object, seen: object) -> Outcome:
            raise NotImplementedError

    with pytest.raises(RecipeError, match=r"the pass \S*:\S*Local has no name .*\n.*effcli.passes"):
        recipe.from_arguments("sample:lm", passes=[Local()])


def test_a_module_without_a_source_has_no_summary(offer: Offer) -> None:
    offer("effcli-odd", builtin="sys:Halve", deep="sys.deep:Halve", empty=":Halve", dots="..:Halve")
    registry: Registry[object] = passes.REGISTRY  # type: ignore[assignment]
    assert {registry.known()[name].summary for name in ("builtin", "deep", "empty", "dots")} == {""}
