"""Time, bytes and dollars of a round on many GPUs, on paper: the table of docs/scale.md.

python benchmarks/scale_model.py

Nothing runs: assumptions about GPUs, and constants that were measured with this program (docs/performance.md), are named below
and printed with the table. Stages follow each other, each on all GPUs. Change a constant to see what it does."""

from __future__ import annotations

import math
from dataclasses import dataclass

STUDENT, TEACHER = 8e9, 32e9
"""Parameters."""
KV_BYTES = 2 * 36 * 8 * 128 * 2
"""Of the student per token: keys and values, 36 layers, 8 heads of 128, bfloat16."""
PROMPT_TOKENS, COMPLETION_TOKENS = 256, 1024
"""Of a sample, on average; the longest completion is as long as the average times LONGEST."""
LONGEST = 2.0
SAMPLES_PER_STEP = 512
SAMPLES_PER_SHARD = 64
EVALUATION_PROMPTS = 1_000
TABLES = 4
"""Of a round: rollouts, sampled, teacher_topk, mask."""

# Assumed of a GPU (H200, dense bfloat16, as its maker says) and of what it costs.
GPU_FLOPS = 989e12
GPU_BANDWIDTH = 4.8e12
"""Bytes per second of its memory."""
GPU_BATCH = 256
"""Samples that one GPU decodes at the same time."""
MFU_FORWARD, MFU_TRAIN, BANDWIDTH_USED = 0.5, 0.4, 0.6
GPUS_PER_NODE = 8
DOLLARS_PER_GPU_HOUR = 3.0
NETWORK_PER_GPU = 50e9
"""Bytes per second between nodes, for each GPU (400 Gb/s)."""
STORE_PER_NODE = 5e9
"""Bytes per second of the shared file system, for each node."""
ENGINE_START_SECONDS = 60.0
"""Of vLLM, of the scorer and of the trainer, each once a round where GPUs are shared between them."""
S3_DOLLARS_PER_GB_MONTH, S3_DOLLARS_PER_PUT = 0.023, 5e-6

# Measured with this program (docs/performance.md), on one core of a CPU where it is CPU time.
ROLLOUT_OF_VLLM, SCORING_OF_BARE, TRAINING_OF_BARE = 1.01, 0.80, 0.96
"""Speed of ours, of a plain loop's."""
BYTES_PER_TOKEN = {"teacher's lists, K = 64": 195.0, "log-probabilities and entropies": 16.0, "ids, text, mask": 13.0}
DIGEST_BYTES_PER_SECOND = 1.2e9
"""SHA-256 of one core."""
PLAN_SECONDS_PER_SAMPLE = 12e-6
COMMIT_SECONDS_PER_SHARD, FIND_SECONDS_PER_SHARD, WRITE_SECONDS_PER_SHARD = 85e-6, 25e-6, 2.7e-3
MANIFEST_BYTES_PER_SHARD = 480
DIGEST_THREADS = 8
"""Files and tensors are hashed side by side."""

ADAM_BYTES = 12
"""Per parameter of the trainer's state: float32 weights and two moments."""
HASHES_OF_STUDENT, HASHES_OF_STATE = 5, 2
"""Times a round that the student and the trainer's state are hashed whole: written (files and tensors), read by each stage."""


@dataclass(frozen=True)
class Round:
    """Seconds of a round's parts, and what it stores."""

    gpus: int
    tokens: float

    @property
    def samples(self) -> float:
        return self.tokens / COMPLETION_TOKENS

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / GPUS_PER_NODE)

    def decode(self, samples: float) -> float:
        """Each step reads the weights and the cache of every sample in the batch, or computes, whichever is longer. The last
        samples are decoded alone."""
        each = samples / self.gpus
        batch = min(GPU_BATCH, max(1.0, each))
        context = PROMPT_TOKENS + COMPLETION_TOKENS / 2

        def step(size: float) -> float:
            read = (2 * STUDENT + size * context * KV_BYTES) / (GPU_BANDWIDTH * BANDWIDTH_USED)
            return max(read, 2 * STUDENT * size / (GPU_FLOPS * MFU_FORWARD))

        steady = each * COMPLETION_TOKENS / batch * step(batch)
        return (steady + (LONGEST - 1) * COMPLETION_TOKENS * step(1)) / ROLLOUT_OF_VLLM

    def forward(self, parameters: float, samples: float) -> float:
        work = 2 * parameters * samples * (PROMPT_TOKENS + COMPLETION_TOKENS)
        return work / (self.gpus * GPU_FLOPS * MFU_FORWARD) / SCORING_OF_BARE

    @property
    def rollout(self) -> float:
        return self.decode(self.samples)

    @property
    def supervise(self) -> float:
        return self.forward(TEACHER, self.samples) + self.forward(STUDENT, self.samples)

    @property
    def train(self) -> float:
        """Forward, backward and the forward again that activations are recomputed by; ZeRO-3 gathers the weights twice and
        scatters the gradients in each step, beside the computation."""
        steps = max(1.0, self.samples / SAMPLES_PER_STEP)
        used = min(self.gpus, SAMPLES_PER_STEP)
        tokens = min(SAMPLES_PER_STEP, self.samples) * (PROMPT_TOKENS + COMPLETION_TOKENS)
        compute = 8 * STUDENT * tokens / (used * GPU_FLOPS * MFU_TRAIN) / TRAINING_OF_BARE
        moved = 3 * 2 * STUDENT / NETWORK_PER_GPU if self.nodes > 1 else 0.0
        return steps * max(compute, moved)

    @property
    def evaluate(self) -> float:
        return self.decode(2 * EVALUATION_PROMPTS) + self.forward(TEACHER, EVALUATION_PROMPTS)

    @property
    def starts(self) -> float:
        """Engines, and their weights from the store to every node."""
        return 3 * ENGINE_START_SECONDS + (3 * 2 * STUDENT + 2 * TEACHER) / STORE_PER_NODE

    def digests(self, threads: int) -> float:
        student, state = HASHES_OF_STUDENT * 2 * STUDENT, HASHES_OF_STATE * ADAM_BYTES * STUDENT
        return (student + state) / DIGEST_BYTES_PER_SECOND / threads

    @property
    def shards(self) -> float:
        return TABLES * math.ceil(self.samples / SAMPLES_PER_SHARD)

    @property
    def driver(self) -> float:
        """CPU of the process of the flow, beside the stages: it plans, finds and commits."""
        per_shard = COMMIT_SECONDS_PER_SHARD + 3 * FIND_SECONDS_PER_SHARD
        return PLAN_SECONDS_PER_SAMPLE * self.samples + per_shard * self.shards

    @property
    def seconds(self) -> float:
        stages = self.rollout + self.supervise + self.train + self.evaluate
        return stages + self.starts + self.digests(DIGEST_THREADS) + self.driver

    @property
    def bytes(self) -> float:
        return self.tokens * sum(BYTES_PER_TOKEN.values())

    @property
    def kept_bytes(self) -> float:
        """Of the student and of the trainer's state."""
        return (2 + ADAM_BYTES) * STUDENT

    @property
    def dollars(self) -> float:
        return self.seconds / 3600 * self.gpus * DOLLARS_PER_GPU_HOUR


def hours(seconds: float) -> str:
    """Seconds, minutes or hours, with two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes with two digits."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= one:
            return f"{count / one:.2g} {unit}" if count < 100 * one else f"{count / one:,.0f} {unit}"
    return f"{count:.0f} B"


def constants() -> list[str]:
    """Every named constant as `NAME = value`."""
    found = [(name, value) for name, value in globals().items() if name.isupper() and name != "ROUNDS"]
    return [f"{name} = {value:g}" if isinstance(value, (int, float)) else f"{name} = {value}" for name, value in found]


ROUNDS = [Round(gpus, tokens) for tokens in (1e7, 1e8, 1e9) for gpus in (8, 64, 512)]


def main() -> None:
    print("; ".join(constants()) + "\n")
    print(
        "| tokens | GPUs | rollout | supervise | train | evaluate | starts | digests | driver | round | GPUs idle | dollars |"
    )
    print("|---" * 12 + "|")
    for r in ROUNDS:
        parts = (r.rollout, r.supervise, r.train, r.evaluate, r.starts, r.digests(DIGEST_THREADS), r.driver, r.seconds)
        idle = (r.starts + r.digests(DIGEST_THREADS) + r.driver) / r.seconds
        cells = [
            f"{r.tokens:.0e}".replace("e+0", "e"),
            str(r.gpus),
            *map(hours, parts),
            f"{idle:.0%}",
            f"{r.dollars:,.0f}",
        ]
        print("| " + " | ".join(cells) + " |")
    print(
        "\n| tokens | samples | shards | bytes of tables | manifests | student and state | CPU to write shards | S3 |"
    )
    print("|---" * 8 + "|")
    for r in ROUNDS[::3]:
        stored = r.bytes + r.kept_bytes
        s3 = stored / 1e9 * S3_DOLLARS_PER_GB_MONTH
        cells = [f"{r.tokens:.0e}".replace("e+0", "e"), f"{r.samples:,.0f}", f"{r.shards:,.0f}", size(r.bytes)]
        cells += [
            size(r.shards * MANIFEST_BYTES_PER_SHARD),
            size(r.kept_bytes),
            hours(r.shards * WRITE_SECONDS_PER_SHARD),
        ]
        print("| " + " | ".join([*cells, f"{s3:.2f} a month, {r.shards * S3_DOLLARS_PER_PUT:.2f} to push"]) + " |")
    one, many = ROUNDS[0].digests(1), ROUNDS[0].digests(DIGEST_THREADS)
    print(f"\nDigests of a round: {hours(one)} in one thread, {hours(many)} in {DIGEST_THREADS}.")


if __name__ == "__main__":
    main()
