#!/usr/bin/env bash
# The eight variants at a reduced scale, two seeds each, and QKV and Q–K=V with the padding masked as well:
# what is in results/reduced_scale. Two hours on two cores.
#
#   bash runs/replicate.sh             # two runs at a time, a thread each
#   JOBS=8 bash runs/replicate.sh
#
# Ctrl-C (or SIGTERM to the training scripts) saves a checkpoint of each run under way and ends; the same command
# continues from there. On another text than the recorded runs' (another version of Python) it says so before anything
# is trained; RESULTS=results/reduced_scale_own keeps its runs and tables apart.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-results/reduced_scale}
export OMP_NUM_THREADS=1
mkdir -p outputs_replicate


# -----------------------------------------------------------------------------
# Data: paragraphs of the standard library, in bytes, a document each. In rows of 256 tokens some are
# truncated and some padded, as documents are in the paper's rows of 2,048.

"$PYTHON" dataset_download.py --source stdlib --split_paragraphs --tokenizer bytes \
    --target_tokens 20_000_000 --validation_tokens 100_000 --output_dir replicate_data
"$PYTHON" runs/gather.py --to $RESULTS --text replicate_data


# -----------------------------------------------------------------------------
# One run

# train ALIAS SCRIPT PROTOCOL SEED
train() {
    local alias=$1 script=$2 protocol=$3 seed=$4
    local name=${alias}_${protocol}_seed${seed}
    local to=outputs_replicate/$name

    local score_padding
    case $protocol in
        padded) score_padding=true ;;
        text) score_padding=false ;;
    esac

    echo "training $name, log in $to.log"
    local status=0
    "$PYTHON" $script --model_config configs/model_config_replicate.yaml \
        --train_config configs/train_config_replicate.yaml --output_dir $to \
        score_padding=$score_padding seed=$seed >> $to.log 2>&1 || status=$?
    if [ $status -ne 0 ]; then
        echo "$name: $(tail -n 1 $to.log)" >&2
        [ $status -eq 2 ] || return 255  # stopped: xargs starts no other run
        return 1
    fi
}
export -f train


# -----------------------------------------------------------------------------
# All runs

runs() {
    for seed in 42 43; do
        echo kqv transformer_KQV_300_M.py padded $seed
        echo qk transformer_QK_300_M.py padded $seed
        echo kv transformer_KV_1_300_M.py padded $seed
        echo k transformer_K_300_M.py padded $seed
        echo gqa transformer_GQA_300_M.py padded $seed
        echo mqa transformer_MQA_300_M.py padded $seed
        echo qgqa transformer_QGQA_300_M.py padded $seed
        echo qmqa transformer_QMQA_300_M.py padded $seed
        echo kqv transformer_KQV_300_M.py text $seed
        echo kv transformer_KV_1_300_M.py text $seed
    done
}

runs | xargs -P "${JOBS:-2}" -L 1 bash -euc 'train "$@"' train

"$PYTHON" runs/gather.py outputs_replicate --to $RESULTS
"$PYTHON" results_table.py $RESULTS --output_dir $RESULTS
