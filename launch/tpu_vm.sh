#!/bin/bash
# A run on a slice of TPU VMs, from the directory of the repository:
#
#   NAME=law TYPE=v6e-32 ZONE=us-east5-b RECIPE=law WORKDIR=gs://bucket/runs/law launch/tpu_vm.sh
#
# It makes the slice unless it is there, puts this directory on every host, and runs the recipe on all of them. A slice
# that is taken away is replaced, and the run goes on there. Called again after it was cut off, it goes on too. The
# slice stays when the run has ended: launch/tpu_vm.sh delete.
set -euo pipefail

: "${NAME:?NAME: of the slice}" "${ZONE:?ZONE: as in us-east5-b}"
tpu() {
    gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"
}
if [ "${1:-}" = delete ]; then
    tpu delete --quiet
    exit
fi

: "${TYPE:?TYPE: of the slice, as in v6e-32}"
: "${RECIPE:?RECIPE: what cpt run is to run, as in RECIPE=law}"
: "${WORKDIR:?WORKDIR: an address in an object store, as in gs://bucket/runs/law}"
case $TYPE in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) version=tpu-ubuntu2204-base ;;
    *) version=${VERSION:?VERSION: of the software on a slice of this type} ;;
esac
version=${VERSION:-$version}
# SPOT= asks for a slice that is not taken away.
SPOT=${SPOT---spot}
PAUSE=${PAUSE:-60}

on_hosts() {
    tpu ssh --worker=all --command="$1"
}

state() {
    tpu describe --format="value(state)" 2>/dev/null || true
}

# What git tracks or does not ignore goes along. Hosts have Python 3.10: uv brings another.
install="set -e; mkdir -p cpt; tar -xzf cpt.tar.gz -C cpt; cd cpt
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
~/.local/bin/uv pip install --quiet -r requirements.txt 'jax[tpu]' gcsfs s3fs
~/.local/bin/uv pip install --quiet --no-deps --editable ."

install_on_hosts() {
    local archive
    archive=$(mktemp -d)/cpt.tar.gz
    git ls-files --cached --others --exclude-standard -z | tar --null --files-from=- -czf "$archive"
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:cpt.tar.gz" --zone="$ZONE" --worker=all
    on_hosts "$install"
}

# What a connection that was cut off has left running is asked to save and end. 75: try again.
run="pkill -TERM -f '[.]venv/bin/cpt run'; while pgrep -f '[.]venv/bin/cpt run' > /dev/null; do sleep 1; done
cd cpt; while :; do
.venv/bin/cpt run $(printf %q "$RECIPE") --workdir $(printf %q "$WORKDIR") --distributed ${ARGUMENTS:-}; status=\$?
[ \$status -eq 75 ] || exit \$status; done"

while :; do
    case $(state) in
        READY)
            if install_on_hosts && on_hosts "$run"; then
                exit 0
            fi
            # It takes a while to be told that a slice was taken away.
            sleep "$PAUSE"
            if [ "$(state)" = READY ]; then
                echo "the run failed, and the slice is there: see above" >&2
                exit 1
            fi
            ;;
        "")
            # Where there is no capacity, it is asked for again.
            tpu create --accelerator-type="$TYPE" --version="$version" ${SPOT:+"$SPOT"} || sleep "$PAUSE"
            ;;
        CREATING | STARTING | RESTARTING | REPAIRING | DELETING | STOPPING)
            sleep "$PAUSE"
            ;;
        *)
            tpu delete --quiet
            ;;
    esac
done
