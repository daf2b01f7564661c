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

# The folder of the project, and what stands before a name in it: nothing where the caller is there. Other paths are the
# caller's, who may be elsewhere.
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$project/
[ "$PWD" != "$project" ] || root=

# Runs a function of this file in the folder of the project.
in_project() {
    local caller=$PWD
    cd "$project"
    "$@"
    cd "$caller"
}

# python -m MODULE …, of the project.
run_module() {
    PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m "$@"
}

# Leaves in $GPUS the number of processes on this machine and in the array launch the start of the command, which ends
# with the arguments: alone for one process, torchrun in front for several (in `runs.launch`, which ends with the cause
# and not a traceback).
choose_launcher() {
    if [ -z "${GPUS:-}" ] && ! compgen -G '/dev/nvidia[0-9]*' > /dev/null && [ ! -e /dev/kfd ] && [ ! -e /dev/dxg ]; then
        GPUS=1 # no driver of a GPU; asking PyTorch takes seconds
    fi
    GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    launch=(env "PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON")
    local several=("${launch[@]}" -m runs.launch)
    if [ "${NNODES:-1}" != 1 ]; then
        launch=("${several[@]}" --nproc_per_node "$GPUS" --nnodes "$NNODES"
            --node_rank "${NODE_RANK:?set NODE_RANK, 0 on the first machine}"
            --master_addr "${MASTER_ADDR:?set MASTER_ADDR, the first machine}" --master_port "${MASTER_PORT:-29500}")
    elif [ "$GPUS" != 1 ]; then
        launch=("${several[@]}" --nproc_per_node "$GPUS" --standalone)
    fi
    launch+=("$@")
}

# The tasks that have a published recipe.
recipe_names() {
    (cd "$project/runs/recipes" && ls -- *.base.flags | sed 's/\.base\.flags$//' | paste -sd ' ')
}

# Leaves in the array recipe the flags of a file in runs/recipes/, and in $pairs how many pairs a step of it takes.
read_recipe() {
    local file=$project/runs/recipes/$1.flags
    [ -f "$file" ] || return 1
    recipe=($(grep -v '^#' "$file"))
    pairs=$(sed -n 's/^# pairs per step: //p' "$file")
}

# Adds --update_freq to recipe so that a step takes the published pairs on any number of GPUs; arguments as bash.sh's.
keep_pairs_per_step() {
    local batch=1 words=("${recipe[@]}" "$@") place at_once
    for place in "${!words[@]}"; do
        case ${words[$place]} in
            --batch_size) batch=${words[$((place + 1))]:-} ;;
            --batch_size=*) batch=${words[$place]#*=} ;;
            --update_freq | --update_freq=*) return 0 ;; # the caller knows better
        esac
    done
    case $batch in '' | 0 | *[!0-9]*) return 0 ;; esac # the program says what is wrong
    at_once=$((batch * GPUS * ${NNODES:-1}))
    local updates=$(((pairs + at_once / 2) / at_once))
    [ "$updates" -ge 1 ] || updates=1
    if [ $((updates * at_once)) = "$pairs" ]; then
        echo "$pairs pairs per step, as ${said:-published}: $at_once at once, --update_freq $updates"
    else
        echo "$((updates * at_once)) pairs per step, not the ${said:-published} $pairs, which $at_once at once do not give"
    fi
    recipe+=(--update_freq "$updates")
}

# Whether bash.sh is to learn from somebody's own data: it is named, or a table or its index lies in DATA_PATH, and not
# COCO's official files or index.
is_own_data() {
    case ${TASK:-} in vqa | captioning) return 0 ;; esac
    case " $* " in *" --train "* | *" --train="*) return 0 ;; esac
    [ -n "${DATA_PATH:-}" ] && [ -z "${TASK:-}" ] && [ ! -e "$DATA_PATH/vqa.rest_val.jsonl" ] || return 1
    [ ! -e "$DATA_PATH/vqa.train.jsonl" ] && [ ! -e "$DATA_PATH/captioning.train.jsonl" ] || return 0
    local here
    here=$(PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -c 'import pathlib, sys
from sources.opening import sources_here
print(sources_here(pathlib.Path(sys.argv[1])))' "$DATA_PATH") || exit
    [ "$here" = True ]
}

# Adds to recipe how long to learn from so many rows; arguments as bash.sh's.
plan_by_size() {
    local planned most said=planned
    planned=$(run_module tasks.recipe_by_size "$TASK" "$DATA_PATH" "$FINETUNE" "$SPM" "$@")
    { read -r pairs && read -r -a most; } <<< "$planned"
    recipe+=("${most[@]}")
    local batch
    batch=$((pairs / (GPUS * ${NNODES:-1})))
    [ "$batch" -ge 1 ] || batch=1
    [ "$batch" -le 64 ] || batch=64
    recipe+=(--batch_size "$batch")
    keep_pairs_per_step "$@"
}

# Runs a command and hands on a SIGTERM or Ctrl-C that this script gets, so that the training can write its checkpoint
# first. Both as SIGTERM: what a script starts in the background is deaf to Ctrl-C. The status is then 143 or 130.
run_handing_on_signals() {
    local status=0 got=0
    "$@" &
    local child=$!
    trap 'got=143; kill -TERM $child 2> /dev/null' TERM
    trap 'got=130; kill -TERM $child 2> /dev/null' INT
    while true; do
        wait "$child" && status=0 || status=$?
        kill -0 "$child" 2> /dev/null || break
    done
    trap - TERM INT
    [ "$got" = 0 ] || return "$got"
    return "$status"
}
