"""A page of HTML, read as a browser would: well formed, and asking nobody for anything."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser


class Checker(HTMLParser):
    """Every tag is closed in its order; text and attributes are kept."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in {"meta", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in {"meta", "wbr"}:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text.append(data)


def checked(page: str) -> Checker:
    """The page, parsed; fails where a tag is left open, something is fetched, or a coordinate is no number."""
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|\bhref=|fetch\(|XMLHttp", page)
    numbers = (value for key, value in checker.attributes if key in {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy"})
    assert all(math.isfinite(float(value)) for value in numbers)
    return checker
