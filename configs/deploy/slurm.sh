#!/bin/bash
# One run on one machine of a Slurm cluster: sbatch configs/deploy/slurm.sh experiment.yaml demo
# Two minutes before the time limit the run stops in order, and the job is queued again; it goes on from the store.
#SBATCH --job-name=opdflow
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus=1
#SBATCH --mem=128G
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

config=${1:?usage: sbatch slurm.sh CONFIG NAME}
name=${2:?usage: sbatch slurm.sh CONFIG NAME}
# On a file system that all machines see and that has locks (Lustre with flock, NFSv4): `opd run` refuses one without.
export OPD_ROOT=${OPD_ROOT:-$PWD/opd-store}
opd=${OPD:-opd} # a path, where the environment is not activated: OPD=.venv/bin/opd

started=$SECONDS
# one task: opd starts its workers and ranks itself
srun --nodes=1 --ntasks=1 "$opd" run "$config" --name "$name" --no-prefect
code=$?
# 130: stopped by a signal. A job that was stopped in its first minutes is not queued again: something else stops it.
if [ "$code" -eq 130 ] && [ $((SECONDS - started)) -gt 300 ]; then
  echo "stopped before its end; queued again: $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
