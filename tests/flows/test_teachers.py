"""Several teachers: which config is refused, what enters keys, and whole runs with scripted engines."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import several_teachers as several
import yaml
from key_walk import TEACHERS, keys_of
from places import DATA
from pydantic import ValidationError
from rich.console import Console

from flows.cli.export import export
from flows.cli.report import report
from flows.config_file import merge
from flows.cross_checks import refuse_changed_fork
from flows.distill import inputs
from flows.experiment import Experiment
from flows.run.checked import Known
from flows.run.executor import Maker
from flows.run.progress import SilentReporter
from flows.run.prompt_checks import prompts_of_each
from flows.run.runner import plan, run_experiment
from flows.run.shown import by_teacher
from storage.artifacts.digests import weights_digest
from storage.artifacts.verify import Verified, verify_run
from storage.errors import ConfigError, InputError, OpdError
from storage.query.catalog import Catalog
from storage.runs import Run
from storage.store import Artifact, Store
from storage.upkeep.gc import Collector
from storage.upkeep.retention import Retention
from tasks.stage import Context

GOLDEN = yaml.safe_load((DATA / "golden.yaml").read_text())
GOLDEN_KEYS = json.loads((DATA / "golden_keys_teachers.json").read_text())


def routed(**more: Any) -> dict[str, Any]:
    """The golden experiment with two teachers, each with the golden one's config."""
    data = copy.deepcopy(GOLDEN)
    one = data.pop("teacher")
    return merge(data, {"teachers": {name: copy.deepcopy(one) for name in TEACHERS}, **more})


def mixture(**weights: float) -> dict[str, Any]:
    return {"weights": weights or {"add": 0.25, "subtract": 0.75}, "average": "logprobs"}


# --- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"teacher": GOLDEN["teacher"]}, "both are given"),
        ({"teachers": {}}, "teacher: required"),
        ({"teachers": {"a/b": GOLDEN["teacher"]}}, "'a/b' is no name"),
        ({"teachers": {"kind": GOLDEN["teacher"]}}, "'kind' is no name"),
        ({"teachers": {"add": {"source": {"kind": "checkpoint", "path": "ema"}}}}, "'ema' is the student itself"),
        (
            {"teachers": {"math": GOLDEN["teacher"], "math_n": GOLDEN["teacher"]}},
            "beside 'math' no teacher can be called 'math_n'",
        ),
        ({"mixture": mixture(add=1.0)}, "at least two teachers"),
        ({"mixture": mixture(add=0.5, subtract=0.6)}, "sum is 1.1"),
        ({"mixture": mixture(add=1.5, subtract=-0.5)}, "is not above 0"),
        ({"mixture": mixture(add=0.5, divide=0.5)}, "`teachers` has no 'divide'\nmixture.weights: teachers.subtract"),
        (
            {"mixture": mixture(), "supervise": {"teacher": {"kind": "vllm"}}},
            "mixture: averages the teachers' whole distributions, which supervise.teacher: kind vllm does not give",
        ),
        (
            {"supervise": {"teacher": {"kind": "server", "model": "m"}}},
            "kind server asks one model of one server, but there are several (teachers: add, subtract)",
        ),
        (
            {"teachers": {"add": {"source": {"kind": "served", "path": "folder", "revision": "1"}}}},
            "teachers.add.source: kind served has no weights",
        ),
        (
            {"teachers": {"add": {"source": {"kind": "initial"}}}},
            "teachers.add.source",
        ),
        *(
            (
                {"rollout": GOLDEN["rollout"] | {"top_p": 1.0, "behaviour": behaviour}},
                f"rollout.behaviour: {behaviour['kind']!r} lets one teacher take part in writing, but there are several"
                " (teachers: add, subtract)",
            )
            for behaviour in (
                {"kind": "trb", "epsilon": 0.1},
                {"kind": "teacher_prefix", "cap": 4},
                {"kind": "mixture", "on_policy_fraction": 0.5},
            )
        ),
    ],
)
def test_a_wrong_choice_of_teachers_is_refused_when_the_config_loads(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate(routed() | change)
    assert text in str(caught.value)


def test_null_leaves_out_teachers_of_a_base_config() -> None:
    data = merge(routed(), {"objective": {"support": {"kind": "full"}}})
    assert [*Experiment.model_validate(merge(data, {"teachers": {"add": None}})).teachers] == ["subtract"]
    one = Experiment.model_validate(merge(data, {"teachers": None, "teacher": GOLDEN["teacher"]}))
    assert one.taught_by.keys() == {None} and one.objective.support.k == 264  # type: ignore[union-attr]
    assert one.identity()["teachers"] == {}


@pytest.mark.parametrize("field", ["teacher", "teachers", "mixture"])
def test_a_fork_with_other_teachers_is_refused(field: str) -> None:
    parent = Experiment.model_validate(routed())
    fork = {"run": "parent", "round": 1, "experiment": parent.identity()}
    refuse_changed_fork(Experiment.model_validate(routed(fork=fork)))
    other: dict[str, Any] = {
        "teacher": {"teacher": GOLDEN["teacher"], "teachers": {}},
        "teachers": {"teachers": routed()["teachers"] | {"third": GOLDEN["teacher"]}},
        "mixture": {"mixture": mixture()},
    }[field]
    with pytest.raises(
        ConfigError, match=r"a fork keeps the teachers? of 'parent'|a fork keeps the mixture of 'parent'"
    ):
        refuse_changed_fork(Experiment.model_validate(routed(fork=fork) | other))


@pytest.mark.parametrize("more", [{}, {"mixture": mixture()}])
def test_merged_stop_ids_of_several_teachers_are_refused_when_the_config_loads(more: dict[str, Any]) -> None:
    data = routed(prompts={"tokenizers": {"stop_ids": "merge"}}) | more
    with pytest.raises(ValidationError, match=r"stop_ids: merge makes one category.*teachers: add, subtract"):
        Experiment.model_validate(data)


def test_full_support_of_teachers_with_other_vocabularies_is_refused_unless_they_are_mixed() -> None:
    data = routed(objective={"support": {"kind": "full", "k": 264, "outside": None}})
    data["objective"]["support"] = {"kind": "full", "k": 264}
    Experiment.model_validate(data)
    data["teachers"]["add"]["source"]["config"]["vocab_size"] = 262
    with pytest.raises(ValidationError, match="the teachers share 262 and 264"):
        Experiment.model_validate(data)
    data["objective"]["support"]["k"] = 262
    Experiment.model_validate(data | {"mixture": mixture()})


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.mark.promise(12, "golden keys of several teachers")
@pytest.mark.parametrize("kind", ["routed", "mixture"])
def test_golden_keys_of_several_teachers(store: Store, kind: str) -> None:
    data = routed() if kind == "routed" else routed(mixture=mixture())
    keys = keys_of(Experiment.model_validate(data), store)
    assert keys == GOLDEN_KEYS[kind], json.dumps(keys, indent=1)


def test_a_teacher_changes_its_own_stages_and_what_reads_them(store: Store) -> None:
    before = keys_of(Experiment.model_validate(routed()), store)
    data = routed()
    data["teachers"]["add"]["warmup"]["steps"] += 1
    after = keys_of(Experiment.model_validate(data), store)
    assert {place for place in before if before[place] != after[place]} == {
        "0/warmup_teacher_add/student", "0/warmup_teacher_add/warmup",
    }  # fmt: skip
    assert keys_of(Experiment.model_validate(routed(mixture=mixture(add=0.5, subtract=0.5))), store) != keys_of(
        Experiment.model_validate(routed(mixture=mixture())), store
    )


# --- whole runs ------------------------------------------------------------------------------------------------------

ROUTES = ["a", "b", "a", "b"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def ids(root: Path, artifact: Artifact) -> list[list[str]]:
    """The samples of each shard."""
    store = Store(root)
    shards = range(len(store.shards(artifact, artifact.stage)))
    return [store.read_shard(artifact, artifact.stage, shard)["sample_id"].to_pylist() for shard in shards]


def test_each_teacher_scores_its_own_samples_in_the_shards_of_the_rollouts(tmp_path: Path, root: Path) -> None:
    engines = several.go(root, several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3}))
    store = Store(root)
    for round in (1, 2):
        rollouts = several.made(root, round, "rollout")["rollout"]
        records = range(len(store.shards(rollouts, "rollouts")))
        shards = [store.read_shard(rollouts, "rollouts", shard) for shard in records]
        for number, name in enumerate("ab"):
            made = several.made(root, round, f"supervise_{name}")
            assert sorted(made) == sorted(several.SIGNALS)
            mine = [[int(prompt[1:]) % 2 == number for prompt in t["prompt_id"].to_pylist()] for t in shards]
            own = [t.filter(which)["sample_id"].to_pylist() for t, which in zip(shards, mine, strict=True)]
            assert sum(map(len, own)) == 4 and [] in own, "half of the samples; a shard of one prompt is one teacher's"
            assert all(ids(root, artifact) == own for artifact in made.values())
    scored = engines.of("ScoreJob")
    assert [job.names for job in scored] == [["a"], ["b"]] * 2, "one teacher after the other"
    assert len({job.teacher.weights for job in scored}) == 2
    assert all(len(places) == 2 for job in engines.of("TrainJob") for places in job.signals.values())


def test_metrics_status_and_sql_name_the_teachers(tmp_path: Path, root: Path) -> None:
    several.go(root, several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3}))
    state = several.state(root)
    metrics = state.rounds[-1].metrics
    assert metrics["reverse_kl/a_n"] == 3 and metrics["reverse_kl/b_n"] == 1 and metrics["reverse_kl_n"] == 4
    assert metrics["accuracy_greedy/a"] is not None
    headings, rows = by_teacher(state.rounds)
    assert headings[:2] == ["round", "teacher"] and [row[:2] for row in rows] == [
        [str(r), t] for r in range(3) for t in "ab"
    ]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in report(state, root, None, console):
        console.print(part)
    assert "teacher" in console.export_text()
    query = Catalog(Store(root)).query
    rows = query(
        "SELECT teacher, count(*) AS n FROM supervision WHERE teacher_logprobs IS NOT NULL GROUP BY ALL ORDER BY 1"
    )
    assert rows.to_pylist() == [{"teacher": "a", "n": 8}, {"teacher": "b", "n": 8}]
    tokens = query("SELECT sample_id, teacher, count(*) AS n FROM tokens GROUP BY ALL").to_pylist()
    assert all(row["teacher"] == "ab"[int(row["sample_id"][1:].partition("/")[0]) % 2] for row in tokens)
    completions = query("SELECT sum(len(completion_token_ids)) AS n FROM rollouts").to_pylist()
    assert sum(row["n"] for row in tokens) == completions[0]["n"]
    steps = query("SELECT step, sum(samples) AS n FROM teacher_steps GROUP BY step ORDER BY step").to_pylist()
    assert steps == [{"step": step, "n": 4} for step in range(1, 5)]
    held = query("SELECT DISTINCT teacher, mode FROM evaluations ORDER BY ALL").to_pylist()
    assert held == [{"teacher": t, "mode": m} for t in "ab" for m in ("greedy", "kl")]
    assert verified(root) == []


def verified(root: Path) -> list[Any]:
    found = Verified()
    verify_run(root, Run.open(root, several.NAME), found, lambda artifact: None)
    return found.problems


def test_the_kl_of_a_prompt_is_to_its_own_teacher(tmp_path: Path, root: Path) -> None:
    e = several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3}, rounds=0)
    jobs = {job.teacher.weights: items for _, job, items in several.go(root, e).jobs if type(job).__name__ == "KLJob"}
    weights = {name: several.made(root, 0, f"model_teacher_{name}")["model"].content["weights"] for name in "ab"}
    assert {name: sum(item.size for item in jobs[weights[name]]) for name in "ab"} == {"a": 3, "b": 1}


def test_two_names_of_one_checkpoint_are_scored_in_one_pass(tmp_path: Path, root: Path) -> None:
    engines = several.go(root, several.experiment(tmp_path, ["a", "b", "c", "b"], {"a": 2, "b": 3, "c": 2}, rounds=1))
    assert [job.names for job in engines.of("ScoreJob")] == [["a", "c"], ["b"]]
    assert [len(items) for _, job, items in engines.jobs if type(job).__name__ == "KLJob"] == [2, 2]
    metrics = several.state(root).rounds[-1].metrics
    assert {"reverse_kl/a", "reverse_kl/c"} <= metrics.keys(), "evaluated by name"


def test_the_order_in_which_a_config_lists_aliases_does_not_name_stages(tmp_path: Path, root: Path) -> None:
    e = several.experiment(tmp_path, ["a", "b", "c", "b"], {"a": 2, "b": 3, "c": 2}, rounds=1)
    several.go(root, e)
    again = Experiment.model_validate(e.model_dump() | {"teachers": dict(reversed(e.model_dump()["teachers"].items()))})
    several.go(root, again)
    assert [label for label in several.state(root).rounds[1].stages if "supervise" in label] == [
        "supervise_a", "supervise_b",
    ]  # fmt: skip


def test_a_new_teacher_leaves_the_rollouts_and_the_signals_of_the_others(tmp_path: Path, root: Path) -> None:
    """One of b's prompts goes to c: a's samples are not scored again."""
    several.go(root, several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3}, rounds=1))
    other = several.experiment(tmp_path, ["a", "b", "a", "c"], {"a": 2, "b": 3, "c": 4}, rounds=1)
    engines = several.go(root, other, name="more")
    assert not [job for job in engines.of("SampleJob") if not job.intermediate], (
        "the rollouts are those of the first run"
    )
    assert [job.names for job in engines.of("ScoreJob")] == [["b"], ["c"]]
    assert several.made(root, 1, "supervise_a") == several.made(root, 1, "supervise_a", "more")


def test_a_renamed_teacher_is_not_asked_again(tmp_path: Path, root: Path) -> None:
    several.go(root, several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3}, rounds=1))
    renamed = [{"a": "x", "b": "y"}[name] for name in ROUTES]
    assert not several.go(root, several.experiment(tmp_path, renamed, {"x": 2, "y": 3}, rounds=1), name="n").of(
        "ScoreJob"
    )


class Fails(several.Engines):
    """The scorer fails at the second shard of the second teacher."""

    def share(self, role: str, job: Any, items: Any, *rest: Any, **more: Any) -> Any:
        items = list(items)
        if type(job).__name__ == "ScoreJob" and job.names == ["b"]:
            super().share(role, job, items[:1], *rest, **more)
            raise InputError("planted")
        return super().share(role, job, items, *rest, **more)


def test_an_interrupted_supervision_goes_on_at_the_shard_of_the_teacher_that_it_was_at(
    tmp_path: Path, root: Path
) -> None:
    e = several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3}, rounds=1)
    with pytest.raises(InputError, match="planted"):
        several.go(root, e, Fails())
    engines = several.go(root, e)
    (items,) = [items for _, job, items in engines.jobs if type(job).__name__ == "ScoreJob"]
    assert [item.shard for item in items] == [1, 2, 3]
    undisturbed = tmp_path / "other"
    several.go(undisturbed, e)
    assert several.state(root).rounds[-1].student_sha256 == several.state(undisturbed).rounds[-1].student_sha256


def test_collected_signals_are_made_again_and_reproduce_themselves(tmp_path: Path, root: Path) -> None:
    e = several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3})
    several.go(root, e)
    collector = Collector(Store(root), retention=lambda run: Retention(signals=1, rollouts=1))
    gone = {item.artifact[0] for item in collector.apply(collector.plan()) if item.artifact and item.kind == "evicted"}
    assert gone >= set(several.SIGNALS)
    store = Store(root)
    assert all(store.evicted(made) for name in "ab" for made in several.made(root, 1, f"supervise_{name}").values())
    with pytest.raises(OpdError, match="evicted"):
        Catalog(store).query("SELECT * FROM supervision WHERE round = 1")
    run_experiment(
        e,
        name=several.NAME,
        root=root,
        prefect=False,
        workers=several.Engines(),
        reporter=SilentReporter(),
        restore=1,  # type: ignore[arg-type]
    )
    assert not any(store.evicted(made) for name in "ab" for made in several.made(root, 1, f"supervise_{name}").values())
    assert verified(root) == []


def test_a_finished_run_is_planned_as_cached(tmp_path: Path, root: Path) -> None:
    e = several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3})
    before = plan(e, root)
    assert [line.stage for line in before if line.round == 1] == [
        "rollout",
        "supervise_a",
        "supervise_b",
        "train",
        "evaluate",
    ]
    several.go(root, e)
    assert {line.state for line in plan(e, root)} == {"cached"}


@pytest.mark.parametrize(
    ("name", "text"),
    [("A", r"train.jsonl:2: teacher_id 'A' is not the name of a teacher"), (None, r"train.jsonl:2: no teacher_id")],
)
def test_a_prompt_without_a_known_teacher_is_refused_by_its_line(
    tmp_path: Path, root: Path, name: str | None, text: str
) -> None:
    with pytest.raises(InputError, match=text):
        several.go(root, several.experiment(tmp_path, ["a", name, "b", "b"], {"a": 2, "b": 3}))  # type: ignore[list-item]


def test_a_mixture_is_one_teacher_of_all_prompts(tmp_path: Path, root: Path) -> None:
    """Scripted scorers compute none; what they are told is looked at."""
    mixed = {"weights": {"a": 0.25, "b": 0.75}, "average": "probs"}
    e = several.experiment(tmp_path, [None] * 4, {"a": 2, "b": 3}, rounds=1, mixture=mixed)  # type: ignore[list-item]
    engines = several.go(root, e)
    (job,) = engines.of("ScoreJob")
    assert job.names is None and [member.weight for member in job.teacher.members] in ([0.25, 0.75], [0.75, 0.25])
    assert job.teacher.average == "probs" and job.teacher.path == ""
    assert "supervise" in several.state(root).rounds[1].stages


def test_a_mixture_has_the_models_of_its_own_run(tmp_path: Path, root: Path) -> None:
    """The second run has equal teachers in folders. What it makes must not need those of the first, which is removed."""
    mixed = {"weights": {"a": 0.25, "b": 0.75}, "average": "probs"}
    e = several.experiment(tmp_path, [None] * 4, {"a": 2, "b": 3}, rounds=1, mixture=mixed)  # type: ignore[list-item]
    several.go(root, e, name="one")
    store, data = Store(root), e.model_dump(mode="json")
    for name in "ab":
        made = several.made(root, 0, f"model_teacher_{name}", "one")["model"]
        shutil.copytree(store.materialize(made), tmp_path / name)
        data["teachers"][name]["source"] = {"kind": "checkpoint", "path": str(tmp_path / name)}
    assert not several.go(root, Experiment.model_validate(data), name="two").of("ScoreJob"), (
        "equal weights, equal signals"
    )
    shutil.rmtree(Run.open(root, "one").directory)
    collector = Collector(Store(root))
    assert [item.kind for item in collector.apply(collector.plan())] == ["unused"] * 3, "two models and their mixture"
    data["policy"]["rounds"] = 2
    (job,) = several.go(root, Experiment.model_validate(data), name="two").of("ScoreJob")
    assert {Path(member.path).parent for member in job.teacher.members} == {tmp_path}


def test_a_warm_up_without_prompts_is_refused_before_anything_trains(tmp_path: Path, root: Path) -> None:
    rows = [row | {"completion": "1"} for row in several.rows_for("a", "warm")]
    source = {"kind": "file", "path": str(several.write(tmp_path / "warmup.jsonl", rows))}
    data = several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3}).model_dump(mode="json")
    data["prompts"]["warmup"] = source
    for name in "ab":
        data["teachers"][name]["warmup"] = {"steps": 1, "samples_per_step": 1, "lr": 1e-3}
    known = known_of(root, Experiment.model_validate(data))
    (found,) = [finding for finding in prompts_of_each(known) if finding.refused]
    assert "teachers.b.warmup: no prompt of warmup has the teacher_id 'b', or none" in found.text


def known_of(root: Path, e: Experiment) -> Known:
    """The models and prompts, made as `opd check` makes them."""
    store = Store(root)
    run, pool = Run.create(root, "known", {}, {}), several.Engines()
    make = lambda progress: Context(store, e.runtime, pool, progress, lambda line: None)  # type: ignore[arg-type]  # noqa: E731
    student, teachers, prompts = inputs(e, Maker(store, run, run.state, make, SilentReporter()))
    return Known.of(e, store, student, teachers, prompts)


def test_vllm_asks_every_teacher(tmp_path: Path, root: Path) -> None:
    """Scripted scorers; what they are told is looked at."""
    vllm = {"kind": "vllm", "entropy_k": 3}
    e = several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3}, rounds=1, supervise={"teacher": vllm})
    jobs = several.go(root, e).of("ScoreJob")
    assert [(job.names, json.loads(bytes(job.backend))) for job in jobs] == [(["a"], vllm), (["b"], vllm)]
    assert len({job.teacher.weights for job in jobs}) == 2
    student, prompts = several.made(root, 0, "model")["model"], several.made(root, 0, "prepare")["prepare"]
    teachers = {name: several.made(root, 0, f"model_teacher_{name}")["model"] for name in "ab"}
    known = Known.of(e, Store(root), student, teachers, prompts)
    assert [model.side for model in known.in_vllm] == ["student", "teachers.a", "teachers.b"]


def test_one_of_several_teachers_is_exported_by_its_name(tmp_path: Path, root: Path) -> None:
    several.go(root, several.experiment(tmp_path, ROUTES, {"a": 2, "b": 3}, rounds=1))

    def exported(name: str | None) -> str:
        target = tmp_path / "out" / str(name)
        export(several.NAME, target, teacher=True, teacher_name=name, root=root)
        return weights_digest(target)

    assert exported("b") == several.made(root, 0, "model_teacher_b")["model"].content["weights"] != exported("a")
    with pytest.raises(InputError, match="has several teachers: the teachers are a, b; choose one with --teacher-name"):
        exported(None)
    with pytest.raises(InputError, match="has no teacher 'c': the teachers are a, b"):
        exported("c")


# --- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"teachers": {"add": {"context": "{prompt} {sibling}"}}}, r"\{sibling\} are known in the round only"),
        ({"teachers": {"add": {"context": ["{answer}{prompt}"]}}}, "a list of templates"),
        ({"teachers": {"add": {"context": "nothing"}}}, "names no column"),
        (
            {"teachers": {"add": {"context": "{prompt} {answer}"}}, "prompts": {"chat_template": False}},
            r"teachers\.add\.context: .*must end with \{prompt\}",
        ),
        (
            {"teachers": {"add": {"context": "{answer} {prompt}"}}, "mixture": mixture()},
            r"teachers\.add\.context: a mixture averages",
        ),
    ],
)
def test_a_context_of_one_teacher_that_cannot_be_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Experiment.model_validate(merge(routed(), change))


def prepared(root: Path, data: dict[str, Any]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The contents of an experiment's prompts, and their rows."""
    e, store, pool = Experiment.model_validate(data), Store(root), several.Engines()
    run = Run.create(store.root, "one", {}, {})
    make = lambda progress: Context(store, e.runtime, pool, progress, lambda line: None)  # type: ignore[arg-type]  # noqa: E731
    _, _, prompts = inputs(e, Maker(store, run, run.state, make, SilentReporter()))
    return prompts.content, store.read_table(prompts, "prompts").to_pylist()


def test_a_column_that_is_missing_for_one_teacher_names_its_context(tmp_path: Path) -> None:
    data = merge(routed(), {"teachers": {"add": {"context": "{hint} {prompt}"}}})
    rows = [{"prompt": f"{n}+1=", "answer": f"{n + 1}", "teacher_id": TEACHERS[n % 2]} for n in range(4)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data["prompts"] |= {split: {"kind": "file", "path": str(path)} for split in ("train", "eval")}
    with pytest.raises(
        InputError, match=r"train\.jsonl:1: teachers\.add\.context uses \{hint\}, which is missing here"
    ):
        prepared(tmp_path / "store", data)


def test_one_teacher_of_several_reads_a_context(tmp_path: Path) -> None:
    """Of its own prompts alone; what other teachers read, and what the student reads, is the same."""
    own = {"operations": ["add", "subtract"], "count": 8}
    data = merge(routed(), {"prompts": {"train": own, "eval": own}})
    context = {"teachers": {"add": {"context": "{answer} {prompt}"}}}
    contents, was = prepared(tmp_path / "plain", data)
    others, now = prepared(tmp_path / "context", merge(data, context))
    assert [row["prompt_id"] for row in was] == [row["prompt_id"] for row in now]
    seen = set()
    for then, row in zip(was, now, strict=True):
        assert then["teacher_token_ids"] is None
        if row["split"] != "warmup" and row["teacher_id"] == "add":
            text = bytes(i for i in row["teacher_token_ids"] if i < 256).decode()
            assert f"{row['answer']} " in text and row["token_ids"] == then["token_ids"]
            seen.add(row["split"])
        else:
            assert row == then
    assert seen == {"train", "eval"}, "held-out prompts too, for the KL to it"
    assert contents["teacher:add:train"] != others["teacher:add:train"]
    for part in ("teacher:subtract:train", "prompts:train", "prompts:eval"):
        assert contents[part] == others[part], part
