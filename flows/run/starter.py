"""The first config for models and prompts of one's own: `opd init` writes it, from what the files say."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from storage.errors import InputError
from tasks.inputs.records import records
from tasks.inputs.rows import COLUMNS, ROLES, USUAL_NAMES, names_of
from tasks.inputs.tokenizers import TokenizerPolicy

_LOOKED_AT = 2_000
"""Rows whose columns and number decide the sections `prompts` and `rollout`."""
_HELD_OUT = 100
_ANSWERS = ("answer", "final_answer", "ground_truth", "expected_answer", "target", "label", "solution")
"""Names under which other datasets hold what a verifier compares."""


@dataclass(frozen=True)
class PromptFile:
    """What the first rows of a prompt file say."""

    path: Path
    rows: int
    """At most `_LOOKED_AT`."""
    columns: dict[str, str]
    """Our name -> theirs, where they differ."""
    answers: bool
    answered: bool = False
    """Whether its conversations end with an assistant's turn."""

    def source(self, folder: Path, limit: int | None = None) -> str:
        """Its section, for a config in this folder; `limit`: of the first rows only."""
        path = _quoted(_relative(self.path, folder))
        more = ""
        if self.answered:
            more += ", last_turn_is_completion: true"
        if self.columns:
            more += ", columns: {" + ", ".join(f"{ours}: {_quoted(name)}" for ours, name in self.columns.items()) + "}"
        if limit is not None:
            more += f", limit: {limit}"
        return f"{{kind: file, path: {path}{more}}}" if more else path

    @classmethod
    def read(cls, path: Path) -> PromptFile:
        """InputError for a file without rows, or without a column that holds prompts."""
        seen: set[str] = set()
        rows, answered = 0, False
        conversations = {"messages", *USUAL_NAMES["messages"]}
        for _, values, names in islice(records(path, {name: name for name in COLUMNS}), _LOOKED_AT):
            rows += 1
            seen.update(names)
            turns = [values[name] for name in conversations if isinstance(values.get(name), list) and values[name]]
            answered |= any(_speaker(turn[-1]) == "assistant" for turn in turns)
        if not rows:
            raise InputError(f"{path}: no rows")
        columns = {}
        if not seen & {"prompt", "messages"}:
            theirs = next(((ours, name) for ours, names in USUAL_NAMES.items() for name in names if name in seen), None)
            if theirs is None:
                raise InputError(
                    f"{path}: none of its columns ({names_of(seen)}) is known to hold prompts; rename the one that does to"
                    " `prompt` (a text) or `messages` (a conversation)"
                )
            columns[theirs[0]] = theirs[1]
        answer = next((name for name in _ANSWERS if name in seen), None)
        if answer not in (None, "answer"):
            columns["answer"] = str(answer)
        return cls(path, rows, columns, answer is not None, answered)


@dataclass(frozen=True)
class Models:
    """What the models' folders say; nothing for a model of the Hub that is not here."""

    positions: int | None
    """The fewest that one has."""
    rows: int
    """The fewest ids that one has."""
    templates: bool
    policy: TokenizerPolicy
    """With which the two tokenizers fit."""

    @classmethod
    def read(cls, student: Path | None, teacher: Path | None) -> Models:
        """InputError where a tokenizer or config cannot be read, or where the two do not fit under any policy that keeps all
        tokens."""
        from tasks.engines.hf_folder import model_rows, positions, read_config
        from tasks.inputs.shipped import load_tokenizer

        folders = [path for path in (student, teacher) if path is not None]
        known = [limit for path in folders if (limit := positions(read_config(path))) is not None]
        return cls(
            positions=min(known, default=None),
            rows=min(map(model_rows, folders), default=1 << 20),
            templates=all(load_tokenizer(path).chat_template is not None for path in folders),
            policy=_policy(student, teacher) if student is not None and teacher is not None else TokenizerPolicy(),
        )


@dataclass(frozen=True)
class Starter:
    """What a first config is made from. `student`, `teacher`: a checkpoint folder, or OWNER/NAME@REVISION of the Hub."""

    student: str
    teacher: str
    prompts: Path
    held_out: Path | None = None
    device: str = "cpu"

    def text(self, folder: Path) -> str:
        """The config's YAML, for a file in this folder. InputError where models or prompts cannot be read, or do not fit."""
        named = {"student": self.student, "teacher": self.teacher}
        folders = [_folder(value, side) for side, value in named.items()]
        train = PromptFile.read(self.prompts)  # before the models, whose tokenizers take seconds to compare
        held_out = PromptFile.read(self.held_out) if self.held_out is not None else None
        if held_out is None and train.rows < 2:
            raise InputError(f"{train.path}: has one row, and some must be held out; give more, or --eval FILE")
        models = Models.read(*folders)
        gpu = self.device == "cuda"
        tokens, longest = (2048, 1024) if gpu else (128, 1024)
        if models.positions is not None:
            longest = min(longest, models.positions // 2)
            tokens = min(tokens, models.positions - longest)
        kept = 0 if held_out is not None else min(_HELD_OUT, max(1, train.rows // 5))
        prompts = min(128 if gpu else 64, 1 << max(0, (train.rows - kept).bit_length() - 1))
        step = min(64 if gpu else 16, prompts)
        lines = [
            "# Written by `opd init`. `opd check FILE` tests it and shows a rendered prompt; docs/config.md has every field.",
            "seed: 0",
            *(f"{side}: {{source: {_source(value, folder)}}}" for side, value in named.items()),
            "",
            "prompts:",
            f"  train: {train.source(folder)}",
        ]
        if held_out is None:
            lines += [
                f"  # the first {kept} rows of the same file: they are evaluated and not trained on; better is a file of its own",
                f"  eval: {train.source(folder, kept)}",
            ]
        else:
            lines.append(f"  eval: {held_out.source(folder)}")
        lines.append(f"  max_prompt_length: {longest}   # tokens; longer prompts are left out and counted")
        if not models.templates:
            lines.append(
                "  chat_template: false   # a tokenizer has no chat template: prompts are tokenised as they are"
            )
        if settled := models.policy.model_dump(exclude_defaults=True):
            shown = ", ".join(f"{name}: {value}" for name, value in settled.items())
            lines += ["  # the two tokenizers differ in this; docs/models.md", f"  tokenizers: {{{shown}}}"]
        lines += [
            "",
            "rollout:                 # what the student writes in a round",
            f"  prompts_per_round: {prompts}",
            f"  max_completion_length: {tokens}   # tokens",
            "  temperature: 1.0",
            "  top_p: 0.9",
            *(["  dtype: bfloat16"] if gpu else []),
            "",
            "# The teacher's likeliest ids of every token. The student's own pass is left out: this objective does not need it.",
            f"supervise: {{student: none{', dtype: bfloat16' if gpu else ''}}}",
            "",
            "objective:               # reverse KL over the teacher's list, all others as one category; more: opd objectives",
            "  estimator: direct",
            "  divergence: {kind: reverse_kl}",
            f"  support: {{kind: teacher_topk, k: {min(64, models.rows - 1)}, outside: bucket}}",
            "",
            "train:",
            f"  samples_per_step: {step}   # of {prompts} in a round: {prompts // step} optimizer steps",
            f"  lr: {'2.0e-6' if gpu else '1.0e-5'}              # raise it as long as the reverse KL falls steadily",
            f"  schedule: {{warmup_steps: {min(10, prompts // step)}}}",
            *(["  dtype: bfloat16"] if gpu else []),
            "",
            "evaluate:                # held-out prompts after every round: reverse KL, and accuracy with a verifier",
            f"  max_completion_length: {tokens}",
        ]
        if train.answers and (held_out is None or held_out.answers):
            lines.append("  verifier: {kind: math_verify}   # or exact_match, or a function of yours (docs/config.md)")
        else:
            lines += ["  greedy: false", "  verifier: null         # the prompts have no answers to compare with"]
        lines += [
            *(["  kl_prompts: 64", "  dtype: bfloat16"] if gpu else []),
            "",
            "runtime:                 # where and how it runs; no part of what the results depend on",
            f"  device: {self.device}",
            f"  threads: {os.cpu_count() or 1}",
            *(["  trainer: {activation_checkpointing: true}"] if gpu else []),
            "",
            "policy: {rounds: 10}",
            "",
        ]
        return "\n".join(lines)


def _speaker(turn: Any) -> str | None:
    """Who wrote a turn, under the field and the name of either form."""
    found = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    return ROLES.get(found, found) if isinstance(found, str) else None


def _folder(value: str, side: str) -> Path | None:
    """A checkpoint's folder; None for a model of the Hub. InputError for neither."""
    path = Path(value)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"--{side} {value}: no config.json in this folder; give the folder of a checkpoint")
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./-]+", value):
        return None
    hint = "; a model of the Hub is OWNER/NAME@COMMIT" if re.fullmatch(r"[\w.-]+/[\w.-]+", value) else ""
    raise InputError(f"--{side} {value}: no such folder{hint}")


def _source(value: str, folder: Path) -> str:
    if Path(value).is_dir():
        return _quoted(_relative(Path(value), folder))
    repo, _, revision = value.partition("@")
    return f"{{kind: hub, repo: {repo}, revision: {_quoted(revision)}}}"


def _relative(path: Path, folder: Path) -> str:
    """A path for a file in `folder`: absolute if it was given so, else relative to the folder."""
    return str(path) if path.is_absolute() else os.path.relpath(path, folder)


def _quoted(text: str) -> str:
    """A scalar of YAML's flow style; in quotes where it needs them."""
    return text if re.fullmatch(r"[A-Za-z_./][\w./-]*", text) else "'" + text.replace("'", "''") + "'"


def _policy(student: Path, teacher: Path) -> TokenizerPolicy:
    """The policy that changes least of those with which the tokenizers fit. InputError, as the default one's, where none does."""
    from tasks.inputs.tokenizers import audit_tokenizers

    own: dict[str, str] = {}
    merged = {"stop_ids": "merge"}
    rendered = {"on_template_mismatch": "teacher"}
    first = audit_tokenizers(student, teacher)
    stops_differ = set(first.student.stop_ids) != set(first.teacher.stop_ids) or first.student.eos != first.teacher.eos
    for fields in (merged, merged | rendered) if stops_differ else (own, rendered):
        policy = TokenizerPolicy.model_validate(fields)
        with suppress(InputError):
            (audit_tokenizers(student, teacher, policy) if fields else first).require()
            return policy
    first.require()
    return TokenizerPolicy()
