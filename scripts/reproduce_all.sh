#!/usr/bin/env bash
# Every table and figure of the paper, measured anew:  bash scripts/reproduce_all.sh [bundled|gpu|paper] [flags of Ray]
#   bundled   the pair in this checkout, no download; 12 minutes on two CPU cores with the built-in text (the default),
#             longer with the data sets that lie in DATA; on a GPU also scripts.bench.gpu
#   gpu       the records of results/h200: this checkout's models at the cost of 7B and 8B, all arms and autoregressive
#             decoding in turns on each prompt; four hours on one H200, `timeout 600` takes a step of ten minutes
#   paper     Vicuna-7B, LongChat-7B, Llama-3.1-8B and R1-Distill-Llama-8B with the hub's weights and data, on a GPU
# Run it again to go on where it stopped. From the environment: DATA, the folder of the data sets (data); OUT, where the
# records go (reproduced/<argument>); TABLES, what REPORT.md, REPORT.html and figures/ are made of (OUT); SHORT and
# LONG, prompts per length up to 4K and beyond; PYTHON. PYTHON=echo shows the commands.
# --ray, --ray_address, --cpus_per_worker and --max_workers spread the evaluations over GPUs or hosts: docs/scale.md.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in --*) what=bundled ;; *) what=${1:-bundled} && shift $(($# > 0)) ;; esac
spread=("$@")
python=${PYTHON:-.venv/bin/python}
data=${DATA:-data} out=${OUT:-reproduced/$what}
paper_tree="--nodes 50 --max_depth 10 --threshold 0.7 --min_probability 0"
cpu_tree="--nodes 12 --max_depth 8 --threshold 0.35 --min_probability 0.06"
drafting="standard fa_hta_streaming specextend"
dense="autoregressive_hf fa hta streaming cmr fa_hta"
sparse="autoregressive prompt_lookup magicdec self_retrieval triforce"

measure() { # entry point, folder of the records, data set, methods, lengths, prompts per length, further flags
    local script=$1 folder=$2 set=$3 methods=$4 lengths=$5 samples=$6
    shift 6
    "$python" "$script" --data_dir "$data/$set" --method $methods --lengths $lengths -n "$samples" \
        --output_file "$out/$folder/${set}_{method}.json" "$@" ${spread[@]+"${spread[@]}"}
}

bundled() {
    local short=${SHORT:-1} long=${LONG:-1} sets=() set head
    for set in govreport pg19 booksum; do
        if compgen -G "$data/$set/*.jsonl" > /dev/null; then sets+=("$set"); fi
    done
    if [ ${#sets[@]} = 0 ]; then
        "$python" scripts/prepare_data.py --builtin --root "$data"
        sets=(builtin)
    fi
    local first=${sets[0]}
    run() { measure "$@" -r 1 -max 128; }

    run eval_classic.py cpu_tree "$first" "$drafting $sparse" "1K 4K" "$short" $cpu_tree
    run eval_classic.py cpu_tree "$first" "$dense" 4K "$short" $cpu_tree
    run eval_classic.py cpu_tree "$first" "$drafting $sparse" 16K "$long" $cpu_tree
    for set in "${sets[@]:1}"; do
        run eval_classic.py cpu_tree "$set" "$drafting" "1K 4K" "$short" $cpu_tree
        run eval_classic.py cpu_tree "$set" "fa_hta_streaming specextend" 16K "$long" $cpu_tree
    done
    for set in "${sets[@]}"; do
        run eval_classic.py paper_tree_greedy "$set" "$drafting" "1K 4K" "$short" $paper_tree
        run eval_classic.py paper_tree_t0.8 "$set" "$drafting" "1K 4K" "$short" $paper_tree --temperature 0.8
    done
    for head in eagle1 eagle3; do
        run eval_eagle.py $head "$first" "standard specextend" "1K 4K" "$short" $paper_tree --head $head
    done
    measure eval_classic.py long_output "$first" "standard specextend" 1K 1 -r 1 -max 2048 --temperature 0.5 --tree paper

    "$python" -m scripts.analysis.needle --data_dir "$data/$first" --lengths 4K 8K -n 2 --output_file "$out/needle.json"
    "$python" -m scripts.analysis.needle --data_dir "$data/$first" --lengths 16K -n 1 --output_file "$out/needle.json"
    "$python" -m scripts.analysis.analyse --data_dir "$data/$first" -n 1 --lengths 1K 4K --output_file "$out/analysis.json"
    if [ ! -e "$out/prefill_memory.json" ]; then
        "$python" -m scripts.bench.prefill_memory --use_specextend --output_file "$out/prefill_memory.json"
    fi
    if [ ! -e "$out/gpu/bench.json" ] && nvidia-smi > /dev/null 2>&1; then # at the cost of a 7B model, 10 minutes
        "$python" -m scripts.bench.gpu --output "$out/gpu"
    fi
}

paper() {
    local lengths="1K 2K 4K 8K 16K" samples=${SHORT:-20} runs=2 set model
    estimate "$samples" "$runs"
    "$python" scripts/prepare_data.py govreport pg19 booksum aime24 --root "$data" -m vicuna_7b
    "$python" scripts/prepare_data.py pg19 --root "$data" -m llama31_8b --lengths 32K 64K 128K
    for set in govreport pg19 booksum; do
        measure eval_classic.py vicuna_7b "$set" "$drafting $sparse $dense" "$lengths" "$samples" -r $runs -m vicuna_7b --tree paper
        measure eval_classic.py longchat_7b "$set" "standard specextend" "$lengths" "$samples" -r $runs -m longchat_7b --tree paper
        for model in vicuna_7b longchat_7b llama31_8b; do
            measure eval_eagle.py ${model}_eagle "$set" "standard specextend" "$lengths" "$samples" -r $runs -m $model --tree paper
        done
    done
    measure eval_eagle.py llama31_8b_long pg19 "standard specextend" 32K "$samples" -r $runs -m llama31_8b --tree paper
    measure eval_eagle.py llama31_8b_long pg19 specextend "64K 128K" "$samples" -r $runs -m llama31_8b --tree paper
    measure eval_eagle.py r1_distill_llama_8b aime24 "standard specextend" all 30 -r 1 -m r1_distill_llama_8b --tree paper
    "$python" -m scripts.analysis.needle -m vicuna_7b --data_dir "$data/govreport" --output_file "$out/needle.json"
    "$python" -m scripts.analysis.analyse -m vicuna_7b --data_dir "$data/govreport" --lengths $lengths -n 5 -max 256 \
        --output_file "$out/analysis.json"
}

gpu() {
    local standard="standard:tree=paper" full="fa_hta:tree=paper" window="fa_hta_streaming:tree=paper"
    local ours="specextend:tree=paper specextend:tree=price" sooner="specextend:nodes=50,max_depth=10,threshold=0.15"
    local fixed="$sooner specextend:nodes=50,max_depth=12,threshold=0.05 prompt_lookup"
    local alone="fa:tree=paper hta:tree=paper streaming:tree=paper cmr:tree=paper"
    local rivals="autoregressive_hf magicdec self_retrieval triforce"
    local own="$data/govreport $data/pg19 $data/booksum" cut="$data/smollm2/govreport $data/smollm2/pg19 $data/smollm2/booksum"
    local head
    "$python" scripts/prepare_data.py govreport pg19 booksum aime24 --root "$data"
    "$python" scripts/prepare_data.py govreport pg19 booksum --same_documents -m smollm2 --root "$data/smollm2"
    "$python" scripts/prepare_data.py pg19 -m bundled_128k --lengths 32K 64K 128K --root "$data/long"
    arms() { # entry point, record, data sets, lengths, temperatures, arms, further flags
        local script=$1 record=$2 sets=$3 lengths=$4 temperatures=$5 arms=$6
        shift 6
        "$python" "$script" --data_dir $sets -l $lengths -t $temperatures --arms $arms -n "${SHORT:-10}" -r 1 --dtype float16 \
            --output_file "$out/$record.json" "$@"
    }
    for head in eagle3 eagle1; do
        arms eval_eagle.py smollm2/smollm2_$head "$cut" "512 1K 2K 4K 8K" "0.7 0" "$standard $full $window $ours" \
            -max 200 -m smollm2 --head $head --widen llama31_8b
        arms eval_eagle.py smollm2/smollm2_${head}_native "$cut" "512 8K" 0.7 \
            "$full $window $ours specextend:tree=paper,top_k=16 specextend:tree=paper,top_k=64" -max 200 -m smollm2 --head $head
    done
    arms eval_classic.py classic/classic_1K_16K "$own" "1K 2K 4K 8K 16K" "0.8 0" "$standard $full $window $ours $fixed" \
        -max 200 --widen vicuna_7b
    arms eval_classic.py classic/classic_512 "$data/govreport $data/pg19" 512 "0.8 0" "$standard $full $window $ours $fixed" \
        -max 200 --widen vicuna_7b
    arms eval_classic.py classic/ablation "$data/govreport" "1K 2K 4K 8K 16K" 0 "$alone" -max 200 --widen vicuna_7b
    arms eval_classic.py classic/rivals "$data/govreport" "1K 2K 4K 8K 16K" 0 "$standard $rivals" -max 200 --widen vicuna_7b
    arms eval_classic.py classic/sweep "$data/govreport" 8K 0 "$(working_caches)" -max 200 --widen vicuna_7b
    arms eval_classic.py classic/short_answers "$own" "1K 4K" 0.8 "$ours" -max 16 --widen vicuna_7b
    arms eval_classic.py classic/classic_t1.2 "$own" "1K 4K 16K" 1.2 "$ours $sooner" -max 200 --widen vicuna_7b
    arms eval_eagle.py eagle1/eagle1_1K_16K "$own" "1K 2K 4K 8K 16K" "0.8 0" "$standard $full $window $ours" \
        -max 200 --head eagle1 --widen vicuna_7b
    arms eval_eagle.py long/long_32K "$data/long/pg19" 32K "0.8 0" "$standard $full $window $ours" \
        -max 200 -m bundled_128k --head eagle3 --widen llama31_8b
    arms eval_eagle.py long/long_64K_128K "$data/long/pg19" "64K 128K" "0.8 0" "$full $window $ours" \
        -max 200 -m bundled_128k --head eagle3 --widen llama31_8b
    arms eval_eagle.py aime/aime24_eagle3 "$data/aime24" all 0.5 "$full $ours" -max 8000 --head eagle3 --widen llama31_8b
    if [ ! -e "$out/prefix.json" ]; then
        "$python" -m scripts.bench.prefix --widen vicuna_7b --dtype float16 --output "$out/prefix.json"
    fi
    if [ ! -e "$out/bench.json" ]; then
        "$python" -m scripts.bench.gpu --output "$out"
    fi
    "$python" -m scripts.report.evidence "$out" --output "$out/tables" --figures "$out/figures"
}

working_caches() { # arms of table 8: tokens in all, tokens of a chunk, rounds between refreshes
    local value
    for value in 2 4 8 16 32 64 128 256; do echo "specextend:tree=paper,top_k=$value"; done
    for value in 1 4 8 16 64 128; do echo "specextend:tree=paper,chunk_size=$value,top_k=$((1024 / value))"; done
    for value in 1 2 16 32 64 128; do echo "specextend:tree=paper,every_n_steps=$value"; done
}

estimate() { # prompts per length, runs
    # 256 tokens by the method and 256 autoregressively at some 25 ms each, and two prefills: about 12 s on an A100
    local generations=$((3 * (14 + 2 + 3 * 2) * 5 * $1 * $2 + 3 * $1 * $2))
    local hours=$((generations * 12 / 3600 + 30 * 2 * 32 * 25 / 3600))
    cat << TEXT
paper: weights of four targets, two small drafts and four EAGLE heads, about 65 GB from the hub, and 15 GB for the data
sets ($(df -h --output=avail . | tail -1 | tr -d ' ') free here); a GPU of 48 GB or more; $generations measurements and the long answers, about
$hours hours on one A100. SHORT=2 takes a tenth of it. Stop it at any time: the same command goes on.
TEXT
}

case $what in
    bundled | paper) "$what" ;;
    gpu) [ ${#spread[@]} = 0 ] || { echo "reproduce_all.sh: gpu takes no flags of Ray; one process measures all arms" >&2 && exit 2; }
        gpu && exit ;;
    *) echo "reproduce_all.sh: $what is unknown; say bundled, gpu or paper" >&2 && exit 2 ;;
esac
"$python" -m scripts.report.plots --results "${TABLES:-$out}"
"$python" -m scripts.report.tables --html --results "${TABLES:-$out}"
