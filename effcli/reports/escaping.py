"""Text from outside in a place that gives some characters a meaning: one function for each kind of place.

Names of layers, classes and files come with the input. Wherever one leaves effcli, it goes through one of these.
"""

from __future__ import annotations

import codecs
import re
from html import escape

# C0 and C1 controls, DEL, the marks and overrides of right-to-left text, line separators, lone surrogates.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HIDDEN_IN_LINES = re.compile(_HIDDEN.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
# What the tool itself prints beyond ASCII, for a terminal that has no more.
_ASCII = {"±": "+-", "×": "x", "…": "...", "–": "-", "—": "-", "−": "-", "·": "*", "→": "->", "Δ": "d"}
_ASCII |= dict(zip("▁▂▃▄▅▆▇█", "__--==##", strict=True))
ENCODING_ERRORS = "effcli-visible"


def terminal(text: str, *, lines: bool = False) -> str:
    r"""Text in which every character that a terminal would obey is visible, as `\x1b`; with `lines` newlines stay."""
    return (_HIDDEN_IN_LINES if lines else _HIDDEN).sub(lambda found: _visible(found[0]), text)


def c_string(text: str) -> str:
    r"""Text between the quotes of a C string: `\`, `"` and `?` escaped, which may begin a trigraph, the rest octal."""
    return "".join(_c_character(byte) for byte in text.encode("utf-8", "surrogatepass"))


def c_comment(text: str) -> str:
    """Text inside a C comment, which it can neither end nor seem to begin anew; printable ASCII only."""
    text = re.sub(r"[^ -~]", lambda found: _visible(found[0]), text)
    text = text.replace("??", "? ?").replace("??", "? ?")
    return text.replace("*/", "* /").replace("/*", "/ *")


def makefile(text: str) -> str:
    """Text as a value or a word of a recipe in a Makefile: no variable is expanded and no comment begins."""
    return terminal(text).replace("$", "$$").replace("#", r"\#")


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", terminal(" ".join(text.split())))


def markdown_code(text: str) -> str:
    """Text in backticks, which it cannot end; in a cell of a table too."""
    text = terminal(" ".join(text.split())).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markup(text: str) -> str:
    """Text in an element or an attribute of HTML or XML, which has no place for control characters."""
    return escape(terminal(text, lines=True))


def json_ascii(text: str) -> str:
    r"""JSON with everything beyond ASCII as `\u....`, so that it survives every encoding."""
    return re.sub(r"[^\x00-\x7e]", lambda found: _utf16(found[0]), text)


def _visible(character: str) -> str:
    code = ord(character)
    common = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
    if character in common:
        return common[character]
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def _c_character(byte: int) -> str:
    character = chr(byte)
    if character in '\\"?':
        return f"\\{character}"
    return character if 0x20 <= byte < 0x7F else f"\\{byte:03o}"


def _utf16(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _unencodable(error: UnicodeError) -> tuple[str, int]:
    """What stands in for characters that an output's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_ASCII.get(character) or _visible(character) for character in lost), error.end


codecs.register_error(ENCODING_ERRORS, _unencodable)
