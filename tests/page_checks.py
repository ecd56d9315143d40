"""What every page must be: one file that asks for nothing, runs nothing, and is well formed, whatever text it shows."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_FETCHING = {
    "script",
    "link",
    "iframe",
    "frame",
    "img",
    "image",
    "object",
    "embed",
    "base",
    "video",
    "audio",
    "source",
    "track",
    "use",
    "form",
    "a",
}
_ADDRESSES = {
    "src",
    "href",
    "xlink:href",
    "srcset",
    "data",
    "action",
    "formaction",
    "poster",
    "background",
    "ping",
    "http-equiv",
}
_VOID = {"meta", "br", "hr", "input", "col", "wbr"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.requests: list[str] = []
        self.broken: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._seen(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._seen(tag, attrs)

    def _seen(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in _FETCHING:
            self.requests.append(f"<{tag}>")
        for name, value in attrs:
            if name in _ADDRESSES or name.startswith("on") or ("url(" in (value or "").lower() and name == "style"):
                self.requests.append(f"{tag} {name}={value!r}")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.broken.append(f"</{tag}> closes {self.open[-1:] or 'nothing'}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            if re.search(r"url\(|@import|src\(|image-set", data, re.IGNORECASE):
                self.requests.append("style sheet")
        else:
            self.text.append(data)


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    reader.broken += [f"<{tag}> is never closed" for tag in reader.open]
    return reader


def requests_of(page: str) -> list[str]:
    """Whatever in a page could make a browser fetch or run something."""
    return _read(page).requests


def broken(page: str) -> list[str]:
    """Elements that are not closed where they should be."""
    return _read(page).broken


def text_of(page: str) -> str:
    """What the page says, without its style sheet, with white space as one blank."""
    return " ".join(" ".join(_read(page).text).split())


def tags_of(page: str) -> list[tuple[str, dict[str, str | None]]]:
    """Every element with its attributes."""
    return _read(page).tags


def unreadable(page: str) -> list[str]:
    """Pictures without a text for those who can't see them, tables without headings, and a page without language or title."""
    tags = tags_of(page)
    found = [f"svg {a}" for t, a in tags if t == "svg" and not a.get("aria-label") and a.get("aria-hidden") != "true"]
    found += [f"heading {a}" for t, a in tags if t == "th" and a.get("scope") not in ("row", "col")]
    found += [
        f"box {a}" for t, a in tags if a.get("class") == "scroll" and not (a.get("aria-label") and a.get("tabindex") == "0")
    ]
    names = [t for t, _ in tags]
    found += [name for name in ("title", "main", "h1") if names.count(name) < 1]
    return found + ([] if ("html", {"lang": "en"}) in tags else ["language"])
