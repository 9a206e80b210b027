#!/usr/bin/env python3
"""Carry out the steps of the Dockerfile without a container engine, in a scratch folder and an environment of its own.

Packages that this Python already has are seen there and not fetched again; effcli itself is installed from its wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IGNORED = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()]
# Folders of the image, each of which becomes one in the scratch folder.
_PLACES = re.compile(r"(?<=[\s\"(])/(?=source|wheels|work)")


def environment(folder: Path) -> dict[str, str]:
    """A new virtual environment in `folder` that sees the packages of this one, as variables for its programs."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Paths alone: what an editable installation adds by a .pth file of its own is left out.
    seen = [*site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))]
    (packages / "seen.pth").write_text("\n".join(dict.fromkeys(seen)) + "\n", encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}


def main() -> None:
    steps = re.findall(r"^(COPY|RUN) (.*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        variables = environment(scratch / "environment")
        for kind, step in steps:
            print(f"{kind} {step}", flush=True)
            if kind == "COPY" and step.startswith(". /"):
                ignored = shutil.ignore_patterns(*IGNORED)
                shutil.copytree(ROOT, scratch / step.removeprefix(". /"), symlinks=True, ignore=ignored)
            elif kind == "RUN":
                local = _PLACES.sub(f"{scratch}/", f" {step}")
                subprocess.run(["bash", "-euo", "pipefail", "-c", local], cwd=scratch, env=variables, check=True)


if __name__ == "__main__":
    main()
