#!/usr/bin/env bash
# Makes .venv and installs this package in it. Does nothing when that is done already and setup.py has not changed.
#
#   ./install.sh          what training needs
#   ./install.sh dev      the tests' tools as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

extra="${1:-}"
stamp=.venv/.installed

find_python() {
    local name
    # A name on the PATH may be a shim of a version that is not there: what counts is that it runs.
    for name in python3 python3.13 python3.12 python3.11 python; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "SimpleTuner-DMD needs Python 3.11, 3.12 or 3.13; found $(python3 --version 2>/dev/null || echo none)." >&2
    echo "Install one (for example: apt install python3.12 python3.12-venv) and run this again." >&2
    return 2
}

fingerprint() {
    echo "$(cat setup.py pyproject.toml simpletuner_dmd/__init__.py | cksum) ${SIMPLETUNER_PLATFORM:-found}"
}

wanted="$(fingerprint)"
if [[ -x .venv/bin/simpletuner && -f $stamp && "$(head -n 1 $stamp)" == "$wanted" ]]; then
    if [[ -z $extra ]] || grep -qx "extra $extra" $stamp; then
        exit 0
    fi
fi

if [[ ! -x .venv/bin/python ]]; then
    python="$(find_python)"
    echo "Making .venv with $("$python" --version) ..."
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
fi

echo "Installing SimpleTuner-DMD and what it needs; the first time this takes some minutes ..."
rm -f $stamp
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
{
    echo "$wanted"
    [[ -z $extra ]] || echo "extra $extra"
} >$stamp
