"""The folder of an export, as Make, CMake, Arduino, PlatformIO and Zephyr take it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from firmware_tools import BOARDS, STRICT, need, need_target
from integer_networks import Network

from effcli.exporters.firmware import bench, project, targets
from effcli.exporters.firmware.generate import Generated, generate
from effcli.exporters.firmware.targets import Target


def generated(single_header: bool = False) -> Generated:
    net = Network((3, 8, 6))
    net.convolution(8, padding=(1, 1, 1, 1))
    net.average_pool(kernel=(2, 2), stride=(2, 2))
    net.flatten()
    net.linear(5)
    return generate(net.finish(), "tiny", single_header=single_header)


def write(folder: Path, target: str = "cortex-m4") -> Path:
    for path, text in project.files(generated(), "tiny", targets.find(target)).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "export")


def call(*command: str | Path, at: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=at, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stdout


def test_no_placeholder_is_left(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            text = file.read_text()
            assert "@name@" not in text and "@NAME@" not in text and "NET_" not in text and "net_" not in text, file


def test_make(folder: Path) -> None:
    need("make", "gcc")
    call("make", at=folder)
    assert (folder / "build" / "libtiny.a").is_file()
    assert call("make", "-s", "test", at=folder) == "PASS\n"
    call("make", "clean", at=folder)
    assert not (folder / "build").exists()


def test_make_for_a_microcontroller(folder: Path) -> None:
    need("make", "arm-none-eabi-gcc")
    call("make", "CROSS=arm-none-eabi-", "CFLAGS=-mcpu=cortex-m4 -mthumb -O2 -ffreestanding", at=folder)
    assert "tiny_run" in call("arm-none-eabi-nm", "build/libtiny.a", at=folder)


@pytest.mark.parametrize("target", BOARDS, ids=lambda target: target.name)
def test_make_qemu(target: Target, tmp_path: Path) -> None:
    need("make")
    need_target(target)
    assert call("make", "-s", "qemu", at=write(tmp_path, target.name)) == "PASS\n"


def test_a_wrong_network_fails_in_qemu(folder: Path) -> None:
    need("make")
    need_target(targets.find("cortex-m4"))
    test = folder / "test" / "tiny_test.c"
    text = test.read_text()
    start = text.index("tiny_test_outputs")
    start = text.index("     ", start) + 5
    end = text.index(",", start)
    changed = int(text[start:end]) ^ 1
    test.write_text(f"{text[:start]}{changed}{text[end:]}")
    done = subprocess.run(["make", "-s", "qemu"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "FAIL: 1 outputs and layers differ\n"


@pytest.mark.parametrize("program", ["main", "bench"])
@pytest.mark.parametrize("target", BOARDS, ids=lambda target: target.name)
def test_no_warnings_on_the_boards(target: Target, program: bench.Program, folder: Path, tmp_path: Path) -> None:
    need(*targets.missing(target, run=False))
    bench.build(folder, "tiny", target, program, tmp_path, extra_flags=STRICT)


def test_cmake(folder: Path) -> None:
    need("cmake", "make", "gcc")
    call("cmake", "-S", ".", "-B", "build", at=folder)
    call("cmake", "--build", "build", at=folder)
    assert "100% tests passed" in call("ctest", "--test-dir", "build", at=folder)


def test_cmake_within_another_project(folder: Path, tmp_path: Path) -> None:
    need("cmake", "make", "gcc")
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(outer C)\nadd_subdirectory(../export tiny)\n"
        "add_executable(outer main.c)\ntarget_link_libraries(outer tiny)\n"
    )
    (outer / "main.c").write_text('#include "tiny.h"\nint main(void) { return tiny_run(0, 0, 0) != -1; }\n')
    call("cmake", "-S", ".", "-B", "build", at=outer)
    call("cmake", "--build", "build", at=outer)
    call("build/outer", at=outer)
    assert not (outer / "build" / "tiny" / "tiny_selftest").exists()


def test_arduino(folder: Path) -> None:
    properties = dict(line.split("=", 1) for line in (folder / "library.properties").read_text().splitlines() if line)
    assert properties["name"] == "tiny" and properties["includes"] == "tiny.h" and properties["architectures"] == "*"
    assert {"version", "author", "maintainer", "sentence", "paragraph", "category", "url"} <= properties.keys()
    assert properties["category"] == "Data Processing"
    assert (folder / "src" / "tiny.h").is_file()
    # A sketch bears the name of its folder.
    assert [sketch.stem for sketch in (folder / "examples").rglob("*.ino")] == ["hello"]


def test_the_sketch_compiles(folder: Path, tmp_path: Path) -> None:
    need("g++")
    (tmp_path / "Arduino.h").write_text(
        "#include <stdint.h>\nunsigned long micros();\n"
        "struct { void begin(long); template <class T> void print(T); template <class T> void println(T); } Serial;\n"
    )
    sketch = folder / "examples" / "hello" / "hello.ino"
    call(
        *("g++", "-std=gnu++11", "-Wall", "-Wextra", "-fsyntax-only", "-I", folder / "src"),
        *("-include", tmp_path / "Arduino.h", "-x", "c++", sketch),
        at=tmp_path,
    )


def test_platformio(folder: Path) -> None:
    library = json.loads((folder / "library.json").read_text())
    assert library["name"] == "tiny" and library["version"] == "1.0.0" and library["headers"] == "tiny.h"
    assert (folder / library["build"]["srcDir"] / "tiny.c").is_file()


def test_zephyr(folder: Path, tmp_path: Path) -> None:
    module = yaml.safe_load((folder / "zephyr" / "module.yml").read_text())
    assert module["name"] == "tiny"
    assert (folder / module["build"]["cmake"] / "CMakeLists.txt").is_file()
    assert (folder / module["build"]["kconfig"]).read_text().startswith("config TINY\n\tbool ")
    need("cmake", "make", "gcc")
    # What Zephyr's own CMake code offers to a module, in short.
    (tmp_path / "CMakeLists.txt").write_text(
        """cmake_minimum_required(VERSION 3.13)
project(stub C)
macro(zephyr_include_directories)
  foreach(given ${ARGN})
    get_filename_component(folder ${given} ABSOLUTE)
    include_directories(${folder})
  endforeach()
endmacro()
macro(zephyr_library)
  set(library zephyr_module)
endmacro()
macro(zephyr_library_sources)
  add_library(${library} STATIC ${ARGN})
endmacro()
if(ENABLED)
  set(CONFIG_TINY y)
endif()
add_subdirectory(export/zephyr module)
"""
    )
    call("cmake", "-S", ".", "-B", "build", "-DENABLED=ON", at=tmp_path)
    call("cmake", "--build", "build", at=tmp_path)
    assert (tmp_path / "build" / "module" / "libzephyr_module.a").is_file()
    shutil.rmtree(tmp_path / "build")
    call("cmake", "-S", ".", "-B", "build", at=tmp_path)
    call("cmake", "--build", "build", at=tmp_path)
    assert not (tmp_path / "build" / "module" / "libzephyr_module.a").exists()


def test_the_host_has_no_board(tmp_path: Path) -> None:
    folder = write(tmp_path, "host")
    assert not (folder / "qemu").exists() and "qemu" not in (folder / "Makefile").read_text()
    assert "QEMU" not in (folder / "README.md").read_text()


def test_one_header_comes_alone() -> None:
    found = project.files(generated(single_header=True), "tiny", targets.find("cortex-m4"))
    assert set(found) == {"tiny.h", "plan.json", "arena.svg"}
