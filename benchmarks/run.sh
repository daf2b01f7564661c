#!/usr/bin/env bash
# Times every path of the toolkit side by side with the way it was done before, and writes benchmarks/RESULTS.md.
#
#   bash benchmarks/run.sh                        everything a CPU can tell (about half an hour on two cores)
#   bash benchmarks/run.sh --quick                smaller sizes, fewer repeats (a few minutes)
#   bash benchmarks/run.sh --only loader,index    these groups; the other sections of RESULTS.md stay
#   bash benchmarks/run.sh --gpu                  what a GPU can tell
#
# The other side are torchscale's encoder and plain code in benchmarks/peers.py. torchscale and what it imports are
# installed into benchmarks/.peers on first use and nowhere else: their version pins would harm the environment.
# Exit status 1: a row failed; the table says which.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
use_environment requirements-dev.txt $RUNTIME_MODULES onnx onnxscript onnxruntime

PEERS=benchmarks/.peers
if [ ! -d $PEERS/torchscale ]; then
    echo "installing what is compared with into $PEERS …" >&2
    "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps --target $PEERS torchscale==0.2.0 fairscale einops ||
        echo "warning: that failed; rows that need torchscale will say so" >&2
fi
# As the toolkit itself: threads that wait by spinning take the core away from others.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$PYTHON" -m benchmarks "$@"
