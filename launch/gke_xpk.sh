#!/bin/bash
# A run on TPU slices of a GKE cluster that xpk has made, from the directory of the repository:
#
#   CLUSTER=tpus TYPE=v6e-32 RECIPE=law WORKDIR=gs://bucket/runs/law launch/gke_xpk.sh
#
# Further arguments are xpk's: --spot or --reservation NAME (as the cluster was made), --num-slices 2, --zone,
# --project, --dry-run. The same command under another NAME continues a run.
set -euo pipefail

: "${CLUSTER:?CLUSTER: that xpk has made}"
: "${TYPE:?TYPE: of the slices, as in v6e-32}"
: "${RECIPE:?RECIPE: what cpt run is to run, as in RECIPE=law}"
: "${WORKDIR:?WORKDIR: an address in an object store, as in gs://bucket/runs/law}"
NAME=${NAME:-cpt-$(date +%m%d-%H%M%S)}

# On one line, for it is put into indented YAML; exec, so that the SIGTERM that xpk passes on reaches the run.
command="pip install -q -r requirements.txt 'jax[tpu]' gcsfs s3fs && pip install -q --no-deps -e . && exec cpt run $(printf %q "$RECIPE") --workdir $(printf %q "$WORKDIR") --distributed ${ARGUMENTS:-}"

# A pod that is taken away has five minutes to save; 75: try again.
exec xpk workload create --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$TYPE" \
    --base-docker-image="${IMAGE:-python:3.12}" --script-dir=. --command="$command" \
    --max-restarts="${RESTARTS:-100}" --restart-on-exit-codes=75 --termination-grace-period-seconds=300 "$@"
