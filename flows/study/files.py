"""The files of a study: report.md, results.csv, results.parquet, curves.svg; report.md links to report.html where it is there."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from flows.study.results import SCHEMA, Grid, Row, grids, mean_error
from storage.disk.files import replace_atomically

if TYPE_CHECKING:
    from flows.study.spec import StudyPlan

REPORT, CSV, PARQUET, CURVES = "report.md", "results.csv", "results.parquet", "curves.svg"
PAGE = "report.html"
"""`opd report` of the methods' runs with the first seed; `opd study` writes it at its end."""
_DASHES = ("-", "--", ":")


def default_folder(root: Path, name: str) -> Path:
    """The default folder of a study's files."""
    return root / "studies" / name


def write_files(plan: StudyPlan, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the results so far, each file atomically, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([{"study": plan.study.name} | row for row in rows], _with_study())
    csv, parquet = io.BytesIO(), io.BytesIO()
    pyarrow.csv.write_csv(table, csv)
    pyarrow.parquet.write_table(table, parquet)
    content = {
        REPORT: markdown(plan, rows, page=(folder / PAGE).exists()).encode(),
        CSV: csv.getvalue(),
        PARQUET: parquet.getvalue(),
        CURVES: curves(plan, rows),
    }
    for name, data in content.items():
        replace_atomically(folder / name, data)
    return [folder / name for name in content]


def _with_study() -> pa.Schema:
    return pa.schema([("study", pa.string()), *SCHEMA])


def markdown(plan: StudyPlan, rows: Sequence[Row], page: bool = False) -> str:
    """The report in Markdown. `page`: with a link to the page of its runs."""
    study = plan.study
    seeds = ", ".join(map(str, study.seeds))
    about = f"Methods: {len(study.methods)}, seeds: {seeds}, rounds: {study.rounds}. Command: `opd study {plan.where}`."
    link = (
        [f"[{PAGE}]({PAGE}): the runs with seed {study.seeds[0]} side by side, down to their tokens."] if page else []
    )
    parts = [f"# Study {study.name}", about, *link, f"![curves]({CURVES})", *map(_markdown, grids(plan, rows))]
    return "\n\n".join(parts) + "\n"


def _markdown(grid: Grid) -> str:
    lines = [grid.header, ("---",) * len(grid.header), *grid.lines]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"## {grid.title}\n\n{grid.note}\n\n{table}"


def curves(plan: StudyPlan, rows: Sequence[Row]) -> bytes:
    """An SVG: reverse KL (log axis) and accuracy over rounds: the mean over seeds, with a bar of one standard error (over
    prompts and seeds) and a band from the lowest to the highest seed."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    colours = matplotlib.color_sequences["tab10"]
    with matplotlib.rc_context({"svg.hashsalt": plan.study.name, "font.size": 11}):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        kl, accuracy = figure.subplots(1, 2)
        for number, method in enumerate(plan.study.methods):
            style = {
                "color": colours[number % len(colours)],
                "linestyle": _DASHES[number // len(colours) % len(_DASHES)],
            }
            for axes, column in ((kl, "reverse_kl"), (accuracy, "accuracy")):
                points = _points(rows, method, column)
                if points:
                    rounds, low, mean, high, error = zip(*points, strict=True)
                    axes.plot(rounds, mean, label=method, marker="o", markersize=3.5, linewidth=1.6, **style)
                    if any(error):
                        axes.errorbar(
                            rounds, mean, yerr=error, fmt="none", ecolor=style["color"], elinewidth=1, capsize=2
                        )
                    axes.fill_between(rounds, low, high, color=style["color"], alpha=0.13, linewidth=0)
        kl.set(title="reverse KL to the teacher (nats per token)", yscale="log", xlabel="round")
        accuracy.set(title="accuracy (greedy)", xlabel="round")
        accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for axes in (kl, accuracy):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25, which="both", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = kl.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside right center", frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _points(rows: Sequence[Row], method: str, column: str) -> list[tuple[int, float, float, float, float]]:
    """(round, lowest, mean, highest, standard error or 0) over the seeds that have a value."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row["part"] == "study" and row["method"] == method and row[column] is not None:
            found.setdefault(row["round"], []).append(row)
    points = []
    for number, there in sorted(found.items()):
        values = [row[column] for row in there]
        points.append((number, min(values), sum(values) / len(values), max(values), mean_error(there, column) or 0.0))
    return points
