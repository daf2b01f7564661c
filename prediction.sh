#!/usr/bin/env bash
# Asks a model about pictures, or answers the test questions and writes the submission for the VQA server.
#
#   bash prediction.sh photo.jpg "What colour is the car?"         one picture
#   bash prediction.sh photos/ "Is there a dog?" --output answers.csv    many; --help tells of tables and captions
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
# FINETUNE      a fine-tuned checkpoint, released or your own (beit3_base_patch16_480_vqa.pth, without DATA_PATH the demo's
#               model; for pictures the newest checkpoint-best under output/)
# SPM           the tokenizer (the checkpoint's own; beit3.spm for released ones, named beit3_….pth)
# ANSWERS       answer2label.txt, to ask a released checkpoint about pictures (that of DATA_PATH)
# TASK, MODEL   where the checkpoint does not say, or nocaps with a captioning checkpoint
# OUTPUT_DIR    where the submission goes (your_prediction)
# GPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON    as in bash.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
in_project use_environment requirements.txt $RUNTIME_MODULES
case $(basename "${FINETUNE:-}") in
    beit3_*.pth) # a released file holds no tokenizer and no answers
        SPM=${SPM:-beit3.spm}
        [ ! -e "${DATA_PATH:-dataset}/answer2label.txt" ] || ANSWERS=${ANSWERS:-${DATA_PATH:-dataset}/answer2label.txt}
        ;;
esac

flags=()
case ${1:-} in
    -h | --help | [!-]*) # pictures; flags alone are those of run_beit3_finetuning.py
        [[ " $* " == *" --output"* ]] || GPUS=1
        choose_launcher -m inference
        [ -z "${ANSWERS:-}" ] || flags+=(--answers "$ANSWERS")
        [ -z "${SPM:-}" ] || flags+=(--tokenizer "$SPM")
        [ -z "${TASK:-}" ] || flags+=(--task "$TASK")
        [ -z "${FINETUNE:-}" ] || flags+=(--checkpoint "$FINETUNE")
        exec "${launch[@]}" ${flags[@]+"${flags[@]}"} "$@"
        ;;
esac

choose_launcher "${root}run_beit3_finetuning.py"
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
if [ -z "${FINETUNE:-}" ]; then
    FINETUNE=$released SPM=${SPM:-beit3.spm}
fi
[ -z "${TASK:-}" ] || flags+=(--task "$TASK")
[ -z "${MODEL:-}" ] || flags+=(--model "$MODEL")
[ -z "${SPM:-}" ] || flags+=(--sentencepiece_model "$SPM")
[ -z "${IMAGE_PATH:-}" ] || flags+=(--image_path "$IMAGE_PATH")
run_handing_on_signals "${launch[@]}" --eval --finetune "$FINETUNE" --data_path "${DATA_PATH:-dataset}" \
    --output_dir "${OUTPUT_DIR:-your_prediction}" --batch_size 64 ${flags[@]+"${flags[@]}"} "$@"
