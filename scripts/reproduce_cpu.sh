#!/usr/bin/env bash
# The records in results/cpu: the bundled pair on a CPU, GovReport and PG-19, standard against SpecExtend.
#   bash scripts/reproduce_cpu.sh [folder that holds govreport/ and pg19/, default data] [samples up to 4K] [beyond]
# Resumes where it stopped; larger numbers of samples extend what is there. A 16K prompt costs a CPU minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data} short=${2:-2} long=${3:-1}
python=${PYTHON:-.venv/bin/python}
paper="--nodes 50 --max_depth 10 --threshold 0.7"

measure() { # result file without data set and method, data set, new tokens, further flags
    local name=$1 set=$2 new=$3
    shift 3
    for method in specextend standard; do
        local switch=
        if [ "$method" = specextend ]; then switch=--use_specextend; fi
        "$python" eval_classic.py --data_dir "$data/$set" -n "$short" -r 1 -max "$new" --lengths 512 1K 2K 4K \
            --output_file "results/cpu/${name}/${set}_$method.json" $switch "$@"
        "$python" eval_classic.py --data_dir "$data/$set" -n "$long" -r 1 -max "$new" --lengths 8K 16K \
            --output_file "results/cpu/${name}/${set}_$method.json" $switch "$@"
    done
}

for set in govreport pg19; do measure paper_tree_greedy $set 128 $paper; done # accepted drafts per round
for set in govreport pg19; do measure cpu_tree $set 128; done                 # speed: the tree for a CPU
for set in govreport pg19; do measure paper_tree_t0.8 $set 128 $paper --temperature 0.8; done
"$python" scripts/measure_prefill_memory.py --use_specextend
"$python" scripts/make_tables.py --readme README.md
"$python" scripts/plot_results.py
