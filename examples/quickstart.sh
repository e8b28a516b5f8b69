#!/usr/bin/env bash
# Installs into .venv, then finetunes the small vision-language model of recipes/configs/vlm/digits.yaml twice,
# sparse and dense, and shows both. No GPU, no account. PYTHON names the interpreter (3.11 or 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
exec .venv/bin/python examples/quickstart.py "$@"
