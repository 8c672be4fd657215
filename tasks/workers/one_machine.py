"""A run is one process, which starts its workers and ranks itself: on its machine, on a Ray cluster, or the ranks on hosts of a
hostfile. A launcher that starts it several times, or on several machines, is refused: the copies would wait for each other's
locks, and without a cluster the other machines would stand idle."""

from __future__ import annotations

from collections.abc import Mapping

from storage.errors import ConfigError

_SIZES = {
    "WORLD_SIZE": "torchrun, accelerate or deepspeed",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
    "SLURM_STEP_NUM_NODES": "srun",
}
"""Variables in which launchers tell a process how many they start, or on how many machines."""
_HOW = (
    "opd starts its workers and ranks itself: call `opd run` once, without a launcher (with Slurm: srun --nodes=1 --ntasks=1),"
    " and set runtime.trainer.processes, runtime.sampler.workers and runtime.scorer.workers; for several machines start Ray on"
    " them and set runtime.cluster: ray, or give DeepSpeed's hostfile (docs/cluster.md)"
)


def refuse_launchers(environment: Mapping[str, str], cluster: bool = False) -> None:
    """ConfigError, with what was found, where this process is one of several, or was started on one of several machines that
    no `cluster` uses."""
    for variable, launcher in _SIZES.items():
        count = _number(environment.get(variable))
        if count > 1:
            raise ConfigError(f"{variable}={count}: started by {launcher} as one of {count}. {_HOW}")
    in_step = "SLURM_STEP_NUM_NODES" in environment  # a step on one node of a larger allocation is fine
    for variable in () if in_step or cluster else ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"):
        count = _number(environment.get(variable))
        if count > 1:
            raise ConfigError(
                f"{variable}={count}: this job has {count} machines, and opd would use one of them. {_HOW}"
            )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.strip().isdigit() else 0
