#!/usr/bin/env bash
# The grid of results/conversion/README.md. It starts from the runs of runs/scaling.sh, so run that first.
#
#   bash runs/conversion.sh                       # all parts, two runs at a time, a thread each
#   PARTS="1 2 3" JOBS=8 bash runs/conversion.sh
#
# A run whose metrics in results/conversion hold its final evaluation is not repeated, nor is a conversion that
# stands in one_shot.jsonl. A source whose checkpoints are gone (git has only its metrics) is trained again when a
# conversion needs them. A run that fails is named, and the others go on; the exit status says so at the end. Ctrl-C
# (or SIGTERM to the process group) saves a checkpoint of the runs under way, and the same command continues from
# there.
set -euo pipefail
shopt -s inherit_errexit lastpipe
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-.venv/bin/python}
export SCALING=${SCALING:-results/scaling}
export RESULTS=${RESULTS:-results/conversion}
export STUDY="results/conversion/study.py --scaling $SCALING --results $RESULTS"
export OMP_NUM_THREADS=1
mkdir -p outputs_conversion $RESULTS


# -----------------------------------------------------------------------------
# Data: that of runs/scaling.sh, and for part 6 that of runs/replicate.sh

"$PYTHON" dataset_download.py --source site-packages --split_paragraphs --tokenizer bytes \
    --target_tokens 50_000_000 --validation_tokens 250_000 --output_dir scaling_data
"$PYTHON" dataset_download.py --source stdlib --split_paragraphs --tokenizer bytes \
    --target_tokens 20_000_000 --validation_tokens 100_000 --output_dir replicate_data

# The text of the runs it starts from
corpus=$(grep -som1 'sha256:[0-9a-f]*' scaling_data/train/metadata.json || true)
recorded=$(cat $SCALING/corpus.txt 2> /dev/null || echo $corpus)
if [ "$corpus" != "$recorded" ]; then
    echo "conversion.sh: scaling_data is $corpus, and the runs in $SCALING are of $recorded. Install the packages of" \
        "$SCALING/environment.txt, or study the conversion of a grid of your own with" \
        "SCALING=results/scaling_own RESULTS=results/conversion_own." >&2
    exit 2
fi


# -----------------------------------------------------------------------------
# What runs have in common. A shape is a width of runs/scaling.sh, a width and a number of heads (96h8), or replica.

# settings ALIAS SHAPE: model, data and recipe
settings() {
    local alias=$1 shape=$2
    local size=${shape%h*}
    if [ $shape = replica ]; then
        echo --model_config configs/model_config_replicate.yaml --train_config configs/train_config_replicate.yaml
    else
        echo --model_config configs/model_config_scaling_$size.yaml --train_config configs/train_config_scaling.yaml
    fi
    case $shape in *h*) echo n_head=${shape#*h} ;; esac
    case $alias in gqa | qgqa) echo n_kv_groups=2 ;; esac
}

# steps_of SHAPE TOKENS_PER_PARAMETER: of 1,024 tokens, for the 12 x layers x width^2 parameters of QKV's matrices
steps_of() {
    local width=${1%h*}
    if [ $1 = replica ]; then
        echo 1500
    else
        echo $((12 * width / 32 * width * width * $2 / 1024))
    fi
}

# name_of ALIAS SHAPE TOKENS_PER_PARAMETER RATE SEED: of a run from the start, as in runs/scaling.sh
name_of() {
    local protocol=packed
    [ $2 != replica ] || protocol=padded
    echo $1_d$2_n$3_lr$4e-3_T256_${protocol}_seed$5
}

# source_of ALIAS SHAPE TOKENS_PER_PARAMETER SEED: the folder of the run at the best rate
source_of() {
    local rate name
    rate=$("$PYTHON" $STUDY best_rate $1 $2 $3)
    name=$(name_of $1 $2 $3 $rate $4)
    if [ -e "$(checkpoint_of outputs_scaling/$name $2 $3 10)" ]; then
        echo outputs_scaling/$name
    else
        echo outputs_conversion/$name
    fi
}

# checkpoint_of SOURCE SHAPE TOKENS_PER_PARAMETER TENTHS: its file after so many tenths of its steps
checkpoint_of() {
    local steps
    steps=$(steps_of $2 $3)
    if [ $4 = 10 ]; then
        echo $1/checkpoint_step_$steps.pt
    else
        echo $1/checkpoint_step_$((steps / 10 * $4)).pt
    fi
}

data_of() {
    if [ $1 = replica ]; then echo replicate_data; else echo scaling_data; fi
}

# run NAME ALIAS SHAPE ARGUMENTS...: train, unless it is done, and copy what is small to results
run() {
    local name=$1 alias=$2 shape=$3
    local to=outputs_conversion/$name
    shift 3
    local script
    case $alias in
        kqv) script=transformer_KQV_300_M.py ;;
        kv) script=transformer_KV_1_300_M.py ;;
        gqa) script=transformer_GQA_300_M.py ;;
        mqa) script=transformer_MQA_300_M.py ;;
        qgqa) script=transformer_QGQA_300_M.py ;;
        qmqa) script=transformer_QMQA_300_M.py ;;
    esac

    echo "training $name"
    local status=0
    "$PYTHON" $script --output_dir $to $(settings $alias $shape) "$@" >> $to.log 2>&1 || status=$?
    if [ $status -ne 0 ]; then
        echo "$name: $(tail -n 1 $to.log)" >&2
        [ $status -lt 128 ] || return 255  # stopped by a signal: xargs starts no other run
        return 1
    fi

    # The metrics come last: with them the run counts as finished.
    finished $name && return
    mkdir -p $RESULTS/$name
    cp $to/*.yaml $RESULTS/$name/
    cp $to/metrics.jsonl $RESULTS/$name/
}

# finished NAME, by this grid or by that of runs/scaling.sh; begun NAME: there is something to resume
finished() {
    grep -qs '"kind": "final"' $RESULTS/$1/metrics.jsonl $SCALING/$1/metrics.jsonl
}

begun() {
    compgen -G "outputs_conversion/$1/checkpoint_step_*.pt" > /dev/null
}


# -----------------------------------------------------------------------------
# Three kinds of jobs

# train ALIAS SHAPE TOKENS_PER_PARAMETER RATE SEED: from the start, the rate in thousandths
train() {
    finished $(name_of "$@") || from_the_first_step "$@"
}

# restore ALIAS SHAPE TOKENS_PER_PARAMETER SEED: train the run at the best rate again if its checkpoints are gone.
# Several jobs may need it, so the first of them does it while the others wait. It is compared with runs on record, so
# all stops if it ends elsewhere than its own record, as on a processor that rounds in another way.
restore() {
    local rate name
    rate=$("$PYTHON" $STUDY best_rate $1 $2 $3)
    name=$(name_of $1 $2 $3 $rate $4)
    (
        flock 9
        if [ -e outputs_conversion/$name.differs ]; then
            echo "$name: trained again, it did not end where its record does: see outputs_conversion/$name.differs" >&2
            exit 255  # xargs starts no other job
        fi
        source=$(source_of $1 $2 $3 $4)
        if [ ! -e "$(checkpoint_of $source $2 $3 10)" ]; then
            from_the_first_step $1 $2 $3 $rate $4
            if ! "$PYTHON" $STUDY same_end outputs_conversion/$name; then
                mv outputs_conversion/$name outputs_conversion/$name.differs
                exit 255
            fi
        fi
    ) 9> outputs_conversion/$name.lock
}

from_the_first_step() {
    local alias=$1 shape=$2 per_parameter=$3 rate=$4 seed=$5
    local name steps lowest
    name=$(name_of $1 $2 $3 $4 $5)
    steps=$(steps_of $shape $per_parameter)
    lowest=$(awk "BEGIN { print $rate / 10 }")

    # All variants of a seed start from the same weights where they share them; not with other heads, nor the replica.
    local start=
    if [ "$shape" = "${shape//[a-z]/}" ] && ! begun $name; then
        local groups=
        case $alias in gqa | qgqa) groups="--n_kv_groups 2" ;; esac
        start="--init_from outputs_conversion/$name.initial.pt"
        "$PYTHON" runs/initial_weights.py $alias --model_config configs/model_config_scaling_$shape.yaml $groups \
            --seed $seed --output outputs_conversion/$name.initial.pt
    fi
    run $name $alias $shape $start seed=$seed target_tokens=$((steps * 1024)) warmup_steps=$((steps / 10)) \
        learning_rate=${rate}e-3 min_lr=${lowest}e-3 keep_checkpoints=null \
        log_interval=$((steps / 20)) eval_interval=$((steps / 2)) save_interval=$((steps / 10))
}

# train_on ALIAS SHAPE TOKENS_PER_PARAMETER SEED TENTHS METHOD PERCENT: the run at the best rate, converted by METHOD
# (none: not at all) after TENTHS of its steps, and trained on: to the same total, or after the end for PERCENT more.
# own_rate is joint_svd, trained on at the best rate of Q–K=V's schedule in the place of the source's.
train_on() {
    local alias=$1 shape=$2 per_parameter=$3 seed=$4 tenths=$5 method=$6 percent=$7
    local name=${alias}_d${shape}_n${per_parameter}_at$((10 * tenths))_${method}_${percent}_seed$seed
    finished $name && return
    begun $name || restore $alias $shape $per_parameter $seed
    local rate source from
    rate=$("$PYTHON" $STUDY best_rate $alias $shape $per_parameter)
    source=$(source_of $alias $shape $per_parameter $seed)
    from=$(checkpoint_of $source $shape $per_parameter $tenths)

    # convert
    local target=$alias
    if [ $method != none ]; then
        local how="--method $method"
        [ $method != unweighted ] || how="--method joint_svd --weighting none"
        [ $method != own_rate ] || how="--method joint_svd"
        case $alias in kqv) target=kv ;; gqa) target=qgqa ;; mqa) target=qmqa ;; esac
        if ! begun $name; then
            "$PYTHON" convert_checkpoint.py --checkpoint $from --to $target $how --data $(data_of $shape)/train \
                --output outputs_conversion/$name.initial.pt > outputs_conversion/$name.log
        fi
        from=outputs_conversion/$name.initial.pt
    fi

    # After the end a fifth of the peak rate; before it, the rate that the schedule has there.
    local steps step more peak lowest
    [ $method != own_rate ] || rate=$("$PYTHON" $STUDY best_rate $target $shape $per_parameter)
    steps=$(steps_of $shape $per_parameter)
    step=$((steps / 10 * tenths))
    if [ $tenths = 10 ]; then
        more=$((steps * percent / 100))
        peak=$(awk "BEGIN { print $rate / 5 }")
        lowest=$(awk "BEGIN { print $rate / 50 }")
    else
        more=$((steps - step))
        lowest=$(awk "BEGIN { print $rate / 10 }")
        peak=$(awk "BEGIN {
            done = ($step - int($steps / 10)) / ($steps - int($steps / 10))
            print $lowest + ($rate - $lowest) * (1 + cos(3.14159265 * done)) / 2
        }")
    fi

    # train on
    local start="--init_from $from"
    if begun $name; then start=; fi
    run $name $target $shape $start seed=$((seed + 100)) target_tokens=$((more * 1024)) keep_checkpoints=1 \
        warmup_steps=$((more / 50 + 10)) learning_rate=${peak}e-3 min_lr=${lowest}e-3 \
        log_interval=$((more / 10)) eval_interval=$((more / 4 + 1)) save_interval=$((more / 10 + 1))
}

# one_shot ALIAS SHAPE TOKENS_PER_PARAMETER SEED TENTHS KIND: conversion alone, of the run at the best rate
one_shot() {
    local source checkpoint
    source=$(source_of $1 $2 $3 $4)
    checkpoint=$(checkpoint_of $source $2 $3 $5)
    if [ ! -e $checkpoint ]; then
        local ways
        ways=$("$PYTHON" $STUDY one_shot $checkpoint --data $(data_of $2) --kind $6 --dry_run)
        [ -n "$ways" ] || return 0
        restore $1 $2 $3 $4
    fi
    "$PYTHON" $STUDY one_shot $checkpoint --data $(data_of $2) --kind $6
}

export -f settings steps_of name_of source_of checkpoint_of data_of run finished begun train restore \
    from_the_first_step train_on one_shot

# Takes a job a line, and does JOBS at a time.
failed=0
do_jobs() {
    local status=0
    xargs -P "${JOBS:-2}" -L 1 bash -euo pipefail -O inherit_errexit -c '"$@"' job || status=$?
    [ $status -le 123 ] || exit $status  # stopped by a signal
    [ $status -eq 0 ] || failed=1
}


# -----------------------------------------------------------------------------
# Several jobs, a line each

after_the_end() {  # ALIAS SHAPE TOKENS_PER_PARAMETER "PERCENTS" "METHODS"
    local seed percent method
    for seed in 42 43 44; do
        for percent in $4; do
            for method in $5; do
                echo train_on $1 $2 $3 $seed 10 $method $percent
            done
        done
    done
}

before_the_end() {  # ALIAS SHAPE TOKENS_PER_PARAMETER "TENTHS"
    local seed tenths method
    for seed in 42 43 44; do
        for tenths in $4; do
            for method in none joint_svd; do
                echo train_on $1 $2 $3 $seed $tenths $method 0
            done
        done
    done
}

on_all_seeds() {  # ALIAS SHAPE TOKENS_PER_PARAMETER TENTHS KIND
    local seed
    for seed in 42 43 44; do
        echo one_shot $1 $2 $3 $seed $4 $5
    done
}

# The rates on seed 42, and the best of them on 43 and 44.
from_the_start() {  # SHAPE TOKENS_PER_PARAMETER "RATES" ALIAS...
    local shape=$1 per_parameter=$2 rates=$3
    local alias rate seed
    shift 3
    for alias in "$@"; do
        for rate in $rates; do
            echo train $alias $shape $per_parameter $rate 42
        done
    done | do_jobs
    for alias in "$@"; do
        rate=$("$PYTHON" $STUDY best_rate $alias $shape $per_parameter)
        for seed in 43 44; do
            echo train $alias $shape $per_parameter $rate $seed
        done
    done | do_jobs
}

around() {  # RATE: half of it, it and twice it
    awk "BEGIN { print $1 / 2, $1, 2 * $1 }"
}


# -----------------------------------------------------------------------------
# The grid, part by part

part_1() {
    local tenths
    {
        for tenths in 1 2 3 4 5 6 7 8 9 10; do
            on_all_seeds kqv 64 80 $tenths default
        done
        on_all_seeds kqv 64 5 10 default
        on_all_seeds kqv 64 20 10 default
        on_all_seeds kqv 64 80 10 all
    } | do_jobs
}

part_2() {
    local seed
    {
        after_the_end kqv 64 80 "1 5 10" "none joint_svd"
        before_the_end kqv 64 80 5
        before_the_end kqv 64 80 1
        after_the_end kqv 64 80 10 "mean drop_v unweighted"
        for seed in 42 43 44; do
            echo train_on kqv 64 80 $seed 1 own_rate 0
        done
    } | do_jobs
}

part_3() {
    local rate rate_kv
    rate=$("$PYTHON" $STUDY best_rate kqv 64 80)
    rate_kv=$("$PYTHON" $STUDY best_rate kv 64 80)
    from_the_start 64 80 "$(around $rate)" gqa mqa
    from_the_start 64 80 "$(around $rate_kv) $(awk "BEGIN { print 4 * $rate_kv }")" qgqa qmqa
    {
        on_all_seeds gqa 64 80 10 default
        on_all_seeds mqa 64 80 10 default
        after_the_end gqa 64 80 10 "none joint_svd"
        after_the_end mqa 64 80 10 "none joint_svd"
        before_the_end gqa 64 80 5
        before_the_end mqa 64 80 5
    } | do_jobs
}

part_4() {
    local rate
    rate=$("$PYTHON" $STUDY best_rate kqv 96 5)
    from_the_start 96 60 "$(around $rate)" kqv kv
    {
        on_all_seeds kqv 96 60 10 default
        after_the_end kqv 96 60 "1 5 10" "none joint_svd"
    } | do_jobs
}

part_5() {
    local heads seed rate rate_kv rate_wide
    rate=$("$PYTHON" $STUDY best_rate kqv 96 20)
    rate_kv=$("$PYTHON" $STUDY best_rate kv 96 20)
    rate_wide=$("$PYTHON" $STUDY best_rate kqv 128 5)
    for seed in 42 43 44; do
        for heads in 8 4 3 2; do
            echo train kqv 96h$heads 20 $rate $seed
        done
        echo train kqv 128h2 5 $rate_wide $seed
    done | do_jobs
    for heads in 8 4 3 2; do
        on_all_seeds kqv 96h$heads 20 10 default
        echo train kv 96h$heads 20 $rate_kv 42
    done | do_jobs
    on_all_seeds kqv 128h2 5 10 default | do_jobs

    # Does the price stay small in wide heads after long training? One seed, see "Changes since".
    echo train kqv 96h2 60 $rate 42 | do_jobs
    echo one_shot kqv 96h2 60 42 10 default | do_jobs
}

part_6() {
    from_the_start replica 1 "0.5 1 2" kqv kv
    {
        on_all_seeds kqv replica 1 10 default
        after_the_end kqv replica 1 10 "none joint_svd"
        before_the_end kqv replica 1 5
    } | do_jobs
}

part_7() {
    before_the_end kqv 96 60 "5 1" | do_jobs
}

part_8() {
    {
        on_all_seeds kqv 96 20 10 all
        on_all_seeds kqv 96 5 10 default
        on_all_seeds kqv 128 5 10 default
    } | do_jobs
}

for part in ${PARTS:-1 2 3 4 5 6 7 8}; do
    echo "part $part"
    part_$part
    "$PYTHON" $STUDY tables
done
exit $failed
