"""Hooks of mkdocs: pages that stand outside of docs/ become part of the site, and links to them lead there."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("benchmarks/README.md", "examples/README.md", "CONTRIBUTING.md")
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links as they stand in the repository to links as they stand in the site; what is not in it, to text."""
    name = page.file.src_uri
    place = posixpath.dirname(name if name in OUTSIDE else f"docs/{name}")

    def rewrite(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if ":" in target:
            return match[0]
        whole = posixpath.normpath(posixpath.join(place, target))
        inside = whole.removeprefix("docs/")
        if files.get_file_from_path(inside) is None:
            # A file of the repository that is no page, such as a recipe: named, not linked.
            return f"](#){{title='{whole}'}}" if (ROOT / whole).exists() else match[0]
        return f"]({posixpath.relpath(inside, posixpath.dirname(name) or '.')}{anchor})"

    return _LINK.sub(rewrite, markdown)
