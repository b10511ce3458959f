#!/usr/bin/env bash
# Linter, formatter, type check and the whole test suite. Installs what it needs. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./install.sh dev

# Tests start several processes; two threads each on two cores are many times slower than one, and glibc hands
# memory back after every small step unless it is told not to.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" KMP_BLOCKTIME="${KMP_BLOCKTIME:-0}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"

step() {
    echo "== $*" >&2
    ".venv/bin/$1" "${@:2}"
}

step ruff check .
step ruff format --check .
step mypy
step python -m pytest "$@"
