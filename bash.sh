#!/usr/bin/env bash
# Fine-tunes BEiT-3.
#
#   bash bash.sh                                  without DATA_PATH: makes the embedded demo and learns it (a few minutes on a CPU)
#   DATA_PATH=/data/coco SPM=beit3.spm FINETUNE=beit3_base_patch16_224.pth GPUS=8 bash bash.sh
#                                                 the published recipe on COCO
#   TRAIN=vqa.csv IMAGE_PATH=photos SPM=beit3.spm FINETUNE=beit3_base_patch16_224.pth bash bash.sh
#                                                 your own pictures and a table of questions or captions (docs/DATA.md);
#                                                 DATA_PATH=photos where the table lies with the pictures
#   … bash bash.sh --check                        looks at the data, trains nothing, says what a training would take
#   … bash bash.sh --batch_size 8                 any flag of run_beit3_finetuning.py: the last one given counts
#
# DATA_PATH     folder with train2014/ val2014/ test2015/ and, for the first run, the official files in vqa/
#               (captioning: dataset_coco.json); of own data the folder where its index goes (beside the table)
# TRAIN, VAL, TEST    own data: a table, JSON file, pair of them joined by a comma, or folder for each
# IMAGE_PATH    folder with the pictures, where they lie elsewhere (DATA_PATH; of own data the table's folder)
# SPM           the tokenizer (beit3.spm)
# FINETUNE      weights to start from (beit3_base_patch16_224.pth, or large as MODEL is); set but empty: fresh weights
# MODEL         beit3_base_patch16_480; the size of the pictures follows from it
# TASK          what to learn: a recipe in runs/recipes/ (vqav2; of own data vqa or captioning, by its columns)
# OUTPUT_DIR    checkpoints and log.txt (output; of the demo output/demo_TASK)
# LOG_DIR       TensorBoard files (OUTPUT_DIR/tensorboard)
# GPUS          processes on this machine (all GPUs; 1 without)
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    several machines, as torchrun understands them
# PYTHON        the interpreter to look for an environment with (python3)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
in_project use_environment requirements.txt $RUNTIME_MODULES
choose_launcher "${root}run_beit3_finetuning.py"

sources=()
[ -z "${TRAIN:-}" ] || sources+=(--train "$TRAIN")
[ -z "${TRAIN:-}" ] || [ -z "${VAL:-}" ] || sources+=(--val "$VAL")
[ -z "${TRAIN:-}" ] || [ -z "${TEST:-}" ] || sources+=(--test "$TEST")
[ ${#sources[@]} = 0 ] || set -- "${sources[@]}" "$@"
own=
if is_own_data "$@"; then
    own=$(run_module tasks.own_data "${DATA_PATH:-}" "${TASK:-}" "${IMAGE_PATH:-}" "$@")
    { IFS= read -r TASK && IFS= read -r DATA_PATH && IFS= read -r IMAGE_PATH; } <<< "$own"
fi
if [ -z "$own${TASK:-}" ] && [ -n "${DATA_PATH:-}" ] && [ ! -e "$DATA_PATH/vqa" ] && [ ! -e "$DATA_PATH/vqa.train.jsonl" ]; then
    table=$(cd "$DATA_PATH" 2> /dev/null && { ls | grep -iE '\.(csv|tsv|jsonl|parquet)(\.gz)?$' | head -n 1; } || true)
    if [ -n "$table" ]; then
        echo "error: $DATA_PATH holds $table and no metadata.csv or train.csv; if that is your table: TRAIN=$DATA_PATH/$table" >&2
        exit 2
    fi
    echo "no table of your own data in $DATA_PATH (metadata.csv, train.csv and the like, docs/DATA.md): taking it for VQAv2"
fi
TASK=${TASK:-vqav2}
if [ ! -f "$project/runs/recipes/$TASK.base.flags" ]; then
    echo "error: TASK=$TASK is not there yet; there are $(recipe_names)" >&2
    exit 2
fi
if [ -z "${DATA_PATH:-}" ]; then
    if ! read_recipe "demo.$TASK"; then
        echo "error: the demo has no $TASK; name your data: DATA_PATH=…" >&2
        exit 2
    fi
    echo "no DATA_PATH: learning the embedded demo (coloured shapes) from scratch"
    [ -z "${FINETUNE:-}${MODEL:-}${SPM:-}" ] || echo "FINETUNE, MODEL and SPM are not used: they are for data of your own"
    DATA_PATH=${root}demo_data SPM=${root}demo_data/demo.spm OUTPUT_DIR=${OUTPUT_DIR:-${root}output/demo_$TASK}
    run_module demo.make "$DATA_PATH"
    after="TASK=$TASK bash ${root}prediction.sh"
else
    MODEL=${MODEL:-beit3_base_patch16_480} SPM=${SPM:-beit3.spm} OUTPUT_DIR=${OUTPUT_DIR:-output}
    size=${MODEL#beit3_} size=${size%%_*}
    if ! read_recipe "$TASK.$size"; then
        read_recipe "$TASK.base"
        echo "no recipe for the $size model: taking that of base"
    fi
    FINETUNE=${FINETUNE-beit3_${size}_patch16_224.pth}
    recipe+=(--model "$MODEL" --finetune "$FINETUNE")
    [ -n "$own" ] || keep_pairs_per_step "$@"
    after="DATA_PATH=$(printf %q "$DATA_PATH") FINETUNE=$(printf %q "$OUTPUT_DIR")/checkpoint-best bash ${root}prediction.sh"
    [ "$TASK" != nocaps ] || after="TASK=nocaps $after"
fi
images=()
[ -z "${IMAGE_PATH:-}" ] || images=(--image_path "$IMAGE_PATH")
run_module tasks.make_index "$TASK" "$DATA_PATH" "$SPM" ${IMAGE_PATH:+"$IMAGE_PATH"} "${@}"
deepspeed=(--enable_deepspeed)
if [ -n "$own" ]; then
    plan_by_size "$@"
    [ "$size" != tiny ] || deepspeed=() # loading it takes a tenth of such a training, and there is nothing to share
    after="FINETUNE=$(printf %q "$OUTPUT_DIR")/checkpoint-best bash ${root}prediction.sh photo.jpg"
    [ "$TASK" != vqa ] || after+=' "What is it?"'
fi

run_handing_on_signals "${launch[@]}" --task "$TASK" "${recipe[@]}" ${images[@]+"${images[@]}"} \
    --sentencepiece_model "$SPM" --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
    --log_dir "${LOG_DIR:-$OUTPUT_DIR/tensorboard}" ${deepspeed[@]+"${deepspeed[@]}"} "$@"
case " $* " in *" --check "*) exit 0 ;; esac
echo "checkpoint: $OUTPUT_DIR/checkpoint-best"
echo "next:       $after"
