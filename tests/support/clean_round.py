"""A small round whose numbers are all in order: rollouts and every signal, each token's lists from two random distributions."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.trainer.data import Samples

ROWS, K, LENGTHS = 16, 4, (3, 1, 2)
NAMES = ("rollouts", "sampled", "mask", "teacher_topk", "student_topk")
Rows = dict[str, list[dict[str, Any]]]


def rows(seed: int = 1, lengths: tuple[int, ...] = LENGTHS, k: int = K, compact: bool = False) -> Rows:
    """Rows per table, of samples with so many tokens; `compact` lists are rounded to float16."""
    random = np.random.Generator(np.random.PCG64(seed))
    made: Rows = {name: [] for name in NAMES}
    for index, length in enumerate(lengths):
        teacher, student = (np.log(random.dirichlet(np.ones(ROWS), size=length)) for _ in range(2))
        completion = random.integers(0, ROWS, length)
        name, places = f"p{index}/1/0", np.arange(length)
        fixed = {"sample_index": 0, "behaviour": "student", "prefix_length": 0, "finish_reason": "stop", "seed": 0}
        lists = {"prompt_token_ids": [1, 2], "completion_token_ids": completion, "sampling_logprobs": [-1.0] * length}
        made["rollouts"].append({"sample_id": name, "prompt_id": name, "completion_text": "", **fixed, **lists})
        values = {
            "student_logprobs": student[places, completion],
            "teacher_logprobs": teacher[places, completion],
            "student_entropy": [1.0] * length,
            "teacher_entropy": [0.0] * length,
            "behaviour_logprobs": student[places, completion],
        }
        made["sampled"].append({"sample_id": name, **values})
        made["mask"].append({"sample_id": name, "mask_reasons": [0] * length})
        for table, own in (("teacher_topk", teacher), ("student_topk", student)):
            ids = np.argsort(-own, axis=1)[:, :k]
            row: dict[str, Any] = {"sample_id": name, "ids": list(ids), "valid": [k] * length}
            prefixes = {"": teacher} if table == "teacher_topk" else {"student_": student, "teacher_": teacher}
            for prefix, logprobs in prefixes.items():
                listed = np.take_along_axis(logprobs, ids, axis=1)
                with np.errstate(divide="ignore"):
                    tails = np.log(np.maximum(0.0, 1 - np.exp(listed).sum(1)))
                kept = [values.astype(np.float16 if compact else np.float64) for values in (listed, tails)]
                row[f"{prefix}logprobs"], row[f"{prefix}tail_logmass"] = list(kept[0]), kept[1]
            made[table].append(row)
    for table in made.values():
        for row in table:
            row |= {
                key: np.array(value).tolist() for key, value in row.items() if isinstance(value, (list, np.ndarray))
            }
    return made


def same_neighbours(found: Samples, clean: Samples, out: int) -> None:
    """Every token but the flat token `out` is kept and has the numbers that it had; that one is counted."""
    index = np.delete(np.arange(len(clean.keep)), out)
    assert clean.keep.all() and found.keep[index].all() and not found.keep[out] and found.invalid == 1
    assert np.array_equal(found.completions.values, clean.completions.values)
    for name, values in clean.floats.items():
        assert np.array_equal(found.floats[name][index], values[index]), name
    assert found.support is not None and clean.support is not None
    ours, theirs = (vars(samples.support.rows(index)) for samples in (found, clean))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
