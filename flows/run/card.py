"""The model card that `opd export` writes beside a student: what it is, where it comes from, how good it is."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.run.figures import EVALUATED
from flows.run.shown import sample_sizes, with_error
from storage.disk.yaml_text import dump
from storage.query.figures import completed
from storage.runs import RoundState, Run
from storage.store import Store
from storage.text import counted

_SECTIONS = ("objective", "rollout", "judge", "supervise", "train", "evaluate")


def card(run: Run, store: Store, round: int, sha256: str) -> str:
    """Markdown with the front matter of the Hub. `sha256`: of the student's weights."""
    config = run.experiment
    state = completed(store, run.state)
    shown = [r for r in state.rounds if r.round in (0, round)]
    base, licence = base_of(config["student"]["source"])
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"tags": ["on-policy-distillation", "opdflow"]}
    if base is not None:
        front["base_model"] = base
    if licence is not None:
        front["license"] = licence
    lines = ["---", dump(front).strip(), "---", "", f"# {run.name}, round {round}", ""]
    lines += [
        "A student of on-policy distillation: in each round it wrote completions, the teacher scored every token of them, and the"
        f" student was trained on that; {counted(round, 'round')}."
        f" Made with opdflow {importlib.metadata.version('opdflow')}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in origins(config)),
        f"| weights (sha256) | `{sha256}` |",
        "",
        "## Figures",
        "",
        *_table(shown, round),
        "",
        "## Config",
        "",
        "<details><summary>All fields that determine the result, beside models and prompts</summary>",
        "",
        "```yaml",
        dump({"seed": config.get("seed", 0), **{name: config[name] for name in _SECTIONS if config.get(name)}}).strip(),
        "```",
        "",
        "</details>",
        "",
    ]
    if licence is None:
        lines += ["The licence of the base model was not found beside it; it holds for this model too.", ""]
    return "\n".join(lines)


def origins(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a run was made from: (role, source in a few words, in Markdown)."""
    yield "base model", _named(config["student"]["source"])
    if config.get("teacher"):
        yield "teacher", _named(config["teacher"]["source"])
    for name, teacher in sorted((config.get("teachers") or {}).items()):
        yield f"teacher {name}", _named(teacher["source"])
    for split in ("train", "eval"):
        if source := config["prompts"].get(split):
            yield f"prompts ({split})", _named(source)


def _named(source: Mapping[str, Any]) -> str:
    """A source in a few words, without the folders of this machine."""
    kind = source["kind"]
    if kind == "hub":
        return f"{source['repo']} at `{source['revision']}`"
    if "path" in source:
        return f"`{Path(source['path']).name}`"
    said = {"architecture": "made from an architecture, not pretrained", "addition": "generated sums"}
    return said.get(kind, str(kind))


def base_of(source: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(name on the Hub, licence) of the base model, where they are known: from the source, or the card in its folder."""
    if source["kind"] == "hub":
        return source["repo"], None
    readme = Path(source.get("path", "")) / "README.md"
    if source["kind"] != "checkpoint" or not readme.is_file():
        return None, None
    head = re.match(r"---\n(.*?)\n---", readme.read_text(errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]+)\s*$", head[1], re.MULTILINE) if head else None
    return None, found[1] if found else None


def _table(rounds: list[RoundState], last: int) -> list[str]:
    known = [f for f in EVALUATED if any(r.metrics.get(f.metric) is not None for r in rounds)]
    if not known:
        return [f"Round {last} was not evaluated."]
    headings = ["", *("before (round 0)" if r.round == 0 else f"this model (round {r.round})" for r in rounds)]
    rows = [[f.with_unit, *(with_error(r.metrics, f.metric, f.form) or "-" for r in rounds)] for f in known]
    sizes = sample_sizes(rounds, tuple(f.metric for f in known))
    return [
        f"| {' | '.join(headings)} |",
        "|" + "---|" * len(headings),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "On held-out prompts; ± is one standard error over prompts; reverse KL is to the teacher, on fresh"
        " completions" + (f"; {sizes}." if sizes else "."),
    ]
