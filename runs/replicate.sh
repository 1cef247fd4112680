#!/usr/bin/env bash
# The eight variants at a reduced scale, two seeds each, and QKV and Q–K=V with the padding masked as well:
# what is in results/reduced_scale. Two hours on two cores.
#
#   bash runs/replicate.sh             # two runs at a time, a thread each
#   JOBS=8 bash runs/replicate.sh
#
# Ctrl-C (or SIGTERM to the training scripts) saves a checkpoint of each run under way; the same command
# continues from there. On another text than the recorded runs' (another version of Python) it says so before
# anything is trained; RESULTS=results/reduced_scale_own keeps its runs and tables apart.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-results/reduced_scale}
export OMP_NUM_THREADS=1
mkdir -p outputs_replicate

# Data: paragraphs of the standard library, in bytes, a document each. In rows of 256 tokens some are
# truncated and some padded, as documents are in the paper's rows of 2,048.

"$PYTHON" dataset_download.py --source stdlib --split_paragraphs --tokenizer bytes \
    --target_tokens 20_000_000 --validation_tokens 100_000 --output_dir replicate_data
"$PYTHON" runs/gather.py --to $RESULTS --text replicate_data

# train ALIAS SCRIPT SCORE_PADDING SEED
train() {
    local alias=$1 script=$2 score_padding=$3 seed=$4
    local name=${alias}_padded_seed$seed
    [ $score_padding = true ] || name=${alias}_text_seed$seed
    local to=outputs_replicate/$name

    echo "training $name, log in $to.log"
    local status=0
    "$PYTHON" transformer_${script}_300_M.py --model_config configs/model_config_replicate.yaml \
        --train_config configs/train_config_replicate.yaml --output_dir $to \
        score_padding=$score_padding seed=$seed >> $to.log 2>&1 || status=$?
    if [ $status -ne 0 ]; then
        echo "$name: $(tail -n 1 $to.log)" >&2
        [ $status -eq 2 ] || return 255  # stopped: xargs starts no other run
        return 1
    fi
}
export -f train

runs() {
    for seed in 42 43; do
        echo kqv KQV true $seed
        echo qk QK true $seed
        echo kv KV_1 true $seed
        echo k K true $seed
        echo gqa GQA true $seed
        echo mqa MQA true $seed
        echo qgqa QGQA true $seed
        echo qmqa QMQA true $seed
        echo kqv KQV false $seed
        echo kv KV_1 false $seed
    done
}

runs | xargs -P "${JOBS:-2}" -L 1 bash -euc 'train "$@"' train

"$PYTHON" runs/gather.py outputs_replicate --to $RESULTS
"$PYTHON" results_table.py $RESULTS --output_dir $RESULTS
