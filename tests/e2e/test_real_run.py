"""What the one true run left behind: metrics, identities, proofs of weights, answers in SQL."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import pytest
from places import TINY

from flows.experiment import load_experiment
from flows.run.runner import fork_experiment, plan
from storage.query.catalog import QueryRefused
from storage.store import Store

STAGES = ("rollout", "supervise", "train", "evaluate")


def plan_of(finished, *changes: str) -> dict[tuple[int, str], str]:
    lines = plan(load_experiment(TINY, list(changes)), finished.root)
    return {(line.round, line.stage): line.state for line in lines}


def test_every_round_has_its_stages_and_figures(finished):
    assert finished.status["status"] == "finished"
    rounds = finished.status["rounds"]
    assert [r["round"] for r in rounds] == [0, 1, 2, 3]
    for entry in rounds:
        assert set(entry["metrics"]) >= {"accuracy_greedy", "reverse_kl", "mean_length", "clipped_ratio"}
        assert all(stage["state"] == "done" and stage["seconds"] > 0 for stage in entry["stages"].values())
    for entry in rounds[1:]:
        assert set(entry["stages"]) == set(STAGES)
        assert entry["stages"]["rollout"]["rows"] == 64
    assert len({entry["student_sha256"] for entry in rounds}) == 4


def test_distillation_brings_the_student_towards_its_teacher(finished):
    first, last = finished.status["rounds"][0]["metrics"], finished.status["rounds"][-1]["metrics"]
    assert last["reverse_kl"] < first["reverse_kl"]


def test_a_second_run_does_no_work_and_says_so(finished):
    again = finished.opd("run", TINY, "--name", "base", "--no-prefect")
    assert "nothing to do" in again.stdout
    state = json.loads(finished.opd("status", "base", "--json").stdout)
    assert state["rounds"] == finished.status["rounds"]


def test_a_new_objective_reuses_the_first_rollouts_and_their_signals(finished):
    states = plan_of(finished, "objective.divergence.kind=forward_kl")
    assert all(state == "cached" for (round, _), state in states.items() if round == 0)
    assert (states[1, "rollout"], states[1, "supervise"], states[1, "train"]) == ("cached", "cached", "run")
    assert states[2, "rollout"] == "pending"


def test_another_top_p_reuses_what_comes_before_the_rollouts(finished):
    states = plan_of(finished, "rollout.top_p=0.8")
    assert all(states[0, stage] == "cached" for stage in ("model", "prepare", "warmup", "warmup_teacher"))
    assert states[1, "rollout"] == "run" and states[1, "supervise"] == "pending"


def test_runtime_changes_no_key(finished):
    changed = ("runtime.trainer.micro_batch_tokens=512", "runtime.scorer.batch_tokens=512", "runtime.threads=1")
    assert set(plan_of(finished, *changed).values()) == {"cached"}


def test_another_objective_misses_only_the_signals_that_it_adds(finished):
    changes = ("objective.estimator=policy_gradient", "objective.support={kind: student_topk, k: 4}")
    args = [part for change in changes for part in ("--set", change)]
    result = finished.opd("run", TINY, "--name", "other", "--dry-run", "--json", *args)
    lines = {(line["round"], line["stage"]): line for line in json.loads(result.stdout)["plan"]}
    supervise = lines[1, "supervise"]
    assert supervise["missing"] == ["student_topk"] and {"sampled", "mask"} <= set(supervise["keys"])


def test_a_fork_shares_its_parents_rounds_and_starts_anew_after_them(finished):
    fork = fork_experiment("base", 2, finished.root, ["objective.divergence.kind=forward_kl"])
    states = {(line.round, line.stage): line.state for line in plan(fork, finished.root)}
    assert all(state == "cached" for (round, _), state in states.items() if round <= 2)
    assert (states[3, "rollout"], states[3, "supervise"], states[3, "train"]) == ("cached", "cached", "run")


def test_a_name_that_holds_another_experiment_is_refused_with_the_difference(finished):
    result = finished.opd("run", TINY, "--name", "base", "--set", "train.lr=0.5", "--no-prefect", check=False)
    assert result.returncode == 2
    assert "train.lr" in result.stderr and "0.5 now" in result.stderr and "fork" in result.stderr


def test_every_engine_was_proven_to_hold_the_new_weights(finished):
    store = Store(finished.root)
    rollouts = store.list("rollout")
    assert len(rollouts) == 3
    for artifact in rollouts:
        proofs = artifact.meta["weight_proofs"]
        assert proofs and all(p["weights"] == artifact.inputs["student:weights"] for p in proofs)
        assert all(p["params_compared"] > 0 and p["params_unproven"] == 0 for p in proofs)
        assert all(p["max_logprob_difference"] < 1e-4 for p in proofs)
    assert all(e["metrics"]["supervise_sampler_mismatch_max"] < 1e-3 for e in finished.status["rounds"][1:])


def test_splits_share_no_prompt_as_sql_shows(finished):
    sql = "select count(*) as shared from (select text from prompts group by text having count(distinct split) > 1)"
    assert finished.query(sql) == [{"shared": 0}]
    trained_on = "select count(*) as n from rollouts r join prompts p using (prompt_id) where p.split <> 'train'"
    assert finished.query(trained_on) == [{"n": 0}]


def test_every_completion_token_has_both_models_log_probabilities(finished):
    (row,) = finished.query(
        "select count(*) as n, count(student_logprob) as s, count(teacher_logprob) as t, count(distinct round) as r,"
        " max(student_logprob) as top from tokens"
    )
    assert row["n"] == row["s"] == row["t"] > 0 and row["r"] == 3 and row["top"] <= 0


def test_each_sample_is_used_once_and_steps_continue_across_rounds(finished):
    assert finished.query("select count(*) as n, count(distinct sample_id) as d from rollouts") == [
        {"n": 192, "d": 192}
    ]
    steps = finished.query("select step, round, lr, loss, grad_norm from training_steps where round > 0 order by step")
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    assert all(row["loss"] is not None and row["grad_norm"] > 0 for row in steps)


def test_the_logs_have_the_figures_of_the_steps(finished):
    logs = finished.opd("logs", "base", "--lines", 0).stdout
    assert logs.count("train: 4 steps: loss ") == 3 and logs.count("warmup: 150 steps: loss ") == 1
    assert all(f"round {number} step {4 * number - 3}: loss " in logs for number in (1, 2, 3))
    assert finished.status["rounds"][1]["metrics"]["train_invalid_tokens"] == 0


def test_prefect_saw_the_flow_and_its_tasks(finished):
    with sqlite3.connect(next((finished.root / "prefect").glob("*.db"))) as database:
        flows = database.execute("select state_type from flow_run").fetchall()
        tasks = [name for (name,) in database.execute("select name from task_run")]
    assert ("COMPLETED",) in flows
    assert any("rollout" in name for name in tasks) and any("train" in name for name in tasks)


def test_the_export_is_a_checkpoint_that_transformers_loads(finished, tmp_path):
    target = tmp_path / "student"
    finished.opd("export", "base", target)
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': '12+34='}], add_generation_prompt=True,"
        " return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**text, max_new_tokens=8, do_sample=False); assert out.shape[1] > text['input_ids'].shape[1]"
    )
    subprocess.run([sys.executable, "-c", script, str(target)], check=True, timeout=120)


def test_inspection_commands_load_no_engine(finished):
    script = (
        "import sys\nfrom flows.cli.app import main\nsys.argv = ['opd', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'torch', 'vllm', 'transformers', 'prefect', 'deepspeed'} & set(sys.modules)\nassert not heavy, heavy"
    )
    for args in (["ls"], ["status", "base"], ["query", "base", "select 1"], ["logs", "base", "--stage", "sampler"]):
        subprocess.run(
            [sys.executable, "-c", script, *args, "--root", str(finished.root)], check=True, capture_output=True
        )


@pytest.mark.parametrize(
    "statement", ["copy prompts to 'x.csv'", "drop view prompts", "select * from 'pyproject.toml'"]
)
def test_query_refuses_what_is_no_reading_of_the_store(finished, statement):
    with pytest.raises(QueryRefused):
        finished.query(statement)
