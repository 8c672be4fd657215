"""A run is one process on one machine; launchers of several are refused before anything starts."""

from __future__ import annotations

import pytest
from places import TINY

from flows.experiment import load_experiment
from flows.run.runner import run_experiment
from storage.errors import ConfigError
from tasks.workers.one_machine import refuse_launchers


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "WORLD_SIZE=16"),
        (
            {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
            "WORLD_SIZE=8",
        ),  # eight runs are no run either
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4"),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2"}, "SLURM_JOB_NUM_NODES=2"),
        (
            {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_NUM_TASKS=2",
        ),
        (
            {"SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "8"},
            "SLURM_STEP_NUM_TASKS=8",
        ),
    ],
)
def test_several_processes_or_machines_are_refused(environment, variable):
    with pytest.raises(ConfigError, match=variable):
        refuse_launchers(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1"},
        {"SLURM_JOB_NUM_NODES": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NNODES": "", "PMI_SIZE": "none"},
    ],
)
def test_one_process_is_fine(environment):
    refuse_launchers(environment)


def test_a_run_under_a_launcher_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ConfigError, match=r"runtime\.trainer\.processes"):
        run_experiment(load_experiment(TINY), name="run", root=tmp_path, prefect=False)
    assert not (tmp_path / "runs").exists()
