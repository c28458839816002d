#!/usr/bin/env bash
# The records in results/cpu: the bundled pair on a CPU, GovReport and PG-19, standard against SpecExtend.
#   bash scripts/reproduce_cpu.sh [folder that holds govreport/ and pg19/, default data] [samples up to 4K] [beyond]
# Resumes where it stopped; larger numbers of samples extend what is there. A 16K prompt costs a CPU minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data} short=${2:-2} long=${3:-1}
python=${PYTHON:-.venv/bin/python}
paper="--nodes 50 --max_depth 10 --threshold 0.7 --min_probability 0"

measure() { # entry point, result file without data set and method, data set, further flags
    local script=$1 name=$2 set=$3
    shift 3
    for method in specextend standard; do
        local switch=
        if [ "$method" = specextend ]; then switch=--use_specextend; fi
        "$python" "$script" --data_dir "$data/$set" -n "$short" -r 1 -max 128 --lengths 512 1K 2K 4K \
            --output_file "results/cpu/${name}/${set}_$method.json" $switch "$@"
        "$python" "$script" --data_dir "$data/$set" -n "$long" -r 1 -max 128 --lengths 8K 16K \
            --output_file "results/cpu/${name}/${set}_$method.json" $switch "$@"
    done
}

for set in govreport pg19; do
    measure eval_classic.py paper_tree_greedy $set $paper # accepted drafts per round
    measure eval_classic.py cpu_tree $set                 # speed: the tree for a CPU
    measure eval_classic.py paper_tree_t0.8 $set $paper --temperature 0.8
done
for set in govreport pg19; do
    for head in eagle1 eagle3; do
        measure eval_eagle.py $head $set $paper --head $head
    done
done
"$python" scripts/measure_prefill_memory.py --use_specextend
"$python" scripts/make_tables.py --readme README.md
"$python" scripts/check_goals.py
"$python" scripts/plot_results.py
