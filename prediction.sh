#!/usr/bin/env bash
# Answers the test questions and writes the submission for the VQA server.
#
#   bash prediction.sh                            nothing named: the demo's test questions, with the model bash.sh made
#   DATA_PATH=/data/coco SPM=beit3.spm FINETUNE=beit3_base_patch16_480_vqa.pth bash prediction.sh
#   … bash prediction.sh --split val              any flag of run_beit3_finetuning.py: the last one given counts
#
# DATA_PATH     folder with the pictures and the index files (dataset)
# SPM           the tokenizer (beit3.spm)
# FINETUNE      a fine-tuned checkpoint, released or your own (beit3_base_patch16_480_vqa.pth)
# MODEL         beit3_base_patch16_480; INPUT_SIZE follows from it
# OUTPUT_DIR    where submit_vqav2_test.json goes (your_prediction)
# TASK, GPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON    as in bash.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
use_environment requirements.txt $RUNTIME_MODULES

choose_task_and_launcher

case $TASK in
    vqav2) extra=() ;;
    *) extra=(--num_max_bpe_tokens 32) ;;
esac
if [ -z "${DATA_PATH:-}${FINETUNE:-}" ]; then
    DATA_PATH=demo_data SPM=demo_data/demo.spm MODEL=beit3_tiny_patch16_64 FINETUNE=output/demo_$TASK/checkpoint-best
    extra+=(--vocab_size 512 --num_workers 1)
    if [ ! -e "$FINETUNE" ]; then
        echo "error: no data and no checkpoint named, and no demo model yet: run 'TASK=$TASK bash bash.sh' first," >&2
        echo "or name yours: DATA_PATH=… SPM=… FINETUNE=… bash prediction.sh" >&2
        exit 2
    fi
fi
MODEL=${MODEL:-beit3_base_patch16_480}
case $TASK in
    vqav2) released=${MODEL}_vqa.pth ;;
    *) released=${MODEL}_$TASK.pth ;;
esac
"${launch[@]}" run_beit3_finetuning.py --model "$MODEL" --input_size "${MODEL##*_}" --task "$TASK" --batch_size 64 \
    --sentencepiece_model "${SPM:-beit3.spm}" --finetune "${FINETUNE:-$released}" \
    --data_path "${DATA_PATH:-dataset}" --output_dir "${OUTPUT_DIR:-your_prediction}" --eval --dist_eval \
    ${extra[@]+"${extra[@]}"} "$@"
