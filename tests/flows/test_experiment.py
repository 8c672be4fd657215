"""Configs: what is refused, with which message, and what belongs to identity."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from places import CHECKOUT, DATA, TINY

from flows.config_file import merge
from flows.experiment import Experiment, load_experiment
from flows.reference.pages import PAGES
from flows.study.spec import load_study
from storage.errors import ConfigError
from storage.identity import canonical_json


def refused(*changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(TINY, list(changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ("rollout.top_pp=0.9", "rollout.top_pp", "did you mean 'top_p'"),
        ("train.learning_rate=1e-4", "train.learning_rate", "did you mean 'lr'"),
        ("rollout.max_new_tokens=9", "rollout.max_new_tokens", "did you mean 'max_completion_length'"),
        ("learning_rate=1e-4", "learning_rate", "did you mean train.lr?"),
        ("trian.lr=1e-4", "trian", "did you mean 'train'"),
        ("objective.support.kk=3", "objective.support.kk", "did you mean 'k'"),
        ("teacher.source.confg={}", "teacher.source.confg", "did you mean 'config'"),
        ("rollout.top_p=0", "rollout.top_p", "greater than 0"),
        ("rollout.top_p=1.5", "rollout.top_p", "less than or equal to 1"),
        ("train.lr=-1", "train.lr", "greater than or equal to 0"),
        ("objective.divergence.kind=revers_kl", "objective.divergence.kind", "did you mean 'reverse_kl'"),
        ("objective.support.k=1000", "objective.support.k", "above the vocabulary"),
        ("rollout.max_completion_length=64", "rollout.max_completion_length", "max_position_embeddings, 64"),
        ("train.samples_per_step=15", "train.samples_per_step", "does not divide"),
        ("objective={estimator: sft}", "objective.estimator", "student.warmup"),
        ("prompts.warmup=null", "teacher.warmup", "needs prompts.warmup"),
        ("prompts.tokenizers.stop_ids=join", "prompts.tokenizers.stop_ids", "'mask' or 'merge'"),
    ],
)
def test_bad_values_are_refused_by_field_and_with_a_way_out(change, field, says):
    message = refused(change)
    assert field in message and says in message


def test_a_sampled_estimator_is_refused_with_a_nucleus_and_accepted_without():
    change = "objective={estimator: policy_gradient, divergence: {kind: reverse_kl}}"
    assert "rollout.top_p is 0.9" in refused(change)
    load_experiment(TINY, [change, "rollout.top_p=1"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ["objective={estimator: policy_gradient, divergence: {kind: reverse_kl}}", "rollout.top_p=1"],
            "objective.estimator",
        ),
        (["objective.support={kind: student_topk, k: 4}"], "'student_topk'"),
        (["objective.support={kind: union, k: 4}"], "'student_topk'"),
        (["train.importance_correction={kind: truncated}"], "train.importance_correction"),
        (["train.max_drift=0.5"], "train.max_drift"),
    ],
)
def test_what_reads_the_rollout_time_student_is_refused_where_it_is_not_run(changes, says):
    load_experiment(TINY, changes)
    message = refused("supervise.student=none", *changes)
    assert says in message and "set supervise.student: full" in message


def test_the_student_that_is_run_is_left_out_of_keys():
    e = load_experiment(TINY)
    assert canonical_json(e.supervise) == canonical_json(load_experiment(TINY, ["supervise.student=full"]).supervise)
    assert canonical_json(e.supervise) != canonical_json(load_experiment(TINY, ["supervise.student=none"]).supervise)


def test_merged_stop_ids_are_those_of_both_models():
    merge = "prompts.tokenizers.stop_ids=merge"
    load_experiment(TINY, [merge])
    for section in ("rollout", "evaluate"):
        assert f"{section}.stop_token_ids" in refused(merge, f"{section}.stop_token_ids=[257]")


PREFIX = "rollout.behaviour={kind: teacher_prefix, cap: 2}"
DRAFTED = "rollout.behaviour={kind: mixture, on_policy_fraction: 0.5}"
GIVEN = "rollout.behaviour={kind: mixture, on_policy_fraction: 0.5, completions: prompts}"


@pytest.mark.parametrize("kind", ["initial", "previous_round", "ema"])
def test_a_teacher_that_changes_by_round_writes_no_drafts(kind):
    own = [f"teacher.source={{kind: {kind}}}", "teacher.warmup=null", "rollout.top_p=1"]
    for behaviour in (PREFIX, DRAFTED):
        if kind == "initial":
            load_experiment(TINY, [*own, behaviour])
        else:
            message = refused(*own, behaviour)
            assert (
                f"teacher.source {kind} is another model in every round; set teacher.source: {{kind: initial}}"
                in message
            )
    load_experiment(TINY, [*own, GIVEN])
    load_experiment(TINY, [*own, "rollout.behaviour={kind: trb}"])


PAIRS = ("rollout.behaviour=pairs", "objective={estimator: pairs, beta: 0.1}")
OWN_TEACHER = "teacher={source: {kind: initial}, warmup: null%s}"


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        (["rollout.behaviour=pairs", "objective={estimator: pairs}"], "objective.beta", "required, but missing"),
        ([*PAIRS, "objective.beta=0"], "objective.beta", "greater than 0"),
        ([*PAIRS, "objective.beta=-0.1"], "objective.beta", "greater than 0"),
        (
            [PAIRS[1]],
            "rollout.behaviour: 'student' writes no completion of the teacher",
            "set rollout.behaviour: pairs",
        ),
        (
            [PAIRS[1], "rollout.behaviour={kind: mixture, on_policy_fraction: 0.5}"],
            "'mixture' writes no",
            "set rollout.beh",
        ),
        (
            [*PAIRS, "rollout.num_generations=1", "rollout.prompts_per_round=64"],
            "num_generations: 1",
            "2 is one pair per prompt",
        ),
        ([*PAIRS, "train.samples_per_step=1"], "train.samples_per_step: 1 is odd", "use an even number"),
        (
            [*PAIRS, "train.max_drift=0.1"],
            "train.max_drift: the drift is measured on the student's own samples",
            "leave it out",
        ),
        (
            [*PAIRS, "train.importance_correction={kind: truncated}"],
            "train.importance_correction: truncated",
            "set kind: none",
        ),
        ([*PAIRS, OWN_TEACHER % ""], "teacher.context: missing", "give a template"),
        (
            [*PAIRS, OWN_TEACHER % ', context: ["{answer} {prompt}", "{prompt}"]'],
            "teacher.context: ",
            "give one template",
        ),
    ],
)
def test_pairs_are_refused_where_one_of_two_is_not_there(changes, field, says):
    message = refused(*changes)
    assert field in message and says in message


def test_pairs_ask_for_no_student_and_for_no_context_of_another_teacher():
    for more in (
        [],
        ["supervise.student=none"],
        [OWN_TEACHER % ', context: "{answer} {prompt}"'],
        ["rollout.num_generations=4"],
    ):
        e = load_experiment(TINY, [*PAIRS, *more])
        assert e.objective.needs().pairs and e.rollout.behaviour.pairs


@pytest.mark.parametrize("kind", ["initial", "previous_round", "ema"])
def test_a_server_is_not_asked_about_this_runs_student(kind):
    own = [f"teacher.source={{kind: {kind}}}", "teacher.warmup=null"]
    message = refused(*own, "supervise.teacher={kind: server, model: teacher}")
    assert f"supervise.teacher: kind server answers with weights of its own, but teacher.source {kind}" in message
    load_experiment(TINY, [*own, "supervise.teacher={kind: vllm}"])


def test_a_sampler_loads_no_teacher_without_weights(tmp_path):
    served = [
        f"teacher.source={{kind: served, path: {tmp_path}, revision: '1'}}",
        "teacher.warmup=null",
        "supervise.teacher={kind: server, model: teacher}",
        "evaluate.kl_prompts=0",
        "rollout.top_p=1",
    ]
    load_experiment(TINY, [*served, GIVEN])
    for behaviour in (PREFIX, DRAFTED, "rollout.behaviour={kind: trb}"):
        assert "the sampler loads the teacher, but teacher.source kind served has no weights" in refused(
            *served, behaviour
        )


def test_renormalising_one_category_is_refused_with_its_reason():
    assert "identically" in refused("objective.support={kind: teacher_topk, k: 1, outside: renormalize}")


def test_lists_that_a_tail_mass_ends_need_a_bucket():
    cut = ("supervise.encoding=packed", "supervise.tail_mass=0.01")
    assert load_experiment(TINY, [*cut]).supervise.tail_mass == 0.01
    load_experiment(TINY, [*cut, "objective.support={kind: union, k: 4}"])
    load_experiment(TINY, [*cut, "objective.support={kind: student_topk, k: 4, outside: renormalize}"])
    for support in (
        "{kind: teacher_topk, k: 4, outside: renormalize}",
        "{kind: union, k: 4, outside: renormalize}",
        "{kind: full, k: 264}",
    ):
        message = refused(*cut, f"objective.support={support}")
        assert "supervise.tail_mass" in message and "outside: bucket" in message
    for value in ("0", "1", "-0.1", ".nan", "1.5"):
        assert "supervise.tail_mass" in refused(f"supervise.tail_mass={value}")
    assert "supervise.encoding" in refused("supervise.encoding=zip")


def test_full_support_below_the_vocabulary_is_refused():
    full = "objective.support={kind: full, k: %d}"
    assert "k is 263 and the vocabulary has 264 rows; set k: 264" in refused(full % 263)
    load_experiment(TINY, [full % 264])
    # a teacher of fewer rows: both models share these, and no more can be asked for
    narrow = "teacher.source.config.vocab_size=262"
    load_experiment(TINY, [full % 262, narrow])
    assert "set k: 262" in refused(full % 261, narrow)


def test_every_problem_is_listed_at_once():
    message = refused("rollout.top_p=0", "train.lr=-1")
    assert "2 problems in the config" in message and "rollout.top_p" in message and "train.lr" in message


def test_a_field_without_its_section_is_answered_with_it():
    assert "lr: unknown field; did you mean train.lr?" in refused("lr=1e-4")
    # a kind with the name of one of its fields
    assert "runtime.cluster.hostfile: required" in refused("runtime.cluster={kind: hostfile}")
    assert "did you mean 'address'?" in refused("runtime.cluster={kind: hostfile, hostfile: a, adress: x}")
    assert "did you mean train.schedule.warmup_steps?" in refused("train.warmup_steps=4")


def test_fields_that_do_not_fit_together_are_a_line_each():
    credit = "objective={estimator: credit, reward: {kind: group}}"
    message = refused("train.samples_per_step=7", credit, "judge=null", "rollout.num_generations=1")
    first, *lines = message.splitlines()
    assert first.endswith(f": {len(lines)} problems in the config") and len(lines) > 2
    for field in ("train.samples_per_step: 7 does not", "judge: ", "rollout.num_generations: 1"):
        assert any(line.startswith(f"  {field}") for line in lines), field
    assert refused("train.samples_per_step=7").splitlines()[0].endswith(": 1 problem in the config")


def test_a_changed_variant_does_not_inherit_the_old_ones_fields():
    changed = load_experiment(
        TINY, ["objective.divergence={kind: jsd, beta: 0.3}", "objective.divergence.kind=reverse_kl"]
    )
    assert changed.objective.divergence.kind == "reverse_kl"


def test_runtime_and_policy_are_no_identity():
    base = load_experiment(TINY)
    other = load_experiment(TINY, ["runtime.threads=2", "policy.rounds=9", "runtime.trainer.processes=2"])
    assert other.identity() == base.identity()
    assert load_experiment(TINY, ["seed=1"]).identity() != base.identity()


def test_the_resolved_config_makes_the_same_experiment(tmp_path):
    base = load_experiment(TINY)
    path = tmp_path / "resolved.yaml"
    path.write_text(base.to_yaml())
    assert load_experiment(path) == base


def test_a_config_laid_over_a_base_changes_only_what_it_says(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": str(TINY), "train": {"lr": 0.5}}))
    mine, base = load_experiment(path), load_experiment(TINY)
    assert mine.train.lr == 0.5
    assert mine.train.samples_per_step == base.train.samples_per_step and mine.rollout == base.rollout


def test_a_fork_is_governed_by_its_parent_up_to_the_fork():
    parent = load_experiment(TINY)
    data = load_experiment(TINY, ["train.lr=0.5"]).model_dump(mode="json")
    fork = Experiment.model_validate(
        data | {"fork": {"run": "p", "round": 2, "experiment": parent.model_dump(mode="json")}}
    )
    assert [fork.at(r).train.lr for r in (0, 1, 2, 3)] == [1e-3, 1e-3, 1e-3, 0.5]


STUDIES = sorted((CHECKOUT / "configs").glob("study*.yaml"))
EXPERIMENTS = sorted({p for p in (CHECKOUT / "configs").rglob("*.yaml") if p.parent.name != "deploy"} - set(STUDIES))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_config_in_the_repository_loads(path, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    load_experiment(path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_in_the_repository_loads(path):
    plan = load_study(path)
    assert [*plan.sweep_runs()] and len(plan.study.seeds) == 3


@pytest.mark.parametrize("page", PAGES)
def test_the_reference_pages_are_what_the_code_says(page):
    written = (CHECKOUT / "docs" / f"{page}.md").read_text()
    assert written == PAGES[page](), f"python -m flows.reference.pages {page} > docs/{page}.md"


SAMPLED = {"estimator": "policy_gradient", "divergence": {"kind": "reverse_kl"}, "advantage": "stop_gradient"}
BIASED = {"importance_correction": {"kind": "biased_truncated"}}
TRB = {"kind": "trb", "epsilon": 0.01}


@pytest.mark.parametrize(
    ("over", "refusal"),
    [
        ({"objective": SAMPLED, "train": BIASED}, None),
        ({"objective": SAMPLED, "train": BIASED, "rollout": {"temperature": 0.8, "min_p": 0.1, "top_k": 50}}, None),
        ({"objective": SAMPLED, "train": BIASED, "rollout": {"top_p": 1.0, "behaviour": TRB}}, None),
        ({"objective": SAMPLED}, r"rollout\.top_p is 0\.9.* biased_truncated\} accepts that"),
        ({"objective": SAMPLED, "rollout": {"top_p": 1.0, "min_p": 0.1}}, r"rollout\.min_p is 0\.1"),
        ({"objective": SAMPLED, "rollout": {"top_p": 1.0, "behaviour": TRB}}, r"with 'trb'.*, or weight the tokens"),
        ({"objective": SAMPLED | {"center": False}, "train": BIASED}, r"objective\.center: false.*outside the nucleus"),
        ({"objective": SAMPLED | {"advantage": "opd_plus"}, "train": BIASED}, r"objective\.advantage: opd_plus"),
        ({"train": BIASED}, r"train\.importance_correction: biased_truncated weights samples"),
    ],
)
def test_weights_for_samples_that_are_not_the_students(over: dict[str, Any], refusal: str | None) -> None:
    data = merge(yaml.safe_load((DATA / "golden.yaml").read_text()), {"rollout": {"top_p": 0.9}})
    data = merge({**data, "objective": over["objective"]} if "objective" in over else data, over)
    if refusal is None:
        Experiment.model_validate(data)
        return
    with pytest.raises(ValueError, match=refusal):
        Experiment.model_validate(data)


def test_a_round_has_the_behaviour_of_its_first_step() -> None:
    data = merge(
        yaml.safe_load((DATA / "golden.yaml").read_text()),
        {"rollout": {"top_p": 1.0, "behaviour": TRB | {"anneal_steps": 10}}},
    )
    experiment = Experiment.model_validate(data)
    steps = experiment.steps_per_round
    for round in range(1, 12):
        behaviour = experiment.at(round).rollout.behaviour
        left = 0.01 * (1 - min(1, (round - 1) * steps / 10))
        assert getattr(behaviour, "epsilon", 0) == pytest.approx(left) and (behaviour.kind == "trb") == (left > 0)
    assert experiment.rollout.behaviour.anneal_steps == 10  # the run's own config keeps the schedule


REWARDED = ("objective={estimator: credit, reward: {kind: group}}", "rollout.top_p=1.0")


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        (("rollout.num_generations=1",), "rollout.num_generations", "compares the samples of a prompt"),
        (("judge=null",), "judge", "reward"),
        (
            ("judge.success_threshold=1.5", "objective.reward.success_threshold=0.5", "objective.scale=rlrt"),
            "objective.reward.success_threshold",
            "give both the same",
        ),
        (("rollout.top_p=0.9",), "rollout", "exact"),
        (
            ("objective.beside={}", "objective.route=srpo", "objective.reward.success_threshold=0.5"),
            "teacher.context",
            "which samples the teacher reads a context for",
        ),
        (("supervise.student=none",), "supervise.student", "full"),
    ],
)
def test_rewards_ask_for_groups_a_judge_and_contexts(changes: tuple[str, ...], field: str, says: str) -> None:
    judged = ("judge={verifiers: [{kind: exact_match}]}",)
    load_experiment(TINY, [*REWARDED, *judged])
    message = refused(*REWARDED, *judged, *changes)
    assert field in message and says in message


def test_a_full_support_beside_takes_the_vocabulary() -> None:
    beside = "objective={estimator: credit, beside: {support: {kind: full}}}"
    found = load_experiment(TINY, [beside]).objective
    (need,) = [need for need in found.needs().signals if need.name == "teacher_topk"]
    assert need.k == 264
