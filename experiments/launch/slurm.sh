#!/usr/bin/env bash
# A run under SLURM that goes on after its time limit: sbatch experiments/launch/slurm.sh [MODULE [FLAG...]]
#
#   sbatch --nodes=4 --gpus-per-node=8 experiments/launch/slurm.sh experiments.gpt2_1558m --data.path data/openwebtext
#
# Submit it from the root of the repository, on a disk that all nodes see. Before the time limit the run saves a
# checkpoint and the job is queued again, with the same command, until the run is finished.
#SBATCH --job-name=nanogpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@180
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "there is no SLURM job here; start it with sbatch $0"
cd "${SLURM_SUBMIT_DIR:-.}"
[ -x .venv/bin/python ] || fail "no .venv in $PWD; run make environment there, and sbatch from there"
[ $# -gt 0 ] || set -- experiments.gpt2_124m

gpus=${SLURM_GPUS_ON_NODE:-1}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*} # not by a pipe into head, which may end scontrol, and with it this script, by SIGPIPE
# A port from 20000 on that depends on the job, since two jobs may share a node.
port=$((20000 + SLURM_JOB_ID % 20000))
cores=${SLURM_CPUS_PER_TASK:-$gpus}
export OMP_NUM_THREADS=$((cores > gpus ? cores / gpus : 1))

# One torchrun on each node, which restarts its node's ranks if they fail. When one ends for good,
# --kill-on-bad-exit ends the others: they would wait until join_timeout for it to rejoin. Since SLURM 22.05 srun
# takes the job's cores only if it is told to.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} .venv/bin/python -m experiments.launch.torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$gpus" --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" -m "$@" &
job_step=$!

out_of_time=no
# srun passes SIGTERM on to every torchrun, and each to its ranks, which save and end within 120 s.
trap 'out_of_time=yes; kill -TERM "$job_step" 2>/dev/null || true' USR1

status=0
wait "$job_step" || status=$?
while kill -0 "$job_step" 2>/dev/null; do # the signal ended the first wait, not the run
    status=0
    wait "$job_step" || status=$?
done
if [ "$out_of_time" = yes ] && [ "$status" -ne 0 ]; then
    echo "out of time (status $status): queued again, to go on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
