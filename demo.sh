#!/usr/bin/env bash
# Starts a page to ask a model about pictures, for this machine alone, and prints its address to open in a browser.
#
#   bash demo.sh                                  the model that bash.sh trained last
#   FINETUNE=output/checkpoint-best bash demo.sh  another one, for answers or for captions
#   SPM=beit3.spm ANSWERS=answer2label.txt FINETUNE=beit3_base_patch16_480_vqa.pth bash demo.sh
#                                                 a released one
#   bash demo.sh --port 8000                      another port; --help tells of the rest, docs/PAGE.md of the page
#
# FINETUNE      a fine-tuned checkpoint, released or your own (the newest checkpoint-best under output/)
# SPM           the tokenizer (the checkpoint's own; beit3.spm for released ones)
# ANSWERS       answer2label.txt, for a released checkpoint
# PYTHON        as in bash.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
in_project use_environment requirements-web.txt $RUNTIME_MODULES gradio
case $(basename "${FINETUNE:-}") in
    beit3_*.pth) SPM=${SPM:-beit3.spm} ;; # a released file holds no tokenizer
esac
GPUS=1
choose_launcher -m inference.page --examples "${root}demo_data" ${FINETUNE:+--checkpoint "$FINETUNE"} \
    ${SPM:+--tokenizer "$SPM"} ${ANSWERS:+--answers "$ANSWERS"}
exec "${launch[@]}" "$@"
