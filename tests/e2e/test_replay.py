"""A round of the true run, replayed: other hash seeds, ambient threads, directories and store paths change no bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from fault_trials import FULL_SECONDS, Trials
from opd_cli import OPD, opd
from places import TINY

ELSEWHERE = {
    "PYTHONHASHSEED": "7",
    "OMP_NUM_THREADS": "5",
    "MKL_NUM_THREADS": "3",
    "OPENBLAS_NUM_THREADS": "4",
    "TZ": "Pacific/Chatham",
    "LC_ALL": "C",
}


def replay(
    root: Path, *args: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Exit code, output and errors of `opd replay base`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "OPD_"))} | (env or {})
    command = [str(OPD), "replay", "base", *map(str, args), "--root", str(root)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=cwd or root.parent, env=clean, timeout=600)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.promise(13, "a round's training replayed elsewhere")
def test_training_replays_bit_for_bit_in_another_environment_place_and_store(finished, tmp_path):
    root = shutil.copytree(finished.root, tmp_path / "a much longer name" / "moved store")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    code, out, err = replay(root, "--round", 2, "--json", cwd=folder, env=ELSEWHERE)
    assert code == 0, err
    results = json.loads(out)
    assert {result["artifact"].split("/")[0] for result in results} == {"student", "trainer_state", "train"}
    assert all(result["identical"] and result["differences"] == [] for result in results)
    assert not list(root.glob(".tmp-*")) and not list(folder.iterdir())
    assert opd("verify", "base", root=root).returncode == 0


@pytest.mark.promise(13, "what a replay needs and was collected is named")
def test_what_a_replay_needs_and_no_longer_has_is_named(finished, tmp_path):
    root = shutil.copytree(finished.root, tmp_path / "store")
    opd("gc", "--keep", "rollouts=2", "--keep", "trainer_state=1", "--apply", root=root)
    code, _, err = replay(root, "--round", 3)  # its own rollouts are there, the state of round 2 is not
    assert code == 1
    assert "needs trainer_state of round 2" in err and "opd restore base --round 2" in err
    code, _, err = replay(root, "--round", 1)
    assert code == 1 and "rollout of round 1" in err and "opd restore base --round 1" in err
    assert replay(root, "--round", 9)[0] == 2
    assert replay(root, "--round", 1, "--stages", "prepare")[0] == 2


def test_hosts_that_are_not_there_are_refused_before_anything_starts(finished, tmp_path):
    (tmp_path / "hosts").write_text("nowhere.invalid slots=1\n")
    there = {"kind": "hostfile", "hostfile": tmp_path / "hosts"}
    fields = [word for field, value in there.items() for word in ("--set", f"runtime.cluster.{field}={value}")]
    before = {path: path.stat().st_mtime_ns for path in finished.root.rglob("*")}
    code, out, err = replay(finished.root, "--round", 2, *fields)
    assert code == 2 and out == "" and "runtime.cluster" in err
    assert {path: path.stat().st_mtime_ns for path in finished.root.rglob("*")} == before


@pytest.mark.slow
def test_every_stage_replays_in_another_environment(finished, tmp_path):
    root = shutil.copytree(finished.root, tmp_path / "moved")
    code, out, err = replay(root, "--round", 1, "--stages", "rollout,supervise,train,evaluate", "--json", env=ELSEWHERE)
    assert code == 0, err
    assert len(json.loads(out)) == 8


@pytest.mark.promise(13, "other numerics and spoilt inputs are told apart")
@pytest.mark.slow
def test_other_numerics_and_spoilt_inputs_are_told_apart_from_the_recorded(finished, tmp_path):
    root = shutil.copytree(finished.root, tmp_path / "store")
    code, _, err = replay(root, "--round", 1, "--set", "runtime.trainer.micro_batch_tokens=64")
    assert code == 1
    assert "model.safetensors: " in err and "values, at most" in err and "training_steps.loss" in err
    assert replay(root, "--round", 1, "--set", "train.lr=1")[0] == 2
    rollouts = root / "artifacts" / "rollout" / finished.stage(1, "rollout")["artifacts"]["rollout"]
    shard = max(rollouts.glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, _, err = replay(root, "--round", 1)
    assert code == 1 and "opd resume base" in err
    opd("resume", "base", "--no-prefect", root=root)
    assert replay(root, "--round", 1)[0] == 0


@pytest.mark.promise(13, "a collected run goes on, and is restored")
@pytest.mark.slow
def test_a_collected_run_goes_on_as_the_undisturbed_one_and_comes_back_whole(finished, tmp_path):
    roots = [shutil.copytree(finished.root, tmp_path / name) for name in ("undisturbed", "collected")]
    keep = [word for what in ("rollouts", "signals", "trainer_state", "students") for word in ("--keep", f"{what}=1")]
    opd("gc", *keep, "--apply", root=roots[1])
    shas = []
    for root in roots:
        state = json.loads(
            opd("resume", "base", "--set", "policy.rounds=4", "--json", "--no-prefect", root=root).stdout
        )
        shas.append([entry["student_sha256"] for entry in state["rounds"]])
    assert shas[0] == shas[1] and len(shas[0]) == 5
    assert opd("verify", "base", root=roots[1]).returncode == 0
    opd("restore", "base", "--round", "2", root=roots[1])
    status = json.loads(opd("status", "base", "--json", root=roots[1]).stdout)
    assert not any(stage["evicted"] for entry in status["rounds"] for stage in entry["stages"].values())
    assert opd("verify", "base", root=roots[1]).returncode == 0
    assert "nothing to do" in opd("run", TINY, "--name", "base", "--rounds", "4", "--no-prefect", root=roots[1]).stdout


@pytest.mark.faults
@pytest.mark.timeout(FULL_SECONDS)
def test_every_round_replays_anywhere(finished, trials: Trials, tmp_path):
    """Each round's training under five environments, and all of its stages under one."""

    def attempt(name: str) -> None:
        draw = random.Random(f"replay {name}")
        number, _, stages = name.split()
        place = tmp_path / f"x{''.join(draw.choices('abc é', k=draw.randint(1, 60)))}y"
        root, folder = place / "store", place / "started here"
        shutil.copytree(finished.root, root)
        folder.mkdir()
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        env = {variable: str(draw.randint(1, 8)) for variable in threads} | {
            "PYTHONHASHSEED": str(draw.randrange(2**32)),
            "TZ": draw.choice(["UTC", "Pacific/Chatham", "America/St_Johns"]),
            "LC_ALL": draw.choice(["C", "C.UTF-8", "POSIX"]),
        }
        code, out, err = replay(root, "--round", number, "--stages", stages, "--json", cwd=folder, env=env)
        assert code == 0, err
        results = json.loads(out)
        assert len(results) == (3 if stages == "train" else 8)
        assert all(result["identical"] and result["differences"] == [] for result in results), results
        assert not list(root.glob(".tmp-*")) and not list(folder.iterdir())
        shutil.rmtree(place)

    names = [f"{number} {environment} train" for number in (1, 2, 3) for environment in range(5)]
    names += [f"{number} 5 rollout,supervise,train,evaluate" for number in (1, 2, 3)]
    trials(13, "replayed under other hash seeds, ambient threads, time zones, folders; real engines", names, attempt)
