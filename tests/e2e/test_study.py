"""A study by `opd study`: a sweep chooses the learning rate, runs share what is equal, repeating it costs nothing. With scripted
engines in `make test`, with the real ones in `make test-full`."""

from __future__ import annotations

import json
import re

import pyarrow.parquet
import pytest
import scripted_run
import yaml
from opd_cli import opd
from page_reader import PageReader
from places import CONFIGS, PLUGINS, TINY

from flows.experiment import load_experiment

RECIPE = CONFIGS / "recipes" / "opd.yaml"
RUNS = ("study-small-sweep-direct-1e-05-s0", "study-small-sweep-direct-0.001-s0", "study-small-bucket-s0")


@pytest.fixture(scope="module", params=["scripted", pytest.param("real", marks=pytest.mark.slow)])
def base(request, tmp_path_factory):
    """A store with models and prompts, the study's base, and its steps per round."""
    folder = tmp_path_factory.mktemp("study")
    if request.param == "real":
        yield request.getfixturevalue("copy_round_0")(folder / "store"), TINY, 4
        return
    config = folder / "base.yaml"
    rollout = scripted_run.EXPERIMENT["rollout"] | {"top_p": 0.9}  # the recipe's is 1
    config.write_text(yaml.safe_dump(scripted_run.EXPERIMENT | {"rollout": rollout}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PLUGINS))
        yield scripted_run.prepare_root(folder / "store"), config, 2


@pytest.fixture(scope="module")
def studied(base, tmp_path_factory):
    """The study's first call, and its second."""
    root, config, _ = base
    study = root.parent / "small.yaml"
    methods = {"bucket": {"group": "direct"}, "sampled": {"config": str(RECIPE)}}
    sweep = {"seeds": [0], "rounds": 1, "groups": {"direct": {"method": "bucket", "lrs": [1e-5, 1e-3]}}}
    text = {"name": "small", "base": str(config), "seeds": [0], "rounds": 1, "methods": methods, "sweep": sweep}
    study.write_text(yaml.safe_dump(text))
    return root, study, opd("study", study, root=root), opd("study", study, root=root)


def states(root) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in (root / "runs").glob("*/state.json")}


def test_the_sweep_chooses_the_rate_that_ends_nearest_to_the_teacher(base, studied):
    root, *_ = studied
    rows = pyarrow.parquet.read_table(root / "studies" / "small" / "results.parquet").to_pylist()
    final = {row["run"]: row for row in rows if row["round"] == 1}
    best = min(RUNS[:2], key=lambda name: final[name]["reverse_kl"])
    chosen = final["study-small-bucket-s0"]
    assert chosen["lr"] == final[best]["lr"] and chosen["reverse_kl"] == final[best]["reverse_kl"]
    recipe = load_experiment(RECIPE)
    assert final["study-small-sampled-s0"]["lr"] == recipe.train.lr, "its recipe's, over the study's base"
    assert all(row["grad_norm_max"] > 0 and row["steps"] == base[2] for row in final.values())


def test_what_is_equal_is_made_once(studied):
    root, *_ = studied
    runs = states(root)
    shared = [runs[name]["rounds"][1]["stages"]["rollout"] for name in RUNS]
    assert len({stage["key"] for stage in shared}) == 1 and [s["state"] for s in shared] == ["done", "cached", "cached"]
    assert {stage["state"] for stage in runs[RUNS[2]]["rounds"][1]["stages"].values()} == {"cached"}
    assert runs["study-small-sampled-s0"]["rounds"][1]["stages"]["rollout"]["key"] != shared[0]["key"]


def test_engines_start_once_and_every_run_has_its_own_logs(studied):
    root, *_ = studied
    logs = {path: path.read_text(errors="replace") for path in (root / "runs").glob("*/logs/*.log")}
    for role in ("sampler", "scorer", "trainer"):
        started = rf"^--- \S+ {role}: (?!next job)"
        assert sum(len(re.findall(started, text, re.MULTILINE)) for text in logs.values()) == 1
    assert root / "runs" / "study-small-sampled-s0" / "logs" / "trainer.log" in logs


def test_a_second_call_builds_nothing_and_shows_the_same(studied):
    root, study, first, second = studied
    assert "nothing to do" in second.stdout and "nothing to do" not in first.stdout
    assert second.stdout.startswith(first.stdout)
    planned = opd("study", study, "--dry-run", root=root).stdout
    assert "after the sweep" not in planned and "0.001" in planned


def test_the_report_has_tables_and_curves_of_every_method(studied):
    root, *_ = studied
    folder = root / "studies" / "small"
    report = (folder / "report.md").read_text()
    assert "## Reverse KL to the teacher" in report and "## Learning rates" in report and "chosen" in report
    assert (folder / "results.csv").read_text().count("\n") == 1 + 4 * 2
    assert (folder / "curves.svg").read_text().startswith("<?xml")
    assert "](report.html)" in report
    assert PageReader((folder / "report.html").read_bytes()).data["names"] == [
        f"study-small-{m}-s0" for m in ("bucket", "sampled")
    ]
