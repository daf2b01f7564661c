#!/usr/bin/env bash
# Fine-tunes BEiT-3.
#
#   bash bash.sh                                  nothing named: makes the embedded demo and learns it (a few minutes on a CPU)
#   DATA_PATH=/data/coco SPM=beit3.spm FINETUNE=beit3_base_patch16_224.pth GPUS=8 bash bash.sh
#                                                 the published recipe on your data
#   … bash bash.sh --batch_size 8 --update_freq 2 any flag of run_beit3_finetuning.py: the last one given counts
#
# DATA_PATH     folder with train2014/ val2014/ test2015/ and, for the first run, the official files in vqa/
#               (captioning: dataset_coco.json)
# SPM           the tokenizer (beit3.spm)
# FINETUNE      weights to start from (beit3_base_patch16_224.pth)
# MODEL         beit3_base_patch16_480; INPUT_SIZE follows from it
# OUTPUT_DIR    checkpoints and log.txt (output)
# LOG_DIR       TensorBoard files (OUTPUT_DIR/tensorboard)
# TASK          vqav2, coco_captioning or nocaps (vqav2)
# GPUS          processes on this machine (all GPUs; 1 without)
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    several machines, as torchrun understands them
# PYTHON        the interpreter to look for an environment with (python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
use_environment requirements.txt $RUNTIME_MODULES

choose_task_and_launcher

if [ -z "${DATA_PATH:-}" ]; then
    if [ "$TASK" = nocaps ]; then
        echo "error: the demo has no nocaps; name your data: DATA_PATH=…" >&2
        exit 2
    fi
    echo "no DATA_PATH: learning the embedded demo (coloured shapes) from scratch"
    "$PYTHON" -m demo.make demo_data
    DATA_PATH=demo_data SPM=demo_data/demo.spm OUTPUT_DIR=${OUTPUT_DIR:-output/demo_$TASK}
    recipe=(--model beit3_tiny_patch16_64 --input_size 64 --vocab_size 512 --crop_scale 1.0 1.0 --drop_path 0.0
        --layer_decay 1.0 --lr 1e-3 --weight_decay 0.05 --opt_betas 0.9 0.98 --clip_grad 1.0 --seed 42
        --save_ckpt_freq 100 --num_workers 1)
    case $TASK in
        vqav2) recipe+=(--batch_size 64 --epochs 4 --warmup_epochs 0.25 --num_max_bpe_tokens 12) ;;
        *) recipe+=(--batch_size 64 --epochs 2 --warmup_epochs 0.25 --num_max_bpe_tokens 32
            --captioning_mask_prob 0.7) ;;
    esac
    after="TASK=$TASK bash prediction.sh"
else
    MODEL=${MODEL:-beit3_base_patch16_480} SPM=${SPM:-beit3.spm} OUTPUT_DIR=${OUTPUT_DIR:-output}
    recipe=(--model "$MODEL" --input_size "${MODEL##*_}" --layer_decay 1.0 --randaug --epochs 10 --warmup_epochs 1
        --drop_path 0.1 --seed 42 --finetune "${FINETUNE:-beit3_base_patch16_224.pth}")
    case $TASK in
        vqav2) recipe+=(--batch_size 16 --lr 3e-5 --update_freq 1 --weight_decay 0.01 --save_ckpt_freq 5
            --task_head_lr_weight 20 --opt_betas 0.9 0.98) ;;
        *) recipe+=(--batch_size 32 --lr 4e-5 --weight_decay 0.05 --save_ckpt_freq 1 --num_max_bpe_tokens 32
            --captioning_mask_prob 0.7 --drop_worst_after 12000 --dist_eval) ;;
    esac
    after="TASK=$TASK DATA_PATH=$DATA_PATH SPM=$SPM FINETUNE=$OUTPUT_DIR/checkpoint-best bash prediction.sh"
fi
"$PYTHON" -m tasks.make_index "$TASK" "$DATA_PATH" "$SPM"

run_handing_on_signals "${launch[@]}" run_beit3_finetuning.py --task "$TASK" "${recipe[@]}" \
    --sentencepiece_model "$SPM" --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
    --log_dir "${LOG_DIR:-$OUTPUT_DIR/tensorboard}" --enable_deepspeed "$@"
echo "checkpoint: $OUTPUT_DIR/checkpoint-best"
echo "next:       $after"
