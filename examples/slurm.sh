#!/usr/bin/env bash
# A training with ckpt_hooks on SLURM: submit it once, and it goes on through preemptions and time limits.
#
#   sbatch examples/slurm.sh
#
# docs/cluster.md explains each line.

#SBATCH --job-name=digits
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGTERM to the tasks of the job, 120 s before its time is over. Without "B:" it goes to the tasks and not to this
# script. A preemption by a job of higher priority sends SIGTERM by itself, GraceTime before SIGKILL.
#SBATCH --signal=TERM@120

set -uo pipefail

# JAX finds SLURM's variables by itself: jax.distributed.initialize() without arguments.
# --kill-on-bad-exit=0: a task that has left with 143 must not end those that are still committing.
srun --kill-on-bad-exit=0 python train.py --workdir "${WORKDIR:-/shared/runs/digits}" --grace_secs 120
code=$?

# 143: the hook was asked to stop, and all tasks have saved and committed the same step. SLURM itself requeues a job
# that was preempted; one that came to its time limit asks for it here.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
