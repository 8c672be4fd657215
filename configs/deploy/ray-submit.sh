#!/bin/bash
# One run as a job of a Ray cluster that is there: ray-submit.sh http://HEAD:8265 experiment.yaml demo
# The job server of Ray (ray[default], its dashboard) starts `opd` on the head. Config and store have the same paths on all nodes.
# To stop the run in order: opd stop NAME on the head, or `ray job stop ID`, which sends SIGTERM and, after three seconds, SIGKILL.
set -euo pipefail

address=${1:?usage: ray-submit.sh ADDRESS CONFIG NAME}
config=${2:?usage: ray-submit.sh ADDRESS CONFIG NAME}
name=${3:?usage: ray-submit.sh ADDRESS CONFIG NAME}
root=${OPD_ROOT:?set OPD_ROOT to the folder of the store, on a file system that all nodes share}

exec "${RAY:-ray}" job submit --address "$address" --submission-id "opd-$name-$(date +%s)" -- \
  opd run "$(realpath "$config")" --name "$name" --root "$root" --no-prefect --set runtime.cluster=ray --set "runtime.device=${DEVICE:-cuda}"
