"""`max_drift`: which estimator a config has, and what that means for keys; k3 is a KL where k1 is none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from flows.experiment import as_stored
from storage.identity import canonical_json
from tasks.trainer.config import TrainConfig

PLAIN = {"lr": 1e-3, "samples_per_step": 4}


def test_keys_change_only_where_the_result_may() -> None:
    plain = TrainConfig.model_validate(PLAIN)
    assert plain.drift_estimator is None and "drift" not in canonical_json(plain).replace("max_drift", "")
    stopped = TrainConfig.model_validate(PLAIN | {"max_drift": 0.5})
    assert stopped.drift_estimator == "k3" and '"drift_estimator":"k3"' in canonical_json(stopped)
    stored = as_stored({"train": PLAIN | {"max_drift": 0.5}})["train"]
    old = TrainConfig.model_validate(stored)
    assert old.drift_estimator == "log_ratio"
    before = canonical_json(plain).replace('"max_drift":null', '"max_drift":0.5')
    assert canonical_json(old) == before, "a run of an earlier version keeps its keys and its rule"


def test_a_stored_config_is_read_as_it_was_written() -> None:
    for fields in (PLAIN, PLAIN | {"max_drift": 0.5}, PLAIN | {"max_drift": 0.5, "drift_estimator": "log_ratio"}):
        config = TrainConfig.model_validate(fields)
        dumped = config.model_dump(mode="json")
        assert TrainConfig.model_validate(as_stored({"train": dumped})["train"]) == config
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    old = {"train": PLAIN, "fork": {"run": "a", "round": 1, "experiment": {"train": PLAIN | {"max_drift": 0.1}}}}
    inner = as_stored(old)["fork"]["experiment"]["train"]
    assert TrainConfig.model_validate(inner).drift_estimator == "log_ratio"
    # a fork that sets the rule where its parent had none gets the new estimator
    parent = TrainConfig.model_validate(PLAIN).model_dump(mode="json")
    assert TrainConfig.model_validate(parent | {"max_drift": 0.1}).drift_estimator == "k3"


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def estimates(live: Callable[[np.ndarray, np.ndarray], np.ndarray], top_p: float) -> tuple[float, float, float]:
    """KL(old || live), and the expectations of both estimators under top-p: 1,000 positions, 200 tokens, each weighed by its
    probability of being sampled, so that there is no sampling error. `live`: (logits, noise) -> the student's new logits."""
    generator = np.random.default_rng(0)
    logits, noise = generator.normal(0, 3, (2, 1000, 200))
    old, new = log_softmax(logits), log_softmax(live(logits, noise))
    p = np.exp(old)
    order = np.argsort(-p, axis=1)
    ranked = np.take_along_axis(p, order, axis=1)
    drawn = np.zeros_like(p)
    np.put_along_axis(drawn, order, np.where(np.cumsum(ranked, axis=1) - ranked < top_p, ranked, 0), axis=1)
    drawn /= drawn.sum(1, keepdims=True)
    log_r = new - old
    means = (p * -log_r, drawn * -log_r, drawn * (np.expm1(log_r) - log_r))
    kl, k1, k3 = (float(of.sum(1).mean()) for of in means)
    return kl, k1, k3


MOVES = {
    "noise": lambda logits, noise: logits + noise / 6,
    "another model": lambda logits, noise: 0.85 * logits + 0.15 * noise,
    "sharper": lambda logits, noise: 1.15 * logits,
}


@pytest.mark.parametrize("move", MOVES)
def test_k3_is_exact_without_truncation_and_low_but_never_negative_with_it(move: str) -> None:
    kl, k1, k3 = estimates(MOVES[move], top_p=1)
    assert k1 == pytest.approx(kl, rel=1e-9) and k3 == pytest.approx(kl, rel=1e-9)
    kl, k1, k3 = estimates(MOVES[move], top_p=0.9)
    off = {"noise": (0.00, -0.06), "another model": (0.49, -0.20), "sharper": (-2.19, -0.49)}[move]
    assert (k1 / kl - 1, k3 / kl - 1) == (pytest.approx(off[0], abs=0.03), pytest.approx(off[1], abs=0.03))
