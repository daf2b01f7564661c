#!/usr/bin/env bash
# Sets the environment up as bash.sh does, checks the style, and runs the tests; arguments go to pytest.
#
#   bash tests/run.sh                 everything that this machine can run
#   bash tests/run.sh -m "not slow"   the quick ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
use_environment requirements-dev.txt $RUNTIME_MODULES pytest hypothesis ruff mypy
"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --quiet --check .
"$PYTHON" -m pytest -q "$@"
