"""Each kind of place shows any text and obeys none of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcli.reports import escaping

NASTY = st.text(st.sampled_from([*'ab"\\?/*%$#|`<>&\n\t', "\x1b", "\x07", "\x9b", "\x7f", "\u202e", "\u2066", "é"]))


def test_terminal_makes_visible_what_a_terminal_obeys() -> None:
    text = "a\x1b]0;x\x07b\x9b\x7f\u202e\u2066\ud800\nü"
    assert escaping.terminal(text) == r"a\x1b]0;x\x07b\x9b\x7f\u202e\u2066\ud800\nü"
    assert escaping.terminal("a\n\tb\r", lines=True) == "a\n\tb\\r"


def test_c_strings_have_no_trigraph_and_octal_escapes_of_three_digits() -> None:
    assert escaping.c_string('x??/"\\') == r"x\?\?/\"\\"
    assert escaping.c_string("é\x017") == r"\303\251\0017"


@given(NASTY)
def test_a_c_comment_ends_where_it_should(text: str) -> None:
    found = f"/* {escaping.c_comment(text)} */"
    assert found.find("*/", 2) == len(found) - 2
    assert "/*" not in found[2:]
    assert "??" not in found
    assert found.isascii() and found.isprintable()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_c_strings_are_what_they_were(tmp_path: Path) -> None:
    texts = ["x??/", '"};int a;//', "\\", "é\x1b7", "%s??'", "a\nb"]
    strings = ", ".join(f'"{escaping.c_string(text)}"' for text in texts)
    code = f"/* {escaping.c_comment(''.join(texts))} */\n#include <stdio.h>\nint main(void){{const char *const a[]={{"
    code += f"{strings}}};unsigned i;for(i=0;i<{len(texts)};++i){{fputs(a[i],stdout);putchar(0);}}return 0;}}\n"
    (tmp_path / "a.c").write_text(code, encoding="utf-8")
    subprocess.run(["cc", "-std=c99", "-Wall", "-Werror", "a.c", "-o", "a"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "a"], capture_output=True, check=True).stdout
    assert printed == b"".join(text.encode() + b"\0" for text in texts)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_makefile_expands_nothing(tmp_path: Path) -> None:
    word = escaping.makefile("a$(shell touch pwned)#b")
    (tmp_path / "Makefile").write_text(f"NAME = {word}\nall:\n\t@printf '%s' '$(NAME)'\n", encoding="utf-8")
    done = subprocess.run(["make", "-s"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "a$(shell touch pwned)#b"


def test_markdown_shows_text_as_it_is() -> None:
    assert escaping.markdown("a|b *c* <d>\n# e\x1b") == r"a\|b \*c\* \<d\> # e\\x1b"
    assert escaping.markdown_code("a`b``c") == "```a`b``c```"


def test_markup_has_no_control_characters() -> None:
    assert escaping.markup("<a>\x1b\x00") == r"&lt;a&gt;\x1b\x00"


@given(st.text())
def test_json_in_ascii_is_the_same_json(text: str) -> None:
    found = escaping.json_ascii(json.dumps([text], ensure_ascii=False))
    assert found.isascii()
    assert json.loads(found) == [text]


def test_an_encoding_without_a_character_gets_another() -> None:
    assert "1 ± 2 × é".encode("ascii", escaping.ENCODING_ERRORS) == rb"1 +- 2 x \xe9"
