# Sourced by bash.sh, prediction.sh and tests/run.sh: leaves in $PYTHON an interpreter that has what is needed.
#
#   use_environment REQUIREMENTS MODULE…
#
# An active environment that has every MODULE is used as it is. Otherwise .venv is, where scripts/install.py puts what
# REQUIREMENTS names, in the versions of constraints.txt, or with LATEST=1 in the newest; a second run installs nothing.

use_environment() {
    local requirements=$1 missing
    shift
    local active=${PYTHON:-python3}
    if ! command -v "$active" > /dev/null; then
        echo "error: $active not found; install Python 3.10 or newer, or name one: PYTHON=/path/to/python3" >&2
        return 1
    fi
    # A .venv may be active although its install was cut off: then modules are found of which half is there.
    missing=$("$active" - "$@" << 'PYTHON_END'
import os, sys
if sys.version_info < (3, 10):
    sys.exit("error: Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; name one: PYTHON=/path/to/python3")
import importlib.util
if os.path.realpath(sys.prefix) == os.path.realpath(".venv") and os.path.exists(".venv/unfinished"):
    print("whole .venv")
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PYTHON_END
    ) || return 1
    if [ -z "$missing" ]; then
        PYTHON=$(command -v "$active")
        return 0
    fi
    "$active" scripts/install.py "$requirements" || return
    PYTHON=$PWD/.venv/bin/python
}

# Chatter of libraries that nobody here can act on.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

RUNTIME_MODULES="torch torchvision timm deepspeed transformers sentencepiece pycocotools pycocoevalcap safetensors tensorboard tqdm ninja psutil"

# How long torchrun lets a training write its checkpoint after a signal; of itself it waits 30 seconds, then kills.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# Leaves in $TASK the task, in $GPUS the number of processes and in the array launch the start of a torchrun command.
choose_task_and_launcher() {
    TASK=${TASK:-vqav2}
    case $TASK in
        vqav2 | coco_captioning | nocaps) ;;
        *)
            echo "error: TASK=$TASK is not there yet; there are vqav2, coco_captioning, nocaps" >&2
            return 2
            ;;
    esac
    GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    launch=("$PYTHON" -m torch.distributed.run --nproc_per_node "$GPUS")
    if [ "${NNODES:-1}" = 1 ]; then
        launch+=(--standalone)
    else
        launch+=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK, 0 on the first machine}"
            --master_addr "${MASTER_ADDR:?set MASTER_ADDR, the first machine}" --master_port "${MASTER_PORT:-29500}")
    fi
}

# Runs a command and hands on a SIGTERM that this script gets, so that the training can write its checkpoint first. (Ctrl-C
# reaches all processes of a terminal by itself.) After a signal the status is 143 or 130, as that of the training.
run_handing_on_signals() {
    local status=0 got=0
    "$@" &
    local child=$!
    trap 'got=143; kill -TERM $child 2> /dev/null' TERM
    trap 'got=130' INT
    while true; do
        wait "$child" && status=0 || status=$?
        kill -0 "$child" 2> /dev/null || break
    done
    trap - TERM INT
    [ "$got" = 0 ] || return "$got"
    return "$status"
}
