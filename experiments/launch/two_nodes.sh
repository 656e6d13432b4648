#!/usr/bin/env bash
# A run on two machines: started on both, in either order, with the same code, flags and run directory.
set -euo pipefail

usage() {
    cat <<USAGE
usage: two_nodes.sh head|other ADDRESS [MODULE [FLAG...]]

Start it on both machines: as head on the one that has ADDRESS, as other on the second one.
MODULE is experiments.gpt2_124m where none is given; FLAGs are its flags. Checkpoints need a run directory that
both machines see. A second machine that was lost may be started again: the head waits for it, and both go on from
the last checkpoint. Which machine has rank 0, whose output is on the terminal, torchrun decides.

  first:   experiments/launch/two_nodes.sh head  10.0.0.1 experiments.gpt2_124m --data.path data/openwebtext
  second:  experiments/launch/two_nodes.sh other 10.0.0.1 experiments.gpt2_124m --data.path data/openwebtext
  check:   the same with nanogpt.doctor

environment: NGPUS          processes on this machine (default: its GPUs, or 1)
             PORT           where ADDRESS listens (default: 29500)
             JOIN_TIMEOUT   seconds to wait for the other machine (default: 600)
             MAX_RESTARTS   how often to start again from the last checkpoint (default: 3; 0 for the check)
             LOCAL_ADDRESS  this machine as the other one can reach it (default: ADDRESS on head, else its name)
             PYTHON         (default: .venv/bin/python)
USAGE
}

fail() {
    echo "error: $1" >&2
    exit 2
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    head) is_host=1 ;;
    other) is_host=0 ;;
    *) usage >&2; fail "the first argument is '${1:-}', expected head or other" ;;
esac
[ -n "${2:-}" ] || fail "no address was given, expected the one of the head machine; two_nodes.sh $1 ADDRESS"
role=$1 address=$2
shift 2
[ $# -gt 0 ] || set -- experiments.gpt2_124m

cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || fail "no Python at $python; run make environment, or set PYTHON"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true) # not MIG slices, nor what it says of an error
processes=${NGPUS:-$((gpus > 0 ? gpus : 1))}
restarts=${MAX_RESTARTS:-$([ "$1" = nanogpt.doctor ] && echo 0 || echo 3)}
for setting in "NGPUS=$processes" "PORT=${PORT:-29500}" "JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}" "MAX_RESTARTS=$restarts"; do
    [[ ${setting#*=} =~ ^(0|[1-9][0-9]{0,4})$ ]] || fail "${setting%%=*} is '${setting#*=}', expected a number"
done
[ "$processes" != 0 ] || fail "NGPUS is 0, expected a number from 1"
[ "$role" = head ] && local_address=${LOCAL_ADDRESS:-$address} || local_address=${LOCAL_ADDRESS:-}

echo "$role on $HOSTNAME: the machines meet at $address:${PORT:-29500}, within ${JOIN_TIMEOUT:-600} s" >&2
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
# Otherwise torchrun's head never tells a machine that joins again where ranks meet, and it waits until both end.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# is_host is given because torchrun would infer it from the machine's name, which an address behind a second
# network card does not match. Given it, torchrun also reports that a port is taken instead of waiting there.
exec "$python" -m experiments.launch.torchrun \
    --nnodes=2 --nproc-per-node="$processes" --max-restarts="$restarts" \
    --rdzv-backend=c10d --rdzv-endpoint="$address:${PORT:-29500}" --rdzv-id="nanogpt-${PORT:-29500}" \
    --rdzv-conf="is_host=$is_host,join_timeout=${JOIN_TIMEOUT:-600}" \
    ${local_address:+--local-addr="$local_address"} -m "$@"
