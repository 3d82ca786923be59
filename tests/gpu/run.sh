#!/usr/bin/env bash
# Tests and benchmark of the TensorRT part on a GPU machine that reaches no package index: see README.md.
#   run.sh pack FOLDER           where there is an index: everything that is needed, in parts of 60 MiB
#   run.sh add FOLDER            on the GPU machine, as often as parts arrive
#   run.sh run --out FOLDER      on the GPU machine: the tests, then the benchmark
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}

usage() {
  sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

case ${1-} in
  pack)
    [[ -n ${PYTHON-} || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
    module=gpu.pack
    ;;
  add) module=gpu.add ;;
  run) module=gpu.run ;;
  *) usage ;;
esac
shift
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "run.sh: $python is older than Python 3.10; name another one in PYTHON" >&2; exit 2; }
RUN_SH_PYTHONPATH=${PYTHONPATH-} PYTHONPATH=$root/tests:$root/tools PYTHONDONTWRITEBYTECODE=1 exec "$python" -m "$module" "$@"
