"""A signal and a teacher backend that plugins bring: two files of a user, and everything else takes them as its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import scripted_run
import torch
from key_walk import keys_of
from opd_cli import OPD
from places import CHECKOUT, DATA, PLUGINS
from registries import plugin_path
from scoring import InProcess, ScoringBench, model_folder, plain_logits
from whole_round import from_rollouts

from flows.config_file import merge
from flows.experiment import Experiment, experiment_of
from flows.reference.pages import signals as signals_page
from flows.run.runner import run_experiment
from storage.artifacts.artifact import MANIFEST
from storage.errors import ConfigError, StoreError
from storage.runs import Run
from storage.store import Artifact, Store
from storage.upkeep.gc import Collector
from storage.upkeep.retention import Retention
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.losses.needs import SignalNeed
from tasks.plugins import load_plugins
from tasks.rollout_config import RolloutConfig
from tasks.signals import SIGNALS, Wanted, register
from tasks.supervise import SuperviseConfig, supervise_work
from tasks.trainer.data import forward_batch, loss_denominators

MARGIN = {"objective": {"token_weight": {"kind": "teacher_margin"}}, "plugins": ["scripted_engines", "teacher_margin"]}
SQL = (
    "select s.sample_id, len(s.teacher_margin_margins) as n, list_sum(m.margins) as total, count(t.teacher_margin_margins) as c"
    " from supervision s join teacher_margin m using (run, round, sample_id) join tokens t using (run, round, sample_id)"
    " where s.round = 1 group by all order by all"
)


@pytest.fixture(autouse=True)
def _plugins() -> Iterator[None]:
    with plugin_path():
        yield


def with_margin() -> Experiment:
    return experiment_of(merge(scripted_run.EXPERIMENT, MARGIN), "test")


# --- a signal --------------------------------------------------------------------------------------------------------


def test_its_config_its_needs_and_the_page_about_it() -> None:
    with pytest.raises(ConfigError, match=r"objective\.token_weight\.kind"):
        experiment_of(merge(scripted_run.EXPERIMENT, {"objective": MARGIN["objective"]}), "test")
    assert "teacher_margin" not in signals_page()
    assert SignalNeed("teacher_margin") in with_margin().objective.needs().signals
    assert "## teacher_margin" in signals_page() and "| `teacher_margin_margins` | float32[] |" in signals_page()


def test_its_source_enters_the_keys_of_the_signal_and_of_training(tmp_path: Path) -> None:
    store, e = Store(tmp_path), with_margin()
    first, second = (
        keys_of(e.model_copy(update={"plugin_sources": {"teacher_margin": digit * 64}}), store, 1) for digit in "01"
    )
    changed = {place for place in first if first[place] != second[place]}
    assert changed == {f"1/{stage}" for stage in (
        "supervise/teacher_margin", "train/student", "train/trainer_state", "train/train"
    )}  # fmt: skip


def test_names_and_tables_that_do_not_fit_are_refused() -> None:
    load_plugins(["teacher_margin"])
    known = type(SIGNALS["teacher_margin"])
    short, bare = replace(known.schema, name="short"), replace(known.schema, name="bare", prefixed=False)
    column = replace(known.schema.columns[-1], name="packed_ids")
    packed = replace(known.schema, name="packed", columns=(*known.schema.columns, column))
    for change, message in (
        ({"name": "mask"}, "'mask' is taken"),
        ({"name": "train"}, "'train' is taken"),
        ({"name": "teacher_margin"}, "'teacher_margin' is taken"),
        ({"name": "other"}, "must be called 'other'"),
        ({"name": "short", "schema": short, "floats": ("margin",)}, "no column 'margin'"),
        ({"name": "bare", "schema": bare}, "prefixed=True"),
        ({"name": "packed", "schema": packed}, "'packed_ids' is reserved"),
    ):
        with pytest.raises(ValueError, match=message):
            register(type("Other", (known,), change))
    with pytest.raises(StoreError, match="must match"):
        register(type("Other", (known,), {"name": "Bad-Name"}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run of two rounds with the plugin's signal; engines are scripted."""
    root = tmp_path_factory.mktemp("margin") / "store"
    with plugin_path():
        scripted_run.prepare_root(root)
        e = with_margin().model_copy(update={"policy": scripted_run.experiment(2).policy})
        run_experiment(e, name="margin", root=root, prefect=False, workers=in_process.InProcess())  # type: ignore[arg-type]
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def opd(root: Path, *args: object, plugins: bool = False) -> str:
    """The output of a command, in a process that finds the plugins only if told so."""
    result = called(root, *args, plugins=plugins)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refusal(root: Path, *args: object) -> str:
    result = called(root, *args)
    assert result.returncode == 2, result.stdout
    return result.stderr


def called(root: Path, *args: object, plugins: bool = False) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "OPD_", "PYTHONPATH"))}
    env |= {"OPD_ROOT": str(root), "PYTHONPATH": str(PLUGINS) if plugins else ""}
    return subprocess.run([OPD, *map(str, args)], env=env, cwd=root, capture_output=True, text=True, check=False)


def of_run(store: Store) -> list[Artifact]:
    rounds = Run.open(store.root, "margin").state.rounds
    keys = [round.stages["supervise"].artifacts["teacher_margin"] for round in rounds if round.round]
    return [store.require("teacher_margin", key) for key in keys]


def test_it_is_queried_verified_and_collected_where_the_plugin_is_gone(root: Path) -> None:
    first, second = of_run(Store(root))
    assert first.meta["metrics"] == {"teacher_margin": 0.0}  # candidates of the scripted teacher are equally likely
    rows = json.loads(opd(root, "query", SQL, "--json"))
    assert len(rows) == 8 and all(row["n"] == row["c"] > 0 and row["total"] == 0 for row in rows)
    listed = {view["view"]: view for view in json.loads(opd(root, "query", "--json"))}
    assert listed["teacher_margin"]["meaning"].startswith("Signal: the teacher's certainty.")
    assert "teacher_margin_margins" in listed["supervision"]["columns"]
    opd(root, "verify", "--all")
    opd(root, "gc", "--keep", "signals=1", "--apply")
    store = Store(root)
    evicted = {artifact.key: store.evicted(artifact) is not None for artifact in of_run(store)}
    assert evicted == {first.key: True, second.key: False}
    manifest = json.loads((root / "artifacts" / "teacher_margin" / first.key / MANIFEST).read_text())
    assert manifest["format"] == 3 and manifest["retention"] == "signals"
    assert [column["type"] for column in manifest["tables"]["teacher_margin"]["columns"]] == ["string", "float32[]"]
    assert len(json.loads(opd(root, "query", SQL.replace("round = 1", "round = 2"), "--json"))) == 8


def test_it_stands_beside_artifacts_of_an_earlier_version(root: Path, tmp_path: Path) -> None:
    """Runs of version 0.1 in the same store, whose manifests declare no tables; the plugin is not there."""
    with tarfile.open(DATA / "v0.1" / "store.tar.xz") as archive:
        archive.extractall(tmp_path / "old", filter="data")
    shutil.copytree(tmp_path / "old" / "store", root, dirs_exist_ok=True)
    sql = "select run, count(*) as n, count(teacher_margin_margins) as m from supervision group by run order by run"
    rows = {row["run"]: (row["n"], row["m"]) for row in json.loads(opd(root, "query", sql, "--json"))}
    assert rows.pop("margin") == (16, 16) and set(rows) == {"base", "gradient", "plugged"}
    assert all(n > 0 and m == 0 for n, m in rows.values())
    assert json.loads(opd(root, "query", "base", "select count(*) as n from teacher_margin", "--json")) == [{"n": 0}]
    opd(root, "verify", "--all")
    opd(root, "export", "margin", tmp_path / "student", "--round", 2)
    opd(root, "gc", "--keep", "signals=0", "--apply")
    store = Store(root)
    assert all(store.evicted(a) for name in ("teacher_margin", "sampled") for a in store.list(name))
    refused = refusal(root, "replay", "margin", "--round", 1, "--stages", "supervise")
    assert "plugins: no module named 'scripted_engines'" in refused


def test_storage_reads_it_without_tasks(root: Path) -> None:
    script = (
        "import sys; from storage.query.catalog import Catalog; from storage.store import Store\n"
        "found = Catalog(Store(sys.argv[1])).query('select count(*) as n from teacher_margin')\n"
        "assert found['n'].to_pylist() == [16], found\n"
        "assert not {name.partition('.')[0] for name in sys.modules} & {'tasks', 'flows', 'torch'}"
    )
    subprocess.run([sys.executable, "-c", script, str(root)], cwd=CHECKOUT, check=True)


def test_it_is_replayed_and_a_lost_shard_is_made_again(root: Path) -> None:
    replayed = json.loads(opd(root, "replay", "margin", "--round", 1, "--stages", "supervise", "--json", plugins=True))
    assert {r["artifact"].partition("/")[0]: r["identical"] for r in replayed} == dict.fromkeys(
        ("mask", "sampled", "teacher_margin", "teacher_topk"), True
    )
    store = Store(root)
    artifact = of_run(store)[0]
    (record, *_) = store.shards(artifact, "teacher_margin")
    (root / "artifacts" / "teacher_margin" / artifact.key / record.file).unlink()
    opd(root, "resume", "margin", "--no-prefect", plugins=True)
    assert store.verify(of_run(Store(root))[0]) == [] and of_run(store)[0].content == artifact.content


def test_gc_keeps_what_it_cannot_read(root: Path) -> None:
    store = Store(root)
    for artifact in of_run(store):
        (root / "artifacts" / "teacher_margin" / artifact.key / MANIFEST).write_text("{")
    plan = Collector(store, lambda run: Retention(signals=0)).plan()
    assert {item.artifact[0] for item in plan.items if item.artifact} == {"sampled", "mask", "teacher_topk"}


# --- with real models ------------------------------------------------------------------------------------------------


class World:
    """Two models, prompts, and rollouts, scored in this process."""

    def __init__(self, root: Path) -> None:
        self.folders = {"student": model_folder(root, "student", 1), "teacher": model_folder(root, "teacher", 2)}
        self.bench = ScoringBench(Store(root / "store"), InProcess({"batch_tokens": 64, "head_chunk_tokens": 8}))
        self.student, self.teacher = (self.bench.model(self.folders[name]) for name in ("student", "teacher"))
        self.prompts = self.bench.prompts(self.student, self.teacher, root / "data")
        self.rollouts = self.bench.rollouts(self.folders["student"], self.prompts, [2, 2])

    def make(self, needs: tuple[SignalNeed, ...], **config: Any) -> dict[str, Artifact]:
        parts = (self.rollouts, self.student, self.teacher, self.prompts)
        sampling = RolloutConfig(temperature=0.8, top_p=0.9)
        return self.bench.make(supervise_work(SuperviseConfig(**config), *parts, needs, sampling))

    def tables(self, made: dict[str, Artifact]) -> dict[str, Any]:
        return {name: self.bench.store.read_table(artifact, name) for name, artifact in made.items()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_it_reaches_the_loss_with_the_values_of_the_teacher(world: World) -> None:
    load_plugins(["teacher_margin"])
    objective = DirectConfig.model_validate(
        {"support": {"kind": "teacher_topk", "k": 6}, "token_weight": {"kind": "teacher_margin"}}
    )
    needs = objective.needs()
    tables = world.tables(world.make(needs.signals))
    rollouts = world.bench.store.read_table(world.rollouts, "rollouts")
    prompts = {p["prompt_id"]: p for p in world.bench.store.read_table(world.prompts, "prompts").to_pylist()}
    expected = []
    for row in rollouts.to_pylist():
        prompt = prompts[row["prompt_id"]]
        logits = plain_logits(
            world.folders["teacher"], prompt["teacher_token_ids"] or prompt["token_ids"], row["completion_token_ids"]
        )
        top = logits.log_softmax(-1).topk(2).values
        expected.append((top[:, 0] - top[:, 1]).numpy())
    for found, margins in zip(tables["teacher_margin"]["margins"].to_pylist(), expected, strict=True):
        np.testing.assert_allclose(found, margins, atol=2e-5)
    samples = from_rollouts(rollouts, tables, needs, [], rows=264)
    order = list(range(len(samples)))
    weights = loss_denominators(samples, order, "token", None)
    batch = forward_batch(samples, order, weights, order, False, torch.device("cpu")).tokens
    np.testing.assert_allclose(batch.signals["teacher_margin_margins"], np.concatenate(expected), atol=2e-5)
    alone = world.make((SignalNeed("teacher_topk", 6),))["teacher_topk"]  # what is made beside it changes nothing
    assert alone.content == world.make(needs.signals)["teacher_topk"].content


# --- a teacher backend -----------------------------------------------------------------------------------------------

SERVED = {"supervise": {"teacher": {"kind": "served"}}, "plugins": ["served_teacher"]}


@pytest.mark.parametrize(
    ("support", "lacks"),
    [
        ({"kind": "teacher_topk", "k": 8}, None),
        ({"kind": "teacher_topk", "k": 9}, r"its 9 likeliest tokens \(at most 8\)"),
        ({"kind": "student_topk", "k": 4}, "log-probabilities of the student's candidates"),
        ({"kind": "union", "k": 4}, "log-probabilities of the student's candidates"),
    ],
)
def test_an_objective_that_needs_more_than_a_backend_gives_is_refused_at_load(support: Any, lacks: str | None) -> None:
    data = merge(scripted_run.EXPERIMENT, {"objective": {"support": support}})
    experiment_of(data, "test")
    if lacks is None:
        assert experiment_of(merge(data, SERVED), "test").supervise.teacher.kind == "served"
        return
    with pytest.raises(ConfigError, match=rf"supervise\.teacher: kind served cannot give {lacks}"):
        experiment_of(merge(data, SERVED), "test")


def test_an_unknown_backend_is_refused_by_its_field() -> None:
    with pytest.raises(ConfigError, match=r"supervise\.teacher"):
        experiment_of(merge(scripted_run.EXPERIMENT, {"supervise": {"teacher": {"kind": "serve"}}}), "test")


def test_a_backend_is_asked_in_the_teachers_place_and_has_keys_of_its_own(world: World) -> None:
    load_plugins(["served_teacher"])
    import served_teacher

    needs = (*DirectConfig(support=TopkSupport(k=6)).needs().signals,)
    local, served = world.make(needs), world.make(needs, teacher={"kind": "served"})
    other = world.make(needs, teacher={"kind": "served", "quantization": "fp8"})
    for name in ("sampled", "mask", "teacher_topk"):
        assert len({made[name].key for made in (local, served, other)}) == 3, name
    assert sum(count for count, _ in served_teacher.asked) == 2 * world.rollouts.rows["rollouts"]
    exact, found = world.tables(local), world.tables(served)
    assert exact["teacher_topk"] == found["teacher_topk"] and exact["mask"] == found["mask"]
    for column in ("student_logprobs", "teacher_logprobs", "student_entropy"):
        assert exact["sampled"][column] == found["sampled"][column]
    entropies = [np.concatenate(t["sampled"]["teacher_entropy"].to_pylist()) for t in (exact, found)]
    assert (entropies[1] < entropies[0] + 1e-5).all() and (entropies[1] < entropies[0] - 0.1).any()
    with pytest.raises(ConfigError, match="cannot give log-probabilities"):
        world.make((SignalNeed("student_topk", 3),), teacher={"kind": "served"})
    scorer = world.bench.workers.handlers["scorer"]
    with pytest.raises(ConfigError, match="served cannot give its whole distribution"):
        scorer.score({}, [], Wanted(reverse_kl=True), lambda *_: None, served_teacher.ServedTeacher())
