#!/usr/bin/env python3
"""Make the pictures of docs/pictures: what a run prints, as SVG, and pages of reports, as PNG.

Runs effcli on its samples, so that what is shown was measured on the machine that runs this. Needs a headless Chromium
for the pages: `chromium`, `google-chrome`, or what CHROMIUM names.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
COLUMNS = 80
# GitHub and mkdocs show images at most about this wide.
PAGE_WIDTH, PAGE_HEIGHT = 1100, 1500
MOST_BYTES = 200_000

# Name of the pictures, and the command whose output and report they show.
RUNS = {
    "language": "effcli compress sample:lm --pass awq --bits 4 -o out",
    "vision": "effcli compress sample:cnn --pass int8 -o small",
}


def terminal_picture(command: str, folder: Path, picture: Path) -> None:
    """Run `command` in `folder` and draw its standard output with its colours."""
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    arguments = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(f"$ {command}\n{done.stdout}".rstrip()))
        console.save_svg(str(picture), title="effcli", theme=MONOKAI)


def page_picture(browser: str, page: Path, picture: Path) -> None:
    """Draw the upper part of an HTML page with 256 colours, so that the file stays small."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={picture}"]
    size = f"--window-size={PAGE_WIDTH},{PAGE_HEIGHT}"
    subprocess.run([browser, *options, size, page.resolve().as_uri()], check=True, capture_output=True)
    with Image.open(picture) as drawn:
        drawn.convert("RGB").quantize(256).save(picture, optimize=True)


def find_browser() -> str:
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path is not None), None)
    if found is None:
        raise SystemExit("no Chromium: install one, or name it in the variable CHROMIUM")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PICTURES, help="folder to write")
    folder = parser.parse_args().output
    browser = find_browser()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, command in RUNS.items():
            output = Path(scratch) / shlex.split(command)[-1]
            terminal_picture(command, Path(scratch), folder / f"{name}-terminal.svg")
            page_picture(browser, output / "report.html", folder / f"{name}-report.png")
    for picture in sorted(folder.iterdir()):
        size = picture.stat().st_size
        print(f"{picture.name}: {size:,} bytes")
        if size > MOST_BYTES:
            raise SystemExit(f"{picture.name} has more than {MOST_BYTES:,} bytes")


if __name__ == "__main__":
    main()
