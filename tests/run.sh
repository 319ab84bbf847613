#!/usr/bin/env bash
# Sets up and passes the tests, on all cores. PYTHON=python3.12 and VENV=dir are honoured; arguments go on to
# pytest (-k packing; -n 0 for one process).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
install_extras test
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
exec "$VENV/bin/python" -m pytest -n auto --dist worksteal "$@"
