#!/bin/bash
# One run over several machines of a Slurm cluster: sbatch configs/deploy/slurm-ray.sh experiment.yaml demo
# Starts a Ray node on each machine and the run on the first. The config has `runtime: {device: cuda, cluster: ray}`.
# Two minutes before the time limit the run stops in order, and the job is queued again; it goes on from the store.
#SBATCH --job-name=opdflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

config=${1:?usage: sbatch slurm-ray.sh CONFIG NAME}
name=${2:?usage: sbatch slurm-ray.sh CONFIG NAME}
# On a file system that all machines see and that has locks (Lustre with flock, NFSv4): `opd run` asks every node.
export OPD_ROOT=${OPD_ROOT:-$PWD/opd-store}
opd=${OPD:-opd} # paths, where the environment is not activated: OPD=.venv/bin/opd RAY=.venv/bin/ray
ray=${RAY:-ray}
port=${RAY_PORT:-6379}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
cpus=${SLURM_CPUS_PER_TASK:-16}
started=$SECONDS
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  "$ray" start --head --port="$port" --num-cpus="$cpus" --include-dashboard=false --disable-usage-stats --block &
sleep "${RAY_WAIT:-20}"
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  srun --nodes="$others" --ntasks="$others" --exclude="$head" --overlap \
    "$ray" start --address="$head:$port" --num-cpus="$cpus" --disable-usage-stats --block &
  sleep "${RAY_WAIT:-20}"
fi

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap "$opd" run "$config" --name "$name" --no-prefect &
run=$!
trap 'kill -TERM "$run"' TERM # Slurm's signal comes to this script; srun passes it to the run
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do # a wait that the signal has ended
  wait "$run"
  code=$?
done
kill $(jobs -p) 2>/dev/null # the Ray nodes
# 130: stopped by a signal. A job that was stopped in its first minutes is not queued again: something else stops it.
if [ "$code" -eq 130 ] && [ $((SECONDS - started)) -gt 300 ]; then
  echo "stopped before its end; queued again: $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
