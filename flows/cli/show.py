"""`opd show`: one completion, token by token, as student and teacher see it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.cells import harmless, visible
from flows.cli.options import AtRound, Json, ReadRoot, at_round, console, example, existing_root
from flows.run.hints import DEFAULT_ROOT
from storage.errors import InputError, did_you_mean
from storage.runs import Run

SHADES = ((4.0, "bold red"), (2.0, "red"), (0.5, "yellow"), (-0.5, ""), (float("-inf"), "green"))
"""From which gap (nats) on a token has a style; a page has the same (flows.page.completions.GAPS)."""
LEGEND = (
    "gap: log p(student) - log p(teacher), the token's part in the reverse KL; ",
    ("yellow", "yellow"),
    " from 0.5, ",
    ("red", "red"),
    " from 2, ",
    ("bold red", "bold red"),
    " from 4, ",
    ("green", "green"),
    " below -0.5 nats; ",
    ("struck out", "strike"),
    ": has a mask reason",
)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd show demo --sample addition-17/3/0"))(show)


def show(
    name: AtRound,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample", help="a sample_id (default: that of the round, or the last one, with the largest mean gap)"
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="alternatives shown for each token")] = 3,
    json_: Json = False,
    root: ReadRoot = DEFAULT_ROOT,
) -> None:
    """Show a completion: coloured by how far student and teacher are apart, then token by token with both models' probabilities,
    their likeliest alternatives where the run stored them, and the reasons to mask it.

    Exit codes: 0 shown, 1 damaged or evicted data, 2 no such run or sample, or no rollouts yet."""
    from storage.query.catalog import Catalog
    from storage.store import Store

    name, round = at_round(name)
    if round is not None and sample is not None:
        raise InputError(f"{name}@{round} and --sample {sample}: a sample's name has its round; give one of them")
    run = Run.open(root, name)
    found = _found(Catalog(Store(existing_root(root)), run), run, sample, top, round)
    if json_:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        _print(found, console())


def _found(catalog: Any, run: Run, sample: str | None, top: int, round: int | None) -> dict[str, Any]:
    """The sample with what the judge gave it (`judged`: reward, feedback, failed; or none) and its tokens; each token has
    `teacher_top` and `student_top`, lists of [token, probability], or none."""
    from flows.page.completions import literal, read
    from storage.query.questions import last_written, with_rollouts

    last = last_written(run.state) if round is None else with_rollouts(run.state, round)
    if sample is None:
        worst = f"SELECT sample_id FROM tokens WHERE round = {last} AND isfinite(gap) GROUP BY ALL ORDER BY avg(gap) DESC LIMIT 1"
        named = (
            catalog.query(worst).to_pylist()
            or catalog.query(f"SELECT sample_id FROM rollouts WHERE round = {last} LIMIT 1").to_pylist()
        )
        sample = named[0]["sample_id"]
    part = str(sample).rsplit("/", 2)
    at = int(part[1]) if len(part) == 3 and part[1].isdigit() else last
    where = f"round = {at} AND sample_id = {literal(str(sample))}"
    if not catalog.query(f"SELECT sample_id FROM rollouts WHERE {where}").num_rows:
        ids = catalog.query(f"SELECT sample_id FROM rollouts WHERE round = {at}")["sample_id"].to_pylist()
        hint = did_you_mean(str(sample), ids, f"round {last} has {', '.join(ids[:3])}, ...")
        raise InputError(f"run {run.name!r} has no sample {sample!r}; {hint}")
    found = read(catalog, at, [str(sample)], top)[0]
    for token in found["tokens"]:
        del token["divergence"]
        token["student_top"] = token["student_top"] and [entry[:2] for entry in token["student_top"]]
    kept = ("sample_id", "prompt_id", "round", "behaviour", "finish_reason", "completion_text", "prompt", "tokens")
    return {key: found[key] for key in (*kept, "judged")}


def _print(found: dict[str, Any], out: Console) -> None:
    tokens = found["tokens"]
    gaps = [token["gap"] for token in tokens if token["gap"] is not None]
    facts = [f"{len(tokens)} tokens", {"stop": "ended by itself", "length": "cut off"}.get(found["finish_reason"], "")]
    facts += [f"mean gap {sum(gaps) / len(gaps):.3f} nats"] if gaps else []
    judged = found["judged"] or {}
    facts += [f"reward {judged['reward']:g}"] if judged.get("reward") is not None else []
    facts += [f"no reward: {judged['failed']}"] if judged.get("failed") else []
    facts += [f"written by {found['behaviour']}"] if found["behaviour"] != "student" else []
    out.print(Text.assemble((found["sample_id"], "bold"), "  ", ", ".join(filter(None, facts))))
    if found["prompt"] is not None:
        out.print(Text(harmless(found["prompt"]), style="dim"))
    out.print(_coloured(found["completion_text"], tokens))
    if judged.get("feedback"):
        out.print(Text(harmless(f"feedback: {judged['feedback']}"), style="dim"))
    out.print()
    out.print(_table(tokens))
    out.print(Text.assemble(*LEGEND, style="dim"))


def _style(token: dict[str, Any]) -> str:
    gap = token["gap"]
    shade = "" if gap is None else next((style for least, style in SHADES if gap >= least), "")
    return f"{shade} strike".strip() if token["reasons"] else shade


def _coloured(text: str, tokens: list[dict[str, Any]]) -> Text:
    """The completion in its tokens' styles. Parts of one character have the style of the last; tokens without text are named."""
    shown, end = Text(), 0
    for token in tokens:
        offset, length = token["text_offset"], token["text_length"]
        if offset is None or not length:
            shown.append(harmless(token["token"] or ""), _style(token))
        elif offset + length > end:
            shown.append(harmless(text[max(end, offset) : offset + length]), _style(token))
            end = offset + length
    return shown


def _table(tokens: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("at", "token", "gap", "student", "teacher"):
        table.add_column(heading, justify="left" if heading == "token" else "right", no_wrap=True)
    models = [model for model in ("teacher", "student") if any(token[f"{model}_top"] for token in tokens)]
    for model in models:
        table.add_column(f"{model}'s likeliest", overflow="fold")
    reasons = any(token["reasons"] for token in tokens)
    if reasons:
        table.add_column("mask reasons", overflow="fold")
    for token in tokens:
        numbers = [_number(token["gap"]), _share(token["student_logprob"]), _share(token["teacher_logprob"])]
        tops = [_alternatives(token[f"{model}_top"]) for model in models]
        cells: list[str | Text] = [
            str(token["position"]),
            Text(visible(token["token"]), _style(token)),
            *numbers,
            *tops,
        ]
        table.add_row(*cells, *([token["reasons"] or ""] if reasons else []))
    return table


def _alternatives(entries: list[tuple[str, float]] | None) -> Text:
    parts = [
        Text.assemble(visible(token), (f" {share:.0%}" if share >= 0.005 else " <1%", "dim"))
        for token, share in entries or ()
    ]
    return Text("  ").join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(logprob: float | None) -> str:
    import math

    return "" if logprob is None else f"{math.exp(logprob):.2%}"
