"""Tables of random top-K lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from storage.schemas import schema_for

INF = np.inf


def lists_of(
    random: np.random.Generator, lengths: list[int], k: int, scale: float, zeros: float, table: str
) -> pa.Table:
    """Rows of a table of top-K lists: per sample as many tokens, lists of 0 to k entries. The first model sorts them. Some tokens
    have no usable list, some entries no probability, some lists no tail."""
    rows = []
    models = [name.removesuffix("logprobs") for name in schema_for(table).names if name.endswith("logprobs")]
    for number, tokens in enumerate(lengths):
        row = {"sample_id": f"p{number}/1/0", "ids": [], "valid": []}
        row |= {f"{model}logprobs": [] for model in models} | {f"{model}tail_logmass": [] for model in models}
        for _ in range(tokens):
            count = int(random.integers(0, k + 1))
            row["valid"].append(count)
            row["ids"].append(random.permutation(2**18)[:count].tolist())
            for model in models:
                logits = random.standard_normal(count + 1) * scale
                logits[:-1][random.random(count) < zeros] = -INF
                logits[-1] = logits[-1] if random.random() < 0.8 or not np.isfinite(logits[:-1]).any() else -INF
                logprobs = logits - np.logaddexp.reduce(logits)
                listed = logprobs[:-1] if model == "teacher_" else np.sort(logprobs[:-1])[::-1]
                row[f"{model}logprobs"].append(listed.tolist())
                row[f"{model}tail_logmass"].append(float(logprobs[-1]) if count else np.nan)
        rows.append(row)
    return pa.Table.from_pylist(rows, schema_for(table))
