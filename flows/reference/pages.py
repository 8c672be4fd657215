"""The reference pages, generated from the schema and the catalogue.

python -m flows.reference.pages config > docs/config.md
python -m flows.reference.pages objectives > docs/objectives.md
python -m flows.reference.pages signals > docs/signals.md

Modules named after the page are imported as plugins first, so that the page has what they register."""

from __future__ import annotations

import json
import sys
from typing import Any

from flows.experiment import Experiment
from flows.reference.catalogue import Entry, axes, catalogue
from flows.study.spec import Study
from storage.schemas import type_name
from tasks.engines.teacher import TEACHERS
from tasks.plugins import load_plugins
from tasks.signals import SIGNALS, Signal

INTRO = """# Config reference

Generated from the schema by `python -m flows.reference.pages config > docs/config.md`; a test compares the two. Everything above
`runtime` is identity: it determines results and enters the keys. `runtime` sets where and how to run, `policy` how long,
`trackers` where metrics go besides, `hooks` which commands of yours are called; all of these may change between two calls of a
run. `base: other.yaml` merges a config over another one; `--set a.b=c` overrides a field,
`--set 'a."b.c".d=e'` one below a name with dots.

Relative paths in a file are relative to that file (also in a base and in a study), those of `--set` to the working directory. A
path in a file that exists only relative to the working directory is refused, and so is one that exists in both places.

Short forms: a kind's name stands for a mapping with that kind (`divergence: jsd`, `support: full`, `verifier: math_verify`), a
path for a section whose only required field is a path (`prompts.train: data.jsonl`, `student: /models/Qwen3-1.7B`). They give the
same keys as the long form. Files are YAML in UTF-8; a key that occurs twice in a mapping is refused. A field of text takes a
number as it is written (`revision: 010`), and a quoted number stays text unless the field is a number.
"""

STUDY = """# A study's file

The input of `opd study`; see configs/study.yaml.
"""


def reference() -> str:
    """Markdown: a section per model of the config, a line per field."""
    schema = Experiment.model_json_schema()
    models: dict[str, Any] = schema["$defs"]
    sections = [INTRO, _section("Experiment", schema)]
    sections += [_section(name, model) for name, model in models.items() if name != "Fork" and "properties" in model]
    study = Study.model_json_schema()
    sections += [STUDY, _section("Study", study), *(_section(name, model) for name, model in study["$defs"].items())]
    return "\n".join(sections).rstrip() + "\n"


def _section(name: str, model: dict[str, Any]) -> str:
    about = " ".join((model.get("description") or "").split("\n\n")[0].split())
    lines = [f"## {name}", "", about, "", "| field | type | default | meaning |", "|---|---|---|---|"]
    required = set(model.get("required", ()))
    for field, info in model["properties"].items():
        default = (
            "required"
            if field in required
            else f"`{json.dumps(info['default'])}`"
            if "default" in info
            else "see there"
        )
        if len(default) > 60:
            default = "see there"
        cells = (f"`{field}`", _type(info), default, info.get("description", ""))
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _type(info: dict[str, Any]) -> str:
    if "$ref" in info:
        name = info["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})" if name != "Fork" else name  # no section: users do not write it
    if "const" in info:
        return f"`{info['const']}`"
    if "enum" in info:
        return " or ".join(f"`{value}`" for value in info["enum"])
    for union in ("anyOf", "oneOf"):
        if union in info:
            return " or ".join(_type(part) for part in info[union])
    kind = info.get("type", "any")
    if kind == "array":
        return f"list of {_type(info['items'])}" if "items" in info else "list"
    return str(kind) + _range(info)


def _range(info: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {info[key]:g}" for key, sign in words.items() if key in info]
    return f" {', '.join(limits)}" if limits else ""


OBJECTIVES = """# Objectives

Generated from the code and the recipes by `python -m flows.reference.pages objectives > docs/objectives.md`; a test compares the
two. Each name links to its equation, and each equation to its code. `opd objectives` prints the same on a terminal.

`p` is the live student, `p_old` the student that wrote the rollouts, `q` the teacher, `y` the sampled token, `u = q/p`, `S` the
support, `rho = p(y) / p_old(y)`, `M` a gate. `A = m A_r + delta` is an advantage (constant in the gradient): `A_r` from rewards,
`delta` from student and teacher. Temperature 1, natural logarithms. The loss is the sum over the unmasked tokens of an
optimizer step divided by their number (`normalisation: token`).

With `estimator: credit` a method is one choice on each factor of `a PPO(rho, m A + delta) + b w c D(q', p)`: A the reward's
advantage, m a scale, delta an addition (with a return), a and b a route, w a divergence weight, c = min(is_clip, rho), q' a
target; `d = log q(y) - log p(y)`. The family of SRPO (2604.02288): recipes name the method, its row, and what of it is ours.

A method is one choice on each axis. Entries marked [experimental] are implemented from summaries of their paper only, or are our
own and untried at scale.

TRB (2605.31159) is the recipe [trb](#recipe-trb): the loss of [rethinking-opd](#recipe-rethinking-opd) on rollouts of the
behaviour [trb](#behaviour-trb). Ours beyond the paper: exact sampling by drafting and verifying instead of token by token; the
ids that end a completion for either model are one category of the blend, written as the student's own; epsilon is annealed over
optimizer steps, and a round takes the value at its first step. Ids that the token audit masks because they are another token to
the teacher, or none, have probability 0 in `q`, which is renormalised over the others; `p` keeps them. So `mu` has none of them
where b > 0, and leaving them out costs at least `-log(1 - p(those ids))` of epsilon: where that is more than epsilon, b is 0 and
`mu` is the student. A sampled estimator can train on blended or truncated rollouts
with `train.importance_correction: {kind: biased_truncated}`, whose weights cannot see outside a nucleus.

TrOPD's guidance (2606.01249) is the recipe [tropd-guided](#recipe-tropd-guided), on rollouts of the behaviour
[teacher_prefix](#behaviour-teacher-prefix). GKD's mixture (2306.13649) and off-policy distillation are
[gkd-mixed](#recipe-gkd-mixed) and [off-policy](#recipe-off-policy), on rollouts of the behaviour
[mixture](#behaviour-mixture). Several teachers: [teachers.md](teachers.md). Off-policy training on given text is
[sft](#estimator-sft), used by warm-ups.

PBSD (2605.05040) is the recipe [pbsd](#recipe-pbsd): the estimator [pairs](#estimator-pairs), whose loss is a function of two
whole completions, on rollouts of the behaviour [pairs](#behaviour-pairs).
"""


def objectives() -> str:
    """Markdown: methods first, then every choice on every axis."""
    entries = catalogue()
    places = {f"{entry.axis} {entry.label}": f"{entry.axis} [{entry.label}](#{entry.anchor})" for entry in entries}
    parts = [OBJECTIVES]
    for axis in axes(entries):
        chosen = [entry for entry in entries if entry.axis == axis]
        title = "Methods" if axis == "recipe" else f"{axis[0].upper()}{axis[1:]}"
        lines = [f"## {title}", "", "| name | description | paper |", "|---|---|---|"]
        lines += [_row((f"[{e.label}](#{e.anchor})", e.summary + _mark(e), _papers(e))) for e in chosen]
        parts.append("\n".join(lines) + "\n")
        parts += [_entry(entry, places) for entry in chosen]
    return "\n".join(parts).rstrip() + "\n"


def _entry(entry: Entry, places: dict[str, str]) -> str:
    path, _, name = entry.code.partition(" ")
    links = [f"code: [{path}](../{path}), `{name}`"]
    if entry.file:
        links.insert(0, f"recipe: [{entry.file}](../{entry.file})")
    if entry.uses:
        links.append("made of: " + ", ".join(places[use] for use in entry.uses))
    about = "" if entry.about == entry.summary else entry.about.strip() + "\n\n"
    equations = "\n".join(f"    {equation}" for equation in entry.equations)
    lines = [f'<a id="{entry.anchor}"></a>', f"### {entry.label}{_mark(entry)}", "", about + equations, ""]
    lines += ["; ".join(links) + (f"; paper: {_papers(entry)}" if entry.papers else ""), ""]
    if entry.fields and entry.axis != "recipe":
        lines += ["| field | default | meaning |", "|---|---|---|"]
        lines += [_row((f"`{f.name}`", f"`{f.default}`", f.meaning)) for f in entry.fields] + [""]
    return "\n".join(lines)


def _mark(entry: Entry) -> str:
    return " [experimental]" if entry.experimental else ""


def _papers(entry: Entry) -> str:
    return ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in entry.papers)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


SIGNALS_PAGE = """# Signals

Written from the code by `python -m flows.reference.pages signals > docs/signals.md`; a test holds it true. A signal is a table
beside the rollouts of a round: one row per sample, in every column one entry per completion token (T; lists of K candidates
where it is a list). An objective names the signals that it needs; `supervise` makes those that are missing, all in one pass of
the models. Columns are in the views `supervision` (with the prefix shown) and, but for lists, `tokens` of `opd query`.
"""
LISTS_PAGE = """## How lists are stored

`supervise.encoding` decides it for the lists of `teacher_topk` and `student_topk`. Readers, `opd query` and the digests of rows
see the columns above in every case; bytes, errors and speeds are measured in [performance.md](performance.md#cache).

| encoding | log-probabilities | error | bytes per token, K = 64, SmolLM2 |
|---|---|---|---|
| `exact` | float32 | none | 490 |
| `compact` | float16 | 2^-11 of the value | 231 |
| `packed` | whole steps of 1/64 nats | 1/64 nats; KL at most 3.1e-5 nats | 149 |

`packed` keeps ids and counts exactly, and the mass of list and tail together: the tail stays 1 minus the list. Its files have the
columns `packed_ids` and `packed_steps` (the entries of a sample's tokens, one after another, `valid` of each token), and
`packed_tail` and `packed_origin` (one per token). To read them without this program: a token's first number in `packed_steps` is
its first entry's steps, each later number is the difference from the entry before; a log-probability is `origin - steps / 64`,
or -inf at 32,767 steps. In `student_topk` the last three columns exist for both models (`packed_teacher_steps`). Lists of a
plugin's signal are packed where `topk_table` makes its rows and its table has these columns.

`supervise.tail_mass` ends the teacher's list of a token at the fewest entries (one at least, K at most) that leave no more than
this mass outside; what is cut off is added to `tail_logmass`. A loss may assume of such lists what it may of lists of K: sorted,
complete with their tail. It may not assume a length, nor that what is outside is unlikely for the student. `outside: bucket`
compares the rest as one category and needs nothing else; an f-divergence (KL is one) over these fewer categories is never above
that over K. `renormalize`, `drop` and `full` would change meaning with the length (a renormalised list of one entry compares
nothing), so a config with these and `tail_mass` is refused. Lists of the student are never cut.
"""
_EXAMPLE_K = 8


def signals() -> str:
    """Markdown: every registered signal, and the backends that can answer for the teacher."""
    parts = [SIGNALS_PAGE, *(_signal(signal) for _, signal in sorted(SIGNALS.items())), LISTS_PAGE]
    lines = [
        "## Teacher backends",
        "",
        "How the teacher is asked: `supervise.teacher.kind`. An objective whose signals need more than",
    ]
    lines += ["a backend can give is refused when the config loads.", ""]
    lines += [
        "| kind | what it is | entropy | longest list | given ids | whole distribution |",
        "|---|---|---|---|---|---|",
    ]
    for kind, cls in TEACHERS.classes.items():
        can = cls.capabilities
        about = " ".join((cls.__doc__ or "").split())
        given, whole = ("yes" if can_it else "no" for can_it in (can.given_ids, can.full_distribution))
        longest, entropy = "any" if can.top is None else str(can.top), can.entropy if cls.asked else "no"
        lines.append(_row((f"`{kind}`", about, entropy, longest, given, whole)))
    return "\n".join([*parts, *lines]).rstrip() + "\n"


def _signal(signal: Signal) -> str:
    k = _EXAMPLE_K if signal.listed else None
    wanted = signal.wanted(k, {"temperature": 1.0, "top_p": 1.0, "top_k": 0})
    lines = [f"## {signal.name}", "", " ".join((type(signal).__doc__ or "").split()), ""]
    lines += [f"asked of the student: {wanted.student}  ", f"asked of the teacher: {wanted.teacher}  "]
    size = f"{signal.bytes_per_token(k)} bytes per token before compression" + (f" at k = {k}" if k else "")
    lines += [f"version {signal.version}; kept by `policy.retain.{signal.retention}`; {size}", ""]
    lines += ["| column | type | meaning |", "|---|---|---|"]
    prefix = f"{signal.name}_" if signal.schema.prefixed else ""
    for column in signal.schema.columns:
        name = column.name if column.name == "sample_id" else prefix + column.name
        lines.append(_row((f"`{name}`", type_name(column.type), column.doc)))
    return "\n".join(lines) + "\n"


PAGES = {"config": reference, "objectives": objectives, "signals": signals}

if __name__ == "__main__":
    load_plugins(sys.argv[2:])
    print(PAGES[sys.argv[1] if len(sys.argv) > 1 else "config"](), end="")
