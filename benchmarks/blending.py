"""Speed of trust-region blending: draft-and-verify and lock-step, relative to plain sampling, on the demo's pair from its early
student. Everything is measured in one process tree on one warm engine; only the ratios mean something on a shared machine.

python benchmarks/blending.py [STORE] [--repeats 3] [--epsilons 0.001 0.01 0.05]

The demo's warm-ups are made in STORE (default: a temporary folder), or found there."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from record import record

from flows.distill import begin
from flows.experiment import load_experiment
from flows.run.executor import Planner
from flows.run.runner import run_experiment
from storage.store import Artifact, Store
from tasks.rollout import rollout_work
from tasks.rollout_config import RolloutConfig
from tasks.stage import Context, Prompts, Student, Teacher
from tasks.workers.pool import WorkerPool

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
EPSILONS = (0.001, 0.01, 0.05)
PROMPTS = 128


def main(root: Path, repeats: int, epsilons: Sequence[float]) -> None:
    e = load_experiment(CONFIG, ["policy.rounds=0", "evaluate.prompts=8", "rollout.top_p=1"])
    run_experiment(e, name="blending", root=root, prefect=False)
    store = Store(root)
    student, teacher, prompts, _ = begin(e, Planner(store), lambda round: True)
    assert not isinstance(teacher, Mapping)  # the demo has one
    ways: dict[str, Any] = {"plain": "student"}
    for sampler in ("draft_and_verify", "lock_step"):
        ways |= {f"{sampler} {eps}": {"kind": "trb", "epsilon": eps, "sampler": sampler} for eps in epsilons}
    print("behaviour,tokens_per_s,relative_to_plain,acceptance,draft_used,beta_mean,kl_mean,kl_max,draft_tv")
    plain = 0.0
    with WorkerPool(e.runtime, root / "benchmark-logs") as pool:
        context = Context(store, e.runtime, pool, lambda *_, **__: None, lambda _: None)
        for name, behaviour in ways.items():
            config = RolloutConfig.model_validate(
                e.rollout.model_dump()
                | {"prompts_per_round": PROMPTS, "shard_prompts": PROMPTS, "behaviour": behaviour}
            )
            speed, made = max(
                (sampled(context, config, student, teacher, prompts, number) for number in range(repeats + 1)),
                key=lambda found: found[0],
            )
            plain = plain or speed
            values = made["blending"].meta["metrics"] if "blending" in made else {}
            names = ("acceptance", "draft_used", "beta_mean", "kl_mean", "kl_max", "draft_tv")
            shown = ",".join("" if values.get(name) is None else f"{values[name]:.4g}" for name in names)
            print(f"{name},{speed:.0f},{speed / plain:.3f},{shown}", flush=True)
            if name != "plain":
                record(f"speed of blended sampling, {name}, of plain", [speed / plain])


def sampled(
    context: Context, config: RolloutConfig, student: Student, teacher: Teacher, prompts: Prompts, number: int
) -> tuple[float, dict[str, Artifact]]:
    """(tokens per second, artifacts) of one round. Its seed is the time: nothing is found in the store."""
    work = rollout_work(config, student, prompts, time.time_ns() % 2**31, number + 1, teacher=teacher)
    started = time.perf_counter()
    with ExitStack() as stack:
        builders = {name: stack.enter_context(context.store.building(spec)) for name, spec in work.outputs.items()}
        work.build(builders, context)
        made = {name: builder.committed for name, builder in builders.items() if builder.committed is not None}
    return made["rollout"].meta["metrics"]["tokens"] / (time.perf_counter() - started), made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds that each way writes after one more; the fastest counts"
    )
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS, help="KL that the blend may spend, nats")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        main(options.store or Path(folder) / "store", options.repeats, options.epsilons)
