"""What a Ray cluster costs and gives beside local workers, in turns on one machine.

python benchmarks/cluster.py [--repeats 3] [--shards 24] [--work 0.4]

`start`: seconds from nothing to the first answer of a worker. `message`: seconds per item of a worker that has nothing to do.
`overhead`: wall seconds of items of --work seconds of CPU on one worker, Ray on one node over local. `two nodes`: items per
second of two workers on two nodes over one worker on one, beside the same ratio of two local processes; a machine with two busy
cores cannot give 2."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from record import record

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--work", type=float, default=0.4)
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


def show(what: str, values: Sequence[float], aim: str = "") -> None:
    print(f"{what:36} {statistics.median(values):8.3f}  ({', '.join(f'{value:.3f}' for value in values)})", flush=True)
    if aim:
        record(f"cluster: {what}", values, aim)


if __name__ == "__main__":
    main()
