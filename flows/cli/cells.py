"""Values and tokens as the cells of a table show them."""

from __future__ import annotations

import re

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and line feed, and marks that reorder a line: a terminal would obey them."""
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def cell(value: object) -> str:
    """A value of a table, with thousands apart and line breaks shown."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return harmless("".join(_ESCAPES.get(character, character) for character in str(value)))


def harmless(text: str) -> str:
    """A text for a terminal: control characters of a model's or a user's text as `\\x1b`. Line breaks and tabs stay."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def visible(token: str | None) -> str:
    """A token's text with its white space shown."""
    return cell(token).replace(" ", "␣")
