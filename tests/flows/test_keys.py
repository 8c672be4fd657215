"""A changed input recomputes exactly what depends on it: every field of a config changed once, and every stage's key
looked at. Contents are held fixed, so a key that changes says that the stage itself depends on the field."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from key_walk import SIGNALS, changed, expected, fields, keys_of, other_values, reachable, validated
from places import DATA
from pydantic import BaseModel

from flows.config_file import DISCRIMINATORS, merge
from flows.experiment import CHANGEABLE, Experiment, Fork, NamedTeacherConfig, load_experiment
from flows.study.spec import load_study
from storage.identity import Identity, RunPolicy, Runtime
from storage.store import Store
from tasks.evaluate import EvaluationSet
from tasks.inputs.judging import JudgeConfig, JudgeExactMatch, JudgeFunction, JudgeMathVerify
from tasks.inputs.models import CheckpointModel, FolderTokenizer, HubModel, ServedModel
from tasks.inputs.sources import FileSource
from tasks.inputs.verifiers import FunctionVerifier
from tasks.losses.config import SftConfig
from tasks.mixture import MixtureConfig

Scenes = list[tuple[dict[str, Any], Experiment]]
GOLDEN = yaml.safe_load((DATA / "golden.yaml").read_text())

REWARD = {"kind": "group", "success_threshold": 0.5}
CREDIT: list[dict[str, Any]] = [
    {"reward": REWARD, "clip": {}, "likelihood": {}, "reference": {}, "normalisation": "constant", "normalisation_length": 32},
    {"reward": {**REWARD, "std": False}, "route": "srpo", "beside": {"support": {"kind": "student_topk", "k": 8}, "is_clip": 2.0,
     "weight": {"kind": "teacher_entropy"}, "sequence_gradient": {}}},
    {"reward": REWARD, "route": {"kind": "spans", "errors": True}, "beside": {"divergence": {"kind": "forward_kl"}, "on_errors":
     {"kind": "reverse_kl"}, "support": {"kind": "student_topk", "k": 8}, "term_clip": 0.05}},
    {"reward": REWARD, "route": "failed_groups", "reference": {"where": "unrouted"},
     "beside": {"support": {"kind": "student_topk", "k": 8}, "target": {"kind": "floor"}}},
    {"beside": {"support": {"kind": "full", "k": 264}, "divergence": {"kind": "forward_kl"}, "target": {"kind": "product"}}},
    *({"reward": REWARD, "scale": kind} for kind in ("rlrt", "rlsd")),
    {"reward": REWARD, "scale": {"kind": "visd", "k": 8}, "advantage_at": "live"},
    *({"add": "log_ratio", "returns": kind} for kind in ("discounted", "mean_future")),
    *({"reward": REWARD, "add": kind} for kind in ("sod", "iw", "power", "proximal", "anti_sd")),
    {"add": {"kind": "vopd", "k": 264}, "advantage_at": "live"},
    {"reward": REWARD, "route": "spans", "beside": {"support": {"kind": "student_topk", "k": 8}}},
    {"add": {"kind": "dasd", "beta": 0.1, "entropy_of": "teacher", "normalised_by": "std"}},
]  # fmt: skip
"""Objectives of rewards and token credit, so that between them every field is somewhere."""

VALUES: dict[tuple[str, str], Any] = {
    ("ArchitectureModel", "config"): {**GOLDEN["student"]["source"]["config"], "intermediate_size": 64},
    ("PrepareConfig", "chat_template_kwargs"): {"enable_thinking": False},
    ("PrepareConfig", "date"): "2026-01-31",
    ("AdditionSource", "operations"): ["add", "subtract"],
    ("PrepareConfig", "train"): {"kind": "addition", "count": 7},
    ("PrepareConfig", "eval"): {"kind": "addition", "count": 7},
    ("PrepareConfig", "warmup"): {"kind": "addition", "count": 7},
    ("RolloutConfig", "stop_token_ids"): [5],
    ("EvaluateConfig", "stop_token_ids"): [5],
    ("TrainConfig", "lora"): {},
    ("WarmupConfig", "lora"): {},
    ("LoraSettings", "target_modules"): ["q_proj"],
    ("ConstantSchedule", "initial"): 3,
    ("TeacherPrefix", "cap"): 7,
    ("Mixture", "on_policy_fraction"): 0.7,
    ("SuperviseConfig", "tail_mass"): 0.01,
    ("ModelConfig", "warmup"): {"steps": 1, "lr": 1e-3},
    ("TeacherConfig", "warmup"): {"steps": 1, "lr": 1e-3},
    ("TeacherConfig", "context"): "{answer} {prompt}",
    ("VOPD", "k"): 260,
    ("VISD", "k"): 9,
    ("SOD", "segment_ends"): [5],
    ("Beside", "on_errors"): {"kind": "forward_kl"},
    ("Beside", "support"): {"kind": "student_topk", "k": 9},
    ("Beside", "sequence_gradient"): {"gamma": 0.5},
    ("CreditConfig", "clip"): {"low": 0.1},
    ("CreditConfig", "likelihood"): {"coef": 0.3},
    ("CreditConfig", "reference"): {"coef": 0.3},
    ("CreditConfig", "beside"): {"support": {"kind": "student_topk", "k": 9}, "coef": 0.3},
    ("Spans", "weight"): 0.3,
    ("Product", "beta"): 0.3,
    ("Experiment", "judge"): {"verifiers": [{"kind": "exact_match"}]},
    ("JudgeConfig", "verifiers"): [{"kind": "exact_match"}],
    ("JudgeExactMatch", "name"): "other",
    ("JudgeMathVerify", "name"): "other",
    ("JudgeFunction", "target"): "fnmatch:fnmatch",
    ("Experiment", "plugin_sources"): {"brings_nothing": "0" * 64},
}
"""Another value of a field whose type alone does not tell one: (model, field) -> value. A new field whose test fails
for want of a valid value is added here."""

EXACT, MARKS = {"kind": "exact_match"}, {"kind": "function", "target": "tasks.inputs.addition:marked"}
"""Verifiers: one that gives rewards alone, and one that marks spans and segments too."""
NORMALISED = {"normalisation": "constant", "normalisation_length": 32}
SCENES: list[dict[str, Any]] = [
    {},
    {"train": {"schedule": {"kind": "cosine", "horizon_steps": 50, "final_ratio": 0.1}, "lora": {"r": 4}}},
    {"student": {"warmup": {"lora": {"r": 4}, "schedule": {"kind": "linear", "horizon_steps": 50}}}},
    {"train": {"importance_correction": {"kind": "truncated"}}, "objective": NORMALISED},
    {"train": {"max_drift": 0.5}},
    {
        "rollout": {"top_p": 0.9},
        "train": {"importance_correction": {"kind": "biased_truncated"}},
        "objective": {"estimator": "policy_gradient", "support": {"kind": "sampled"}, "advantage": "stop_gradient"},
    },
    {"rollout": {"top_p": 1.0, "behaviour": {"kind": "trb", "epsilon": 0.01, "anneal_steps": 50}}},
    {"rollout": {"behaviour": {"kind": "teacher_prefix", "cap": 4}}},
    *(
        {
            "rollout": {
                "behaviour": {
                    "kind": "mixture",
                    "on_policy_fraction": {"kind": kind, "initial": 0.2, "final": 0.8, "steps": 50},
                }
            }
        }
        for kind in ("linear", "cosine")
    ),
    {"rollout": {"behaviour": {"kind": "pairs"}}, "objective": {"estimator": "pairs", "beta": 0.1}},
    {"teacher": {"source": {"kind": "ema", "decay": 0.9}, "warmup": None, "context": "{solution}\n{prompt}"}},
    {
        "teacher": {
            "source": {"kind": "initial"},
            "warmup": None,
            "context": ["{prompt}\n{sibling}", "{prompt} {answer}"],
            "sibling": {"rule": "draw"},
        },
        "rollout": {"num_generations": 2},
        "judge": {"verifiers": [{"kind": "exact_match"}, {"kind": "math_verify"}], "success_threshold": 1.5},
    },
    {"evaluate": {"num_generations": 1, "verifier": {"kind": "math_verify"}}},
    {"supervise": {"teacher": {"kind": "vllm"}}},
    {"supervise": {"teacher": {"kind": "server", "model": "teacher"}}},
    {"objective": {"support": {"kind": "student_topk", "k": 8}}},
    {"objective": {"support": {"kind": "full", "k": 264}}},
    {
        "rollout": {"top_p": 1.0},
        "objective": {"estimator": "policy_gradient", "ppo_clip": 0.2, "dual_clip": 3.0, **NORMALISED},
    },
    {
        "objective": {
            "estimator": "policy_gradient",
            "support": {"kind": "student_topk", "k": 8},
        }
    },
    {
        "supervise": {"teacher": {"kind": "none"}},
        "rollout": {"top_p": 1.0, "num_generations": 2},
        "judge": {"verifiers": [EXACT]},
        "objective": {"estimator": "credit", "reward": {"kind": "group"}},
    },
    *(
        {
            "teacher": {"context": "{answer}\n{prompt}"},
            "rollout": {"top_p": 1.0, "num_generations": 2},
            "judge": {"verifiers": [MARKS if "spans" in str(objective) or "sod" in str(objective) else EXACT]},
            "objective": {"estimator": "credit", **objective},
        }
        for objective in CREDIT
    ),
]
"""Configs laid over the golden one, so that between them every field of every model is somewhere. Variants on an axis
whose fields all have defaults (divergences, trust regions, token weights) are found and added by `scenes`."""

ELSEWHERE = {CheckpointModel, FolderTokenizer, FileSource, HubModel, ServedModel, FunctionVerifier, SftConfig, Fork}
ELSEWHERE |= {
    MixtureConfig,
    NamedTeacherConfig,
    EvaluationSet,
    JudgeConfig,
    JudgeExactMatch,
    JudgeMathVerify,
    JudgeFunction,
}
"""What needs files, a user's code, or is never part of an experiment: their own tests show what of them enters keys."""
ALONE = {
    ("ModelConfig", "source"), ("TeacherConfig", "source"), ("ArchitectureModel", "tokenizer"),
    ("Experiment", "fork"), ("Experiment", "teacher"), ("Experiment", "teachers"), ("Experiment", "mixture"),
    ("Experiment", "judge"), ("FullSupport", "k"), ("EvaluateConfig", "sets"),
}  # fmt: skip
"""Fields whose other variants are such, though the fields inside are changed one by one; the k of a full support has no
other value, being the vocabulary's. For several teachers see `test_teachers.py`, for named evaluation sets below, for the
judge `tests/tasks/test_judge.py`."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("keys"))


def scenes() -> Scenes:
    """The golden config, those of SCENES, and for every variant that none of them has one that does."""
    found: Scenes = []
    seen: set[type[BaseModel]] = set()

    def add(data: dict[str, Any]) -> None:
        experiment = validated(data)
        assert experiment is not None, f"the scene is refused: {Experiment.model_validate(data)}"
        found.append((experiment.model_dump(mode="json"), experiment))
        seen.update(type(model) for _, model, _ in fields(experiment))

    for over in SCENES:
        add(merge(GOLDEN, over))
    for data, experiment in found:  # grows as variants are found
        for path, model, name in fields(experiment):
            if path[0] == "runtime":  # changes no key (test_runtime_and_policy_change_no_key)
                continue
            for value in other_values(model, name):
                if not (isinstance(value, dict) and set(value) & set(DISCRIMINATORS)):
                    continue
                other = validated(changed(data, path, value))
                if other is not None and {type(m) for _, m, _ in fields(other)} - seen:
                    add(changed(data, path, value))
    return found


@pytest.fixture(scope="module")
def scenery() -> Scenes:
    return scenes()


def stages_of(keys: dict[str, str]) -> dict[str, set[str]]:
    """Stage (of supervise: signal) -> its keys in all rounds."""
    found: dict[str, set[str]] = {}
    for place, key in keys.items():
        round, label, name = place.split("/")
        found.setdefault(name if label == "supervise" else label, set()).add(f"{round}:{key}")
    return found


def is_fixed(model: BaseModel | type[BaseModel], name: str) -> bool:
    """A discriminator, which only another variant has otherwise, or a field with one choice."""
    info = (model if isinstance(model, type) else type(model)).model_fields[name]
    return name in DISCRIMINATORS or (get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1)


def mutations(data: dict[str, Any], path: tuple[str | int, ...], model: BaseModel, name: str) -> list[Experiment]:
    """Valid experiments that differ from the scene in this field alone."""
    known = VALUES.get((type(model).__name__, name))
    values = list(other_values(model, name)) if known is None else [known]
    found = (validated(changed(data, path, value)) for value in values)
    return [experiment for experiment in found if experiment is not None]


@pytest.mark.promise(12, "every field changed once: the keys that change")
def test_every_field_changes_the_keys_that_depend_on_it_and_no_other(store: Store, scenery: Scenes) -> None:
    tried: set[tuple[str, str]] = set()
    refused: dict[tuple[str, str], str] = {}
    for data, experiment in scenery:
        before = stages_of(keys_of(experiment, store))
        for path, model, name in fields(experiment):
            place = (type(model).__name__, name)
            if path[0] in ("runtime", *CHANGEABLE) or place in tried | ALONE or is_fixed(model, name):
                continue
            held = getattr(model, name)
            if isinstance(held, Identity) and place not in VALUES and not list(other_values(model, name)):
                tried.add(place)  # a group of fields, each of which is changed
                continue
            others = [e for e in mutations(data, path, model, name) if e.identity() != experiment.identity()]
            if not others:
                refused[place] = ".".join(map(str, path))
                continue
            tried.add(place)
            for other in others[:3]:
                after = stages_of(keys_of(other, store))
                both = before.keys() & after.keys()
                different = {stage for stage in both if before[stage] != after[stage]}
                due = expected(path) & both
                if path[0] == "objective":  # it says which signals there are, and how long their lists
                    asked, asks = ({(n.name, n.k) for n in e.objective.needs().signals} for e in (experiment, other))
                    due = due | ({signal for signal, _ in asked ^ asks} & both)
                gone = before.keys() ^ after.keys()
                if "context" in gone:  # what reads contexts depends on there being any
                    due = due | ((SIGNALS | {"train"}) & both)
                assert different == due, f"{'.'.join(map(str, path))}: {different} changed instead of {due}"
                assert gone <= SIGNALS | {"warmup", "warmup_teacher", "draft", "judge", "context"}, path
    untried = {place: where for place, where in refused.items() if place not in tried}
    assert not untried, f"no other value was accepted; name one in VALUES: {untried}"
    wanted = {
        (model.__name__, name)
        for model in reachable(Experiment) - ELSEWHERE - reachable(Runtime) - reachable(RunPolicy)
        if not issubclass(model, Runtime | RunPolicy)
        for name in model.model_fields
        if name not in ("runtime", *CHANGEABLE) and (model.__name__, name) not in ALONE
        if not is_fixed(model, name)
    }
    assert not wanted - tried, f"fields that no scene has; add one to SCENES: {sorted(wanted - tried)}"


@pytest.mark.promise(12, "every variant: keys of its own")
def test_a_variant_of_its_own_has_its_own_keys(store: Store, scenery: Scenes) -> None:
    """Discriminators are fields too: two scenes that differ in a variant differ in the train, source or verifier key."""
    keys = [json.dumps(keys_of(experiment, store), sort_keys=True) for _, experiment in scenery]
    assert len(set(keys)) == len(keys)


def test_a_named_evaluation_set_changes_its_own_keys_alone(store: Store) -> None:
    def keys(**fields: Any) -> dict[str, set[str]]:
        one = {"prompts": {"kind": "addition", "count": 7}} | fields
        experiment = validated(merge(GOLDEN, {"evaluate": {"sets": {"a": one}}}))
        assert experiment is not None
        return stages_of(keys_of(experiment, store))

    plain = validated(GOLDEN)
    assert plain is not None
    before, own = keys(), {"prepare_a", "evaluate_a"}
    assert {stage: found for stage, found in before.items() if stage not in own} == stages_of(keys_of(plain, store))
    changes: dict[str, Any] = {
        "prompts": {"kind": "addition", "count": 8},
        "verifier": None,
        "limit": 3,
        "kl_prompts": 2,
    }
    assert changes.keys() == EvaluationSet.model_fields.keys()
    for field, value in changes.items():
        after = keys(**{field: value})
        assert {stage for stage in before if before[stage] != after[stage]} == {
            "prepare_a" if field == "prompts" else "evaluate_a"
        }


@pytest.mark.promise(12, "runtime and policy: no key changes")
def test_runtime_and_policy_change_no_key(store: Store, scenery: Scenes) -> None:
    data, experiment = scenery[0]
    before = keys_of(experiment, store)
    tried = set()
    for path, model, name in fields(experiment):
        if path[0] not in ("runtime", *CHANGEABLE):
            continue
        others = [e for e in mutations(data, path, model, name) if e != experiment]
        for other in others[:2]:
            tried.add(".".join(map(str, path)))
            assert keys_of(other, store) == before, path
    assert {"runtime.threads", "runtime.trainer.processes", "runtime.trainer.micro_batch_tokens"} <= tried
    assert {"runtime.sampler.max_num_seqs", "policy.rounds", "policy.retain.rollouts"} <= tried


def test_the_same_config_has_the_same_keys_however_it_is_written(store: Store) -> None:
    first = keys_of(Experiment.model_validate(GOLDEN), store)
    turned = json.loads(json.dumps(GOLDEN, sort_keys=True))
    turned["rollout"]["temperature"] = 1
    turned["train"]["weight_decay"] = -0.0
    assert keys_of(Experiment.model_validate(turned), store) == first


def test_rounds_depend_on_the_round_and_on_what_they_read(store: Store) -> None:
    keys = keys_of(Experiment.model_validate(GOLDEN), store, rounds=3)
    longer = keys_of(Experiment.model_validate(GOLDEN), store, rounds=5)
    assert {place: longer[place] for place in keys} == keys
    assert len({keys[f"{n}/rollout/rollout"] for n in (1, 2, 3)}) == 3


@pytest.mark.promise(12, "golden keys")
def test_golden_keys(store: Store) -> None:
    """What was made by an earlier version stays found."""
    keys = keys_of(Experiment.model_validate(GOLDEN), store)
    golden = json.loads((DATA / "golden_keys.json").read_text())
    different = sorted(place for place in keys.keys() | golden.keys() if keys.get(place) != golden.get(place))
    assert keys == golden, (
        f"keys of {different} changed: stores of earlier versions would be made again. A new field needs"
        " `json_schema_extra=omit_at(value)`; if a stage's meaning changed, these are the new ones:\n"
        + json.dumps(keys, indent=1)
    )


@pytest.mark.promise(12, "golden keys of merged stop ids")
def test_golden_keys_of_merged_stop_ids(store: Store) -> None:
    """Merged ids are in the key of each stage whose result depends on them: all but models, warm-ups and prepare, where the
    policy is."""
    experiment = Experiment.model_validate(merge(GOLDEN, {"prompts": {"tokenizers": {"stop_ids": "merge"}}}))
    keys = keys_of(experiment, store, stop_ids="[257,256]")
    assert keys == json.loads((DATA / "golden_keys_merge.json").read_text()), json.dumps(keys, indent=1)
    plain = json.loads((DATA / "golden_keys.json").read_text())
    same = {place.split("/")[1] for place in keys if keys[place] == plain[place]}
    assert same == {"model", "model_teacher", "warmup", "warmup_teacher"}
    assert (
        len({json.dumps(keys_of(experiment, store, stop_ids=ids)) for ids in ("[257,256]", "[256,257]", "[1,2]")}) == 3
    )


BACKENDS = json.loads((DATA / "golden_keys_backends.json").read_text())
"""Config of `supervise.teacher` (JSON) -> place -> key, of the places whose key is not that of the local teacher."""


@pytest.mark.promise(12, "golden keys of teacher backends")
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_keys_of_teacher_backends(store: Store, backend: str) -> None:
    local = keys_of(Experiment.model_validate(GOLDEN), store)
    data = merge(GOLDEN, {"supervise": {"teacher": json.loads(backend)}})
    keys = keys_of(Experiment.model_validate(data), store)
    other = {place: key for place, key in keys.items() if local[place] != key}
    assert other == BACKENDS[backend], f"these are the new ones:\n{json.dumps({backend: other}, indent=1)}"
    assert {place.split("/")[2] for place in other} == {"sampled", "mask", "teacher_topk"}


AXES = json.loads((DATA / "golden_axes.json").read_text())
"""By axis that came after 0.1: what is laid over the golden config, and the keys that differ from the golden ones."""


@pytest.mark.promise(12, "golden keys")
@pytest.mark.parametrize("axis", AXES)
def test_golden_keys_of_later_axes(store: Store, axis: str) -> None:
    plain = json.loads((DATA / "golden_keys.json").read_text())
    keys = keys_of(Experiment.model_validate(merge(GOLDEN, AXES[axis]["over"])), store)
    assert {place: key for place, key in keys.items() if plain.get(place) != key} == AXES[axis]["keys"]


@pytest.mark.promise(12, "golden keys")
def test_golden_keys_of_self_teachers(store: Store) -> None:
    """Contents are held fixed, so what differs from the golden keys is what a kind and a context change themselves."""
    golden = json.loads((DATA / "golden_keys.json").read_text())
    recorded = json.loads((DATA / "golden_keys_self_teacher.json").read_text())
    found = {}
    for source in ({"kind": "initial"}, {"kind": "previous_round"}, {"kind": "ema"}, {"kind": "ema", "per": "step"}):
        over = {"teacher": {"source": source, "warmup": None, "context": "{answer} {prompt}"}}
        keys = keys_of(Experiment.model_validate(merge(GOLDEN, over)), store)
        found[json.dumps(source)] = {place: key for place, key in sorted(keys.items()) if golden.get(place) != key}
        assert {place.split("/")[1] for place in golden.keys() - keys.keys()} == {"model_teacher", "warmup_teacher"}
        assert {place for place in keys if golden.get(place) == keys[place]} >= {"0/model/model", "1/rollout/rollout"}
    assert found == recorded, json.dumps(found, indent=1)


EARLIER = [json.loads(line) for line in (DATA / "v0.1" / "keys.jsonl").read_text().splitlines()]
"""Every recipe, study method and scene as version 0.1.0 read it, with the keys that it computed."""


@pytest.mark.promise(12, "keys of every recipe, study method and scene of an earlier version")
def test_keys_of_an_earlier_version_are_unchanged(store: Store) -> None:
    wrong = [
        f"{entry['name']} {place}"
        for entry in EARLIER
        for place, key in keys_of(Experiment.model_validate(entry["experiment"]), store).items()
        if entry["keys"].get(place) != key
    ]
    assert not wrong


def test_configs_mean_what_they_meant_in_an_earlier_version(store: Store) -> None:
    """The files themselves, defaults and bases applied, make the same keys, but for signals where the student is not run."""
    configs = DATA.parent.parent
    files = [entry for entry in EARLIER if entry["name"].endswith(".yaml")]
    assert len(files) == 15
    now = {entry["name"]: load_experiment(configs / entry["name"]) for entry in files}
    plan = load_study(configs / "configs/study.yaml")
    runs = {f"configs/study.yaml {run.name}": run for run in (*plan.sweep_runs(), *plan.method_runs())}
    methods = [entry for entry in EARLIER if entry["name"] in runs]
    assert len(methods) == 22
    for entry in methods:
        run = runs[entry["name"]]
        now[entry["name"]] = plan.experiment(run.method, run.seed, run.lr)
    for entry in (*files, *methods):
        experiment, name = now[entry["name"]], entry["name"]
        full = experiment.model_copy(update={"supervise": experiment.supervise.model_copy(update={"student": "full"})})
        assert keys_of(full, store) == entry["keys"], name
        keys = keys_of(experiment, store)
        different = {place.split("/")[2] for place, key in keys.items() if entry["keys"].get(place) != key}
        assert different == (set() if experiment.supervise.student == "full" else {"sampled", "mask"}), name
    alone = {
        name for name, experiment in now.items() if experiment.supervise.student == "none" and name.endswith(".yaml")
    }
    assert alone == {f"configs/{name}.yaml" for name in WITHOUT_STUDENT}


WITHOUT_STUDENT = (
    "quickstart", "recipes/gkd", "recipes/revisiting-opd", "recipes/topk-bucket",
)  # fmt: skip
"""The configs of 0.1 whose objective asks nothing of the student that wrote the rollouts."""
