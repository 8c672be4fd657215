"""A page as a browser's parser sees it: its elements, its text, the JSON for its script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

URL = re.compile(r"\b(?:https?:)?//[\w-]+\.[\w.-]+")
VOID = {"meta", "link", "input", "br", "img", "hr"}
LOADING = {"src", "srcset", "href", "data", "action", "poster", "background"}


class PageReader(HTMLParser):
    """`elements`: (tag, attributes) in order; `text`: what is shown, tables included; `scripts`: (attributes, content)."""

    def __init__(self, html: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._open: list[str] = []
        self._text: list[str] = []
        self.feed(html.decode())
        self.close()
        assert self._open == [], self._open
        self.text = " ".join("".join(self._text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._text.append(" ")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._open[-1:] != ["style"]:
            self._text.append(data)

    @property
    def ids(self) -> set[str]:
        return {attributes["id"] or "" for _, attributes in self.elements if "id" in attributes}

    @property
    def data(self) -> dict[str, Any]:
        """The JSON that the page's script reads."""
        (found,) = [text for attributes, text in self.scripts if attributes.get("type") == "application/json"]
        return dict(json.loads(found))

    def loaded(self) -> list[str]:
        """What the elements would load or lead to, without links inside of the page and data in the page."""
        values = [a[name] or "" for _, a in self.elements for name in LOADING & a.keys()]
        return [value for value in values if not value.startswith(("#", "data:"))]

    def tokens(self) -> list[tuple[str, str]]:
        """(sample_id, token's name) of every token of the token view."""
        data = self.data
        return [(found["id"], data["words"][word]) for found in data["completions"] for word in found["name"]]

    def allowed(self) -> set[str]:
        """Hashes of the scripts that the page's policy allows."""
        (policy,) = [a["content"] for tag, a in self.elements if tag == "meta" and a.get("http-equiv")]
        return set(re.findall(r"'sha256-([^']+)'", policy or ""))

    def executed(self) -> set[str]:
        """Hashes of the scripts that the page has."""
        texts = [text for attributes, text in self.scripts if not attributes.get("type")]
        return {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts}
