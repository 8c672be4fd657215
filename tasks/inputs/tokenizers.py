"""Tokenizers: a byte-level one for new models, and the comparison (audit) of a student's with a teacher's.

The audit's problems and notes are part of the content digest `audit`, which enters keys: do not reword them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from storage.errors import InputError
from storage.identity import Identity, canonical_json, omit_at
from tasks.engines.hf_folder import declared, model_rows, read_generation, stop_token_ids, token_ids
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

    on_mismatch: Literal["refuse", "mask", "map"] = Field(
        "refuse",
        description="ids with different tokens, or different ends of sequence: refuse, or mask such tokens; map: an id that is a"
        " special token of both is one token under two names and stays in the loss, others are masked",
    )
    stop_ids: Literal["mask", "merge"] | None = Field(
        None,
        description="different ends of sequence: mask them (then nothing teaches when to stop), or merge the ids that end a"
        " completion of either model into one category of both distributions, on each of which samplers stop; null: as"
        " on_mismatch says",
        json_schema_extra=omit_at(None),
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


Verdict = Literal["identical", "compatible", "merged", "masked", "refused"]


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
    stop_ids: tuple[int, ...] = ()
    """Merged stop ids, first the student's own, which stands for the category; empty where nothing is merged."""
    explained: tuple[str, ...] = Field((), exclude=True)
    """For people: each difference, what is done about it, and what to set. Not stored."""

    @property
    def warnings(self) -> list[str]:
        """What the policy costs."""
        ours, theirs = set(self.student.stop_ids), set(self.teacher.stop_ids)
        ends = [token.id for token in (self.student.eos, self.teacher.eos) if token is not None]
        if self.verdict != "masked" or not set(self.masked_ids) & {*ours, *theirs, *ends}:
            return []
        return [
            "the ends of completions are masked, so nothing teaches the student when to stop, and its completions may grow to the"
            " limit; prompts.tokenizers.stop_ids: merge counts the stop ids of both models as one category"
        ]

    def record(self) -> dict[str, Any]:
        """As it is stored, and enters keys. Fields younger than version 0.1.0 are there only where they say something."""
        stored = self.model_dump(mode="json") | {"policy": json.loads(canonical_json(self.policy))}
        if not self.stop_ids:
            del stored["stop_ids"]
        return stored

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
        lines += [f"  {line}" for line in self.explained]
        if self.mismatches > len(self.mismatched):
            lines.append(f"  ... and {self.mismatches - len(self.mismatched)} more ids")
        lines += [f"  warning: {warning}" for warning in self.warnings]
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
    sides = _Side(folders[0], student, facts[0], names[0]), _Side(folders[1], teacher, facts[1], names[1])
    stops, problems = _merged_stops(*sides) if policy.stop_ids == "merge" else ((), [])
    mapped = _mapped(sides, mismatched) if policy.on_mismatch == "map" else set()
    settled = mapped | set(stops)
    found, notes, masked = _judge_ids(
        policy, facts[0], facts[1], [item for item in mismatched if item.id not in settled], bool(stops)
    )
    problems += found
    if _extended(student, teacher, facts[0], facts[1], mismatched):
        problems = [_two_vocabularies(mismatched, facts[0], facts[1])]
    if mapped:
        notes.append(f"{len(mapped)} ids are special tokens with two names: mapped, each is one token for both")
    if stops:
        notes.append(
            f"completions end with any of {list(stops)}: merged into one category, which {stops[0]} stands for"
        )
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
    notes += _harmless(student, teacher, facts[0], facts[1], bool(stops))
    verdict: Verdict = "compatible" if notes else "identical"
    if problems or masked or stops:
        verdict = "refused" if problems else "masked" if masked else "merged"
    return TokenizerAudit(
        student=facts[0], teacher=facts[1], policy=policy, verdict=verdict,
        mismatches=len(mismatched), mismatched=tuple(mismatched[:_SHOWN]),
        problems=tuple(problems), notes=tuple(notes),
        masked_ids=tuple(sorted(masked)) if verdict == "masked" else (),
        teacher_renders=bool(rendering) and policy.on_template_mismatch == "teacher",
        stop_ids=() if problems else stops,
        explained=tuple(_explained(sides, policy, mismatched[:_SHOWN], masked, mapped, set(stops))),
    )  # fmt: skip


@dataclass(frozen=True)
class _Side:
    """One model's tokenizer while it is compared."""

    folder: Path
    tokenizer: Any
    facts: TokenizerFacts
    names: dict[int, str]

    @cached_property
    def special(self) -> set[int]:
        return special_ids(self.tokenizer)

    @cached_property
    def stops(self) -> list[int]:
        """The ids that end its completions: its tokenizer's end of sequence first. InputError when there is none."""
        own = self.facts.eos
        found = stop_token_ids(self.folder, "eos", None if own is None else own.id)
        return sorted(found, key=lambda index: (own is None or index != own.id, index))

    def says(self, index: int) -> str:
        """What an id is here."""
        if index not in self.names:
            return "no token (a padding row)" if index < self.facts.rows else "no token and no row"
        name = self.names[index]
        text = self.tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        shown = repr(name) if text in (name, "\N{REPLACEMENT CHARACTER}") else f"{name!r} (text {text!r})"
        return f"{shown}, special" if index in self.special else shown


def _merged_stops(student: _Side, teacher: _Side) -> tuple[tuple[int, ...], list[str]]:
    """(the merged stop ids, the student's own first; problems). No ids where there is only one."""
    try:
        ours, theirs = student.stops, teacher.stops
    except InputError as error:
        return (), [f"prompts.tokenizers.stop_ids: merge needs the stop ids of both models, but {error}"]
    own = ours[0]
    merged = (own, *sorted({*ours, *theirs} - {own}))
    problems = []
    if own >= teacher.facts.rows:
        problems.append(
            f"prompts.tokenizers.stop_ids: merge: the student's end of sequence {student.says(own)} (id {own}) is past the"
            f" teacher's {teacher.facts.rows} rows, so no list of the teacher can name the category; pad the teacher's embedding"
            " to the student's rows, or set stop_ids: mask"
        )
    for stop, side, other in (*((i, student, teacher) for i in ours), *((i, teacher, student) for i in theirs)):
        name, whose = ("teacher", "student") if side is student else ("student", "teacher")
        if stop not in other.stops and stop in other.names and stop not in other.special:
            problems.append(
                f"prompts.tokenizers.stop_ids: merge: id {stop} ends completions of the {whose}, but is ordinary text of the"
                f" {name} ({other.says(stop)}), so counting it as a stop would be wrong inside a completion; take it out of"
                f" eos_token_id in the {whose}'s generation_config.json, or set stop_ids: mask"
            )
    return merged if len(merged) > 1 else (), problems


def _mapped(sides: tuple[_Side, _Side], mismatched: list[Mismatch]) -> set[int]:
    """Differing ids that are a special token of both, where neither name is another id of the other's."""
    student, teacher = (set(side.names.values()) for side in sides)
    return {
        item.id
        for item in mismatched
        if item.student not in teacher and item.teacher not in student
        if all(item.id in side.special and item.id in side.names for side in sides)
    }


def _extended(
    student: Any, teacher: Any, ours: TokenizerFacts, theirs: TokenizerFacts, mismatched: list[Mismatch]
) -> bool:
    """Whether one vocabulary has many tokens beside those of the other and splits text by them, or many ids differ."""
    several = [item for item in mismatched if item.student is not None and item.teacher is not None]
    limit = MASKED_SHARE_LIMIT * max(ours.tokens, theirs.tokens)
    return len(several) > limit or (len(mismatched) > limit and _split_difference(student, teacher) is not None)


def _two_vocabularies(mismatched: list[Mismatch], ours: TokenizerFacts, theirs: TokenizerFacts) -> str:
    first = mismatched[0]
    return (
        f"{len(mismatched):,} of {max(ours.tokens, theirs.tokens):,} ids stand for different tokens (the first: id {first.id},"
        f" {first.student!r} for the student, {first.teacher!r} for the teacher): these are two vocabularies, and a token of the"
        " one has no log-probability under the other; take a teacher with the student's tokenizer (distillation across"
        " tokenizers is not implemented)"
    )


def _elsewhere(student: _Side, teacher: _Side, item: Mismatch) -> str:
    """The ids under which the other tokenizer has a token's name."""
    found = []
    for whose, name, other in (("teacher", item.student, teacher), ("student", item.teacher, student)):
        at = next((index for index, token in other.names.items() if token == name), None)
        if name is not None and at is not None:
            found.append(f"{name!r} is id {at} of the {whose}")
    return f" ({', '.join(found)}; ids are not renumbered)" if found else ""


def _explained(
    sides: tuple[_Side, _Side],
    policy: TokenizerPolicy,
    shown: list[Mismatch],
    masked: set[int],
    mapped: set[int],
    stops: set[int],
) -> Iterable[str]:
    """A line per difference: what the id is in either tokenizer, what is done, and what to set."""
    student, teacher = sides
    for item in shown:
        what = f"id {item.id}: student {student.says(item.id)}; teacher {teacher.says(item.id)}"
        both_special = bool(_mapped(sides, [item]))
        if item.id in stops:
            yield f"{what}: merged with the other stop ids"
        elif item.id in mapped:
            yield f"{what}: mapped (one token under two names)"
        elif item.id in masked:
            more = "; on_mismatch: map keeps it in the loss" if both_special else _elsewhere(student, teacher, item)
            if item.student is None and not more:
                more = f"; objective.support_exclude_ids: [{item.id}] takes it out of both distributions too"
            left_out = item.id >= student.facts.rows
            yield f"{what}: " + (
                "never sampled, and no part of any distribution" if left_out else f"masked where it is sampled{more}"
            )
        else:
            choices = "mask leaves it out of the loss" + (", map keeps it" if both_special else "")
            yield f"{what}: to be settled by prompts.tokenizers.on_mismatch ({choices})"
    try:
        ends = student.stops, teacher.stops
    except InputError:
        return  # reported where they are needed
    if ends[0] == ends[1] and not stops:
        return
    for name, side in (("student", student), ("teacher", teacher)):
        yield f"completions of the {name} end with {', '.join(f'{index} {side.says(index)}' for index in side.stops)}"
    if stops:
        yield (
            "these ids are merged: one category in both distributions, which samplers stop on; rollouts keep the id that was"
            " sampled, texts end with the student's own"
        )
    elif not masked:
        yield "rollouts stop on the student's ids; prompts.tokenizers.stop_ids: merge counts those of both as one category"


def _judge_ids(
    policy: TokenizerPolicy,
    student: TokenizerFacts,
    teacher: TokenizerFacts,
    mismatched: list[Mismatch],
    ends_settled: bool,
) -> tuple[list[str], list[str], set[int]]:
    """(problems, notes, ids to mask) from the differing ids and the ends of sequence."""
    found, masked = [], {item.id for item in mismatched}
    if mismatched:
        found.append(f"{len(mismatched)} ids stand for different tokens")
    ends: set[int] = set()
    if student.eos != teacher.eos and not ends_settled:
        found.append(f"sequences end with {_name(student.eos)} for the student, {_name(teacher.eos)} for the teacher")
        ends = {token.id for token in (student.eos, teacher.eos) if token}
        masked |= ends
    if not found:
        return [], [], set()
    open_ids = bool(mismatched) and not (policy.stop_ids == "mask" and {item.id for item in mismatched} <= ends)
    open_ends = bool(ends) and policy.stop_ids != "mask"
    if policy.on_mismatch == "refuse" and (open_ids or open_ends):
        also = "; prompts.tokenizers.stop_ids: merge counts both ends as one, so that the student learns to stop"
        return (
            [
                f"{'; '.join(found)} (prompts.tokenizers.on_mismatch: mask leaves such tokens out of the loss"
                f"{also if open_ends else ''})"
            ],
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


def _harmless(
    student: Any, teacher: Any, ours: TokenizerFacts, theirs: TokenizerFacts, ends_settled: bool
) -> Iterable[str]:
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
    if ours.eos == theirs.eos and set(ours.stop_ids) != set(theirs.stop_ids) and not ends_settled:
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
