"""Tokenizers: a byte-level one for new models, and the comparison (audit) of a student's with a teacher's.

The audit's problems and notes are part of the content digest `audit`, which enters keys: do not reword them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from storage.errors import InputError
from storage.identity import Identity
from tasks.engines.hf_folder import declared, model_rows, read_generation, token_ids
from tasks.inputs.shipped import load_pair
from tasks.inputs.shipped import load_tokenizer as load_tokenizer

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
BYTE_SPECIALS = (PAD, END, SYSTEM, USER, ASSISTANT)
BYTE_IDS = 256 + len(BYTE_SPECIALS)
"""Number of ids of the byte-level tokenizer."""
BYTE_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MASKED_SHARE_LIMIT = 0.05
"""Above this share of differing ids the vocabularies count as different, and masking is refused."""
_PROBES = (
    "The quick brown fox doesn't jump over 12 lazy dogs.\n\n  Indented,\ttabbed  and spaced ",
    "def add(a, b):\n    return a+b  # 4821+1357=6178, 3.14e-10, 1/2",
    "Größe, naïve, 東京タワー, Привет, مرحبا, 🙂🧪",
    r"\frac{x^2}{\sqrt{y}} \le \sum_{i=0}^{n} 10^{i} = \boxed{42}",
)
_SHOWN = 8


class TokenizerPolicy(Identity):
    """What to do if the student's and the teacher's tokenizers differ."""

    on_mismatch: Literal["refuse", "mask"] = Field(
        "refuse", description="ids with different tokens, or different ends of sequence: refuse, or mask such tokens"
    )
    on_template_mismatch: Literal["refuse", "student", "teacher"] = Field(
        "refuse",
        description="different chat template or automatic BOS/EOS: refuse, or whose rendering of a prompt the teacher reads",
    )


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NamedToken(_Record):
    """An id and its token."""

    id: int
    token: str


class TokenizerFacts(_Record):
    """One model's side of the comparison."""

    tokens: int
    """Number of ids: the highest id with a token, plus one."""
    rows: int
    """Rows of the model's embedding; those past `tokens` are padding."""
    eos: NamedToken | None
    bos: NamedToken | None
    pad: NamedToken | None
    stop_ids: tuple[int, ...]
    """End-of-sequence ids of the generation config (or of the model config)."""
    chat_template: str | None
    """sha256 of the template; null without one."""
    special: int
    """Number of special tokens."""


class Mismatch(_Record):
    """An id with different tokens; null if a tokenizer has none at that id."""

    id: int
    student: str | None
    teacher: str | None


Verdict = Literal["identical", "compatible", "masked", "refused"]


class TokenizerAudit(_Record):
    """Result of the comparison. `str()` gives a report."""

    student: TokenizerFacts
    teacher: TokenizerFacts
    policy: TokenizerPolicy
    mismatches: int
    mismatched: tuple[Mismatch, ...]
    """The first mismatches."""
    verdict: Verdict
    problems: tuple[str, ...]
    """Reasons for refusal, each with what to do."""
    notes: tuple[str, ...]
    """Harmless differences, and those that the policy resolves."""
    masked_ids: tuple[int, ...]
    """Completion tokens with these ids get the mask reason UNMAPPED; empty unless the verdict is `masked`."""
    teacher_renders: bool
    """Whether the teacher reads prompts in its own template (policy `teacher`) instead of the student's."""

    def require(self) -> None:
        """Raises InputError if the verdict is `refused`."""
        if self.verdict == "refused":
            raise InputError("student and teacher tokenizers do not match: " + "; ".join(self.problems))

    def __str__(self) -> str:
        lines = [f"tokenizers: {self.verdict}"]
        for name, facts in (("student", self.student), ("teacher", self.teacher)):
            named = ", ".join(
                f"{kind} {token.id} {token.token!r}" if token else f"no {kind}"
                for kind, token in (("eos", facts.eos), ("bos", facts.bos), ("pad", facts.pad))
            )
            template = facts.chat_template[:8] if facts.chat_template else "none"
            lines.append(
                f"  {name}: {facts.tokens} tokens in {facts.rows} rows, {facts.special} special, {named},"
                f" stops at {list(facts.stop_ids)}, chat template {template}"
            )
        lines += [f"  refused: {problem}" for problem in self.problems]
        lines += [f"  note: {note}" for note in self.notes]
        for item in self.mismatched:
            lines.append(f"  id {item.id}: student {item.student!r}, teacher {item.teacher!r}")
        if self.mismatches > len(self.mismatched):
            lines.append(f"  ... and {self.mismatches - len(self.mismatched)} more ids")
        return "\n".join(lines)


def build_byte_tokenizer() -> Any:
    """A transformers tokenizer whose ids 0..255 are the bytes, then pad, end, system, user and assistant tokens.

    No download, no training, no unknown token; 261 ids. It has a chat template with one token per role."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in _byte_symbols().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BYTE_SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = BYTE_TEMPLATE
    return tokenizer


def vocabulary_rows(name: str, tokenizer: Any) -> dict[str, list[Any]]:
    """Columns of the table `vocabulary`: every id with its token and text (null if it is not valid text alone)."""
    tokens = dict(sorted((index, token) for token, index in tokenizer.get_vocab().items()))
    special = special_ids(tokenizer)
    texts = tokenizer.batch_decode([[index] for index in tokens], clean_up_tokenization_spaces=False)
    return {
        "tokenizer": [name] * len(tokens),
        "id": list(tokens),
        "token": list(tokens.values()),
        "text": [None if "\N{REPLACEMENT CHARACTER}" in text else text for text in texts],
        "special": [index in special for index in tokens],
    }


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens: the named ones (eos, pad, ...) and all added tokens marked special."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def audit_tokenizers(
    student_dir: Path | str, teacher_dir: Path | str, policy: TokenizerPolicy | None = None
) -> TokenizerAudit:
    """Compares two checkpoints' tokenizers: ids, end of sequence, special tokens, template, padded rows, splitting.

    Raises InputError if a tokenizer or config.json is missing. A mismatch raises nothing; the verdict states it."""
    policy = policy or TokenizerPolicy()
    folders = Path(student_dir), Path(teacher_dir)
    student, teacher = load_pair(*folders)
    facts = tuple(_facts(folder, tokenizer) for folder, tokenizer in zip(folders, (student, teacher), strict=True))
    names = tuple({index: token for token, index in side.get_vocab().items()} for side in (student, teacher))
    mismatched = [
        Mismatch(id=index, student=names[0].get(index), teacher=names[1].get(index))
        for index in sorted(names[0].keys() | names[1].keys())
        if names[0].get(index) != names[1].get(index)
    ]
    problems, notes, masked = _judge_ids(policy, facts[0], facts[1], mismatched)
    rendering = _rendering_differences(student, teacher, facts[0], facts[1])
    if rendering and policy.on_template_mismatch == "refuse":
        problems.append(
            f"{'; '.join(rendering)} (set prompts.tokenizers.on_template_mismatch to say whose rendering the teacher reads)"
        )
    elif rendering:
        notes.append(f"{'; '.join(rendering)}: the teacher reads the {policy.on_template_mismatch}'s rendering")
    if not mismatched and (text := _split_difference(student, teacher)) is not None:
        problems.append(
            f"the same ids, but text is split differently, e.g. {text!r}; take a teacher with the same tokenizer"
        )
    notes += _harmless(student, teacher, facts[0], facts[1])
    verdict: Verdict = "refused" if problems else "masked" if masked else "compatible" if notes else "identical"
    return TokenizerAudit(
        student=facts[0], teacher=facts[1], policy=policy, verdict=verdict,
        mismatches=len(mismatched), mismatched=tuple(mismatched[:_SHOWN]),
        problems=tuple(problems), notes=tuple(notes),
        masked_ids=tuple(sorted(masked)) if verdict == "masked" else (),
        teacher_renders=bool(rendering) and policy.on_template_mismatch == "teacher",
    )  # fmt: skip


def _judge_ids(
    policy: TokenizerPolicy, student: TokenizerFacts, teacher: TokenizerFacts, mismatched: list[Mismatch]
) -> tuple[list[str], list[str], set[int]]:
    """(problems, notes, ids to mask) from the differing ids and the ends of sequence."""
    found, masked = [], {item.id for item in mismatched}
    if mismatched:
        found.append(f"{len(mismatched)} ids stand for different tokens")
    if student.eos != teacher.eos:
        found.append(f"sequences end with {_name(student.eos)} for the student, {_name(teacher.eos)} for the teacher")
        masked |= {token.id for token in (student.eos, teacher.eos) if token}
    if not found:
        return [], [], set()
    if len(mismatched) > MASKED_SHARE_LIMIT * max(student.tokens, teacher.tokens):
        return [f"{found[0]}: these are two vocabularies; take a teacher with the student's tokenizer"], [], set()
    if policy.on_mismatch == "refuse":
        return (
            [f"{'; '.join(found)} (prompts.tokenizers.on_mismatch: mask leaves such tokens out of the loss)"],
            [],
            set(),
        )
    return [], [f"{'; '.join(found)}: {len(masked)} ids are masked"], masked


def _facts(directory: Path, tokenizer: Any) -> TokenizerFacts:
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    stops = (read_generation(directory) or {}).get("eos_token_id", declared(directory, "eos_token_id"))
    template = tokenizer.chat_template
    return TokenizerFacts(
        tokens=max(names) + 1,
        rows=model_rows(directory),
        eos=_named(names, tokenizer.eos_token_id),
        bos=_named(names, tokenizer.bos_token_id),
        pad=_named(names, tokenizer.pad_token_id),
        stop_ids=tuple(token_ids(stops, directory)),
        chat_template=hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None,
        special=len(special_ids(tokenizer)),
    )


def _rendering_differences(student: Any, teacher: Any, ours: TokenizerFacts, theirs: TokenizerFacts) -> list[str]:
    found = []
    if ours.chat_template != theirs.chat_template:
        found.append("the chat templates differ")
    around = [side.convert_ids_to_tokens(side("a").input_ids) for side in (student, teacher)]
    if around[0] != around[1]:
        found.append("the tokens put around a plain text (BOS, EOS) differ")
    return found


def _split_difference(student: Any, teacher: Any) -> str | None:
    """The first probe that two tokenizers with one vocabulary split differently."""
    for text in _PROBES:
        if student(text, add_special_tokens=False).input_ids != teacher(text, add_special_tokens=False).input_ids:
            return text
    return None


def _harmless(student: Any, teacher: Any, ours: TokenizerFacts, theirs: TokenizerFacts) -> Iterable[str]:
    if ours.rows != theirs.rows:
        yield f"{ours.rows} and {theirs.rows} rows: what is past the tokens is padding"
    for side, facts in (("student", ours), ("teacher", theirs)):
        if facts.rows < facts.tokens:
            yield (
                f"the {side}'s tokenizer has {facts.tokens} ids, its model {facts.rows} rows: a prompt or stop id past the rows"
                " is refused"
            )
    if ours.pad != theirs.pad:
        yield f"padding is {_name(ours.pad)} and {_name(theirs.pad)}: no completion holds it"
    if ours.bos != theirs.bos:
        yield f"BOS is {_name(ours.bos)} and {_name(theirs.bos)}"
    if ours.eos == theirs.eos and set(ours.stop_ids) != set(theirs.stop_ids):
        yield f"generation stops at {list(ours.stop_ids)} and {list(theirs.stop_ids)}: the rollout's stop ids decide"
    both = special_ids(student) ^ special_ids(teacher)
    if both:
        yield f"{len(both)} tokens are special for one of them only (first: id {min(both)})"


def _named(names: dict[int, str], index: int | None) -> NamedToken | None:
    return None if index is None else NamedToken(id=index, token=names[index])


def _name(token: NamedToken | None) -> str:
    return f"{token.token!r} (id {token.id})" if token else "nothing"


def _byte_symbols() -> dict[int, str]:
    """The printable character by which byte-level tokenizers (GPT-2 on) write each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
