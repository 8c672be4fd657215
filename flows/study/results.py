"""Results of a study, read from its runs' states and the catalog: rows, learning rates, tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flows.run.figures import BY_METRIC
from storage.errors import CorruptArtifact, OpdError
from storage.query.catalog import Catalog
from storage.query.figures import Sums, difference, evaluation_of, figure, read_sums
from storage.runs import RoundState, Run, RunState, settled
from storage.store import Store

if TYPE_CHECKING:
    from flows.study.spec import StudyPlan, StudyRun, Sweep

SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("method", pa.string()),
        ("group", pa.string()),
        ("lr", pa.float64()),
        ("seed", pa.int64()),
        ("run", pa.string()),
        ("status", pa.string()),
        ("round", pa.int64()),
        ("accuracy", pa.float64()),
        ("accuracy_se", pa.float64()),
        ("accuracy_n", pa.int64()),
        ("reverse_kl", pa.float64()),
        ("reverse_kl_se", pa.float64()),
        ("reverse_kl_n", pa.int64()),
        ("grad_norm_max", pa.float64()),
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
    ]
)
"""One row per round of a run. Errors are clustered by prompt, n are completions. The gradient norm is the largest of the
round's steps, before clipping."""
METRICS = {"accuracy": "accuracy_greedy", "reverse_kl": "reverse_kl"}
"""Column -> the evaluation's metric."""
_FORMS = {column: BY_METRIC[metric].form for column, metric in METRICS.items()}

_NORMS = (
    "SELECT round, max(grad_norm) AS grad_norm_max, count(*) AS steps FROM training_steps WHERE stage = 'train'"
    " GROUP BY round"
)

_NORM_HEADING = "largest gradient norm (before clipping)"

Row = dict[str, Any]
"""The columns of `SCHEMA`; for an evaluated round also `sums`: by metric the evaluation's sums over prompts."""


@dataclass(frozen=True)
class Known:
    """What was read from Parquet, so that later calls need not."""

    norms: dict[tuple[str, str], dict[int, tuple[float | None, int]]] = field(default_factory=dict)
    """(run, when its state changed) -> round -> largest gradient norm, steps."""
    sums: dict[str, dict[str, Sums]] = field(default_factory=dict)
    """By key of the evaluation."""


@dataclass(frozen=True)
class Grid:
    """One table of the report."""

    title: str
    note: str
    header: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]


def read_rows(plan: StudyPlan, root: str | Path, known: Known | None = None) -> list[Row]:
    """A row per evaluated round of every run of the study that exists, in the study's order. `known` is kept between calls."""
    known = known or Known()
    store, runs = Store(root), {run.name: run for run in Run.list(root)}
    rows: list[Row] = []
    for planned in (*plan.sweep_runs(), *plan.method_runs()):
        run = runs.get(planned.name)
        if run is not None:
            rows += _rows_of(planned, run, store, known)
    return rows


def _rows_of(planned: StudyRun, run: Run, store: Store, known: Known) -> list[Row]:
    norms = known.norms
    state = settled(run.state, run.holder())
    key = (run.name, state.updated)
    if key not in norms and _trained(state):
        try:
            found = Catalog(store, run).query(_NORMS).to_pylist()
            norms[key] = {row["round"]: (row["grad_norm_max"], row["steps"]) for row in found}
        except CorruptArtifact:
            pass  # rebuilt, and then read, when the run's turn comes
    steps = norms.get(key, {})
    common = {
        "part": planned.part,
        "method": planned.method,
        "group": planned.group,
        "lr": planned.lr if planned.lr is not None else run.experiment["train"]["lr"],
        "seed": planned.seed,
        "run": run.name,
        "status": _status(state, planned.rounds),
        "error": _error(state) if state.status == "failed" else None,
    }
    evaluated = [r for r in state.rounds if r.round <= planned.rounds and "reverse_kl" in r.metrics]
    if not evaluated:
        return [dict.fromkeys(SCHEMA.names) | common]
    rows = []
    for r in evaluated:
        sums = _sums_of(store, r, known)
        row = common | {
            "round": r.round,
            "grad_norm_max": steps.get(r.round, (None, None))[0],
            "steps": steps.get(r.round, (None, None))[1],
            "seconds": sum(stage.seconds or 0.0 for stage in r.stages.values()),
            "sums": sums,
        }
        for column, metric in METRICS.items():
            found = figure([sums[metric]]) if metric in sums else None
            row[column] = r.metrics.get(metric)
            row |= {f"{column}_se": found.se if found else None, f"{column}_n": found.n if found else None}
        rows.append(row)
    return rows


def _sums_of(store: Store, round: RoundState, known: Known) -> dict[str, Sums]:
    """Of the round's evaluation; empty where its rows cannot be read."""
    evaluation = evaluation_of(store, round)
    if evaluation is None:
        return {}
    if evaluation.key not in known.sums:
        try:
            known.sums[evaluation.key] = read_sums(store, evaluation)
        except (OpdError, OSError):
            return {}
    return known.sums[evaluation.key]


def _trained(state: RunState) -> bool:
    return any(
        r.stages.get("train") is not None and r.stages["train"].state in ("done", "cached") for r in state.rounds
    )


def _status(state: RunState, rounds: int) -> str:
    """`finished` if the study's last round is evaluated, whatever the run's own policy.rounds is."""
    last = next((r for r in state.rounds if r.round == rounds), None)
    stage = last.stages.get("evaluate") if last is not None else None
    return "finished" if stage is not None and stage.state in ("done", "cached") else state.status


def _error(state: RunState) -> str:
    failed = [(r.round, label, s.error) for r in state.rounds for label, s in r.stages.items() if s.state == "failed"]
    return "; ".join(f"round {round} {label}: {error}" for round, label, error in failed) or "failed before a stage"


def finals_of(rows: Iterable[Row], group: str, sweep: Sweep) -> dict[float, dict[int, float | None]]:
    """Learning rate -> seed -> the group's metric after its last round; None if the run failed or the value is not finite.

    Candidates whose run is neither finished nor failed are left out."""
    found: dict[float, dict[int, float | None]] = {}
    for row in rows:
        if row["part"] == "sweep" and row["group"] == group and row["status"] in ("finished", "failed"):
            value = (
                row[sweep.groups[group].by] if row["status"] == "finished" and row["round"] == sweep.rounds else None
            )
            usable = value if value is not None and math.isfinite(value) else None
            known = found.setdefault(row["lr"], {})
            known[row["seed"]] = usable if usable is not None else known.get(row["seed"])
    return found


def best_lr(finals: dict[float, dict[int, float | None]], by: str = "reverse_kl") -> float | None:
    """The rate with the lowest mean reverse KL, or highest mean accuracy; the smaller one on a tie. Rates that failed on any
    seed are excluded."""
    sign = -1 if by == "accuracy" else 1
    means = {}
    for lr, by_seed in finals.items():
        values = [value for value in by_seed.values() if value is not None]
        if by_seed and len(values) == len(by_seed):
            means[lr] = sign * sum(values) / len(values)
    return min(means, key=lambda lr: (means[lr], lr), default=None)


def best_lrs(plan: StudyPlan, rows: Sequence[Row]) -> dict[str, float]:
    """Group -> learning rate, for groups with all candidates tried and at least one not failed."""
    sweep = plan.study.sweep
    if sweep is None:
        return {}
    chosen = {}
    for name, group in sweep.groups.items():
        finals = finals_of(rows, name, sweep)
        if all(set(finals.get(lr, ())) == set(sweep.seeds) for lr in group.lrs):
            lr = best_lr(finals, group.by)
            if lr is not None:
                chosen[name] = lr
    return chosen


def undecided(plan: StudyPlan, rows: Sequence[Row]) -> dict[str, list[float]]:
    """Group -> learning rates that are not told apart from its best: the 95% interval of the paired difference on the shared
    prompts, over the sweep's seeds, has 0 in it. Only groups whose best is known."""
    sweep, found = plan.study.sweep, dict[str, list[float]]()
    for name, best in best_lrs(plan, rows).items():
        assert sweep is not None
        metric = METRICS[sweep.groups[name].by]
        last = {
            (row["lr"], row["seed"]): row.get("sums", {}).get(metric)
            for row in rows
            if (row["part"], row["group"], row["round"]) == ("sweep", name, sweep.rounds)
        }
        found[name] = []
        for lr in sweep.groups[name].lrs:
            pairs = [(last.get((lr, seed)), last.get((best, seed))) for seed in sweep.seeds]
            known = [(one, other) for one, other in pairs if one is not None and other is not None]
            if lr != best and len(known) == len(sweep.seeds) and not difference(known).told_apart:
                found[name].append(lr)
    return found


def grids(plan: StudyPlan, rows: Sequence[Row]) -> list[Grid]:
    """The report's tables: reverse KL and accuracy by method and round, the sweep, failures."""
    tables = [_metric(plan, rows, "reverse_kl", "Reverse KL to the teacher", "nats per token, full vocabulary")]
    measured = {column for column in METRICS for row in rows if row[column] is not None}
    if "accuracy" in measured or not measured:  # without a verifier there is none
        tables.append(_metric(plan, rows, "accuracy", "Accuracy", "greedy, held-out prompts"))
    if plan.study.sweep is not None:
        tables.append(_sweep(plan, rows))
    failed = {row["run"]: row["error"] for row in rows if row["status"] == "failed"}
    if failed:
        lines = [(name, error or "") for name, error in failed.items()]
        tables.append(Grid("Failed", "tried again by the next call", ("run", "error"), lines))
    return tables


def _metric(plan: StudyPlan, rows: Sequence[Row], column: str, title: str, unit: str) -> Grid:
    rounds = range(plan.study.rounds + 1)
    seeds = len(plan.study.seeds)
    lines = []
    for method in plan.study.methods:
        mine = [row for row in rows if row["part"] == "study" and row["method"] == method]
        cells = [_cell([r for r in mine if r["round"] == number], column, seeds) for number in rounds]
        lines.append(
            (method, _lrs(mine), _seeds(mine, seeds), *cells, *([_norm(mine)] if column == "reverse_kl" else []))
        )
    note = (
        f"{unit}; mean over seeds ± standard error over prompts and seeds (lowest to highest), [k] where only k seeds have"
        f" it; {_sizes(rows, column)}"
    )
    header = ("method", "lr", "seeds", *(f"round {number}" for number in rounds), _NORM_HEADING)
    return Grid(title, note, header if column == "reverse_kl" else header[:-1], lines)


def _norm(rows: Sequence[Row]) -> str:
    norms = [row["grad_norm_max"] for row in rows if row["grad_norm_max"] is not None]
    return f"{max(norms):.3g}" if norms else ""


def _lrs(rows: Sequence[Row]) -> str:
    return ", ".join(f"{lr:g}" for lr in sorted({row["lr"] for row in rows}))


def _seeds(rows: Sequence[Row], seeds: int) -> str:
    finished = len({row["seed"] for row in rows if row["status"] == "finished"})
    failed = len({row["seed"] for row in rows if row["status"] == "failed"})
    return f"{finished} of {seeds}" + (f", {failed} failed" if failed else "")


def _cell(rows: Sequence[Row], column: str, seeds: int) -> str:
    """The mean of a column over seeds, with its error."""
    return spread([row[column] for row in rows], _FORMS[column], seeds, mean_error(rows, column))


def mean_error(rows: Sequence[Row], column: str) -> float | None:
    """Standard error of the mean of a column over rows of several seeds; None where the rows of an evaluation cannot be read."""
    there = [row for row in rows if row[column] is not None]
    sums = [row["sums"][METRICS[column]] for row in there if METRICS[column] in row.get("sums", {})]
    return figure(sums).se if sums and len(sums) == len(there) else None


def _sizes(rows: Sequence[Row], column: str) -> str:
    """How many completions an evaluation has."""
    sizes = sorted({row[f"{column}_n"] for row in rows if row.get(f"{column}_n")})
    return (
        f"n {' to '.join(f'{size:,}' for size in dict.fromkeys((sizes[0], sizes[-1])))} each" if sizes else "n unknown"
    )


def spread(values: Sequence[float | None], form: str, seeds: int, error: float | None = None) -> str:
    """`mean ± error (lowest to highest)` of the existing values, with their number if it is not `seeds`."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    low, high, mean = min(there), max(there), sum(there) / len(there)
    text = form.format(mean) + (f" ± {form.format(error)}" if error is not None else "")
    if len(there) > 1:
        text += f" ({form.format(low)} to {form.format(high)})"
    return text + (f" [{len(there)}]" if len(there) != seeds else "")


def _sweep(plan: StudyPlan, rows: Sequence[Row]) -> Grid:
    sweep = plan.study.sweep
    assert sweep is not None
    chosen, close = best_lrs(plan, rows), undecided(plan, rows)
    lines = []
    for name, group in sweep.groups.items():
        finals = finals_of(rows, name, sweep)
        edges = {min(group.lrs), max(group.lrs)}
        for lr in group.lrs:
            mine = [row for row in rows if row["part"] == "sweep" and row["group"] == name and row["lr"] == lr]
            values = list(finals.get(lr, {}).values())
            last = [row for row in mine if row["round"] == sweep.rounds]
            remark = "failed" if values and None in values else "" if values else "not tried yet"
            if chosen.get(name) == lr:
                remark = "chosen by accuracy" if group.by == "accuracy" else "chosen"
                remark += ", the end of its list" if lr in edges and len(group.lrs) > 1 else ""
            elif lr in close.get(name, ()):
                remark = "not told apart from the best"
            kl, accuracy = (_cell(last, column, len(sweep.seeds)) for column in ("reverse_kl", "accuracy"))
            lines.append((name, group.method, f"{lr:g}", kl, accuracy, _norm(mine), remark))
    note = (
        f"each group: {len(group.lrs)} rates, seed {', '.join(map(str, sweep.seeds))}, rounds: {sweep.rounds}; used is the"
        " lowest reverse KL at the end, or the highest accuracy where a group says so; not told apart: the 95% interval of"
        f" the paired difference on the same prompts has 0 in it; {_sizes(rows, 'reverse_kl')}"
    )
    header = ("group", "method", "lr", "reverse KL", "accuracy", _NORM_HEADING, "")
    return Grid("Learning rates", note, header, lines)
