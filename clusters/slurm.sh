#!/bin/bash
# A study on a Slurm cluster: the first node of the job is the head and also trains, the others join it.
#
#     sbatch clusters/slurm.sh search_spaces/inat.yaml --out '$LIFT_RESULTS/inat2018'
#     sbatch clusters/slurm.sh search_spaces/inat.yaml --out '$LIFT_RESULTS/inat2018' --resume    # after the time limit
#
# All arguments are passed to `python -m lift_ray.tune`, with $LIFT_RESULTS expanded here: a folder that all nodes see, or a URL. A job
# that Slurm restarts after a preemption resumes by itself. The dashboard listens on the first node's loopback only; the log shows its address:
#     ssh -N -L 8265:localhost:8265 FIRST_NODE         # then http://localhost:8265; it asks for `ray get-auth-token`
#
#SBATCH --job-name=lift
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# CHANGE: adapt the lines above to your machines, and add a #SBATCH --partition.
set -euo pipefail

# CHANGE: what to install (a git ref as here, or a wheel), the installation folder, which all nodes must see, and the locations of
# the Parquet shards and of the results. Variables exported by your shell take precedence.
export LIFT_RAY="${LIFT_RAY:-lift_ray @ git+https://github.com/YOUR-ORG/lift_ray@v0.1.0}"
export LIFT_ENV="${LIFT_ENV:-$HOME/lift}"
export LIFT_DATA="${LIFT_DATA:-/shared/inat2018}"
export LIFT_RESULTS="${LIFT_RESULTS:-/shared/lift_ray}"

# CHANGE, optional: to use an image of your own with Apptainer (docs/how-to/clusters.md), uncomment the next line, and delete the lines
# between the two marks. Jobs then install nothing, and LIFT_RAY and LIFT_ENV have no effect.
in_image=()
# in_image=(apptainer exec --nv --bind /shared docker://registry.example.org/YOUR-ORG/lift_ray:0.1.0-cuda)
# >>> installation
# Installs if LIFT_RAY changed since the last job. If compute nodes have no internet, run these lines on the login node first.
test -x "$LIFT_ENV/bin/pip" || python3 -m venv "$LIFT_ENV"
if [ "$(cat "$LIFT_ENV/lift_ray" 2> /dev/null)" != "$LIFT_RAY" ]; then
    "$LIFT_ENV/bin/pip" install -q "$LIFT_RAY" 'ray[default,train,tune]==2.60.0'
    "$LIFT_ENV/bin/pip" install -q --force-reinstall --no-deps "$LIFT_RAY" # pip keeps a lift_ray of the same version
    echo "$LIFT_RAY" > "$LIFT_ENV/lift_ray"
fi
export PATH="$LIFT_ENV/bin:$PATH"
# <<< installation
export RAY_TRAIN_ENABLE_STATE_TRACKING=1 RAY_USAGE_STATS_ENABLED=0

# All nodes read the token from the shared home folder; Ray refuses callers without it.
export RAY_AUTH_MODE=token
"${in_image[@]}" ray get-auth-token --generate > /dev/null
chmod 600 ~/.ray/auth_token

# Since Slurm 22.05 `srun` gives a step the CPUs of the job only if told to.
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# This job has its own port and folder (for Ray's logs, at the same path on every node), because other jobs may share the nodes.
# Ray's workers use ports up to 19999.
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The IP address, not the name: a name may resolve to loopback on the node itself, or only be in /etc/hosts, which Ray does not read.
ip="$("${in_image[@]}" python -c 'import ray; print(ray.util.get_node_ip_address())')"
address="$ip:$((20000 + SLURM_JOB_ID % 10000))"
start='ray start --block --num-cpus="$SLURM_CPUS_ON_NODE"'
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" "${in_image[@]}" bash -c \
    "$start --head --port=${address#*:} --dashboard-host=127.0.0.1 --temp-dir=/tmp/lift-$SLURM_JOB_ID" &
if ((SLURM_JOB_NUM_NODES > 1)); then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --nodes=$others --ntasks=$others --overlap --exclude="$head" "${in_image[@]}" bash -c \
        "until ray health-check --address $address > /dev/null 2>&1; do sleep 2; done; until $start --address=$address; do sleep 2; done" &
fi
# A search counts the nodes that exist when it starts, so wait for all of them, for at most ten minutes.
all_there='import ray, sys; ray.init(logging_level="ERROR"); sys.exit(len(ray.nodes()) < int(sys.argv[1]))'
for _ in {1..120}; do
    RAY_ADDRESS="$address" "${in_image[@]}" python -c "$all_there" "$SLURM_JOB_NUM_NODES" > /dev/null 2>&1 && break || sleep 5
done

# When this script ends, Slurm ends everything that `srun` started.
resume=()
if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ " $* " != *" --resume "* ]]; then resume=(--resume); fi
RAY_ADDRESS="$address" "${in_image[@]}" python -m lift_ray.tune "${@//'$LIFT_RESULTS'/"$LIFT_RESULTS"}" "${resume[@]}"
