# Sourced by bash.sh, prediction.sh and tests/run.sh: leaves in $PYTHON an interpreter that has what is needed.
#
#   use_environment REQUIREMENTS MODULE…
#
# An active environment that has every MODULE is used as it is. Otherwise .venv is made, with REQUIREMENTS installed;
# what was installed is remembered by a hash of the requirements, so a second run installs nothing.

use_environment() {
    local requirements=$1 module missing
    shift
    local active=${PYTHON:-python3}
    if ! command -v "$active" > /dev/null; then
        echo "error: $active not found; install Python 3.10 or newer" >&2
        return 1
    fi
    missing=$("$active" - "$@" << 'PYTHON_END'
import importlib.util, sys
if sys.version_info < (3, 10):
    sys.exit("error: Python 3.10 or newer is needed, this is " + sys.version.split()[0])
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PYTHON_END
    ) || return 1
    if [ -z "$missing" ]; then
        PYTHON=$(command -v "$active")
        return 0
    fi
    local wanted stamp=.venv/installed.$(basename "$requirements").sha256
    wanted=$(cat requirements.txt "$requirements" | sha256sum)
    if [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]; then
        echo "installing $requirements into .venv (the active Python has no $(echo $missing | cut -d' ' -f1); two minutes, 6 GB of disk) …"
        if ! "$active" -m venv .venv 2> .venv.log; then
            cat .venv.log >&2
            echo "error: $active -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 1
        fi
        rm -f .venv.log
        # pip chats a lot; it is heard only when it fails.
        if ! .venv/bin/python -m pip install -qq --disable-pip-version-check -r "$requirements" > .venv/install.log 2>&1; then
            cat .venv/install.log >&2
            echo "error: installing $requirements failed; the lines above say why. Run the same command again to retry" >&2
            return 1
        fi
        echo "$wanted" > "$stamp"
    fi
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
    launch=("$PYTHON" -m runs.launch --nproc_per_node "$GPUS")
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
