"""What the command line costs beside the work: wall and CPU seconds of commands on a store with finished rounds, and the packages
that each imports; then the seconds of a run that are outside of its stages.

python benchmarks/overhead.py [STORE] [--rounds 10] [--repeats 5] [--config CONFIG]

The run (by default the smallest experiment with every real part, a minute or two) is made in STORE, or found there. Compiled
modules are kept beside it, so that commands start warm whatever PYTHONDONTWRITEBYTECODE says."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

from flows.experiment import load_experiment
from flows.run.progress import SilentReporter
from flows.run.runner import run_experiment
from storage.runs import RoundState, StageState
from tasks.workers.metrics import Metrics

CHECKOUT = Path(__file__).resolve().parent.parent
NAME = "overhead"
STAGE_SECONDS = 20.0
"""Of the four stages of a round, for the share that is outside of them."""
STARTS = "import sys; from opdflow import main; sys.argv[0] = 'opd'; main()"
LOADED = """
import sys
from opdflow import main
try:
    main()
except SystemExit:
    pass
watched = ("pandas", "pyarrow", "duckdb", "torch", "prefect", "vllm", "transformers", "deepspeed")
print(len(sys.modules), "modules:", ", ".join(name for name in watched if name in sys.modules) or "none of them", file=sys.stderr)
"""


class Stages(SilentReporter):
    """The seconds of a run's rounds from 1 on, and those of their stages."""

    def __init__(self) -> None:
        self.rounds: list[tuple[float, float, float]] = []
        """Of each: wall seconds, of these in stages, CPU seconds of this process outside of them."""
        self._begin()

    def _begin(self) -> None:
        self._started, self._cpu, self._inside, self._inside_cpu = time.perf_counter(), time.process_time(), 0.0, 0.0

    def stage(self, round: int, label: str, state: StageState, metrics: Metrics | None = None) -> None:
        if state.state == "running":
            self._stage, self._stage_cpu = time.perf_counter(), time.process_time()
        elif state.state == "done":
            self._inside += time.perf_counter() - self._stage
            self._inside_cpu += time.process_time() - self._stage_cpu

    def round_done(self, state: RoundState) -> None:
        if state.round:
            wall, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
            self.rounds.append((wall, self._inside, cpu - self._inside_cpu))
        self._begin()


def once(arguments: list[str], cache: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one command."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "PYTHONDONT"))}
    environment["PYTHONPYCACHEPREFIX"] = str(cache)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS, *arguments],
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"opd {' '.join(arguments)}: exit {process.returncode}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main(args: argparse.Namespace, root: Path) -> None:
    rounds = f"policy.rounds={args.rounds}"
    reporter = Stages()
    run_experiment(load_experiment(args.config, [rounds]), name=NAME, root=root, reporter=reporter)
    store = ["--root", str(root)]
    commands = {
        "--help": ["--help"],
        "ls": ["ls", *store],
        "status": ["status", NAME, *store],
        "query": ["query", NAME, "SELECT count(*) FROM rollouts", *store],
        f"run, {args.rounds} rounds done": ["run", str(args.config), "--name", NAME, "--set", rounds, *store],
        f"resume, {args.rounds} rounds done": ["resume", NAME, *store],
    }
    cache = root.parent / f"{root.name}-compiled"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for repeat in range(args.repeats + 1):  # the first compiles
        for name, arguments in commands.items():
            found = once(arguments, cache)
            times[name] += [found] if repeat else []
    print("command; wall s; CPU s (median, lowest-highest); imports", flush=True)
    for name, arguments in commands.items():
        wall, cpu = zip(*times[name], strict=True)
        result = subprocess.run(
            [sys.executable, "-c", LOADED, *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True
        )
        print(f"{name}; {spread(list(wall))}; {spread(list(cpu))}; {result.stderr.splitlines()[-1]}", flush=True)
        aim = {"query": "1 s"}.get(name, "3 s" if "done" in name else "0.6 s")
        record(f"opd {name}: CPU time", cpu, aim, "s")
        record(f"opd {name}: wall time", wall, aim, "s")
    if reporter.rounds:
        outside = [wall - inside for wall, inside, _ in reporter.rounds]
        share = statistics.median(outside) / (statistics.median(outside) + 4 * STAGE_SECONDS)
        print(
            f"outside of stages, per round: wall {spread(outside)} s, CPU {spread([c for *_, c in reporter.rounds])} s"
        )
        record("outside of stages, per round", outside, "at most 5% of stages of 20 s", "s")
        print(f"with stages of {STAGE_SECONDS:.0f} s that is {share:.2%} of a round's wall time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--config", type=Path, default=CHECKOUT / "tests" / "data" / "tiny.yaml")
    arguments = parser.parse_args()
    if arguments.store is not None:
        main(arguments, arguments.store)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(arguments, Path(folder) / "store")
