"""Speed and memory of the trainer's optimizer steps, against a bare loop of transformers and torch.

python benchmarks/training.py            prints one CSV row per model and number of processes, then one per memory setting
python benchmarks/training.py --quick    the rows of speed with fewer repeats
BENCH_PROFILE=1 python ...               and torch's profile of a block of each side

Both sides have the same weights, objective and head (`TrainModule`), micro-batches, AdamW and clipping. The bare loop has its
tensors ready in memory: forward, backward, `clip_grad_norm_`, `step`; with 2 processes inside DistributedDataParallel, which
exchanges gradients once per step. The trainer plans its steps, reads samples from its mapped files, runs through DeepSpeed
(ZeRO stage 0), and makes the rows of `training_steps`. Blocks of both alternate, so that a busy machine slows both.

    cpu, wall      tokens per second of bare over trainer's seconds: 0.95 means that the trainer needs 1/0.95 of the time. The
                   median over blocks, with the quartiles behind it. CPU time is that of rank 0's process
    tokens         of the trainer per second of wall time, padding not counted
    peak           largest resident memory of rank 0 in MiB, above what it had before the model was made"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from record import record

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests" / "support")]


@dataclass(frozen=True)
class Setting:
    """One child process group."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    k: int
    length: int
    step: int
    """Samples of an optimizer step."""
    block: int
    """Steps of a block."""
    budget: int
    """runtime.trainer.micro_batch_tokens"""
    ranks: int = 1
    stage: int = 0
    checkpointing: bool = False
    repeats: int = 9
    speed: bool = True


LARGE = Setting("14M parameters", 384, 6, 8192, 64, 112, 8, 1, 512)
SMALL = Setting("0.25M parameters", 64, 4, 512, 16, 24, 32, 4, 2048)


def settings(quick: bool) -> list[Setting]:
    from dataclasses import replace

    found = [replace(model, ranks=ranks, repeats=5 if quick else 15) for model in (LARGE, SMALL) for ranks in (1, 2)]
    if not quick:
        for stage, checkpointing in ((0, False), (1, False), (2, False), (0, True), (2, True)):
            found.append(
                replace(
                    LARGE,
                    ranks=2,
                    stage=stage,
                    checkpointing=checkpointing,
                    repeats=2,
                    speed=False,
                    step=16,
                    budget=1024,
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(Setting(**json.loads(given.child)))
        return
    print("model,processes,zero,checkpointing,cpu,cpu_q1,cpu_q3,wall,wall_q1,wall_q3,tokens,peak", flush=True)
    for setting in settings(given.quick):
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "--child", json.dumps(asdict(setting))],
                    env=os.environ
                    | {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(setting.ranks),
                        "OPD_WORKER_SOCKET": f"{folder}/socket",
                        "BENCH_FOLDER": folder,
                        "GLOO_SOCKET_IFNAME": "lo",
                        "DS_ACCELERATOR": "cpu",
                        "OMP_NUM_THREADS": "1",
                    },
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL if not os.environ.get("BENCH_LOUD") else None,
                )
                for rank in range(setting.ranks)
            ]
            failed = [process.wait() for process in ranks]
            if any(failed):
                raise SystemExit(f"{setting}: a rank failed; set BENCH_LOUD=1 to see why")


def child(setting: Setting) -> None:
    import torch
    import torch.distributed as dist
    from synthetic_round import make_round, train_job
    from transformers import LlamaConfig, LlamaForCausalLM

    from storage.store import Store
    from tasks.losses.build import make_objective
    from tasks.losses.config import DirectConfig, TopkSupport
    from tasks.losses.head import ChunkedHead
    from tasks.trainer.batching import plan_steps, split_step
    from tasks.trainer.columns import shared
    from tasks.trainer.config import TrainConfig
    from tasks.trainer.data import forward_batch, loss_denominators
    from tasks.trainer.engine import Engine, start
    from tasks.trainer.loop import Plan, run_steps
    from tasks.trainer.model import TrainModule, trainable
    from tasks.trainer.reading import collect_round
    from tasks.workers.jobs import ArtifactRef

    torch.set_num_threads(1)
    device = start()
    rank, folder = dist.get_rank(), Path(os.environ["BENCH_FOLDER"])
    steps = setting.block * setting.repeats
    if rank == 0:
        make_round(folder / "store", setting.step * steps, setting.length, setting.k, vocabulary=setting.vocabulary)
    dist.barrier()
    store = Store(folder / "store")
    objective = DirectConfig(support=TopkSupport(k=setting.k, outside="bucket"))
    stored = {artifact.stage: [ArtifactRef.of(artifact)] for artifact in store.list()}
    needed = {need.name for need in objective.needs().signals}
    job = train_job(store.root, stored["rollout"][0], {name: stored[name] for name in needed}, objective)
    until = ExitStack()
    samples = until.enter_context(
        shared(store.root, lambda where: collect_round(job, objective.needs(), [], setting.vocabulary, store, where))
    )
    gc.collect()
    before = memory("VmRSS")
    config = LlamaConfig(
        hidden_size=setting.hidden,
        intermediate_size=8 * setting.hidden // 3,
        num_hidden_layers=setting.layers,
        num_attention_heads=max(1, setting.hidden // 32),
        num_key_value_heads=max(1, setting.hidden // 32),
        vocab_size=setting.vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )
    train = TrainConfig(lr=1e-4, samples_per_step=setting.step)

    def module() -> TrainModule:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        if setting.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return TrainModule(model, make_objective(objective), ChunkedHead(512))

    ours = module()
    parameters = trainable(ours.model)
    file = folder / f"deepspeed-{setting.stage}.json"
    if rank == 0:
        file.write_text(json.dumps({"zero_optimization": {"stage": setting.stage}}))
    dist.barrier()
    engine = Engine(ours, parameters, train, str(file), device)
    engine.make_moments(0)
    planned = plan_steps(0, 1, len(samples), setting.step, len(samples))

    def trainer(number: int) -> None:
        mine = planned[number * setting.block : (number + 1) * setting.block]
        plan = Plan(mine, number * setting.block, 0, 1, "token", None, 10_000, None, None, setting.budget)
        run_steps(plan, samples, engine, ours, train, lambda *a, **b: None, [], lambda rows: None)

    blocks: list[Callable[[int], None]] = [trainer]
    if setting.speed:
        bare = module()
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(bare) if setting.ranks > 1 else bare
        optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        ready = []
        for step in planned:
            weights = loss_denominators(samples, step.rows, "token", None)
            micros = split_step(samples.forward_lengths[list(step.rows)].tolist(), setting.ranks, setting.budget)[rank]
            ready.append([forward_batch(samples, step.rows, weights, m.places, m.filler, device) for m in micros])

        def plain(number: int) -> None:
            for batches in ready[number * setting.block : (number + 1) * setting.block]:
                for place, batch in enumerate(batches):
                    last = place == len(batches) - 1
                    if setting.ranks > 1 and not last:
                        with wrapped.no_sync():
                            (wrapped(batch, False) * setting.ranks).backward()
                    else:
                        (wrapped(batch, False) * setting.ranks).backward()
                torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        blocks.append(plain)
    taken = np.zeros((setting.repeats, len(blocks), 2))
    for number in range(setting.repeats):
        order = list(enumerate(blocks))
        for place, block in order if number % 2 else order[::-1]:
            dist.barrier()
            began = time.process_time(), time.monotonic()
            block(number)
            taken[number, place] = time.process_time() - began[0], time.monotonic() - began[1]
    if setting.speed and setting.ranks == 1:
        gap = max(
            float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), bare.parameters(), strict=True)
        )
        assert gap < 1e-4, gap  # the same work was done
    if os.environ.get("BENCH_PROFILE"):
        from torch.profiler import profile

        for block in blocks:
            with profile() as found:
                block(setting.repeats - 1)
            table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
            if rank == 0:
                print(table)
    if rank == 0:
        taken = taken[1:]  # warm-up
        tokens = int(samples.forward_lengths.sum()) / steps * setting.block
        row: list[Any] = [setting.name, setting.ranks, setting.stage, setting.checkpointing]
        if setting.speed:
            for clock in range(2):
                row += [
                    f"{share:.3f}" for share in np.percentile(taken[:, 1, clock] / taken[:, 0, clock], (50, 25, 75))
                ]
        else:
            row += [""] * 6
        row += [f"{tokens / np.median(taken[:, 0, 1]):.0f}", "" if setting.speed else f"{memory('VmHWM') - before:.0f}"]
        print(",".join(map(str, row)), flush=True)
        if setting.speed:
            what = f"speed of training, {setting.name}, {setting.ranks} process{'es' * (setting.ranks > 1)}, of a bare loop"
            record(what, taken[:, 1, 1] / taken[:, 0, 1], "at least 0.95")
            record(f"{what}: CPU time", taken[:, 1, 0] / taken[:, 0, 0], "at least 0.95")
    engine.close()
    dist.destroy_process_group()


def memory(name: str) -> float:
    """A figure of this process's memory in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
