"""A page of HTML, read as a browser would: well formed, and asking nobody for anything."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "wbr"}


@dataclass
class Element:
    """An element of a page with what stands in it, in order."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    inside: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text below, scripts and styles left out."""
        if self.tag in {"script", "style"}:
            return ""
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())

    def all(self, tag: str = "", css: str = "", **attributes: str) -> list[Element]:
        """Every element below of this tag, with this class and these attributes, in their order."""
        return [
            each
            for each in self._below()
            if tag in ("", each.tag)
            and (not css or css in each.classes)
            and all(each.attributes.get(key) == value for key, value in attributes.items())
        ]

    def one(self, tag: str = "", css: str = "", **attributes: str) -> Element:
        """The only such element below."""
        (found,) = self.all(tag, css, **attributes)
        return found

    def _below(self) -> Iterator[Element]:
        for part in self.inside:
            if isinstance(part, Element):
                yield part
                yield from part._below()


class Checker(HTMLParser):
    """Every tag is closed in its order; text and attributes are kept. root: the page as a tree."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("")
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self._path = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        found = [(key, value or "") for key, value in attrs]
        self.attributes += found
        element = Element(tag, dict(found))
        self._path[-1].inside.append(element)
        if tag not in _VOID:
            self.open.append(tag)
            self._path.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()
            self._path.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag
        self._path.pop()

    def handle_data(self, data: str) -> None:
        self._path[-1].inside.append(data)
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text.append(data)


def checked(page: str) -> Checker:
    """The page, parsed; fails where a tag is left open, something is fetched, or a coordinate is no number.

    A link may lead to a place within the page alone, and to one that is there.
    """
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|fetch\(|XMLHttp", page)
    places = [value for key, value in checker.attributes if key == "id"]
    assert len(places) == len(set(places))
    assert all(value[:1] == "#" and value[1:] in places for key, value in checker.attributes if key == "href")
    numbers = (value for key, value in checker.attributes if key in {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy"})
    assert all(math.isfinite(float(value)) for value in numbers)
    return checker
