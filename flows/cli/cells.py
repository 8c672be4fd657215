"""Values and tokens as the cells of a table show them."""

from __future__ import annotations

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
    return "".join(_ESCAPES.get(character, character) for character in str(value))


def visible(token: str | None) -> str:
    """A token's text with its white space shown."""
    return cell(token).replace(" ", "␣")
