#!/usr/bin/env bash
# Answers the test questions and writes the submission for the VQA server.
#
#   DATA_PATH=/data/coco FINETUNE=output/checkpoint-best bash prediction.sh
#                                                 your own checkpoint, which says all about itself
#   DATA_PATH=/data/coco SPM=beit3.spm FINETUNE=beit3_base_patch16_480_vqa.pth bash prediction.sh
#                                                 a released one
#   bash prediction.sh                            nothing named: dataset/ and beit3_base_patch16_480_vqa.pth where these lie in
#                                                 this folder, else the demo's test questions, with the model bash.sh made
#   … bash prediction.sh --split val              any flag of run_beit3_finetuning.py: the last one given counts
#
# DATA_PATH     folder with the pictures and the index files (dataset)
# IMAGE_PATH    folder with the pictures, where they lie elsewhere (DATA_PATH)
# FINETUNE      a fine-tuned checkpoint, released or your own
# SPM           the tokenizer (the checkpoint's own; beit3.spm for released ones)
# TASK, MODEL   where the checkpoint does not say, or nocaps with a captioning checkpoint
# OUTPUT_DIR    where the submission goes (your_prediction)
# GPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON    as in bash.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
in_project use_environment requirements.txt $RUNTIME_MODULES
choose_launcher

flags=()
released=beit3_base_patch16_480_vqa.pth
if [ -z "${DATA_PATH:-}${FINETUNE:-}" ] && ! { [ -d dataset ] && [ -e "$released" ]; }; then
    demo=${TASK:-vqav2}
    DATA_PATH=${root}demo_data FINETUNE=${root}output/demo_$demo/checkpoint-best
    flags+=(--num_workers 1)
    if [ ! -e "$FINETUNE" ]; then
        echo "error: no data and no checkpoint named, and no demo model yet: run 'TASK=$demo bash bash.sh' first," >&2
        echo "or name yours: DATA_PATH=… FINETUNE=… bash prediction.sh" >&2
        exit 2
    fi
fi
FINETUNE=${FINETUNE:-$released}
case $(basename "$FINETUNE") in
    beit3_*.pth) SPM=${SPM:-beit3.spm} ;; # a released file holds no tokenizer
esac
[ -z "${TASK:-}" ] || flags+=(--task "$TASK")
[ -z "${MODEL:-}" ] || flags+=(--model "$MODEL")
[ -z "${SPM:-}" ] || flags+=(--sentencepiece_model "$SPM")
[ -z "${IMAGE_PATH:-}" ] || flags+=(--image_path "$IMAGE_PATH")
run_handing_on_signals "${launch[@]}" --eval --finetune "$FINETUNE" --data_path "${DATA_PATH:-dataset}" \
    --output_dir "${OUTPUT_DIR:-your_prediction}" --batch_size 64 ${flags[@]+"${flags[@]}"} "$@"
