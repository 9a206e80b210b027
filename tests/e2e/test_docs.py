"""What the README and the pages of docs/ tell a reader to do, done; and that they are current and lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import documented
import pytest
import yaml
from documented import ROOT

from effcli import exporters, passes

# The packages and commands of the guide to extensions are those of the templates, which test_extending.py runs.
ELSEWHERE = ROOT / "docs" / "extending.md"
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - {ELSEWHERE})
TO_DO = [page for page in PAGES if any(block.language in ("sh", "python") for block in documented.blocks(page))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_slow(page: Path) -> bool:
    return any(block.slow for block in documented.blocks(page))


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=name(page), marks=[pytest.mark.slow] if is_slow(page) else []) for page in TO_DO]
)
def test_commands(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documented.furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert documented.carry_out(page, monkeypatch, capsys) > 0


@pytest.mark.parametrize("page", TO_DO, ids=name)
def test_what_a_page_compares_it_has_made_of_one_model(page: Path) -> None:
    made: dict[str, str] = {}
    for block in documented.blocks(page):
        for line in documented.commands(block.text) if block.language == "sh" and not block.reason else ():
            words = shlex.split(line)
            if words[:2] == ["effcli", "compress"] and "-o" in words:
                made[words[words.index("-o") + 1]] = words[2]
            elif words[:2] == ["effcli", "compare"]:
                assert made[words[2]] == made[words[3]], line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_all_commands_are_tested(page: Path) -> None:
    assert documented.loose_commands(page) == []
    reasons = {block.reason for block in documented.blocks(page)} - {""}
    assert reasons <= set(documented.REASONS)


def test_tables_of_options_are_current() -> None:
    filled = runpy.run_path(str(ROOT / "scripts" / "pages.py"))["filled"]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert filled(text) == text, f"{name(page)}: run scripts/pages.py"


def test_every_pass_and_target_has_its_place() -> None:
    listed = (ROOT / "docs" / "passes" / "index.md").read_text(encoding="utf-8")
    for each in passes.PASSES:
        page = (ROOT / "docs" / "passes" / f"{each}.md").read_text(encoding="utf-8")
        assert f"({each}.md)" in listed and f"{passes.PASSES[each].place} -->" in page
    formats = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert all(f"`{each}`" in formats for each in exporters.TARGETS)


@pytest.mark.parametrize("page", [*PAGES, ELSEWHERE], ids=name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert ":" in target or (page.parent / target).exists(), target


def test_every_page_is_in_the_site() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load(config)["nav"])))
    assert {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} <= listed


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 920


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "pictures").iterdir()), ids=lambda path: path.name)
def test_pictures_are_small(picture: Path) -> None:
    assert picture.stat().st_size < 200_000
