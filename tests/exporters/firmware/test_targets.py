from __future__ import annotations

from pathlib import Path

import pytest

from effcli.errors import UnsupportedError, UserError
from effcli.exporters.firmware import targets


def test_every_target_is_found_by_its_name() -> None:
    assert next(iter(targets.TARGETS)) == "host"
    for name, target in targets.TARGETS.items():
        assert targets.find(name) is target and target.name == name
        assert (target.board is None) == (name == "host")


def test_an_unknown_target_is_likened_to_a_known_one() -> None:
    with pytest.raises(UnsupportedError, match="there is no target 'cortex-4'") as caught:
        targets.find("cortex-4")
    assert "'cortex-m4'" in caught.value.remedy


def test_what_is_missing_and_how_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    target = targets.find("rv32imc")
    assert targets.missing(target) == ("riscv64-unknown-elf-gcc", "qemu-system-riscv32")
    assert targets.missing(target, run=False) == ("riscv64-unknown-elf-gcc",)
    with pytest.raises(UserError) as caught:
        targets.require(target)
    assert "riscv64-unknown-elf-gcc and qemu-system-riscv32, not installed here" in caught.value.cause
    assert caught.value.remedy == "apt-get install gcc-riscv64-unknown-elf qemu-system-misc"


def test_the_environment_names_the_compiler_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc -m32")
    assert targets.find("host").command == ("no-such-cc", "-m32")
    assert targets.missing(targets.find("host")) == ("no-such-cc",)
    assert targets.find("cortex-m4").command == ("arm-none-eabi-gcc",)
