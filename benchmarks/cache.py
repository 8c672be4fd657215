"""The cache of a teacher's top-K lists: bytes per token on disk, error, and speed of reading, by encoding and tail mass.

Three teachers: synthetic with Zipf-like tails over Qwen3's 151,936 ids (the ids uniformly random, which compresses worst), the
same but peaked (mean entropy below 0.5 nats), and SmolLM2-135M on text of its own, with 20 of its 30 layers as the student.

python benchmarks/smollm2.py FOLDER     makes the pair
python benchmarks/cache.py [FOLDER]     prints one CSV row per teacher, K, encoding and tail mass; without FOLDER not for SmolLM2

    bytes         of the whole shard's file, per token
    entries       of a list, mean
    kl_mean, _max KL(teacher || stored) in nats over the stored list and its tail: the error of the stored numbers
    cut_kl        the same over all ids, with what lies outside the stored list spread evenly over the ids outside, minus this
                  for the exact list of K: what the cut loses for a reader who must know the ids outside; a bucket need not
    loss_change   of the bucketed KL(student || teacher), mean over tokens, against the exact list of K (SmolLM2; its value is
                  in the row of the exact list)
    read          tokens per second of CPU time: the file read and its rows unpacked, checksums verified"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from record import record
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.artifacts.packed import is_packed, packed_schema
from storage.artifacts.shards import read_parquet, write_parquet
from storage.schemas import TABLES, validate_table
from tasks.signals import SIGNALS, Shard

VOCABULARY = 151_936
TOKENS, LENGTH = 8192, 128
"""Of the synthetic teachers, in samples of LENGTH tokens."""
CANDIDATES, BEYOND_EACH = 4096, 16
"""Ids of a synthetic teacher that have noise; the rest follow Zipf's law, so many of them at equal values."""
PROMPTS, WRITTEN = 32, 96
"""Prompts, and tokens of text per prompt, of SmolLM2."""
TAIL_MASSES = (1e-3, 1e-2, 5e-2)
SIZES = (50, 64, 128)
READS = 7
"""The fastest counts."""


@dataclass(frozen=True)
class Lists:
    """A teacher's N likeliest-first lists of the longest K, and the mass of the rest. Natural logarithms."""

    name: str
    vocabulary: int
    length: int
    ids_NK: np.ndarray
    logprobs_NK: np.ndarray
    entropy: float
    student_NK: np.ndarray | None = None

    def tail(self, k: int) -> np.ndarray:
        mass = 1 - np.exp(self.logprobs_NK[:, :k].astype(np.float64)).sum(1)
        return np.log(np.maximum(mass, 1e-12)).astype(np.float32)


def synthetic(name: str, low: float, high: float, seed: int) -> Lists:
    """Exponents of Zipf's law between low and high, by token; the candidates' logits have noise of deviation 0.5."""
    random = np.random.Generator(np.random.PCG64(seed))
    rank = np.log(np.arange(1, CANDIDATES + 1))
    beyond = np.log(np.arange(CANDIDATES + 1, VOCABULARY + 1, BEYOND_EACH))
    logprobs, entropy = np.empty((TOKENS, max(SIZES)), np.float32), 0.0
    for token, exponent in enumerate(random.uniform(low, high, TOKENS)):
        rest = -exponent * beyond
        logits = -exponent * rank + 0.5 * random.standard_normal(CANDIDATES)
        total = np.log(np.exp(logits).sum() + BEYOND_EACH * np.exp(rest).sum())
        for part, times in ((logits - total, 1), (rest - total, BEYOND_EACH)):
            entropy -= float(times * (np.exp(part) * part).sum()) / TOKENS
        logprobs[token] = np.sort(logits - total)[::-1][: max(SIZES)]
    ids = random.integers(0, VOCABULARY, (TOKENS, max(SIZES))).astype(np.int32)
    return Lists(name, VOCABULARY, LENGTH, ids, logprobs, entropy)


@torch.inference_mode()
def smollm2(folder: Path) -> Lists:
    """The teacher's lists on its own text, sampled at temperature 1, and the student's log-probabilities of the same ids."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher", padding_side="left")
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder / who).eval() for who in ("teacher", "student"))
    lines = (folder / "train.jsonl").read_text().splitlines()
    prompts = [
        line.removeprefix('{"prompt": "').removesuffix('"}') for line in lines[:: len(lines) // PROMPTS][:PROMPTS]
    ]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    written = teacher.generate(
        **given, max_new_tokens=WRITTEN, do_sample=True, top_k=0, top_p=1.0, min_new_tokens=WRITTEN
    )
    mask = torch.cat([given["attention_mask"], torch.ones_like(written[:, -WRITTEN:])], 1)
    ids, logprobs, own, entropies = [], [], [], []
    for row, seen in zip(written.split(4), mask.split(4), strict=True):
        places = (seen.cumsum(1) - 1).clamp(min=0)
        q, p = (
            model(row, attention_mask=seen, position_ids=places).logits[:, -WRITTEN - 1 : -1].float().log_softmax(-1)
            for model in (teacher, student)
        )
        top = q.topk(max(SIZES), dim=-1)
        ids.append(top.indices.flatten(0, 1))
        logprobs.append(top.values.flatten(0, 1))
        own.append(p.gather(-1, top.indices).flatten(0, 1))
        entropies.append(-(q.exp() * q).sum(-1).flatten())
    joined = [torch.cat(parts).numpy() for parts in (ids, logprobs, own)]
    entropy = float(torch.cat(entropies).mean())
    return Lists(
        "SmolLM2", teacher.config.vocab_size, WRITTEN, joined[0].astype(np.int32), joined[1], entropy, joined[2]
    )


def rows_of(lists: Lists, k: int, encoding: str, tail_mass: float | None) -> pa.Table:
    """A shard's rows, as the scorer writes them."""
    samples = len(lists.ids_NK) // lists.length
    quantities = {
        "ids": lists.ids_NK[:, :k],
        "logprobs": lists.logprobs_NK[:, :k],
        "valid": np.full(len(lists.ids_NK), k, np.int16),
        "tail": lists.tail(k),
    }
    values = {f"teacher_top{k}_{name}": np.split(array, samples) for name, array in quantities.items()}
    rollouts = pa.table(
        {
            "sample_id": [f"prompt-{i // 4:05d}/1/{i % 4}" for i in range(samples)],
            "completion_token_ids": [[0] * lists.length for _ in range(samples)],
        }
    )
    rows = SIGNALS["teacher_topk"].table(Shard(rollouts, values, k, encoding, tail_mass=tail_mass))
    schema = TABLES["teacher_topk"]
    return validate_table("teacher_topk", rows, packed_schema(schema) if is_packed(rows.column_names) else schema)


def flat(table: pa.Table, column: str) -> np.ndarray:
    array = pa.concat_arrays(table[column].chunks)
    while pa.types.is_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False).astype(np.float64)


@dataclass(frozen=True)
class Error:
    kl_N: np.ndarray
    spread_N: np.ndarray
    """With the tail spread over all ids outside."""
    loss_N: np.ndarray | None
    entries: float


def error(lists: Lists, k: int, stored: pa.Table) -> Error:
    counts, tails = flat(stored, "valid").astype(int), flat(stored, "tail_logmass")
    here = np.arange(k) < counts[:, None]
    kept = np.full(here.shape, -np.inf)
    kept[here] = flat(stored, "logprobs")
    x = lists.logprobs_NK[:, :k].astype(np.float64)
    mass = np.exp(x)
    rest = np.maximum(1 - mass.sum(1), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        outside = rest + np.where(here, 0, mass).sum(1)
        listed = np.where(here, mass * (x - kept), 0).sum(1)
        kl = listed + np.where(outside > 0, outside * (np.log(outside) - tails), 0)
        each = tails - np.log(lists.vocabulary - counts)  # of an id outside the stored list
        spread = listed + np.where(here, 0, mass * (x - each[:, None])).sum(1)
        spread += np.where(rest > 0, rest * (np.log(rest / (lists.vocabulary - k)) - each), 0)
        loss = None
        if lists.student_NK is not None:
            p = lists.student_NK[:, :k].astype(np.float64)
            left = 1 - np.where(here, np.exp(p), 0).sum(1)
            loss = np.where(here, np.exp(p) * (p - kept), 0).sum(1) + left * (np.log(left) - tails)
    return Error(kl, spread, loss, float(counts.mean()))


def measure(lists: Lists, k: int, encoding: str, tail_mass: float | None, folder: Path, whole: Error | None) -> Error:
    file = folder / "shard.parquet"
    write_parquet(rows_of(lists, k, encoding, tail_mass), file)
    best = np.inf
    for _ in range(READS):
        started = time.process_time()
        stored = read_parquet(file)
        best = min(best, time.process_time() - started)
    found, tokens = error(lists, k, stored), len(lists.ids_NK)
    loss, cut = "", ""
    if found.loss_N is not None:
        loss = f"{(found.loss_N - (0 if whole is None or whole.loss_N is None else whole.loss_N)).mean():.2g}"
    if tail_mass is not None and whole is not None:
        cut = f"{(found.spread_N - whole.spread_N).mean():.2g}"
    ended = "" if tail_mass is None else f"{tail_mass:g}"
    print(
        f"{lists.name},{lists.entropy:.2f},{k},{encoding},{ended},{found.entries:.1f},{file.stat().st_size / tokens:.1f},"
        f"{found.kl_N.mean():.2g},{found.kl_N.max():.2g},{cut},{loss},{tokens / best:.0f}",
        flush=True,
    )
    if encoding == "packed" and k == 64:
        what = f"K = 64, packed, {lists.name}{f', tail mass {ended}' * bool(ended)}"
        # a cut shortens the lists of a sure teacher alone
        aim = "at most 200" if not ended else "at most 60" if lists.name == "peaked" else ""
        record(f"{what}: bytes per token", [file.stat().st_size / tokens], aim, "B")
        record(f"{what}: tokens read per second of CPU", [tokens / best], "at least 200,000", "/s")
    return found


def main(folder: Path | None) -> None:
    print("teacher,entropy,k,encoding,tail_mass,entries,bytes,kl_mean,kl_max,cut_kl,loss_change,read")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        pair = [] if folder is None else [smollm2(folder)]
        for lists in (synthetic("Zipf-like", 0.9, 1.6, 0), synthetic("peaked", 3, 7, 1), *pair):
            for k in SIZES:
                whole = measure(lists, k, "exact", None, Path(place), None)
                ways: list[tuple[str, float | None]] = [("packed", None)]
                if k == 64:
                    ways = [("compact", None), ("packed", None), *(("packed", mass) for mass in TAIL_MASSES)]
                for encoding, tail_mass in ways:
                    measure(lists, k, encoding, tail_mass, Path(place), whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
