"""What a Ray cluster costs and gives beside local workers, in turns on one machine.

python benchmarks/cluster.py [--repeats 3] [--shards 24] [--work 0.4] [--prompts 512]

`start`: seconds from nothing to the first answer of a worker. `message`: seconds per item of a worker that has nothing to do.
`overhead`: wall seconds of items of --work seconds of CPU on one worker, Ray on one node over local. `two nodes`: items per
second of two workers on two nodes over one worker on one, beside the same ratio of two local processes. `sampling`: the same
with rollouts of vLLM, engines of one thread that are loaded already, in tokens per second, beside two bare vLLM processes
of which each has half of the prompts. A machine with two busy cores cannot give 2."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import record
from sampling import LONGEST, Bare, Building, built, experiment

from flows.distill import inputs
from storage.store import Artifact, Store
from tasks.inputs.rounds import prompts_for_round
from tasks.rollout import plan_samples, rollout_work
from tasks.stage import Context, Prompts, Student
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig

CHECKOUT = Path(__file__).resolve().parent.parent
PLUGINS = CHECKOUT / "tests" / "plugins"
sys.path[:0] = [str(CHECKOUT / "tests" / "support"), str(PLUGINS)]


def measured(address: str | None, workers: int, shards: int, work: float, folder: Path) -> tuple[float, float]:
    """(seconds to the first answer, seconds of the items) of so many workers; address None: local ones."""
    from scripted_jobs import ScriptedItem, ScriptedJob

    cluster = {"kind": "local"} if address is None else {"kind": "ray", "address": address}
    runtime = RuntimeConfig.model_validate(
        {"device": "cpu", "threads": 1, "cluster": cluster, "scorer": {"workers": workers}}
    )
    begun = time.perf_counter()
    with WorkerPool(runtime, folder / "logs", ("scripted_worker",), str(PLUGINS)) as pool:
        pool.share("scorer", ScriptedJob(do="burn"), [ScriptedItem(n) for n in range(workers)])
        ready = time.perf_counter()
        pool.share("scorer", ScriptedJob(do="burn", pause=work), [ScriptedItem(n) for n in range(shards)])
        return ready - begun, time.perf_counter() - ready


class Rollouts:
    """Rollouts of one student by vLLM, each with a seed of its own."""

    def __init__(self, prompts: int, root: Path) -> None:
        sizes = argparse.Namespace(prompts=prompts, slots=64, hidden=256, layers=4)
        self.e = experiment(sizes)
        self.config = self.e.rollout.model_copy(update={"shard_prompts": 16})
        self.store, self.root, self.seed = Store(root), root, 0
        with WorkerPool(self.e.runtime, root / "logs") as pool:
            self.student, _, self.prompts = inputs(self.e.at(0), Building(self._context(self.e.runtime, pool)))  # type: ignore[arg-type]
        rows = self.store.read_table(self.prompts, "prompts", columns=["prompt_id", "split", "token_ids"]).to_pylist()
        self.ids = {row["prompt_id"]: row["token_ids"] for row in rows if row["split"] == "train"}

    def _context(self, runtime: RuntimeConfig, pool: WorkerPool) -> Context:
        return Context(self.store, runtime, pool, lambda *_, **__: None, lambda _: None)

    def rate(self, address: str | None, workers: int) -> float:
        """Completion tokens per second of so many samplers that have loaded the student; address None: local ones."""
        cluster = {"kind": "local"} if address is None else {"kind": "ray", "address": address}
        sampler = self.e.runtime.sampler.model_dump() | {"workers": workers}
        given = self.e.runtime.model_dump() | {"cluster": cluster, "sampler": sampler}
        runtime = RuntimeConfig.model_validate(given)
        with WorkerPool(runtime, self.root / "logs") as pool:
            self._sampled(self._context(runtime, pool), 64)
            begun = time.perf_counter()
            made = self._sampled(self._context(runtime, pool), self.config.prompts_per_round)
            seconds = time.perf_counter() - begun
        table = self.store.read_table(made, "rollouts", columns=["completion_token_ids"])
        return sum(map(len, table["completion_token_ids"].to_pylist())) / seconds

    def _sampled(self, context: Context, prompts: int) -> Artifact:
        self.seed += 1
        config = self.config.model_copy(update={"prompts_per_round": prompts})
        work = rollout_work(config, Student(self.student), Prompts(self.prompts), self.seed, 1)
        return built(context, work)["rollout"]

    def bare(self, count: int, engines: Sequence[Bare]) -> float:
        """Completion tokens per second of `count` of these engines, side by side, each with its part of the prompts."""
        self.seed += 1
        chosen = prompts_for_round(list(self.ids), self.seed, 1, self.config.prompts_per_round)
        plan = plan_samples(chosen, self.config, self.seed, 1)
        requests = [(self.ids[request.prompt_id], request.seed) for shard in plan for request in shard]
        begun = time.perf_counter()
        with ThreadPoolExecutor(count) as threads:
            parts = list(threads.map(lambda n: engines[n].generate(requests[n::count]), range(count)))
        return sum(sum(lengths) for _, lengths in parts) / (time.perf_counter() - begun)

    def engines(self, count: int) -> list[Bare]:
        """Bare engines of vLLM that have loaded the student."""
        longest = max(map(len, self.ids.values())) + LONGEST
        found = [Bare(self.store, self.student, self.e, longest) for _ in range(count)]
        for engine in found:
            self.bare(1, [engine])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--work", type=float, default=0.4)
    parser.add_argument("--prompts", type=int, default=512)
    given = parser.parse_args()
    from ray_nodes import nodes

    with tempfile.TemporaryDirectory() as place, nodes(1, 1) as cluster:
        folder = Path(place)

        def turns(*settings: tuple[str | None, int, int, float]) -> list[list[tuple[float, float]]]:
            return [[measured(*one, folder) for one in settings] for _ in range(given.repeats)]

        ray, here = cluster.address, None
        empty = turns((here, 1, 400, 0.0), (ray, 1, 400, 0.0))
        show("start, local, s", [one[0][0] for one in empty])
        show("start, Ray, s", [one[1][0] for one in empty])
        show("message, local, ms", [1000 * one[0][1] / 400 for one in empty])
        show("message, Ray, ms", [1000 * one[1][1] / 400 for one in empty])
        busy = [(where, count, given.shards, given.work) for where in (here, ray) for count in (1, 2)]
        full = turns(*busy)

        def ratio(over: int, under: int) -> list[float]:
            return [turn[over][1] / turn[under][1] for turn in full]

        show("overhead: Ray / local, one worker", ratio(2, 0), "at most 1.1")
        show("two local workers / one", ratio(0, 1))
        show("two nodes / one", ratio(2, 3), "at least 1.5")

        rollouts = Rollouts(given.prompts, folder / "store")
        rates = [[rollouts.rate(where, count) for where, count, *_ in busy] for _ in range(given.repeats)]
        engines = rollouts.engines(2)
        bare = [[rollouts.bare(count, engines) for count in (1, 2)] for _ in range(given.repeats)]
        for engine in engines:
            engine.close()
        show("sampling overhead: local / Ray", [turn[0] / turn[2] for turn in rates], "at most 1.1")
        show("sampling, two local workers / one", [turn[1] / turn[0] for turn in rates])
        show("sampling, two nodes / one", [turn[3] / turn[2] for turn in rates], "at least 1.5")
        show("sampling, two bare engines / one", [turn[1] / turn[0] for turn in bare])


def show(what: str, values: Sequence[float], aim: str = "") -> None:
    print(f"{what:36} {statistics.median(values):8.3f}  ({', '.join(f'{value:.3f}' for value in values)})", flush=True)
    if aim:
        record(f"cluster: {what}", values, aim)


if __name__ == "__main__":
    main()
