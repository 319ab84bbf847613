# shellcheck shell=bash
# Sourced: makes the virtual environment $VENV (default .venv) with $PYTHON (default: python3)
# and installs this checkout with the extras named in $1, again only when setup.cfg or the extras change.
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "bert_jax needs Python 3.11 or newer; '$PYTHON' is not. Name one: PYTHON=python3.12 bash $0" >&2
  exit 2
}
# Of an environment that could be made by half only, pip is what is missing.
[ -x "$VENV/bin/pip" ] || "$PYTHON" -m venv "$VENV" || {
  echo "'$PYTHON' cannot make a virtual environment in $VENV (Debian and Ubuntu: apt-get install python3-venv)" >&2
  exit 5
}

install_extras() {
  local want
  want="$("$VENV/bin/python" - "$1" <<'EOF'
import hashlib, pathlib, sys
files = [pathlib.Path(name).read_bytes() for name in ("setup.cfg", "pyproject.toml")]
print(hashlib.sha256(b"".join(files)).hexdigest()[:16], pathlib.Path.cwd(), sys.argv[1])
EOF
)" || return 1
  touch "$VENV/installed"
  grep -qxF "$want" "$VENV/installed" && return
  echo "installing bert_jax[$1] into $VENV ..." >&2
  # -e is off in a function that is called before ||.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$1]" || return 1
  echo "$want" >> "$VENV/installed"
}
