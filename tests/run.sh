#!/usr/bin/env bash
# Linter, formatter, type check and the whole test suite. Installs what it needs. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./install.sh dev

step() {
    echo "== $*" >&2
    ".venv/bin/$1" "${@:2}"
}

step ruff check .
step ruff format --check .
step mypy
step python -m pytest "$@"
