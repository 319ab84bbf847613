#!/usr/bin/env bash
# On a machine of the run, from the unpacked bundle: installs once, ends what a lost connection left running, trains
# with the arguments given, and prints the exit code for who listens. EXTRAS names the wheels (tpu or gpu).
set -uo pipefail
trap 'echo "bert_jax exit code $?"' EXIT # read by launch/outside.py; also where a sourced file exits
trap 'exit 143' TERM INT HUP
cd "$(dirname "$0")/.." || exit 5
# shellcheck source=/dev/null
if [ -f job.env ]; then . ./job.env; fi
if [ -z "${PYTHON:-}" ]; then
    # The images of TPU VMs carry Python 3.10.
    python3.11 -c 'import ensurepip' 2>/dev/null ||
        { sudo apt-get update --quiet && sudo apt-get install --yes --quiet python3.11-venv; } || exit 5
    export PYTHON=python3.11
fi
# shellcheck source=launch/environment.sh
. launch/environment.sh
install_extras "${EXTRAS:-tpu}" || exit 5
if [ -f job.pid ] && read -r left <job.pid && grep -q bert_jax "/proc/$left/cmdline" 2>/dev/null; then
    echo "ending process $left, which an earlier connection left running; its state is saved" >&2
    kill -TERM "$left"
    for ((second = 0; second < 120; second++)); do
        kill -0 "$left" 2>/dev/null || break
        sleep 1
    done
    kill -KILL "$left" 2>/dev/null
fi
"$VENV/bin/python" -m bert_jax.train "$@" &
child=$!
echo "$child" >job.pid
trap 'kill -TERM "$child" 2>/dev/null' TERM INT HUP
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the process
    wait "$child"
    code=$?
done
rm -f job.pid
exit "$code"
