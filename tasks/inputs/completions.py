"""Tokens of a completion in the context of its prompt.

A tokenizer can put a space before the first token of a text, or join characters across its beginning, so a completion that is
tokenised alone is not what the model would write after the prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from storage.identity import canonical_json
from tasks.inputs.shipped import load_tokenizer, remembered
from tasks.inputs.templates import render

_ENDINGS = ("a", "7", "=", ":", ".", " ", "\n")
_BEGINNINGS = ("46", " 46", "word", "Word two", "\nword", "\n\n word", ".", "=", "a", "東京", "🙂")


_ANCHORS = ("\n", ".", "a", "1")
"""Texts after which a completion is tried where a token spans the end of its prompt."""


_TOKENS = 400
"""About how many tokens of the vocabulary are tried."""


class Rendering(Protocol):
    """The fields of `PrepareConfig` that say how a prompt ends."""

    @property
    def chat_template(self) -> bool: ...
    @property
    def chat_template_kwargs(self) -> dict[str, str | int | float | bool | None]: ...
    @property
    def add_generation_prompt(self) -> bool: ...
    @property
    def date(self) -> str | None: ...


def continued(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], bool]]:
    """(tokens of the completion, whether prompt and completion are one text) of each (prompt, completion).

    The two are tokenised as one text, which is cut where the prompt's tokens end. Where a token spans that place, the
    completion is tokenised after another text instead (the end-of-sequence token first), and the flag is False."""
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False).input_ids
    wholes = tokenizer([prompt + completion for prompt, completion in pairs], add_special_tokens=False).input_ids
    for (_, completion), prompt, whole in zip(pairs, prompts, wholes, strict=True):
        if whole[: len(prompt)] == prompt:
            yield whole[len(prompt) :], True
        else:
            yield _apart(tokenizer, prompt, completion), False


def _apart(tokenizer: Any, prompt: list[int], completion: str) -> list[int]:
    """Tokens of the completion after another text, the first ones that read as it does after the prompt; else those alone."""
    wanted = _text(tokenizer, prompt) + completion
    alone: list[int] = tokenizer(completion, add_special_tokens=False).input_ids
    for before in (tokenizer.eos_token or "", *_ANCHORS):
        start: list[int] = tokenizer(before, add_special_tokens=False).input_ids
        whole: list[int] = tokenizer(before + completion, add_special_tokens=False).input_ids
        tokens = whole[len(start) :]
        if whole[: len(start)] == start and _text(tokenizer, prompt + tokens) == wanted:
            return tokens
    return alone


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def depends_on_context(directory: Path, config: Rendering, memo: Path | None) -> bool:
    """Whether this tokenizer gives a completion other tokens after a prompt than alone, tried on short texts.

    The prompts end as the chat template ends them, and without one with a letter, digit, sign or space."""
    shown = [config.chat_template, config.chat_template_kwargs, config.add_generation_prompt]
    rendering = hashlib.sha256(canonical_json(json.loads(json.dumps(shown))).encode("ascii")).hexdigest()

    def compute() -> str:
        tokenizer = load_tokenizer(directory)
        pairs = list(_pairs(tokenizer, config))
        alone = tokenizer([completion for _, completion in pairs], add_special_tokens=False).input_ids
        same = (tokens == own for (tokens, _), own in zip(continued(tokenizer, pairs), alone, strict=True))
        return "" if all(same) else "depends"

    return bool(remembered(directory, memo, f"completion-{rendering[:16]}", compute))


def _pairs(tokenizer: Any, config: Rendering) -> Iterator[tuple[str, str]]:
    """Prompts and completions: short ones, and tokens of the vocabulary cut in two or put after the template's end."""
    words = _words(tokenizer)
    if not config.chat_template:
        yield from ((f"some text {ending}", beginning) for ending in _ENDINGS for beginning in _BEGINNINGS)
        yield from ((word[:cut], word[cut:]) for word in words for cut in range(1, len(word)))
    elif tokenizer.chat_template is not None:
        try:
            prompt = render(
                tokenizer,
                [{"role": "user", "content": "some text"}],
                date=config.date or "2000-01-01",
                add_generation_prompt=config.add_generation_prompt,
                arguments=config.chat_template_kwargs,
            )
        except Exception:  # reported for the row that it concerns, when prompts are rendered
            return
        yield from ((prompt, beginning) for beginning in (*_BEGINNINGS, *words))


def _words(tokenizer: Any) -> list[str]:
    """Texts of some tokens of two and more letters."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [index for index in sorted(tokenizer.get_vocab().values()) if index not in special]
    some = ids[:: max(1, len(ids) // _TOKENS)]
    texts = tokenizer.batch_decode([[index] for index in some], clean_up_tokenization_spaces=False)
    return [text for text in texts if len(text) > 1 and "\N{REPLACEMENT CHARACTER}" not in text]
