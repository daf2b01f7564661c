#!/usr/bin/env bash
# Sets the environment up as bash.sh does, checks the style, and runs the tests; arguments go to pytest.
#
#   bash tests/run.sh                 everything that this machine can run
#   bash tests/run.sh -m "not slow"   the quick ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
use_environment requirements-dev.txt $RUNTIME_MODULES pytest xdist pytest_timeout hypothesis ruff mypy \
    gradio selenium pyarrow onnx onnxscript onnxruntime
"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --quiet --check .
# Each file of tests in one process, as many at once as there are cores, four at most; so none needs threads of its own.
cores=$(nproc)
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n $((cores < 4 ? cores : 4)) --dist loadfile --no-loadscope-reorder "$@"
