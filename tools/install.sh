#!/usr/bin/env bash
# install.sh STAMP EXTRAS: install tritonsmith with EXTRAS into .venv and leave .venv/.STAMP when all is in.
# Safe to interrupt and to run twice at once.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=$1 extras=$2 python=${PYTHON:-python3}

exec 9>.venv.lock
if ! flock --nonblock 9; then
    echo "waiting for another installation in this folder" >&2
    flock 9
fi
done=.venv/.$stamp
if [ "$done" -nt pyproject.toml ] && [ "$done" -nt tools/constraints.txt ] && [ "$done" -nt tools/install.sh ]; then
    exit 0 # the one we waited for did it
fi
"$python" - <<'CHECK'
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"tritonsmith needs Python 3.10 to 3.13, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")
try:
    import ensurepip, venv
except ImportError:
    v = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    sys.exit(f"{v} cannot make virtual environments: apt-get install {v}-venv")
CHECK
if [ ! -f .venv/.created ]; then
    rm -rf .venv # an interrupted one
    "$python" -m venv .venv
    touch .venv/.created
fi
echo "installing tritonsmith[$extras] into .venv (the first time takes a few minutes)" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! .venv/bin/python -m pip install --quiet --no-input --constraint tools/constraints.txt \
        --editable ".[$extras]" >"$log" 2>&1; then
    cat "$log" >&2
    echo "the installation failed; it goes on from here when you run it again" >&2
    exit 1
fi
touch "$done"
