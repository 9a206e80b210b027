"""The export to C as a user meets it: the folder, what builds it, and bad requests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from integer_networks import Network, random_network
from pydantic import ValidationError
from small_graphs import residual

from effcli.cli import main
from effcli.errors import CheckpointError, MachineError, OutputError, UnsupportedError
from effcli.exporters import c
from effcli.exporters._target import MARK
from effcli.exporters.c import C
from effcli.exporters.firmware import check
from effcli.reports.columns import exported_size


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with an integer network."""
    net = Network((3, 10, 10))
    net.convolution(8, (3, 3), padding=(1, 1, 1, 1))
    net.convolution(8, (3, 3), groups=8, padding=(1, 1, 1, 1))
    net.mean((1, 2))
    net.linear(4)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    net.finish().save(folder)
    return folder


def test_the_folder_of_an_export(source: Path, tmp_path: Path) -> None:
    done = C(name="kws").export(source, tmp_path / "c")
    found = {str(path.relative_to(tmp_path / "c")) for path in (tmp_path / "c").rglob("*") if path.is_file()}
    assert {
        "src/kws.h",
        "src/kws.c",
        "src/kws_weights.c",
        "test/kws_test.c",
        "plan.json",
        "arena.svg",
        "Makefile",
        "CMakeLists.txt",
        "library.properties",
        "library.json",
        "zephyr/module.yml",
        "examples/hello/hello.ino",
        "README.md",
    } <= found
    assert done.nbytes == sum((tmp_path / "c" / path).stat().st_size for path in found)
    assert re.search(r"3 calibration inputs: every byte of 4 layers", done.checked)
    assert exported_size(done).endswith("kB of source text"), "it is not flash"
    assert re.match(r"RAM [\d,]+ bytes", done.remarks[0]) and re.match(r"flash about [\d,]+ bytes", done.remarks[1])
    # Nothing is left to be filled in.
    texts = {path: (tmp_path / "c" / path).read_text() for path in found}
    assert not [path for path, text in texts.items() if re.search(r"@\w+@|\bnet_|\bNET_", text)]
    assert [row.layer for row in c.C().table(tmp_path / "c")] == ["convolution0", "convolution1", "mean2", "linear3"]


def test_macros_of_the_header(source: Path, tmp_path: Path) -> None:
    C(name="kws").export(source, tmp_path / "c")
    header = (tmp_path / "c" / "src" / "kws.h").read_text()
    assert "#define KWS_INPUT_SHAPE { 10, 10, 3 }" in header
    assert "#define KWS_INPUT_BYTES 300u" in header and "#define KWS_OUTPUT_BYTES 4u" in header
    assert "#define KWS_LAYERS 4" in header
    assert re.search(r"#define KWS_INPUT_SCALE 0\.05\d*f", header)
    arena = json.loads((tmp_path / "c" / "plan.json").read_text())["ram"]["arena"]
    assert f"#define KWS_ARENA_BYTES {arena}u" in header


def test_one_header(source: Path, tmp_path: Path) -> None:
    done = C(name="kws", single_header=True).export(source, tmp_path / "c")
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {"arena.svg", "kws.h", "plan.json", MARK}
    assert "every byte of 4 layers" in done.checked


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(source), "--to", "c", "--name", "kws", "--target", "cortex-m4"]
    assert main([*command, "--max-ram", "64k", "--max-flash=256k", "-o", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert "every byte of 4 layers" in printed and "convolution0" in printed and "instructions" in printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-ram", "1k"], "bytes of RAM, and 1,024 are allowed"),
        (["--max-flash", "1"], "bytes of flash, and 1 are allowed"),
        (["--max-ram", "lots"], "must be bytes, as 65536 or 64k, not 'lots'"),
        (["--max-ram", "0"], "max_ram"),
        (["--name", "2nd"], "must be a C identifier in lower case"),
        (["--name", "Kws"], "must be a C identifier in lower case"),
        (["--target", "cortex-m5"], "cortex-m55"),
        (["--tests", "0"], "tests"),
        (["--max-rom", "64k"], "max_ram"),
        (["kws"], "unexpected argument kws"),
        (["--name", "a", "--name", "b"], "--name stands twice"),
    ],
)
def test_bad_requests(
    flags: list[str], said: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(source), "--to", "c", "-o", str(tmp_path / "c"), *flags]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_that_is_not_integer(tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    residual().save(folder)
    with pytest.raises(UnsupportedError, match="int8"):
        C().export(folder, tmp_path / "c")


def test_nothing_of_the_users_is_overwritten(source: Path, tmp_path: Path) -> None:
    C().export(source, tmp_path / "c")
    with pytest.raises(OutputError, match="exists"):
        C().export(source, tmp_path / "c")
    C().export(source, tmp_path / "c", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "main.c").write_text("int main;")
    with pytest.raises(OutputError, match="holds no export"):
        C().export(source, tmp_path / "mine", overwrite=True)
    with pytest.raises(OutputError):
        C().export(source, source, overwrite=True)


def test_wrong_code_is_not_left_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> None:
        raise MachineError("the C computes something else")

    monkeypatch.setattr(check, "compare", wrong)
    with pytest.raises(MachineError):
        C().export(source, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_without_a_compiler_the_export_says_so(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert C().export(source, tmp_path / "c").checked == "not compiled: there is no C compiler here"


def test_options_in_a_recipe_are_the_same_models() -> None:
    assert C(max_ram="64k", max_flash="1M") == C(max_ram=65536, max_flash=1048576)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        C(max_rom=1)  # type: ignore[call-arg]


def test_a_network_without_probe_is_compared_on_random_inputs(tmp_path: Path) -> None:
    network = random_network(1)
    network.probe = None
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    network.save(folder)
    assert "16 random inputs" in C().export(folder, tmp_path / "c").checked


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_names_of_layers_stay_names(tmp_path: Path) -> None:
    names = ["x??/", '}; int taken(void){return 42;} static int q[]={1}//"', "a */ int b; /*|`\x1b\\\n$(shell c)"]
    net = Network((4,))
    for name in names:
        net.linear(4)
        step = net.steps[-1]
        for key in [key for key in net.arrays if key.startswith(f"{step.name}.")]:
            net.arrays[name + key.removeprefix(step.name)] = net.arrays.pop(key)
        net.steps[-1] = step.model_copy(update={"name": name, "source": name})
    (tmp_path / "checkpoint").mkdir()
    net.finish().save(tmp_path / "checkpoint")
    C().export(tmp_path / "checkpoint", tmp_path / "c")
    code = '#include <stdio.h>\n#include "network.h"\nstatic const char *const names[] = NETWORK_LAYER_NAMES;\n'
    code += "int main(void) { int i; for (i = 0; i < 3; ++i) { fputs(names[i], stdout); putchar(0); } return 0; }\n"
    (tmp_path / "names.c").write_text(code, encoding="utf-8")
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path / 'c' / 'src'}", "names.c", "-o", "names"]
    subprocess.run(command, cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "names"], capture_output=True, text=True, check=True).stdout
    assert printed == "".join(f"{name}\0" for name in names)
    subprocess.run(["make", "-C", tmp_path / "c", "test"], capture_output=True, check=True)
    rows = [line for line in (tmp_path / "c" / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows if "linear" in row} == {10}
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", (tmp_path / "c" / "arena.svg").read_text())


@pytest.mark.parametrize("damage", [None, "{", "[]", '{"layers": 3}', '{"layers": [{"name": "a"}]}'])
def test_a_damaged_plan(tmp_path: Path, damage: str | None) -> None:
    if damage is not None:
        (tmp_path / "plan.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"plan\.json is") as caught:
        c.C().table(tmp_path)
    assert caught.value.remedy == "export it again"
