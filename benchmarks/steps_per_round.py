"""How on-policy to be: the demo's student after equally many rollouts and optimizer steps, in rounds of 1, 2, 4, 8 and 20 steps.

python benchmarks/steps_per_round.py ROOT [--steps 80] [--per-round 1 2 4 8 20] [--seeds 0 1 2] [--generations 2]
                                          [--set train.lr=1e-3]

ROOT: a folder for the store; the same command goes on with what is missing there. A step takes 32 completions (16 prompts, two
each, or `--generations`; with 1, no step has two completions of a prompt, however long the round). The later a step comes in
its round, the older is the student that wrote its completions. Prints for each number of steps
per round, over the seeds: reverse KL and accuracy after the last round with standard errors between seeds, their difference
to the first column by seed (paired), and the seconds of a round's stages."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import opdflow
from opdflow.lab import LabRun

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
COMPLETIONS_PER_STEP = 32


def run(root: Path, per_round: int, seed: int, options: argparse.Namespace) -> str:
    """Runs to the end, or goes on; the name of the run."""
    other = "" if options.generations == 2 else f"-generations{options.generations}"
    name = f"steps{per_round}-seed{seed}{other}"
    fields = {
        "seed": seed,
        "rollout.num_generations": options.generations,
        "rollout.prompts_per_round": COMPLETIONS_PER_STEP // options.generations * per_round,
        "train.samples_per_step": COMPLETIONS_PER_STEP,
        "train.epochs_per_round": 1,
        "train.schedule": "{kind: constant, warmup_steps: 10}",
        "train.lr": 3e-4,
        "policy.rounds": options.steps // per_round,
        "policy.evaluate_every": 10_000,
    }
    opd = str(Path(sys.executable).parent / "opd")
    sets = [part for field, value in fields.items() for part in ("--set", f"{field}={value}")]
    more = [part for field in options.set for part in ("--set", field)]
    command = [opd, "run", str(CONFIG), "--name", name, "--root", str(root), "--no-prefect", *sets, *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return name


def seconds_per_round(run: LabRun) -> float:
    """Median over the rounds but the first, which starts the workers."""
    sql = """SELECT median(seconds) AS seconds FROM (SELECT round, sum(seconds) AS seconds FROM stages
             WHERE round > 1 AND stage IN ('rollout', 'supervise', 'train') GROUP BY round)"""
    return float(run.sql(sql).rows()[0]["seconds"])


def mean(values: list[float]) -> str:
    """Mean and its standard error between seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=80, help="of every run")
    parser.add_argument("--per-round", type=int, nargs="+", default=[1, 2, 4, 8, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--generations", type=int, choices=[1, 2, 4, 8], default=2, help="completions per prompt")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    if bad := [n for n in options.per_round if options.steps % n]:
        parser.error(f"--per-round {bad[0]}: --steps {options.steps} is no multiple of it")
    found: dict[int, list[tuple[float, float, float]]] = {}
    for seed in options.seeds:
        for per_round in options.per_round:
            name = run(options.root, per_round, seed, options)
            done = opdflow.open(options.root).run(name)
            last = done.rounds.rows()[-1]
            kl, accuracy = last["reverse_kl"], last["accuracy_greedy"]
            found.setdefault(per_round, []).append((kl, accuracy, seconds_per_round(done)))
            print(f"# {name}: reverse KL {kl:.4f}, accuracy {accuracy:.3f}", flush=True)
    print("| steps per round | reverse KL | difference to the first | accuracy | seconds per round |")
    print("|---|---|---|---|---|")
    first = found[options.per_round[0]]
    for per_round, runs in found.items():
        kls, accuracies, seconds = (list(column) for column in zip(*runs, strict=True))
        apart = mean([kl - other[0] for kl, other in zip(kls, first, strict=True)]) if runs is not first else ""
        print(f"| {per_round} | {mean(kls)} | {apart} | {mean(accuracies)} | {statistics.median(seconds):.1f} |")


if __name__ == "__main__":
    main()
