"""All benchmarks one after the other, and the table of their figures in docs/performance.md.

python benchmarks/bench.py [--full] [--only NAME ...] [--pair PAIR] [--trl TRL] [--out docs/performance.md]

Without `--full` it takes about twenty minutes on two idle cores (`make bench`), with it hours (`make bench-full`): larger sizes,
and what needs models or packages from outside: `--pair`, the folder of `python benchmarks/smollm2.py PAIR`; `--trl`, that of
`pip install --no-deps --target TRL "trl==1.16.*"`. What they print goes to standard error; a benchmark that fails is named in the
table, and the exit code is 1. The table replaces what is between the markers in the document, and is written anew after each
benchmark."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path

from record import PLACE

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@dataclass(frozen=True)
class Benchmark:
    """One script with its arguments, quick and full; null: it runs in the other mode alone. `{pair}` and `{trl}` stand for the
    folders that were given, `{tmp}` for a temporary one."""

    script: str
    quick: Sequence[str] | None
    full: Sequence[str] | None
    one_thread: bool = False
    name: str = ""


BENCHMARKS = (
    Benchmark("losses.py", ["--turns", "5"], ["--sizes", "small,large", "--turns", "5"], True),
    Benchmark("scoring.py", ["--turns", "3"], ["--turns", "5"], True),
    Benchmark("sampling.py", ["--repeats", "2", "--shards", "16", "256"], [], True),
    Benchmark("training.py", ["--quick"], []),
    Benchmark("overhead.py", ["--rounds", "10", "--repeats", "5"], ["--rounds", "10", "--repeats", "5"]),
    Benchmark("questions.py", ["{tmp}/questions", "2000000"], ["{tmp}/questions"]),
    Benchmark(
        "scale.py",
        ["--prompts", "1000", "10000", "100000", "--shards", "250", "1000", "4000", "--catalogue", "10000", "100000"],
        [],
    ),
    Benchmark("cache.py", [], ["{pair}"], True),
    Benchmark("blending.py", ["--repeats", "1", "--epsilons", "0.01"], []),
    Benchmark("beside_trl.py", None, ["{pair}", "{trl}", "--trl-steps", "7", "--rounds", "3"]),
    Benchmark("steps_per_round.py", None, ["{tmp}/steps"]),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of scripts, without .py")
    parser.add_argument("--pair", type=Path)
    parser.add_argument("--trl", type=Path)
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    known = [Path(benchmark.script).stem for benchmark in BENCHMARKS]
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only {unknown.pop()}: names are {', '.join(known)}")
    if options.full and not options.only and (options.pair is None or options.trl is None):
        parser.error("--full needs --pair and --trl; see --help for how the two folders are made")
    before = options.out.read_text()
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        parser.error(f"{options.out}: it needs the lines {BEGIN} and {END} once, between which the table goes")
    start, end = before.index(BEGIN) + len(BEGIN), before.index(END)
    text = f"no benchmark has these names in this mode ({conditions()})"
    began, rows, failed = time.perf_counter(), [], False
    with tempfile.TemporaryDirectory() as folder:
        for benchmark in BENCHMARKS:
            arguments = benchmark.full if options.full else benchmark.quick
            if arguments is None or (options.only and Path(benchmark.script).stem not in options.only):
                continue
            found, seconds, code = run(benchmark, arguments, options, Path(folder))
            command = " ".join([f"benchmarks/{benchmark.script}", *arguments]).replace("{tmp}", "FOLDER")
            command = command.replace("{pair}", "PAIR").replace("{trl}", "TRL")
            rows.append(f"| **`{command}`** | {f'**failed: exit {code}**' if code else ''} | | {seconds:,.0f} s |")
            rows += [row_of(record) for record in found]
            failed |= bool(code)
            head = f"`make bench{'-full' * options.full}`, {time.perf_counter() - began:,.0f} s. {conditions()}"
            text = "\n".join(
                [head, "", "| what | median [lowest, highest], n | aim | took |", "|---|---|---|---|", *rows]
            )
            options.out.write_text(f"{before[:start]}\n{text}\n{before[end:]}")
    print(text)
    return int(failed)


def run(
    benchmark: Benchmark, arguments: Sequence[str], options: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, object]], float, int]:
    """(figures that it left, seconds, exit code)."""
    place = folder / f"{Path(benchmark.script).stem}.jsonl"
    places = {"pair": str(options.pair), "trl": str(options.trl), "tmp": str(folder)}
    command = [sys.executable, str(HERE / benchmark.script), *(argument.format(**places) for argument in arguments)]
    environment = os.environ | {PLACE: str(place)} | (ONE_THREAD if benchmark.one_thread else {})
    print(f"\n=== {' '.join(command[1:])}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    code = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
    lines = place.read_text().splitlines() if place.exists() else []
    return [json.loads(line) for line in lines], time.perf_counter() - started, code


def row_of(record: dict[str, object]) -> str:
    """A row of the table."""
    values = record["values"]
    assert isinstance(values, list)
    unit = "" if record["unit"] == "ratio" else f" {record['unit']}"
    spread = f" [{min(values):.3g}, {max(values):.3g}], {len(values)}" if len(values) > 1 else ""
    return f"| {record['what']} | {statistics.median(values):.3g}{unit}{spread} | {record['aim']} | |"


def conditions() -> str:
    """Date, commit, machine, load and versions."""
    commit = git("rev-parse", "--short", "HEAD") or "no commit"
    if git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", f":(exclude,top)docs/{DOCUMENT.name}"):
        commit += " with changes"
    info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in info}
    wide = "AVX-512" if "avx512f" in fields.get("flags", "").split() else "AVX2"
    processor = f"{fields.get('model name', 'unknown')} (family {fields.get('cpu family', '?')}, {wide})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(
        f"{name} {installed(name)}" for name in ("torch", "vllm", "transformers", "deepspeed", "duckdb")
    )
    today = datetime.date.today().isoformat()
    return (
        f"{today}, commit {commit}; {processor}, {os.cpu_count()} cores, {memory:.0f} GiB, load {os.getloadavg()[2]:.1f} over the"
        f" last 15 minutes; Python {sys.version.split()[0]}, {versions}."
    )


def git(*arguments: str) -> str:
    """What it prints; nothing where there is no repository."""
    return subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True).stdout.strip()


def installed(package: str) -> str:
    """The version of the distribution that brings a package: vLLM for CPUs has another name."""
    return version(packages_distributions()[package][0])


if __name__ == "__main__":
    sys.exit(main())
