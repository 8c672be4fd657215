"""Puts a page together: reads the store, chooses what fits, fills the template."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from flows.page import completions, curves, diagnostics, judged, prompts
from flows.page.facts import RunFacts, facts_of, opened
from flows.run.compare import Compared, Point, compared, differing
from flows.run.figures import PAIRED
from flows.run.shown import apart
from storage.disk.files import utc_now
from storage.errors import Evicted, InputError, OpdError
from storage.query.catalog import Catalog
from storage.query.questions import question
from storage.runs import Run
from storage.schemas import MaskReason
from storage.store import Store

GENERATOR = "opdflow report"
"""What a page's `<meta name="generator">` begins with; a file that has it may be replaced by another page."""
MOST_BYTES = 5_000_000
"""Of a page. It is made with fewer tokens until it fits."""
TOKENS, LONGEST, TOP = 20_000, 1_000, 5
"""Tokens of all completions together; of one completion; alternatives of each token."""
FEEDBACK = 300
"""Characters of a completion's feedback."""
MOST_RUNS = 24
REASONS = {
    MaskReason.SPECIAL_TOKEN: "a special token (of those that supervise.special_tokens marks)",
    MaskReason.TRUNCATED: "of a completion that was cut off at the length limit",
    MaskReason.TEACHER_PREFIX: "written by the teacher, not by the student",
    MaskReason.UNMAPPED: "the teacher's vocabulary has no such token",
    MaskReason.INVALID_VALUE: "a model's value was not finite or out of range",
}
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """The file's content, and in a few words what is in it."""

    html: bytes
    about: str


def page(root: Path, names: Sequence[str]) -> Page:
    """A page of these runs; the first is what it is about, the others are compared with it. Nothing is written.

    InputError for an unknown run, one without a finished round, or too many; CorruptArtifact for damaged data."""
    names = list(dict.fromkeys(names))
    if len(names) > MOST_RUNS:
        raise InputError(f"{len(names)} runs: a page shows at most {MOST_RUNS}; leave some out")
    runs = [opened(root, name) for name in names]
    store, made = Store(root), utc_now()
    facts = [facts_of(store, run) for run in runs]
    context = _context(store, runs, facts) | {"made": made.replace("T", " ").replace("Z", " UTC")}
    budget = TOKENS
    while True:
        shown = [group for run in runs for group in _groups(store, run, budget // len(runs), first=run is runs[0])]
        html = _render(context, facts, shown)
        if len(html) <= MOST_BYTES or not budget:
            break
        budget //= 2
    count = sum(len(group["completions"]) for group in shown)
    return Page(html, f"{', '.join(names)}: {len(html):,} bytes, {count:,} completions")


def _context(store: Store, runs: Sequence[Run], facts: Sequence[RunFacts]) -> dict[str, Any]:
    """What the template shows beside the completions."""
    first, catalog = runs[0], Catalog(store, runs[0])
    states = {fact.name: fact.state for fact in facts}
    steps, notes = curves.by_step(store, runs)
    drawn, held_out = prompts.before_after(catalog, first)
    with_tokens = completions.rounds_with_tokens(facts[0].state)
    rewards, watched = judged.rewards(store, runs, facts), diagnostics.diagnostics(store, runs, facts)
    return {
        "generator": f"{GENERATOR} {importlib.metadata.version('opdflow')}",
        "version": importlib.metadata.version("opdflow"),
        "names": [fact.name for fact in facts],
        "facts": facts,
        "differences": _differences(runs),
        "pairs": _pairs(store, facts),
        "charts": {
            "rounds": curves.by_round(states),
            "steps": steps,
            "stages": curves.by_stage(states),
            "rewards": rewards["charts"],
            "groups": rewards["groups"],
            "diagnostics": [*watched["charts"], *watched["lengths"], *watched["positions"]],
        },
        "rewards": [(name, *_filled(judged.HEADINGS, rows)) for name, rows in rewards["tables"]],
        "thresholds": {fact.name: judged.threshold(fact) for fact in facts},
        "overlap": _filled(diagnostics.HEADINGS, watched["overlap"]),
        "missing": watched["notes"],
        "step_notes": notes,
        "evaluated": prompts.evaluated(first.state),
        "worse": prompts.worse(catalog, first),
        "drawn": drawn,
        "held_out": held_out,
        "worst_tokens": prompts.worst_tokens(catalog, first, with_tokens[-1]) if with_tokens else [],
        "masks": _masks(catalog, first, with_tokens[-1]) if with_tokens else [],
        "last_round": with_tokens[-1] if with_tokens else None,
    }


def _filled(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that have no value."""
    kept = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    return [headings[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _differences(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """(names, rows of field and a value for each) where the configs differ; of a single fork, from the run that it began from."""
    experiments = {run.name: run.experiment for run in runs}
    fork = runs[0].experiment.get("fork")
    if len(runs) == 1 and fork:
        mine = runs[0].experiment | {"fork": None}
        experiments = {runs[0].name: mine, f"{fork['run']} (forked at round {fork['round']})": fork["experiment"]}
    rows = differing(experiments)
    return list(experiments), [["" if row[n] is None else str(row[n]) for n in ("field", *experiments)] for row in rows]


def _pairs(store: Store, facts: Sequence[RunFacts]) -> tuple[list[str], list[list[str]]]:
    """(headings, a row per further run): its paired difference from the first, at the last round that both evaluated."""
    found: list[tuple[str, Compared | str]] = []
    for other in facts[1:]:
        both = [{round.round: round for round in fact.state.rounds if round.evaluated} for fact in (other, facts[0])]
        shared = both[0].keys() & both[1].keys()
        title = f"{other.name} - {facts[0].name}"
        if not shared:
            found.append((title, "no round that both evaluated"))
            continue
        one, base = Point(other.name, both[0][max(shared)]), Point(facts[0].name, both[1][max(shared)])
        try:
            found.append((f"{one} - {base}", compared(store, one, base)))
        except OpdError as error:
            found.append((f"{one} - {base}", str(error)))
    lines = [line for _, line in found if not isinstance(line, str)]
    shown = [figure for figure in PAIRED if any(figure.metric in line.figures for line in lines)]
    rows = []
    for title, line in found:
        if isinstance(line, str):
            rows.append([title, *[""] * len(shown), line])
        else:
            cells = [apart(line.figures[f.metric], f.form) if f.metric in line.figures else "" for f in shown]
            rows.append([title, *cells, line.prompts])
    return ["difference", *(figure.heading for figure in shown), "prompts"], rows


def _masks(catalog: Catalog, run: Run, round: int) -> list[dict[str, Any]]:
    """The question `mask-reasons`; empty where the data was removed."""
    try:
        sql = question("mask-reasons").sql(run.state, {"round": str(round)})
        return list(catalog.query(sql, limit_seconds=completions.SECONDS).to_pylist())
    except Evicted:
        return []


def _groups(store: Store, run: Run, budget: int, first: bool) -> list[dict[str, Any]]:
    """Completions of the run's last round that has tokens; of the page's first run of its first one too. Rounds whose data was
    removed are named."""
    rounds = completions.rounds_with_tokens(run.state)
    wanted = list(dict.fromkeys([*rounds[-1:], *(rounds[:1] if first else [])]))
    catalog = Catalog(store, run)
    return [_group(catalog, run, number, budget // len(wanted)) for number in wanted]


def _group(catalog: Catalog, run: Run, round: int, budget: int) -> dict[str, Any]:
    group: dict[str, Any] = {"run": run.name, "round": round, "note": "", "completions": []}
    try:
        sample = completions.choose(catalog, round, budget, LONGEST)
        shown = completions.read(catalog, round, sample.ids, TOP, LONGEST) if sample.ids else []
    except Evicted:
        return group | {
            "note": f"{run.name}, round {round}: the rollouts or their signals were removed (opd restore makes them)"
        }
    note = _chosen(sample, shown)
    for place, found in enumerate(shown):
        found["worst"] = place < sample.worst
    return group | {"note": f"{run.name}, round {round}: {note}", "completions": shown}


def _chosen(sample: completions.Sample, shown: Sequence[Mapping[str, Any]]) -> str:
    """How many of the round's completions are shown, and how they were chosen."""
    count, tokens = len(shown), sum(len(found["tokens"]) for found in shown)
    note = f"{count:,} of {sample.completions:,} completions, {tokens:,} of {sample.tokens:,} tokens"
    if not sample.supervised:
        note += "; the models have not scored them"
    if count < sample.completions:
        worst = (
            f"the {sample.worst:,} with the largest mean gap and {count - sample.worst:,}" if sample.worst else "chosen"
        )
        note += f": {worst} by the smallest sha256 of their ids"
    if any(len(found["tokens"]) < found["length"] for found in shown):
        note += f"; of longer completions the first {LONGEST:,} tokens"
    return note


def _packed(groups: Sequence[Mapping[str, Any]], thresholds: Mapping[str, float | None]) -> dict[str, Any]:
    """The completions as the page's script reads them: texts of tokens in one list `words`, and lists per completion.
    `thresholds`: by run the reward from which a completion is right."""
    words: dict[str, int] = {}
    reasons: dict[str, int] = {"": 0}
    prompts_: dict[str, int] = {}

    def word(text: Any) -> int:
        return words.setdefault(str(text or ""), len(words))

    def share(value: float) -> float:
        return float(f"{value:.3g}")

    def top(entries: Sequence[Sequence[Any]] | None) -> list[Any] | None:
        return None if entries is None else [[word(text), *map(share, shares)] for text, *shares in entries]

    packed = []
    for group in groups:
        for found in group["completions"]:
            tokens, end, pieces = found["tokens"], 0, []
            for token in tokens:
                piece, end = _piece(found["completion_text"], token, end)
                pieces.append(word(piece))
            packed.append(
                {
                    "run": group["run"],
                    "round": group["round"],
                    "id": found["sample_id"],
                    "prompt": prompts_.setdefault(prompts.cut(found["prompt"]), len(prompts_)),
                    "by": found["behaviour"],
                    "end": found["finish_reason"],
                    "length": found["length"],
                    "worst": int(found["worst"]),
                    "judged": _verdict(found["judged"], thresholds[group["run"]]),
                    "text": pieces,
                    "name": [word(token["token"]) for token in tokens],
                    "student": _rounded(tokens, "student_logprob"),
                    "teacher": _rounded(tokens, "teacher_logprob"),
                    "gap": _rounded(tokens, "gap"),
                    "divergence": _rounded(tokens, "divergence"),
                    "mass": _rounded(tokens, "teacher_mass"),
                    "reasons": [reasons.setdefault(token["reasons"] or "", len(reasons)) for token in tokens],
                    "teacher_top": _lists([top(token["teacher_top"]) for token in tokens]),
                    "student_top": _lists([top(token["student_top"]) for token in tokens]),
                }
            )
    return {"words": list(words), "reasons": list(reasons), "prompts": list(prompts_), "completions": packed}


def _verdict(given: Mapping[str, Any] | None, least: float | None) -> dict[str, Any] | None:
    """What the judge gave a completion: `reward`, `right` (null where that is not known), `feedback` and `failed`, cut."""
    if given is None:
        return None
    reward = given["reward"]
    right = None if reward is None or least is None else reward >= least
    texts = {name: prompts.cut(given[name], FEEDBACK) for name in ("feedback", "failed") if given[name]}
    return {"reward": None if reward is None else float(f"{reward:.6g}"), "right": right} | texts


def _piece(text: str, token: Mapping[str, Any], end: int) -> tuple[str, int]:
    """(what is shown for a token, where the shown text ends). Of tokens that are parts of one character the first shows it."""
    offset, length = token["text_offset"], token["text_length"]
    if offset is None or not length:
        return token["token"] or "", end
    if offset + length > end:
        return text[max(end, offset) : offset + length], offset + length
    return "\u00b7", end


def _rounded(tokens: Sequence[Mapping[str, Any]], name: str) -> list[float | None] | None:
    """A column with three decimals; None where no token has a value."""
    found = [curves.number(token[name]) for token in tokens]
    return [value and round(value, 3) for value in found] if any(value is not None for value in found) else None


def _lists(found: list[Any]) -> list[Any] | None:
    return found if any(entries is not None for entries in found) else None


def _render(context: Mapping[str, Any], facts: Sequence[RunFacts], groups: Sequence[Mapping[str, Any]]) -> bytes:
    scripts = {
        "chart": _source("vendor/chart.umd.min.js").rpartition("//# sourceMappingURL")[0],  # the map is not on the page
        "script": _source("page.js"),
    }
    data = {
        "names": context["names"],
        "charts": context["charts"],
        "gaps": completions.GAPS,
        "why": {(reason.name or "").lower().replace("_", " "): text for reason, text in REASONS.items()},
        "left_out": _left_out(facts),
        **_packed(groups, context["thresholds"]),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    html = environment.get_template("page.html.j2").render(
        **context,
        notes=[group["note"] for group in groups],
        data=data,
        style=Markup(_source("page.css")),
        policy=" ".join(itertools.chain(["script-src"], (f"'sha256-{_sha256(text)}'" for text in scripts.values()))),
        **{name: Markup(text) for name, text in scripts.items()},
    )
    return html.encode("utf-8", errors="replace")


def _left_out(facts: Sequence[RunFacts]) -> dict[str, list[str]]:
    """By run: the mask reasons, in words, whose tokens its training leaves out."""
    found = {}
    for fact in facts:
        train = fact.experiment.get("train") or {}
        found[fact.name] = [str(reason).replace("_", " ") for reason in train.get("mask_reasons") or ()]
    return found


def _source(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
