"""Completions per second of a rollout (plan, sampler worker, checks, shards, commit) relative to one `LLM.generate` call of vLLM
with all of its prompts: same checkpoint, engine settings, seeds and completions. A random model with vocabulary V ends a
completion at each token with probability STOPS / V, so lengths are geometric: the longest of 512 has seven times the mean.

Both engines are warm and take turns in one run. Ratios of wall time mean something on an idle machine only; CPU time (of the
worker and of this process, against that of the bare engine's process) is measured beside it.

python benchmarks/sampling.py [--prompts 512] [--slots 64] [--shards 16 64 256] [--repeats 5] [--hidden 256] [--layers 4]"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from record import record

from flows.distill import inputs
from flows.experiment import Experiment, load_experiment
from storage.store import Artifact, Store
from tasks.inputs.rounds import prompts_for_round
from tasks.rollout import plan_samples, rollout_work
from tasks.stage import Context, Prompts, Student, Work
from tasks.workers.pool import WorkerPool

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
STOPS, LONGEST, HEAD = 4, 448, 32
Times = tuple[float, float]
"""Wall and CPU seconds."""


class Building:
    """An executor that builds each stage at once, without a run."""

    def __init__(self, context: Context) -> None:
        self.context, self.store = context, context.store

    def __call__(self, label: str, make: Callable[..., Work], *args: Any, **given: Any) -> dict[str, Artifact]:
        return built(self.context, make(*args, **given))


def built(context: Context, work: Work) -> dict[str, Artifact]:
    """The outputs of a stage."""
    with ExitStack() as stack:
        builders = {name: stack.enter_context(context.store.building(spec)) for name, spec in work.outputs.items()}
        if missing := {name: builder for name, builder in builders.items() if builder.committed is None}:
            work.build(missing, context)
    return {name: builder.committed for name, builder in builders.items() if builder.committed is not None}


def experiment(args: argparse.Namespace) -> Experiment:
    size = f"hidden_size={args.hidden}", f"intermediate_size={3 * args.hidden}", f"num_hidden_layers={args.layers}"
    heads = f"num_attention_heads={args.hidden // HEAD}", f"num_key_value_heads={args.hidden // HEAD}"
    shape = [f"student.source.config.{value}" for value in (*size, *heads, "max_position_embeddings=512")]
    return load_experiment(
        CONFIG,
        [
            *shape,
            "student.warmup=null",
            "teacher.warmup=null",
            f"rollout.prompts_per_round={args.prompts}",
            f"rollout.stop_token_ids={list(range(STOPS))}",
            f"rollout.max_completion_length={LONGEST}",
            "rollout.num_generations=1",
            "rollout.top_p=1",
            "runtime.threads=1",
            f"runtime.sampler.max_num_seqs={args.slots}",
        ],
    )


# --- the bare engine, in a process of its own --------------------------------------------------------------------------


def serve() -> None:
    """Load the engine, then answer every line (requests as JSON) with the seconds of one `generate` call."""
    from tasks.engines.vllm_engine import VllmEngine, drawn
    from tasks.workers.jobs import Sampling

    channel, sys.stdout = sys.stdout, sys.stderr
    begin = json.loads(input())
    engine = VllmEngine(begin["settings"])
    engine.load(Path(begin["path"]), begin["weights"], begin["dtype"], begin["longest"])
    sampling = Sampling(**begin["sampling"])
    stops = begin["sampling"]["stop_token_ids"]
    print("ready", file=channel, flush=True)
    for line in sys.stdin:
        requests = json.loads(line)
        engine.clear_cache()
        started, cpu = time.perf_counter(), time.process_time()
        params = [engine._params(sampling, seed, sampling.max_completion_length, stops) for _, seed in requests]
        prompts = [{"prompt_token_ids": tokens} for tokens, _ in requests]
        outputs = engine.llm.generate(prompts, params, use_tqdm=False)
        spent = time.perf_counter() - started, time.process_time() - cpu
        lengths = [len(drawn(output.outputs[0]).token_ids) for output in outputs]
        print(json.dumps({"spent": spent, "lengths": lengths}), file=channel, flush=True)
    engine.close()


class Bare:
    """The other end of `serve`."""

    def __init__(self, store: Store, student: Artifact, e: Experiment, longest: int) -> None:
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        settings = e.runtime.sampler.model_dump(mode="json") | {"device": "cpu", "threads": e.runtime.threads}
        begin = {
            "settings": settings,
            "path": str(store.materialize(student)),
            "weights": student.content["weights"],
            "dtype": e.rollout.dtype,
            "longest": longest,
            "sampling": e.rollout.sampling(),
        }
        self._ask(begin)

    def _ask(self, what: object) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def generate(self, requests: list[tuple[list[int], int]]) -> tuple[Times, list[int]]:
        """Seconds of one call, and the completions' lengths."""
        answer = json.loads(self._ask(requests))
        return tuple(answer["spent"]), answer["lengths"]

    def close(self) -> None:
        self.process.communicate()


# --- the comparison ---------------------------------------------------------------------------------------------------


@contextmanager
def measured(found: list[float]) -> Iterator[None]:
    """Adds wall and CPU seconds of the block to `found`: of this process and of all below it but the bare engine's."""
    started, before = time.perf_counter(), cpu_seconds()
    yield
    after = cpu_seconds()
    found += [time.perf_counter() - started, sum(after[pid] - before.get(pid, 0.0) for pid in after)]


def cpu_seconds() -> dict[int, float]:
    me = psutil.Process()
    serving = [p for p in me.children() if "--serve" in p.cmdline()]
    processes = [p for p in (me, *me.children(recursive=True)) if p not in serving]
    return {p.pid: sum(p.cpu_times()[:2]) for p in processes}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main(args: argparse.Namespace, root: Path) -> None:
    e, store = experiment(args), Store(root)
    with WorkerPool(e.runtime, root / "logs") as pool:
        context = Context(store, e.runtime, pool, lambda *_, **__: None, lambda _: None)
        model, _, prompts = inputs(e.at(0), Building(context))  # type: ignore[arg-type]
        rows = store.read_table(prompts, "prompts", columns=["prompt_id", "split", "token_ids"]).to_pylist()
        tokens = {row["prompt_id"]: row["token_ids"] for row in rows if row["split"] == "train"}
        bare = Bare(store, model, e, max(map(len, tokens.values())) + LONGEST)
        ratios: dict[int, tuple[list[float], list[float]]] = {size: ([], []) for size in args.shards}
        print("shard_prompts,repeat,completions,mean_length,longest,wall_s,bare_wall_s,cpu_s,bare_cpu_s", flush=True)
        for repeat in range(args.repeats + 1):  # the first warms both up
            for size in args.shards:
                config = e.rollout.model_copy(update={"shard_prompts": size})
                seed = repeat * 1000 + size
                chosen = prompts_for_round(list(tokens), seed, 1, config.prompts_per_round)
                requests = [
                    (tokens[request.prompt_id], request.seed)
                    for shard in plan_samples(chosen, config, seed, 1)
                    for request in shard
                ]
                (bare_wall, bare_cpu), lengths = bare.generate(requests)
                spent: list[float] = []
                with measured(spent):
                    made = built(context, rollout_work(config, Student(model), Prompts(prompts), seed, 1))["rollout"]
                table = store.read_table(made, "rollouts", columns=["completion_token_ids"])
                ours = [len(ids) for ids in table["completion_token_ids"].to_pylist()]
                assert ours == lengths, "both must have sampled the same completions"
                wall, cpu = spent
                if repeat:
                    ratios[size][0].append(bare_wall / wall)
                    ratios[size][1].append(bare_cpu / cpu)
                    mean = statistics.mean(ours)
                    print(
                        f"{size},{repeat},{len(ours)},{mean:.1f},{max(ours)},{wall:.2f},{bare_wall:.2f},{cpu:.2f},{bare_cpu:.2f}",
                        flush=True,
                    )
        bare.close()
    print("\nshard_prompts,relative_speed_wall,relative_speed_cpu   (1: as fast as one call; median, lowest-highest)")
    for size, (walls, cpus) in ratios.items():
        print(f"{size},{spread(walls)},{spread(cpus)}")
        record(f"speed of a rollout, shards of {size}, of one vLLM call", walls, "at least 0.95")
        record(f"the same by CPU time, shards of {size}", cpus, "at least 0.95")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("prompts", 512), ("slots", 64), ("repeats", 5), ("hidden", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shards", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(arguments, Path(folder) / "store")
