#!/usr/bin/env bash
# The grid of results/scaling/README.md.
#
#   bash runs/scaling.sh               # two runs at a time, a thread each
#   JOBS=8 bash runs/scaling.sh
#
# A run that is recorded in runs.jsonl, or complete in outputs_scaling, is not repeated. Ctrl-C (or SIGTERM to
# the training scripts) saves a checkpoint of each run under way; the same command continues from there. On
# another text than the recorded runs' (packages of other versions) it says so before anything is trained;
# RESULTS=results/scaling_own begins a grid of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-.venv/bin/python}
export RESULTS=${RESULTS:-results/scaling}
export OMP_NUM_THREADS=1
mkdir -p outputs_scaling

# Data: paragraphs of the installed packages, in bytes, a document each

"$PYTHON" dataset_download.py --source site-packages --split_paragraphs --tokenizer bytes \
    --target_tokens 50_000_000 --validation_tokens 250_000 --output_dir scaling_data

# Packages of other versions are another text, and its runs would not belong to the same grid.
"$PYTHON" runs/gather.py --to $RESULTS --text scaling_data

# train ALIAS WIDTH TOKENS_PER_PARAMETER RATE SEED ROW PROTOCOL, the rate in thousandths
train() {
    local alias=$1 width=$2 per_parameter=$3 rate=$4 seed=$5 row=$6 protocol=$7
    local name=${alias}_d${width}_n${per_parameter}_lr${rate}e-3_T${row}_${protocol}_seed${seed}
    local to=outputs_scaling/$name
    grep -qs "{\"name\":\"$name\"," $RESULTS/runs.jsonl && return
    grep -qs '"kind": "final"' $to/metrics.jsonl && return

    # N tokens for each of the matrices' 12 x layers x width^2 parameters, in steps of 1,024
    local tokens=$((12 * width / 32 * width * width * per_parameter))
    local steps=$((tokens / 1024))

    local settings="target_tokens=$tokens learning_rate=${rate}e-3 min_lr=${rate}e-4 seed=$seed
        seq_length=$row micro_batch_size=$((1024 / row)) warmup_steps=$((steps / 10))
        log_interval=$((steps / 20)) eval_interval=$((steps / 2)) save_interval=$((steps / 10))"
    case $protocol in
        packed) settings+=" sequence=packed" ;;
        scored) settings+=" sequence=padded score_padding=true" ;;
        masked) settings+=" sequence=padded score_padding=false" ;;
    esac

    local script groups=
    case $alias in
        kqv) script=KQV ;;
        qk) script=QK ;;
        kv) script=KV_1 ;;
        k) script=K ;;
        gqa) script=GQA groups=2 ;;
        qmqa) script=QMQA ;;
    esac
    settings+=${groups:+ n_kv_groups=$groups}

    # All variants of a seed start from the same weights where they share them.
    local model=configs/model_config_scaling_$width.yaml
    if [ ! -e $to.initial.pt ]; then
        "$PYTHON" runs/initial_weights.py $alias --model_config $model ${groups:+--n_kv_groups $groups} \
            --seed $seed --output $to.initial.pt
    fi

    echo "training $name"
    local status=0
    "$PYTHON" transformer_${script}_300_M.py --model_config $model \
        --train_config configs/train_config_scaling.yaml --output_dir $to \
        --init_from $to.initial.pt $settings >> $to.log 2>&1 || status=$?
    if [ $status -ne 0 ]; then
        echo "$name: $(tail -n 1 $to.log)" >&2
        [ $status -eq 2 ] || return 255  # stopped: xargs starts no other run
        return 1
    fi
}
export -f train

# cells WIDTH TOKENS_PER_PARAMETER RATES SEEDS ROW PROTOCOL ALIAS...: a line for each run
cells() {
    local width=$1 per_parameter=$2 rates=$3 seeds=$4 row=$5 protocol=$6 seed rate alias
    shift 6
    for seed in $seeds; do
        for rate in $rates; do
            for alias in "$@"; do
                echo "$alias $width $per_parameter $rate $seed $row $protocol"
            done
        done
    done
}

# The parts of results/scaling/PLAN.md but 6 for d128 at 20, and 8, whose rates come from the others
grid() {
    # The gap over the tokens at the smallest size, and of other variants
    cells 64 80 "16 32 8" "42 43 44" 256 packed kqv
    cells 64 80 "4 16 8 2" "42 43 44" 256 packed kv
    cells 64 20 "8 4 16" "42 43 44" 256 packed kqv kv
    cells 64 20 "2" "42 43 44" 256 packed kqv
    cells 64 5 "2 1 4" "42 43 44" 256 packed kqv kv
    cells 64 20 "8 16 4 32" "42 43" 256 packed qk k
    cells 64 20 "8 16 4 32" "42" 256 packed gqa qmqa
    cells 64 5 "1 2 4" "42 43" 256 packed qk k
    cells 64 80 "8 4 16 2" "42" 256 packed qk k

    # The length of rows, and what is in them
    cells 64 20 "8 16" "42 43" 64 packed kqv kv
    for row in 64 256; do
        cells 64 20 "8 16" "42 43" $row scored kqv kv
        cells 64 20 "8 16" "42 43" $row masked kqv kv
    done

    # Other sizes; of conversion's part 4, 60 tokens per parameter
    cells 96 5 "8 4 16 2" "42 43" 256 packed kqv kv
    cells 96 5 "4" "44" 256 packed kqv kv
    cells 96 20 "4" "42 43 44" 256 packed kqv kv
    cells 96 20 "8 2" "42" 256 packed kqv kv
    cells 128 5 "2" "42 43 44" 256 packed kqv kv
    cells 128 5 "1 4" "42 43" 256 packed kqv kv
    cells 96 60 "4 8 2" "42" 256 packed kqv kv
    cells 96 60 "4" "43 44" 256 packed kqv kv
}

# A run that fails is named, and the others go on; the exit status says so at the end.
failed=0
grid | xargs -P "${JOBS:-2}" -L 1 bash -euc 'train "$@"' train || failed=$?
[ $failed -le 123 ] || exit $failed  # stopped by a signal

# QKV's end points as Q–K=V without training, and the tables

for model in outputs_scaling/kqv_*_T256_packed_seed*/final_model.pt; do
    folder=$(dirname $model)
    if [ -e $model ] && [ ! -e $folder/conversion.txt ]; then
        "$PYTHON" convert_checkpoint.py --checkpoint $model --to kv --data scaling_data/train \
            --val_data scaling_data/validation --output $folder/converted.pt > $folder/conversion.tmp
        mv $folder/conversion.tmp $folder/conversion.txt
    fi
done

"$PYTHON" runs/gather.py outputs_scaling --to $RESULTS
"$PYTHON" runs/scaling_tables.py $RESULTS
exit $failed
