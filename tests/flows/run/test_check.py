"""`opd check` and bad input: what is wrong is named with file and line before an engine starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from places import TINY
from registries import plugin_path

from flows.cross_checks import NOT_JUDGED
from flows.experiment import Experiment, experiment_of, load_experiment
from flows.run.check import check_experiment
from flows.run.runner import bytes_of_run, bytes_per_round, run_experiment
from storage.errors import ConfigError, InputError
from tasks.inputs.verifiers import verify


def check(tmp_path: Path, *changes: str) -> str:
    return "\n".join(check_experiment(load_experiment(TINY, list(changes)), tmp_path / "store"))


def test_a_good_config_is_described(tmp_path):
    text = check(tmp_path)
    assert (
        "tokenizers: identical" in text
        and "prompts: 32 for eval" in text
        and "in eval)" in text
        and "4 optimizer steps" in text
    )
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (None, r"prompts\.jsonl: no such prompt file"),
        (['{"prompt": "1+1="}', '{"prompt": '], r"prompts\.jsonl:2: not JSON"),
        (['{"question": "1+1="}'], r"prompts\.jsonl:1.*prompt"),
        (['{"prompt": ""}'], "none of 1 prompts is left"),
        ([json.dumps({"prompt": "9" * 100})], "none of 1 prompts is left"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(tmp_path, lines, says):
    path = tmp_path / "prompts.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=says):
        check(tmp_path, f"prompts.train={{kind: file, path: {path}}}")


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    source = f"teacher={{source: {{kind: checkpoint, path: {tmp_path / 'model'}}}, warmup: null}}"
    with pytest.raises(InputError, match="without tokenizer"):
        check(tmp_path, source)


def lines(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{{kind: file, path: {path}}}"


def test_lengths_and_a_rendered_prompt_with_its_special_tokens(tmp_path):
    source = lines(tmp_path / "a.jsonl", *({"prompt": "[INST]" + "x" * n} for n in range(100)))
    positions = [f"{side}.source.config.max_position_embeddings=256" for side in ("student", "teacher")]
    text = check(tmp_path, f"prompts.train={source}", "prompts.max_prompt_length=200", *positions)
    # a user's marker, 6 letters and n, an end marker, the assistant's marker
    assert "lengths of train: p50 58, p95 103, max 108 tokens" in text
    assert "first prompt of train, 9 tokens: '<|user|>[INST]<|end|><|assistant|>'" in text


def test_the_same_model_twice_is_noticed(tmp_path):
    assert "student and teacher are the same model" not in check(tmp_path)
    source = yaml.safe_load(TINY.read_text())["student"]["source"] | {"init_seed": 7}
    settings = [f"{side}={json.dumps({'source': source, 'warmup': None})}" for side in ("student", "teacher")]
    assert "warning: student and teacher are the same model" in check(tmp_path, *settings)


REWARDED = (
    "objective={estimator: credit, reward: group}",
    "judge={verifiers: [exact_match]}",
    "rollout.top_p=1.0",
    "supervise.student=full",
    "rollout.num_generations=2",
)


@pytest.mark.usefixtures("own_workers")  # with engines of a plugin nothing is checked
@pytest.mark.parametrize("teacher", [{"kind": "initial"}, None])
def test_rewards_alone_leave_nothing_to_distil_and_that_is_no_fault(tmp_path, teacher):
    """The advice to give the teacher a context is for objectives that have the teacher in the loss."""
    source = teacher or yaml.safe_load(TINY.read_text())["student"]["source"] | {"init_seed": 7}
    student = yaml.safe_load(TINY.read_text())["student"]["source"] | {"init_seed": 7}
    models = [
        f"{side}={json.dumps({'source': s, 'warmup': None})}" for side, s in (("student", student), ("teacher", source))
    ]
    text = check(tmp_path, *REWARDED, *models)
    assert "nothing to distil" not in text
    assert "note: teacher: this objective trains on rewards alone" in text
    referred = check(tmp_path, *REWARDED, *models, "objective.reference={kind: k3}")
    assert "nothing to distil" not in referred and "rewards alone" not in referred
    assert "nothing to distil" in check(tmp_path, *REWARDED, *models, "objective.add=log_ratio")


@pytest.mark.usefixtures("own_workers")
def test_pairs_with_oneself_are_refused_where_no_prompt_of_a_file_has_more_for_the_teacher(tmp_path):
    """Both completions of a pair would come from one distribution; whether a file has teacher_prompt is known once it is read."""
    pairs = ("rollout.behaviour=pairs", "objective={estimator: pairs, beta: 0.1}")
    own = ("teacher={source: {kind: initial}, warmup: null}", "student.warmup=null", "prompts.warmup=null")
    plain = lines(tmp_path / "plain.jsonl", *({"prompt": f"{n}+1="} for n in range(20)))
    with pytest.raises(InputError, match=r"nothing to distil; give it more with teacher\.context"):
        check(tmp_path, *pairs, *own, f"prompts.train={plain}")
    more = lines(
        tmp_path / "more.jsonl", *({"prompt": f"{n}+1=", "teacher_prompt": f"{n + 1}: {n}+1="} for n in range(20))
    )
    assert "nothing to distil" not in check(tmp_path, *pairs, *own, f"prompts.train={more}")


TASK = """
def exact(completion, answer):
    return completion == answer

def silent(completion, answer):
    completion == answer
"""


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Path]:
    """A config and a module of the user's in one folder, and nothing of it on the import path."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "task_beside.py").write_text("import helper_beside\n" + TASK)
    (folder / "helper_beside.py").write_text("")
    (folder / "config.yaml").write_text(
        f"base: {TINY}\nevaluate: {{verifier: {{kind: function, target: 'task_beside:exact'}}}}\n"
    )
    before = list(sys.path)
    yield folder
    sys.path[:] = before
    for name in ("task_beside", "helper_beside", "json_beside"):
        sys.modules.pop(name, None)


def test_a_verifier_beside_its_config_is_found_tried_and_remembered(tmp_path, task):
    experiment = load_experiment(task / "config.yaml")
    assert experiment.runtime.modules == (task,)
    text = "\n".join(check_experiment(experiment, tmp_path / "store"))
    tried = next(line for line in text.splitlines() if line.startswith("verifier"))
    assert str(task / "task_beside.py") in tried and tried.endswith("as correct")
    sys.path.remove(str(task))
    sys.modules.pop("task_beside")
    resumed = experiment_of(experiment.model_dump(mode="json"), "a run")  # as `opd resume` reads it, from anywhere
    assert verify(resumed.evaluate.verifier, "1", "1") is True
    assert load_experiment(TINY).runtime.modules == ()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("task_beside:silent", "must return True or False, found None"),
        ("task_beside:exakt", "did you mean 'exact'"),
        ("nowhere_beside:f", "no module 'nowhere_beside' beside the config"),
    ],
)
def test_a_verifier_that_cannot_work_is_refused_by_check(tmp_path, task, target, says):
    with pytest.raises(ConfigError, match=says):
        experiment = load_experiment(task / "config.yaml", [f"evaluate.verifier.target={target}"])
        list(check_experiment(experiment, tmp_path / "store"))


def test_a_run_refuses_a_verifier_that_is_not_there_before_its_first_stage(tmp_path, task):
    experiment = load_experiment(task / "config.yaml", ["evaluate.verifier.target=nowhere_beside:f"])
    with pytest.raises(ConfigError, match="no module 'nowhere_beside'"):
        run_experiment(experiment, name="r", root=tmp_path / "store", prefect=False)
    assert not (tmp_path / "store" / "artifacts" / "model").exists()


def test_a_module_beside_the_config_that_another_one_hides_is_refused(task):
    (task / "json.py").write_text(TASK)
    with pytest.raises(ConfigError, match=r"module 'json': .* rename yours"):
        load_experiment(task / "config.yaml", ["evaluate.verifier.target=json:exact"])


def test_a_plugin_beside_its_config_is_found(tmp_path, task):
    (task / "json_beside.py").write_text("")
    text = "\n".join(check_experiment(load_experiment(task / "config.yaml", ["plugins=[json_beside]"]), tmp_path / "s"))
    assert f"plugin: json_beside ({task / 'json_beside.py'})" in text
    with pytest.raises(ConfigError, match="no module named 'jsonbeside'"):
        load_experiment(task / "config.yaml", ["plugins=[jsonbeside]"])


def test_prompts_without_the_answer_that_a_verifier_needs_are_counted(tmp_path):
    source = lines(tmp_path / "a.jsonl", {"prompt": "1", "answer": "1"}, {"prompt": "2", "id": "lost"})
    with pytest.raises(InputError, match=r"prompts\.eval: 1 of 2 evaluated prompts have no answer .*'lost'"):
        check(tmp_path, f"prompts.eval={source}")
    check(tmp_path, f"prompts.eval={source}", "evaluate.verifier=null")


JUDGED = (
    "objective={estimator: policy_gradient, advantage: {kind: grouped, k: 4}, divergence: {kind: reverse_kl}, support: sampled}",
    "rollout.top_p=1.0",
    "plugins=[extra_credits]",
)
"""What makes the tiny experiment one whose objective reads rewards."""


@pytest.fixture
def own_judge(own_workers: None) -> Iterator[None]:
    with plugin_path():
        yield


def test_a_judge_is_tried_on_a_training_prompt(tmp_path, own_judge):
    verifiers = (
        "judge.verifiers=[{kind: exact_match, weight: 2}, {kind: exact_match, extract: '#(\\d+)', name: marked},"
        " {kind: function, target: 'judges:graded'}, {kind: function, target: 'judges:named'}]"
    )
    tried = [line for line in check(tmp_path, *JUDGED, verifiers).splitlines() if line.startswith("judge: ")]
    assert len(tried) == 5
    told = tried.pop(0)
    assert told.startswith("judge: exact_match (weight 2), marked (weight 1), judges:graded (weight 1)")
    assert "at most 10 s" in told and "(judge.timeout)" in told and "a reward of 1 (where all are 0 or 1)" in told
    assert tried[0].startswith("judge: exact_match (weight 2) gives the completion '") and tried[0].endswith("reward 1")
    assert tried[1].startswith("judge: marked (weight 1)") and tried[1].endswith("reward 0")
    assert tried[2].startswith("judge: judges:graded") and tried[2][-1] in "01"
    assert "no reward: 'judges:named': KeyError" in tried[3]


def test_what_is_trained_on_and_two_thresholds_are_told(tmp_path, own_judge):
    """Beside the verifiers a sentence of what the objective does; thresholds of two sections that differ are named."""
    objective = (
        "objective={estimator: credit, reward: {kind: group, success_threshold: 0.7}, scale: rlrt, clip: {high: 0.28}}"
    )
    context = "teacher.context='{answer} {prompt}'"
    verifiers = "judge.verifiers=[exact_match, {kind: exact_match, name: twice, weight: 0.5}]"
    shown = check(tmp_path, *REWARDED, objective, context, verifiers).splitlines()
    (told,) = [line for line in shown if line.startswith("objective: ")]
    assert "the reward of its sample relative to its prompt's samples' mean" in told and "(rlrt)" in told
    assert "clipped to 1 - 0.2 .. 1 + 0.28" in told
    assert [line for line in shown if line == "judge: its reward is 1.5, the weighted sum"]
    (warning,) = [line for line in shown if line.startswith("warning: objective.reward.success_threshold is 0.7")]
    assert "judge.success_threshold is not set" in warning
    agreed = check(tmp_path, *REWARDED, objective, context, verifiers, "judge.success_threshold=0.7")
    assert "warning: objective.reward" not in agreed and "a reward of 0.7 or more is correct" in agreed
    with pytest.raises(ConfigError, match="give both the same"):
        check(tmp_path, *REWARDED, objective, context, verifiers, "judge.success_threshold=0.5")


def test_a_context_whose_column_is_missing_is_refused_with_its_name(tmp_path, own_judge):
    source = lines(
        tmp_path / "a.jsonl", {"prompt": "1", "answer": "1", "solution": "1"}, {"prompt": "2", "answer": "2"}
    )
    given = (*REWARDED, "objective.scale=rlsd", f"prompts.train={source}", "evaluate.kl_prompts=0")
    with pytest.raises(InputError, match=r"a\.jsonl:2: teacher\.context uses \{solution\}, which is missing here"):
        check(tmp_path, *given, "teacher.context='{solution} {prompt}'")
    with pytest.raises(InputError, match=r"teacher\.context uses \{hint\}, which no row has"):
        check(tmp_path, *given, "teacher.context=['{hint} {prompt}', '{sibling} {prompt}']")


def test_feedback_that_no_context_has_room_for_is_noted(tmp_path, own_judge):
    given = (*REWARDED, "objective.scale=rlsd", "judge.verifiers=[{kind: function, target: 'judges:graded'}]")
    context, note = (
        "teacher.context='{feedback} {prompt}'",
        "note: judge.max_feedback: 8,000 characters are more than the",
    )
    given = (*given, context, "prompts.max_teacher_prompt_length=100")
    assert note in check(tmp_path, *given, "judge.max_feedback=8000")
    assert note not in check(tmp_path, *given, "judge.max_feedback=90")


def test_prompts_without_the_answer_that_a_judge_compares_with_are_counted(tmp_path, own_judge):
    source = lines(tmp_path / "a.jsonl", {"prompt": "1", "answer": "1"}, {"prompt": "2", "id": "lost"})
    given = (*JUDGED, f"prompts.train={source}")
    with pytest.raises(InputError, match=r"judge\.verifiers: exact_match compares.* 1 of 2 prompts of train.*'lost'"):
        check(tmp_path, *given, "judge.verifiers=[exact_match]")
    check(tmp_path, *given, "judge.verifiers=[{kind: function, target: 'judges:longer'}]")


def test_a_judge_that_nothing_reads_is_noted(tmp_path, own_judge):
    assert f"note: {NOT_JUDGED}" in check(tmp_path, "judge.verifiers=[exact_match]")


def total(experiment: Experiment) -> int:
    return sum(bytes_of_run(experiment, 1000).values())


def test_the_disk_of_all_rounds_is_set_against_what_is_free(tmp_path):
    one = load_experiment(TINY, ["policy.rounds=1"])
    many = load_experiment(TINY, ["policy.rounds=10"])
    retain = "policy.retain={students: 1, trainer_state: 1, signals: 1, rollouts: 1}"
    kept = load_experiment(TINY, ["policy.rounds=10", "policy.collect=true", retain])
    assert total(one) == bytes_per_round(one) + 4 * 1000 + 12 * 1000
    assert total(many) == 10 * total(one)
    assert total(kept) == 2 * total(one)  # the newest round is made before the one before is collected
    assert "warning: all rounds may not fit" in check(tmp_path, "policy.rounds=1000000000")


def test_a_deepspeed_file_that_cannot_be_read_is_named(tmp_path, own_workers):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(InputError, match=rf"runtime\.trainer\.deepspeed: .*{name}"):
            check(tmp_path, f"runtime.trainer.deepspeed={tmp_path / name}")


def test_all_files_that_do_not_exist_are_listed_at_once(tmp_path):
    models = [
        f"{side}={{source: {{kind: checkpoint, path: {tmp_path / side}}}, warmup: null}}"
        for side in ("student", "teacher")
    ]
    with pytest.raises(InputError) as refused:
        check(tmp_path, *models, f"prompts.eval={tmp_path / 'eval.jsonl'}")
    first, *lines = str(refused.value).splitlines()
    assert first.startswith("3 files or folders do not exist")
    assert lines == [
        f"student.source.path: {tmp_path / 'student'}",
        f"teacher.source.path: {tmp_path / 'teacher'}",
        f"prompts.eval.path: {tmp_path / 'eval.jsonl'}",
    ]
