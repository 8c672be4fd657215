"""A behaviour that a plugin brings: seen in the config, the keys, the pages, rollouts, queries, collection and replays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted_run
import yaml
from key_walk import keys_of
from opd_cli import OPD
from places import CHECKOUT, DATA, PLUGINS
from registries import plugin_path

from flows.config_file import merge
from flows.experiment import Experiment, experiment_of
from flows.reference.catalogue import catalogue
from flows.reference.pages import reference
from flows.run.runner import run_experiment
from storage.errors import Evicted
from storage.query.catalog import Catalog
from storage.store import Store
from tasks.behaviours import BEHAVIOURS
from tasks.plugins import load_plugins
from tasks.workers.pool import WorkerPool

GOLDEN = yaml.safe_load((DATA / "golden.yaml").read_text())
FORCED = {"rollout": {"behaviour": {"kind": "forced_start", "tokens": [5, 6]}}, "plugins": ["forced_start"]}


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        load_plugins(["forced_start"])
        yield


def test_a_config_names_it_and_only_rollouts_depend_on_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    plain, forced = Experiment.model_validate(GOLDEN), Experiment.model_validate(merge(GOLDEN, FORCED))
    short = Experiment.model_validate(merge(GOLDEN, {"rollout": {"behaviour": "forced_start"}}))
    assert short.rollout.behaviour == BEHAVIOURS.classes["forced_start"]()
    named = Experiment.model_validate(merge(GOLDEN, {"rollout": {"behaviour": "student"}}))
    before, after = keys_of(plain, store), keys_of(forced, store)
    assert keys_of(named, store) == before
    assert {place.split("/")[1] for place in before if before[place] != after[place]} == {"rollout"}
    sourced = forced.model_copy(update={"plugin_sources": {"forced_start": "0" * 64}})
    assert {p.split("/")[1] for p in after if keys_of(sourced, store)[p] != after[p]} == {"rollout"}


def test_a_sampled_estimator_is_refused_with_it() -> None:
    over = {"rollout": {"top_p": 1.0}, "objective": {"estimator": "policy_gradient", "support": None}}
    data = merge(merge(GOLDEN, FORCED), over)
    data["objective"] = {"estimator": "policy_gradient", "divergence": {"kind": "reverse_kl"}}
    with pytest.raises(
        ValueError, match=r"rollout\.behaviour: with 'forced_start' the student does not draw every token"
    ):
        Experiment.model_validate(data)
    with pytest.raises(ValueError, match="'forced_stop'"):
        Experiment.model_validate(merge(GOLDEN, {"rollout": {"behaviour": "forced_stop"}}))


def test_the_catalogue_has_it() -> None:
    (entry,) = [entry for entry in catalogue() if entry.axis == "behaviour" and entry.name == "forced_start"]
    assert [field.name for field in entry.fields] == ["tokens"] and "given" in entry.summary


def opd(root: Path, *args: object) -> str:
    command = [str(OPD), *map(str, args), "--root", str(root)]
    env = os.environ | {"PYTHONPATH": f"{CHECKOUT}:{PLUGINS}"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root.parent, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_run_with_it_is_queried_collected_and_replayed(tmp_path: Path) -> None:
    """The sampler is the real one over a scripted engine; scorer and trainer are scripted. Run and restoration share the workers,
    the replay is a process of its own."""
    root = scripted_run.prepare_root(tmp_path / "store")
    plugins = ["scripted_engines", "scripted_sampler", "forced_start"]
    e = experiment_of(merge(scripted_run.EXPERIMENT, FORCED) | {"policy": {"rounds": 1}, "plugins": plugins}, "test")
    sql = "SELECT behaviour, prefix_length AS n, completion_token_ids AS ids, sampling_logprobs AS p FROM rollouts"

    def queried() -> list[dict[str, Any]]:
        return Catalog(Store(root)).query(sql).to_pylist()

    with WorkerPool(e.runtime, tmp_path / "logs", e.plugins, str(PLUGINS)) as pool:
        run_experiment(e, name="forced", root=root, prefect=False, workers=pool)
        rows = queried()
        assert len(rows) == 8
        for row in rows:
            assert (row["behaviour"], row["n"], row["ids"][:2], row["p"][:2]) == ("teacher", 2, [5, 6], [0.0, 0.0])
            assert len(row["ids"]) == len(row["p"]) <= 6
        replayed = json.loads(opd(root, "replay", "forced", "--round", 1, "--stages", "rollout", "--json"))
        assert [result["identical"] for result in replayed] == [True]
        assert "rollout" in opd(root, "gc", "--keep", "rollouts=0", "--apply")
        with pytest.raises(Evicted):
            queried()
        run_experiment(e, name="forced", root=root, prefect=False, workers=pool, restore=1)
    assert queried() == rows


def test_the_pages_have_it() -> None:
    assert "token ids that every completion begins with" in reference()
