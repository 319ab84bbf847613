#!/usr/bin/env bash
# Several processes on this machine make one run, as the hosts of a pod would: to test and to see it.
#   bash launch/local.sh PROCESSES DEVICES python -m bert_jax.train --config … --workdir W
# Each process gets DEVICES simulated devices. Process 0 speaks; what the others say is in W/hosts/. The exit code is
# that of the first process that failed, else 0.
set -uo pipefail
if (($# < 3)) || [[ ! $1$2 =~ ^[0-9]+$ ]]; then
    echo "usage: bash launch/local.sh PROCESSES DEVICES COMMAND ..." >&2
    exit 2
fi
processes=$1 devices=$2
shift 2
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=cpu JAX_NUM_PROCESSES=$processes JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
pids=()
# Processes in the background of a script do not hear Ctrl-C: told by TERM, they save and end.
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT HUP
for ((index = 0; index < processes; index++)); do
    JAX_PROCESS_ID=$index "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"
    found=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait, not the process
        wait "$pid"
        found=$?
    done
    ((code == 0)) && code=$found
done
exit "$code"
