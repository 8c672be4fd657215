"""Changes to a completion's text that leave its answer as it is: what a verifier should not care about.

A function takes a text and returns another one, or None where it does not apply, or where in doubt: a text that may speak of its
lines by number, place or pronoun keeps numbers and order. EST-PRM ("Stress-Testing Process Reward Models
Before They Become Load-Bearing", 2026) tests process reward models with inserted steps, another order of steps and marks of
confidence. These are ours; no model paraphrases, and the same text gives the same result. None touches the answer part: from the
first line that states an answer (`\\boxed`, `####`, the word answer, `</think>`) to the end; where no line does, the last line
that is not empty. A text with a fenced block of code is left alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

NEUTRAL = "Let me go through this with care."
"""A line that says nothing about the answer."""
CERTAIN = " I am sure of this."
SHIFT = 10
"""By how much step numbers rise."""

_ANSWER = re.compile(r"\\boxed|####|\banswers?\b|</think>", re.IGNORECASE)
_STEP = re.compile(
    r"(?P<before>\s*(?:[*#]+\s*)?(?:step\s+)?\(?)(?P<number>\d{1,3})(?P<after>[.):]\**\s)", re.IGNORECASE
)
_LABELLED = (
    r"(?:steps?|points?|items?|parts?|lines?|rows?|entr(?:y|ies)|equations?|eqs?|eqns?|expressions?|formulas?|formulae|rules?|"
    r"facts?|claims?|cases?|statements?|conditions?|lemmas?|results?|sentences?|numbers?|nos?)"
)
_NUMBERED = r"(?:\d|one|two|three|four|five|six|seven|eight|nine|ten)"
_ORDINAL = (
    r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|\d+(?:st|nd|rd|th)|last|final|next|previous|"
    r"preceding|following|earlier|other|same)"
)
_MENTION = re.compile(
    rf"\b{_LABELLED}\b\.?\s*[(\[#]?\s*{_NUMBERED}"  # step 2, equation (1), eq. 1, line two
    r"|[(\[]\d{1,3}[)\]]|(?<!#)#\d"  # (1), [1], #1
    rf"|\b{_ORDINAL}\s+(?:\w+\s+)?{_LABELLED}\b"  # the first line, the second of these steps
    r"|\b(?:former|latter|above|below|aforementioned|previously|preceding)\b",
    re.IGNORECASE,
)
"""A line of the text that is spoken of by its number or its place."""
_POINTING = re.compile(
    r"\b(?:this|these|those)\b|\b(?:as|by|from|with|using|of|in|on|after|before|for|to|into)\s+(?:that|it|them|both|which)\b",
    re.IGNORECASE,
)
"""A pronoun that may stand for a line."""
_BRACKETED = re.compile(r"\([^()]*\)")
_FOLLOWS = re.compile(
    r"(?:so|then|thus|hence|therefore|this|that|these|those|it|its|now|next|finally|which|and|but|because|since|again|first|"
    r"second|third|last|adding|we get)\b",
    re.IGNORECASE,
)
"""How a line begins that may build on the one before it."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_WORD = re.compile(r"[^\W\d_]+")
_COMMON = frozenset(
    {"step", "steps", "with", "from", "that", "this", "have", "each", "were", "them", "what", "when", "where", "find"}
)
"""Words that two lines may share without one being about the other."""


def parts(text: str) -> tuple[list[str], str]:
    """(the lines before the answer part, with their line ends; the answer part)."""
    lines = text.splitlines(keepends=True)
    stated = [place for place, line in enumerate(lines) if _ANSWER.search(line)]
    filled = [place for place, line in enumerate(lines) if line.strip()]
    end = stated[0] if stated else filled[-1] if filled else 0
    return lines[:end], "".join(lines[end:])


def renumber(text: str) -> str | None:
    """Numbered steps get numbers that are 10 higher. Applies to at least two steps whose numbers count up by one, in a text that
    has no table and may speak of no line: by number or place ("step 2", "equation 1", "using 1)", "from 2", "the first line"), or
    by a pronoun ("this")."""
    body, answer = _body(text)
    found = [_STEP.match(line) for line in body]
    numbers = [int(match["number"]) for match in found if match]
    if len(numbers) < 2 or any(after != before + 1 for before, after in itertools.pairwise(numbers)):
        return None
    rest = [line[match.end() :] if match else line for line, match in zip(body, found, strict=True)]
    said = [*rest, *answer.splitlines()]
    if any(_tabular(line) or _MENTION.search(line) or _POINTING.search(line) or _names(line, numbers) for line in said):
        return None
    return "".join(_numbered(line, match) for line, match in zip(body, found, strict=True)) + answer


def _names(line: str, numbers: Sequence[int]) -> bool:
    """Whether a line may name a step by its number alone: "using 1)", "by 2 and 3"."""
    of = "|".join(map(str, numbers))
    plain = _BRACKETED.sub("", line)
    return bool(
        re.search(rf"(?<![\w.(])(?:{of})\)", plain)
        or re.search(rf"\b(?:using|by|from|with|see|per|via|combining)\s+(?:{of})\b(?!\.\d)", plain, re.IGNORECASE)
    )


def _tabular(line: str) -> bool:
    """Whether a line looks like a row of a table, whose entries belong to their columns."""
    return line.count("|") >= 2 or "\t" in line.strip()


def _numbered(line: str, match: re.Match[str] | None) -> str:
    if match is None:
        return line
    return f"{match['before']}{int(match['number']) + SHIFT}{match['after']}{line[match.end() :]}"


def reorder(text: str) -> str | None:
    """The first two neighbouring lines that do not depend on each other change places; step numbers stay where they are. Lines
    are taken as independent if they share no number, no variable and no word of four letters or more that is not common, neither
    has a pronoun that may stand for a line, and neither the second nor the line after it begins like a conclusion. Applies where
    there is such a pair, in a text that has no table and speaks of no line by its number or place."""
    body, answer = _body(text)
    split = [_split(line) for line in body]
    if any(_tabular(line) for line in body) or any(
        _MENTION.search(line) for line in (*(said for _, said, _ in split), *answer.splitlines())
    ):
        return None
    for place, (one, other) in enumerate(itertools.pairwise(split)):
        after = next((said for _, said, _ in split[place + 2 :] if said), answer)
        if _independent(one[1], other[1]) and not _POINTING.search(after) and not _FOLLOWS.match(after.lstrip()):
            split[place], split[place + 1] = (one[0], other[1], one[2]), (other[0], one[1], other[2])
            return "".join("".join(line) for line in split) + answer
    return None


def _split(line: str) -> tuple[str, str, str]:
    """(step number and white space, what it says, white space at its end)."""
    match = _STEP.match(line)
    start = match.end() if match else len(line) - len(line.lstrip())
    said = line[start:].rstrip()
    return line[:start], said, line[start + len(said) :]


def _independent(one: str, other: str) -> bool:
    if not one or not other or one == other or _FOLLOWS.match(other) or any(map(_POINTING.search, (one, other))):
        return False
    if one.startswith(("<", "|")) or other.startswith(("<", "|")) or one.endswith(":"):
        return False
    terms = [_terms(line) for line in (one, other)]
    return bool(terms[0]) and bool(terms[1]) and not terms[0] & terms[1]


def _terms(line: str) -> set[str]:
    words = {word.casefold() for word in _WORD.findall(line)}
    kept = {word for word in words if (len(word) == 1 and word not in "ai") or (len(word) > 3 and word not in _COMMON)}
    return kept | set(_NUMBER.findall(line))


def pad(text: str) -> str | None:
    """A neutral line before the text, and one after each of its lines outside the answer part. A text that begins with a
    mark such as `<think>` keeps it in front. Applies where there is a place for a line."""
    body, answer = _body(text)
    padded = "".join(line + (NEUTRAL + "\n" if line.strip() else "") for line in body)
    opening = "" if text.startswith("<") or not text.strip() else NEUTRAL + "\n"
    return opening + padded + answer if answer.strip() and (opening or body) else None


def confident(text: str) -> str | None:
    """A mark of confidence after every line that ends in a full stop. Applies where there is one before the answer part."""
    body, answer = _body(text)
    marked = [re.sub(r"\.(\s*)$", lambda found: f".{CERTAIN}{found[1]}", line) for line in body]
    return None if marked == body else "".join(marked) + answer


def _body(text: str) -> tuple[list[str], str]:
    """`parts`; nothing where the text is not to be changed."""
    return ([], "") if "```" in text else parts(text)


TRANSFORMATIONS: dict[str, Callable[[str], str | None]] = {
    "renumber": renumber,
    "reorder": reorder,
    "pad": pad,
    "confident": confident,
}
"""By name."""
