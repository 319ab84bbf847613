#!/usr/bin/env bash
# From raw text to a sentiment model: vocabulary -> rows -> pre-training -> fine-tuning with and without it -> a mask,
# a label, and pages that show why.
# Everything lands in $WORK (default work/demo); run again, it goes on where it was. PYTHON and VENV are honoured.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS
. launch/environment.sh
install_extras demo
exec "$VENV/bin/python" launch/demo.py "${WORK:-work/demo}" --installed-in "$((SECONDS - began))" "$@"
