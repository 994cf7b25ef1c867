#!/usr/bin/env bash
# Makes the work pool, its deployments, the automations and the limit of scans at once on the Prefect server that
# PREFECT_API_URL names; run again, it brings all but the limit up to date. Run from the repository's root, where the
# entry points of prefect.yaml are.
#
#   register.sh process                              the pool of one machine, of compose and of Slurm
#   register.sh kubernetes BASE_JOB_TEMPLATE.json    a pool whose flow runs are Kubernetes jobs
set -euo pipefail

type=${1:?a kind of work pool must be given: process or kubernetes}
here=$(dirname "$0")

export HALOSEG_HOME=${HALOSEG_HOME:-$PWD}
: "${HALOSEG_CLUSTER:?must be the address of the Dask scheduler, such as tls://dask-scheduler:8786}"
: "${HALOSEG_ROOTS:?must be the folders or URL prefixes that flows may use, comma-separated}"
: "${HALOSEG_ARCHIVE:?must be the folder or URL of the archive that the nightly run segments}"
: "${HALOSEG_MODEL:?must be the name, path or URL of the model of the nightly run}"
: "${HALOSEG_MODELS:?must be the folder or URL prefix where models lie by name, within HALOSEG_ROOTS}"
export HALOSEG_CLUSTERS=${HALOSEG_CLUSTERS:-$HALOSEG_CLUSTER} # comma-separated: what flows may be told to compute on
export HALOSEG_IMAGE=${HALOSEG_IMAGE:-}
export HALOSEG_TRAIN_GPUS=${HALOSEG_TRAIN_GPUS:-0}

template=()
if [ $# -gt 1 ]; then
    template=(--base-job-template "$2")
fi
prefect --no-prompt work-pool create haloseg --type "$type" --overwrite "${template[@]}"
prefect --no-prompt deploy --prefect-file "$here/prefect.yaml" --all
python "$here/automations.py"
PYTHONPATH=$HALOSEG_HOME${PYTHONPATH:+:$PYTHONPATH} python "$here/limits.py"
