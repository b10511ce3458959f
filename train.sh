#!/usr/bin/env bash
# Installs if needed, then trains:
#
#   ./train.sh                      config/config.json or config.json; where there is none, the demo
#   ./train.sh --env my-run         config/my-run/config.json; every argument of `simpletuner train` works
set -euo pipefail
home="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"$home/install.sh"

if ! command -v nvidia-smi >/dev/null 2>&1 && ! command -v rocm-smi >/dev/null 2>&1; then
    # On a CPU, small steps spend half their time in giving memory back to the system and fetching it again,
    # and idle threads spin instead of letting others work. What you have set yourself stays.
    export KMP_BLOCKTIME="${KMP_BLOCKTIME:-0}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
    export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"
fi

if [[ $# -eq 0 ]]; then
    set -- --demo-if-none
fi
exec "$home/.venv/bin/simpletuner" train "$@"
