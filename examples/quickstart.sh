#!/usr/bin/env bash
# Installs into .venv, then trains the small vision-language model of recipes/configs/vlm/digits.yaml with
# sparse attention, and shows it. No GPU, no account. PYTHON names the interpreter (3.11 or 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."
# Threads that wait without spinning: on a busy machine spinning ones take each other's time.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" PYTHONUNBUFFERED=1
if [ ! -x .venv/bin/python ]; then
    echo "making .venv"
    "${PYTHON:-python3}" -m venv .venv
fi
echo "installing (the first time: 2 to 5 minutes)"
.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e ".[all]" |
    { grep --line-buffered -E "^(Collecting|Downloading|Installing|Successfully)" || true; } | cut -c1-100
exec .venv/bin/python examples/quickstart.py "$@"
